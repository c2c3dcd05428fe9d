"""Processes that are killed (SIGKILL) in the middle of a verb, at places that a seed draws.

``make test`` runs a slice. The whole campaign, 50 kills for each verb::

    PYTHONPATH=plugins/refitkit-peft/src python -m tests.campaign.kills --count 50 --seed 1

Without that path ``adapters`` is left out. Half of the kills come at a place in refitkit's code,
the other half at a time, in whatever runs then. After each one a file is the old one or the new
one, another process does the same verb, and no temporary file of the dead one is left.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import refitkit
from tests.campaign.interrupts import NEW, OLD, X, make_file, model, same, state
from tests.fakes import BACKEND, KeyedPlugin
from tests.forking import forked
from tests.interrupting import Points, in_refitkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Places(Points):
    """Kills the process at a place."""

    def _point(self, frame: Any) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Ground:
    """Files that verbs use.

    Attributes:
        source: A saved module with the old weights.
        target: What is written over: the same.
        old: A checkpoint with the old weights.
        new: One with the new ones.
        adapter: A folder with an adapter.
        plans: A folder for plans.
        temporary: The folder for temporary files.
    """

    def __init__(self, folder: Path) -> None:
        """Make them.

        Args:
            folder: An empty one.
        """
        self.folder = folder
        self.source, self.target = make_file(folder), folder / "target.refit"
        self.old, self.new = folder / "old.safetensors", folder / "new.safetensors"
        self.adapter, self.plans = folder / "adapter", folder / "plans"
        self.temporary = folder / "temporary"
        for path in (self.adapter, self.plans, self.temporary):
            path.mkdir()
        save_file(state(OLD), self.old)
        save_file(state(NEW), self.new)
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["0"]}
        (self.adapter / "adapter_config.json").write_text(json.dumps(config))
        lora = {"A": torch.ones(1, 4), "B": torch.ones(3, 1)}
        names = {f"base_model.model.0.lora_{half}.weight": part for half, part in lora.items()}
        save_file(names, self.adapter / "adapter_model.safetensors")

    def reset(self) -> None:
        """Have the old weights in what is written over, and no plan."""
        self.target.write_bytes(self.source.read_bytes())
        for plan in self.plans.iterdir():
            plan.unlink()

    def litter(self) -> list[str]:
        """What should not be there."""
        parts = [path.name for path in self.folder.rglob(".*")]
        return sorted(parts + [path.name for path in self.temporary.iterdir()])


@dataclass(frozen=True)
class Verb:
    """A verb in whose middle a process is killed.

    Attributes:
        prepare: What comes before it; the result is for ``run``.
        run: Calls it.
        weights: What the target may hold then, beside the old weights.
    """

    prepare: Callable[[Ground], Any]
    run: Callable[[Ground, Any], Any]
    weights: Callable[[], dict[str, torch.Tensor]] = lambda: state(OLD)


def _loaded(ground: Ground) -> refitkit.CompiledModule:
    return refitkit.load(ground.source)


def _refitted(ground: Ground) -> refitkit.CompiledModule:
    module = _loaded(ground)
    refitkit.refit(module, ground.new)
    return module


def _refit(ground: Ground, module: refitkit.CompiledModule) -> None:
    refitkit.refit(module, ground.new, inputs=(X,))
    _expect(module, state(NEW))


def _refit_all(ground: Ground, modules: list[refitkit.CompiledModule]) -> None:
    refitkit.refit_all([(module, ground.new) for module in modules], rollback=True)
    for module in modules:
        _expect(module, state(NEW))


def _plan(ground: Ground, _: None) -> None:
    pipeline = refitkit.Pipeline({"plan_cache": ground.plans}, plugins=[KeyedPlugin()])
    plan = pipeline.plan(torch.export.export(model(), (X,)), backend=BACKEND)
    for engine in plan.materialize(state(NEW)).values():
        assert same(engine, {name: state(NEW)[name] for name in engine})


def _add(ground: Ground, module: refitkit.CompiledModule) -> None:
    from refitkit_peft import Lora, plugin

    refitkit.Pipeline(plugins=[plugin]).refit(module, Lora(ground.old, {ground.adapter: 1.0}))
    _expect(module, _summed())
    module.save(ground.target)


def _summed() -> dict[str, torch.Tensor]:
    return {**state(OLD), "0.weight": state(OLD)["0.weight"] + 1}


def _expect(module: refitkit.CompiledModule, weights: dict[str, torch.Tensor]) -> None:
    assert same({slot.name: module.read(slot.name) for slot in module.slots}, weights)


VERBS = {
    "load": Verb(lambda ground: None, lambda ground, _: _loaded(ground)),
    "save": Verb(_refitted, lambda g, module: module.save(g.target), lambda: state(NEW)),
    "refit": Verb(_loaded, _refit),
    "refit_all": Verb(lambda ground: [_loaded(ground), _loaded(ground)], _refit_all),
    "plan": Verb(lambda ground: None, _plan),
    "adapters": Verb(_loaded, _add, _summed),
}
if importlib.util.find_spec("refitkit_peft") is None:
    del VERBS["adapters"]


class Campaign:
    """Kills in one verb.

    Attributes:
        outcomes: How many kills left which weights in the file, or came too late.
        problems: What was broken, and by which kill.
    """

    def __init__(self, name: str, ground: Ground) -> None:
        """Nothing is killed yet."""
        self._name, self._verb, self._ground = name, VERBS[name], ground
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, count: int, seed: int) -> None:
        """Kill it so many times."""
        self._ground.reset()
        places, seconds = forked(self._measured)
        drawn = random.Random(f"{seed} {self._name}")  # noqa: S311 - to be repeated
        for number in range(count):
            self._ground.reset()
            place = drawn.randrange(places) if number % 2 else None
            delay = drawn.uniform(0, seconds)
            outcome = self._kill(place, delay)
            self.outcomes[outcome] += 1
            where = f"after {delay:.4f} s" if place is None else f"at place {place} of {places}"
            self.problems += [f"{self._name} {where}: {one}" for one in self._broken()]

    def _measured(self) -> tuple[int, float]:
        """How many places a run passes, and how many seconds it takes without counting them."""
        prepared = self._verb.prepare(self._ground)
        self._verb.run(self._ground, prepared)
        start = time.perf_counter()
        self._verb.run(self._ground, prepared)
        seconds = time.perf_counter() - start
        prepared = self._verb.prepare(self._ground)
        with Points(None, in_refitkit) as points:
            self._verb.run(self._ground, prepared)
        return points.count, seconds

    def _kill(self, place: int | None, delay: float) -> str:
        ready, told = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                prepared = self._verb.prepare(self._ground)
                os.write(told, b".")
                with Places(place, in_refitkit) if place is not None else contextlib.nullcontext():
                    self._verb.run(self._ground, prepared)
                os._exit(0)
            os._exit(1)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        if place is None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            if os.WEXITSTATUS(status):
                self.problems.append(f"{self._name}: it failed before it was killed")
            return "too late"
        return "killed"

    def _broken(self) -> Iterator[str]:
        try:
            wrong = forked(self._found)
        except AssertionError as exc:
            wrong = str(exc)
        if wrong:
            yield wrong
        litter = self._ground.litter()
        if litter:
            yield f"left: {litter}"

    def _found(self) -> str:
        """Read the target, do the verb, and read it again."""
        module = refitkit.load(self._ground.target)
        held = {slot.name: module.read(slot.name) for slot in module.slots}
        if not (same(held, state(OLD)) or same(held, self._verb.weights())):
            return "the file is neither the old one nor the new one"
        self._verb.run(self._ground, self._verb.prepare(self._ground))
        module.save(self._ground.target)
        return ""


def main() -> int:
    """Run the whole campaign."""
    parser = argparse.ArgumentParser(description="Kill processes in every verb.")
    parser.add_argument("--count", type=int, default=50, help="kills for each verb")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("verbs", nargs="*", default=list(VERBS), help="of " + ", ".join(VERBS))
    given = parser.parse_args()
    failed = 0
    torch.set_num_threads(1)  # the machine has other work
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        tempfile.tempdir = str(ground.temporary)
        for name in given.verbs:
            campaign = Campaign(name, ground)
            campaign.run(given.count, given.seed)
            print(name, dict(campaign.outcomes), f"{len(campaign.problems)} problems", flush=True)  # noqa: T201
            for problem in campaign.problems:
                print("  ", problem)  # noqa: T201
            failed += len(campaign.problems)
        tempfile.tempdir = None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
