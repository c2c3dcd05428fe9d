"""Interrupts of every verb, at places that a seed draws.

``make test`` runs a slice. The whole campaign, 500 interrupts for each verb::

    python -m tests.campaign.interrupts --count 500 --seed 1

After each interrupt the module holds its old weights or its new ones, as its version says. Other
threads call and refit it, and a file that was being written is the old one or the new one.
"""

from __future__ import annotations

import argparse
import gc
import io
import random
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_safetensors

import refitkit
from refitkit.pipeline.gate import _unfinished
from tests.interrupting import Interrupt, Points, in_a_thread, in_refitkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

X = torch.ones(2, 4)
OLD, NEW = 1, 2
"""Seeds of the weights before a verb, and of those that it may bring."""


def model() -> torch.nn.Module:
    """A model of four slots."""
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()


def state(seed: int) -> dict[str, torch.Tensor]:
    """Weights for it."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(t.shape, generator=generator) for n, t in model().state_dict().items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two states have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_file(folder: Path) -> Path:
    """A saved module with the old weights."""
    compiled = refitkit.compile(torch.export.export(model(), (X,)), prove=False)
    refitkit.refit(compiled, state(OLD))
    compiled.save(folder / "module.refit")
    return folder / "module.refit"


class World:
    """Two modules with the old weights, and a file that has the new ones.

    Attributes:
        source: A file with the old weights.
        target: What ``save`` writes over.
        module: The module that verbs are called on.
        second: Another one, for ``refit_all``.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        """Load them.

        Args:
            source: What ``make_file`` gave.
            folder: For files.
        """
        self.source, self.target = source, folder / "target.refit"
        self.pipeline = refitkit.Pipeline({"keep_versions": 2})
        self.module, self.second = refitkit.load(source), refitkit.load(source)
        refitkit.refit(self.second, state(NEW))
        self.second.save(self.target)
        self.written = self.target.read_bytes()
        self.reset()

    def reset(self) -> None:
        """Have old weights everywhere, after new ones."""
        self.target.write_bytes(self.written)
        for module in (self.module, self.second):
            self.pipeline.refit(module, state(NEW))
            self.pipeline.refit(module, state(OLD))

    def problems(self, before: tuple[int, int], *, writes: bool) -> Iterator[str]:
        """Say what an interrupt has broken.

        Args:
            before: Versions of both modules before the verb.
            writes: Whether the verb may have brought new weights.
        """
        modules = (self.module, self.second)
        moved = {module.version - old for module, old in zip(modules, before, strict=True)}
        if moved - ({0, 1} if writes else {0}):
            yield f"versions moved by {moved}"
        for module, old in zip(modules, before, strict=True):
            yield from self._of_module(module, NEW if module.version > old else OLD)
        if not (self.target.read_bytes() == self.written or self._is_saved()):
            yield "the file is neither the old one nor the new one"

    def _of_module(self, module: refitkit.CompiledModule, seed: int) -> Iterator[str]:
        if module.gate.lost:
            yield "lost"
            return
        if _unfinished(module.gate._call_turns):
            yield "a call is counted for ever"
        found = in_a_thread(lambda: {slot.name: module.read(slot.name) for slot in module.slots})
        if found is None or not same(found, state(seed)):
            yield "reads wait for ever" if found is None else "wrong weights"
        if in_a_thread(lambda: self.pipeline.refit(module, state(NEW))) is None:
            yield "refits in another thread fail, or wait for ever"
            return
        self.pipeline.refit(module, state(OLD), inputs=(X,))

    def _is_saved(self) -> bool:
        with zipfile.ZipFile(io.BytesIO(self.target.read_bytes())) as archive:
            weights = archive.read("refitkit/weights.safetensors")
            return archive.testzip() is None and same(load_safetensors(weights), state(OLD))


@dataclass(frozen=True)
class Verb:
    """A verb to interrupt.

    Attributes:
        run: Calls it.
        writes: Whether it brings new weights.
    """

    run: Callable[[World], Any]
    writes: bool = False


def _pairs(world: World) -> list[Any]:
    return [(world.module, state(NEW)), (world.second, state(NEW))]


VERBS = {
    "call": Verb(lambda world: world.module(X)),
    "read": Verb(lambda world: world.module.read("0.weight")),
    "save": Verb(lambda world: world.module.save(world.target)),
    "load": Verb(lambda world: refitkit.load(world.source)),
    "refit": Verb(lambda w: w.pipeline.refit(w.module, state(NEW), inputs=(X,)), writes=True),
    "delta": Verb(lambda w: w.pipeline.refit(w.module, state(NEW), delta=True), writes=True),
    "refit_all": Verb(lambda world: world.pipeline.refit_all(_pairs(world)), writes=True),
    "restore": Verb(
        lambda w: w.pipeline.restore(w.module, w.module.version - 1, verify="weights"), writes=True
    ),
    "copy": Verb(lambda world: world.pipeline.copy(world.module)),
    "verify": Verb(lambda w: w.pipeline.verify(w.module, state(OLD), inputs=(X,))),
    "diff": Verb(lambda world: world.pipeline.diff(world.module, world.second)),
    "free_spare": Verb(lambda world: world.module.free_spare()),
    "forget": Verb(lambda world: world.module.forget()),
}


class Campaign:
    """Interrupts of one verb.

    Attributes:
        outcomes: How many verbs ended how.
        problems: What was broken, and where the interrupt came.
    """

    def __init__(self, name: str, source: Path, folder: Path, *, lines: bool = False) -> None:
        """Nothing is interrupted yet; ``lines`` as for ``Points``."""
        self._name, self._verb, self._lines = name, VERBS[name], lines
        self._make = lambda: World(source, folder)
        self._world = self._make()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, count: int, seed: int) -> None:
        """Interrupt it at so many places."""
        for _ in range(2):  # the first time fills caches
            with Points(None, in_refitkit, lines=self._lines) as points:
                self._verb.run(self._world)
            self._world.reset()
        drawn = random.Random(f"{seed} {self._name}")  # noqa: S311 - to be repeated
        places = range(points.count)
        many = drawn.sample(places, min(count, len(places)))
        while len(many) < count:  # a short verb: each of its places, and then again
            many += drawn.sample(places, min(count - len(many), len(places)))
        for place in many:
            self._interrupt(place)

    def _interrupt(self, place: int) -> None:
        world = self._world
        before = (world.module.version, world.second.version)
        with Points(place, in_refitkit, lines=self._lines) as points:
            outcome = _outcome(lambda: self._verb.run(world))
        self.outcomes[outcome] += 1
        if self._lines:
            gc.collect()  # files whose with statement was not left
        problems = list(world.problems(before, writes=self._verb.writes))
        if points.where and outcome not in {"Interrupt", "done"}:
            problems.append(f"it ended with {outcome}")
        if problems:
            self.problems.append(f"{self._name} {place} at {points.where}: {'; '.join(problems)}")
            self._world = self._make()
        else:
            world.reset()


def _outcome(run: Callable[[], Any]) -> str:
    try:
        run()
    except Interrupt:
        return "Interrupt"
    except Exception as exc:  # noqa: BLE001 - reported
        # At the line that ends a with statement, an interrupt can make an outer one fail.
        if isinstance(exc.__context__, Interrupt) and not isinstance(exc, refitkit.RefitError):
            return "Interrupt"
        return f"{type(exc).__name__}: {exc}"
    return "done"


def main() -> int:
    """Run the whole campaign."""
    parser = argparse.ArgumentParser(description="Interrupt every verb at places of a seed.")
    parser.add_argument("--count", type=int, default=500, help="interrupts for each verb")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lines", action="store_true", help="at the starts of lines, too")
    parser.add_argument("verbs", nargs="*", default=list(VERBS), help="of " + ", ".join(VERBS))
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        source = make_file(Path(folder))
        for name in given.verbs:
            campaign = Campaign(name, source, Path(folder), lines=given.lines)
            campaign.run(given.count, given.seed)
            print(name, dict(campaign.outcomes), f"{len(campaign.problems)} problems", flush=True)  # noqa: T201
            for problem in campaign.problems:
                print("  ", problem)  # noqa: T201
            failed += len(campaign.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
