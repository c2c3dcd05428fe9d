"""Plans kept in a folder: found again, never trusted, never in the way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import refitkit
from refitkit.config import PLAN_CACHE_VARIABLE
from refitkit.model import Leaf, PlanData, SourceRef, Step, fingerprint_of_slots
from refitkit.pipeline import Pipeline, planning
from refitkit.pipeline.planning import code_digest
from refitkit.recipe import RefitPlan
from tests.fakes import BACKEND, KeyedBackend, KeyedPlugin, guard_of

ROOT = Path(__file__).parents[3]
CHILD = ROOT / "tests/integration/children/plan_and_tell.py"


class Net(torch.nn.Module):
    """Weights, a buffer that no state_dict holds, and a constant."""

    def __init__(self, mask: float = 1.0, constant: float = 2.0, width: int = 4) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, width)
        self.second = torch.nn.Linear(3, width)
        self.register_buffer("mask", torch.full((width,), mask), persistent=False)
        self.constant = torch.full((width,), constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) + self.second(x)) * self.mask + self.constant


def program_of(net: torch.nn.Module | None = None, batch: int = 2, **how: Any) -> Any:
    torch.manual_seed(0)
    return torch.export.export((net or Net()).eval(), (torch.zeros(batch, 3),), **how)


class Scene:
    """A pipeline with a folder for plans, and what it told."""

    def __init__(self, folder: Path, *plugins: object, **settings: Any) -> None:
        self.folder, self.told = folder, list[str]()
        self.plugin = KeyedPlugin()
        listener = self

        class Listener:
            name = "listener"

            @refitkit.hookimpl
            def refitkit_event(self, event: Any) -> None:
                if isinstance(event, Step):
                    listener.told.append(event.text)

        settings = {"plan_cache": folder, **settings}
        self.pipeline = Pipeline(settings, plugins=[self.plugin, Listener(), *plugins])

    @property
    def backend(self) -> KeyedBackend:
        return self.plugin.keyed

    def plan(self, program: Any = None, **how: Any) -> RefitPlan:
        program = program or program_of()
        return self.pipeline.plan(program, **{"backend": BACKEND, **how})

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "plans")


def test_the_second_time_nothing_is_planned(scene: Scene) -> None:
    first = scene.plan()
    (file,) = scene.files()
    assert file.name.endswith(".refitplan")
    second = scene.plan()
    assert scene.backend.drafts == 1
    assert second.data == first.data
    assert [second.pinned(n).tolist() for n in second.data.pinned] == [[1.0] * 4, [2.0] * 4]
    assert scene.files() == [file]
    assert any("is read from the cache" in text and file.name in text for text in scene.told)


def test_another_pipeline_finds_it_and_can_open_any_weights(scene: Scene) -> None:
    scene.plan()
    other = Scene(scene.folder)
    plan = other.plan()
    assert other.backend.drafts == 0
    net = Net()
    values = plan.materialize(net)["first"]
    assert torch.equal(values["first.weight"], net.first.weight)


def test_new_weights_find_the_same_plan(scene: Scene) -> None:
    scene.plan()
    program = program_of()
    with torch.no_grad():
        program.state_dict["first.weight"].fill_(7.0)
    scene.plan(program)
    assert scene.backend.drafts == 1


def test_without_a_folder_nothing_is_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(PLAN_CACHE_VARIABLE, raising=False)
    without = Scene(scene.folder, plan_cache=None)
    without.plan()
    without.plan()
    assert without.backend.drafts == 2
    assert not scene.folder.exists()
    monkeypatch.setenv(PLAN_CACHE_VARIABLE, str(scene.folder))
    without.plan()
    assert len(scene.files()) == 1
    without.plan()
    assert without.backend.drafts == 3


def test_plans_that_depend_on_unknown_things_are_not_kept(scene: Scene) -> None:
    scene.backend.key = None
    scene.plan()
    scene.plan()
    assert scene.backend.drafts == 2
    assert not scene.folder.exists()


def other_versions(backend: KeyedBackend) -> None:
    assert backend.key
    backend.key = dataclasses.replace(backend.key, versions={"fake": "2"})


def other_settings(backend: KeyedBackend) -> None:
    assert backend.key
    backend.key = dataclasses.replace(backend.key, text="other")


def other_platform(backend: KeyedBackend) -> None:
    assert backend.key
    backend.key = dataclasses.replace(backend.key, platform="there")


@pytest.mark.parametrize("change", [other_versions, other_settings, other_platform])
def test_what_the_backend_tells_counts(scene: Scene, change: Any) -> None:
    scene.plan()
    change(scene.backend)
    scene.plan()
    assert scene.backend.drafts == 2
    assert len(scene.files()) == 2


BATCH = torch.export.Dim("batch", min=1, max=8)
WIDE = torch.export.Dim("batch", min=1, max=16)


@pytest.mark.parametrize(
    "program",
    [
        program_of(Net(mask=3.0)),
        program_of(Net(constant=3.0)),
        program_of(Net(constant=-2.0)),
        program_of(Net(width=5)),
        program_of(batch=3),
        program_of(dynamic_shapes=({0: BATCH},)),
    ],
    ids=["buffer", "constant", "negated", "width", "batch", "dynamic"],
)
def test_another_program_is_planned(scene: Scene, program: Any) -> None:
    """Values that plans keep count, too."""
    scene.plan()
    kept = scene.plan(program)
    assert scene.backend.drafts == 2
    assert kept.data.leaves == scene.plan(program).data.leaves
    assert scene.backend.drafts == 2
    assert len(scene.files()) == 2


def test_ranges_of_dynamic_shapes_count(scene: Scene) -> None:
    scene.plan(program_of(dynamic_shapes=({0: BATCH},)))
    scene.plan(program_of(dynamic_shapes=({0: WIDE},)))
    assert scene.backend.drafts == 2


def test_ties_count(scene: Scene) -> None:
    net = Net()
    net.second.weight = net.first.weight
    scene.plan()
    assert scene.plan(program_of(net)).data.ties == (("first.weight", "second.weight"),)
    assert len(scene.files()) == 2


def test_options_and_plugins_count(scene: Scene) -> None:
    class Another:
        name = "another"

    scene.plan()
    scene.plan(options={"mute": True})
    assert scene.backend.drafts == 2
    more = Scene(scene.folder, Another())
    more.plan()
    assert more.backend.drafts == 1
    assert len(scene.files()) == 3


def test_a_target_counts_and_its_slots_are_checked(scene: Scene) -> None:
    program = program_of()
    compiled = scene.pipeline.compile(program, BACKEND, prove=False)
    assert scene.backend.drafts == 1
    again = scene.pipeline.compile(program, BACKEND, prove=False)
    assert scene.backend.drafts == 1
    assert again.plan is not None
    assert compiled.plan is not None
    assert again.plan.data == compiled.plan.data
    scene.plan(program)
    assert scene.backend.drafts == 2  # offline: of other engines, perhaps


def test_a_plan_from_the_cache_refits(scene: Scene) -> None:
    scene.pipeline.compile(program_of(), BACKEND, prove=False)
    compiled = scene.pipeline.compile(program_of(), BACKEND)
    net = Net()
    scene.pipeline.refit(compiled, net)
    assert torch.equal(compiled.read("first.weight"), net.first.weight)
    assert scene.backend.drafts == 1


def test_refitkits_own_code_counts(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = set()
    for name, text in [("a.py", "1"), ("a.py", "2"), ("b/c.py", "2"), ("d.txt", "3")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        code_digest.cache_clear()
        digests.add(code_digest(tmp_path))
    assert len(digests) == 3  # what is no code does not count
    scene.plan()
    monkeypatch.setattr(planning, "_PACKAGE", tmp_path)
    scene.plan()
    assert scene.backend.drafts == 2


# -- never trusted ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_ignored_told_and_replaced(scene: Scene, content: bytes | None) -> None:
    first = scene.plan()
    (file,) = scene.files()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert scene.plan().data == first.data
    assert scene.backend.drafts == 2
    assert any("is not used, and made again" in text for text in scene.told)
    assert file.read_bytes() == whole
    scene.plan()
    assert scene.backend.drafts == 2


def elsewhere(data: PlanData) -> tuple[Leaf, ...]:
    return tuple(leaf.model_copy(update={"device": "cuda:0"}) for leaf in data.leaves)


def forged(scene: Scene, **changes: Any) -> RefitPlan:
    """A plan that says something else, under the name of the right one."""
    plan = scene.plan()
    (file,) = scene.files()
    data = plan.data
    changes = {k: v(data) if callable(v) else v for k, v in changes.items()}
    made = {k: v for k, v in changes.items() if k in type(data.fingerprint).model_fields}
    rest = {k: v for k, v in changes.items() if k not in made}
    data = data.model_copy(update={**rest, "fingerprint": data.fingerprint.model_copy(update=made)})
    pinned = {name: plan.pinned(name) for name in data.pinned}
    RefitPlan(data, pinned).save(file)
    assert RefitPlan.load(file).data == data
    return plan


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"graph": "1" * 64}, "graph"),
        ({"versions": {"fake": "0"}}, "versions"),
        ({"platform": "there"}, "platform"),
        ({"backend": "other"}, "backend"),
        ({"ties": (("mask", "constant"),)}, "ties"),
        ({"leaves": elsewhere}, "leaves"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_the_right_name_and_another_plan_is_not_used(
    scene: Scene, changes: Any, named: str
) -> None:
    first = forged(scene, **changes)
    assert scene.plan().data == first.data
    assert scene.backend.drafts == 2
    (told,) = (text for text in scene.told if "is not used" in text)
    assert f"{named}: differs" in told


def test_settings_count_where_the_backend_knows_them(scene: Scene) -> None:
    assert scene.backend.key
    scene.backend.key = dataclasses.replace(scene.backend.key, settings={"mode": "fake"})
    first = forged(scene, settings={"mode": "other"})
    assert scene.plan().data == first.data
    assert any("settings: differs" in text for text in scene.told)


def test_a_plan_with_another_constant_is_not_used(scene: Scene) -> None:
    plan = scene.plan()
    (file,) = scene.files()
    other = Scene(scene.folder / "other").plan(program_of(Net(mask=3.0)))
    pinned = {name: other.pinned(name) for name in other.data.pinned}
    RefitPlan(plan.data.model_copy(update={"pinned": other.data.pinned}), pinned).save(file)
    assert scene.plan().pinned("mask").tolist() == [1.0] * 4
    assert any("constant mask: differs" in text for text in scene.told)


def test_a_plan_with_other_slots_is_not_used_for_a_target(scene: Scene) -> None:
    compiled = scene.pipeline.compile(program_of(), BACKEND, prove=False)
    assert compiled.plan is not None
    (file,) = scene.files()
    offline = Scene(scene.folder / "offline").plan()
    rows = offline.ledger[:-1]
    slots = fingerprint_of_slots(row.slot for row in rows)
    made = offline.data.fingerprint.model_copy(update={"slots": slots})
    data = offline.data.model_copy(update={"ledger": rows, "fingerprint": made})
    RefitPlan(data, {name: offline.pinned(name) for name in data.pinned}).save(file)
    again = scene.pipeline.compile(program_of(), BACKEND, prove=False)
    assert again.plan is not None
    assert again.plan.data == compiled.plan.data
    assert any("in the engine, not in the plan" in text for text in scene.told)


def test_a_plan_whose_guards_do_not_hold_for_the_program_is_made_again(scene: Scene) -> None:
    """It would leave every slot to a strategy that is slow, or to none."""

    def program_with(value: float) -> Any:
        program = program_of()
        with torch.no_grad():
            program.state_dict["first.bias"].fill_(value)
        now = guard_of(SourceRef(fqn="first.bias"), torch.full((4,), value))
        scene.backend.guards = (now,)
        return program

    scene.plan(program_with(1.0))
    scene.plan(program_with(1.0))
    assert scene.backend.drafts == 1
    plan = scene.plan(program_with(2.0))
    assert scene.backend.drafts == 2
    assert plan.data.guards[0].shown == "[2.0, 2.0, 2.0, 2.0]"
    scene.plan(program_with(2.0))
    assert scene.backend.drafts == 2


# -- never in the way -------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    scene = Scene(tmp_path / "file/plans")
    assert scene.plan().ledger
    assert any("cannot be written to the cache" in text for text in scene.told)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    scene = Scene(tmp_path)
    assert scene.plan().ledger
    assert any("cannot be written to the cache" in text for text in scene.told)


def test_what_is_no_file_is_told(scene: Scene) -> None:
    scene.plan()
    (file,) = scene.files()
    file.unlink()
    file.mkdir()
    assert scene.plan().ledger
    assert any("cannot be read" in text for text in scene.told)
    assert any("cannot be written to the cache" in text for text in scene.told)


def child(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(CHILD), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_share_plans(tmp_path: Path) -> None:
    """At once, all of them write; afterwards nobody plans."""
    folder = tmp_path / "plans"
    at_once = [child(folder) for _ in range(2)]
    told = [json.loads(one.communicate()[0]) for one in at_once]
    assert [one["slots"] for one in told] == [["weight", "bias"]] * 2
    assert any(one["drafts"] for one in told)
    assert len(list(folder.iterdir())) == 1
    assert json.loads(child(folder).communicate()[0]) == {**told[0], "drafts": 0}
