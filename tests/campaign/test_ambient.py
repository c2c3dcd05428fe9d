"""A slice of the campaign of modes; ``ambient.py`` says how to run all of it."""

from __future__ import annotations

import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest

from tests.campaign.ambient import IN_EVERYTHING, MODES, VERBS, Campaign, make_file

ROOT = Path(__file__).parents[2]
KEEPING = ("load", "refit", "save and load", "refit with a merge", "copy", "verify", "read")
"""Verbs that make tensors which later refits use."""
OTHERS = [mode for mode in MODES if mode not in {"none", *IN_EVERYTHING}]
PAIRS = [
    *(("everything", verb) for verb in VERBS if verb not in {"compile", "nothing"}),
    *zip(OTHERS, cycle(KEEPING), strict=False),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("source")
    return Campaign("aotinductor", make_file("aotinductor", folder, "everything"), folder)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore:.*set_default_tensor_type", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("mode", "verb"), PAIRS)
def test_a_slice(mode: str, verb: str, campaign: Campaign) -> None:
    campaign.problems.clear()
    campaign.run(mode, verb)
    assert not campaign.problems


FIRST = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
    import refitkit
    module = refitkit.load(sys.argv[1])
from tests.campaign.ambient import X, state
for seed in (1, 2, 3):
    refitkit.refit(module, state("aotinductor", seed), inputs=(X,))
"""


def test_a_process_that_first_uses_it_in_a_mode(campaign: Campaign) -> None:
    command = [sys.executable, "-c", FIRST, str(campaign.source)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
