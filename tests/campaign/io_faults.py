"""Calls of the operating system, and allocations, that fail in every verb, at places of a seed.

``make test`` runs a slice. The whole campaign::

    python -m tests.campaign.io_faults --count 120 --allocations 40 --seed 1

A verb whose call failed is done all the same, or raises a ``ResourceError`` that says why. Then
modules hold the weights that their versions say, files are old or new, nothing lies around, and the
verb works the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import faulthandler
import gc
import importlib
import importlib.util
import io
import json
import os
import random
import re
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
import torch.distributed.checkpoint as distributed
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

import refitkit
from refitkit.cli.main import main as run_command
from refitkit.model import Step
from tests.campaign.interrupts import NEW, OLD, X, make_file, model, same, state
from tests.fakes import BACKEND, KeyedPlugin
from tests.faulting import CODES, Faults, Limit
from tests.forking import KilledError, forked
from tests.interrupting import Points, in_refitkit

try:
    import _testcapi
except ImportError:  # not every CPython has its tests
    _testcapi = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

_BLAMES = re.compile(
    r"damag|mismatch|[Tt]he plugin|corrupt|too short|cut off|not whole|bug in|not a file of"
)
_OURS = re.compile(r"\.?refitkit-.*")
LIMITS = [Limit("descriptors", count) for count in range(8)]
LIMITS += [Limit("bytes", size) for size in (0, 100, 1_000, 10_000, 100_000, 1_000_000)]
_UNGUARDED = re.compile(r"contextlib\.py|(?!.*_guarded).*main\.py:\d+ in main$")
# what CPython 3.11 itself makes of a lack of memory in os.stat, and in C code of others
_QUIRKS = re.compile("os.PathLike.*, not PosixPath|error return without exception set")
_EXPONENT = 4.5  # more allocations than any verb makes
RANK = 2
HAS_ADAPTERS = importlib.util.find_spec("refitkit_peft") is not None


class Exhausted(Points):
    """Raises ``MemoryError`` at a call, in place of it."""

    def _step(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "opcode" and frame.f_lasti in _calls_of(frame.f_code):
            self.count += 1
            if self.count - 1 == self.at:
                self.where = self._stack(frame)
                raise MemoryError
        return self._step


@cache
def _calls_of(code: CodeType) -> frozenset[int]:
    """Where a function calls something, but for ``__exit__`` at the end of a with statement."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "PRECALL"]
    loaded = [(step.opname, step.argval) for step in steps]
    leaving = [("LOAD_CONST", None)] * 3
    return frozenset(
        step.offset
        for number, step in enumerate(steps)
        if step.opname == "CALL" and loaded[max(0, number - 3) : number] != leaving
    )


class Starved:
    """An allocation of CPython's that fails: to be used in a process of its own.

    Attributes:
        at: Its number.
    """

    where = "the interpreter"

    def __init__(self, at: int) -> None:
        self.at = at

    def __enter__(self) -> Self:
        _testcapi.set_nomemory(self.at, self.at + 1)
        return self

    def __exit__(self, *_: object) -> None:
        _testcapi.remove_mem_hooks()


Fault: TypeAlias = Faults | Limit | Exhausted | Starved


class Listener:
    """A plugin that keeps what it is told of progress."""

    name = "listener"

    def __init__(self) -> None:
        self.told: list[str] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        """Keep it."""
        if isinstance(event, Step):
            self.told.append(event.text)


def _write_weights(folder: Path) -> None:
    """The same new weights in files of all kinds."""
    new = state(NEW)
    save_file(new, folder / "w.safetensors")
    torch.save(new, folder / "w.pt")
    torch.save(new, folder / "old.pt", _use_new_zipfile_serialization=False)
    sharded = folder / "sharded"
    sharded.mkdir()
    shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(new)}
    for file in set(shards.values()):
        save_file({n: t for n, t in new.items() if shards[n] == file}, sharded / file)
    index = {"metadata": {}, "weight_map": shards}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the lack of processes
        distributed.save(new, checkpoint_id=folder / "distributed", no_dist=True)


def _write_adapter(folder: Path, base: Path) -> None:
    """An adapter, and the old weights less what it adds: together they are the new ones."""
    made = torch.Generator().manual_seed(3)
    factors = {
        "base_model.model.0.lora_A.weight": torch.rand(RANK, 4, generator=made),
        "base_model.model.0.lora_B.weight": torch.rand(3, RANK, generator=made),
    }
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter_model.safetensors")
    save_file(state(OLD), base)


class World:
    """Two modules with the old weights, files of new ones, and files that verbs write.

    Attributes:
        folder: Where all of that lies; ``out`` and ``tmp`` in it are what is watched.
        source: A saved module with the old weights.
        program: What it was compiled from.
        base: The old weights, for adapters.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        """Make them.

        Args:
            source: What ``make_file`` gave.
            folder: An empty folder.
        """
        self.folder, self.source = folder, source
        self.out, self.tmp = folder / "out", folder / "tmp"
        for new in (self.out, self.tmp):
            new.mkdir()
        self.target, self.plan_file = self.out / "target.refit", self.out / "plan.refitplan"
        self.cache = self.out / "cache"
        _write_weights(folder)
        _write_adapter(folder / "adapter", folder / "base.safetensors")
        self.program, self.base = torch.export.export(model(), (X,)), state(OLD)
        plugins = [importlib.import_module("refitkit_peft.plugin")] if HAS_ADAPTERS else []
        self.pipeline = refitkit.Pipeline({"keep_versions": 2}, plugins)
        self.listener = Listener()
        self.caching = refitkit.Pipeline({"plan_cache": self.cache}, [KeyedPlugin(), self.listener])
        tempfile.tempdir = str(self.tmp)
        self.modules = [self.pipeline.load(source) for _ in range(2)]
        self.pipeline.refit(self.modules[1], state(NEW))
        self.modules[1].save(self.target)
        self.modules[1].plan.save(self.plan_file)
        self.written = {path: path.read_bytes() for path in (self.target, self.plan_file)}
        self.adapted = self._adapted() if HAS_ADAPTERS else {}
        self.reset()
        gc.collect()
        gc.freeze()  # what is here stays: the next collections are fast
        self.kept = self.litter()
        self.descriptors = _descriptors()

    def close(self) -> None:
        """Forget the folder for temporary files, and let old objects be collected again."""
        tempfile.tempdir = None
        gc.unfreeze()

    def _adapted(self) -> dict[str, torch.Tensor]:
        self.pipeline.refit(self.modules[0], lora(self))
        return held(self.modules[0])

    def reset(self) -> None:
        """Have old weights and old files everywhere, after new weights."""
        for path, content in self.written.items():
            path.write_bytes(content)
        for module in self.modules:
            self.pipeline.refit(module, state(NEW))
            self.pipeline.refit(module, state(OLD))

    def litter(self) -> set[Path]:
        """What lies around under names of refitkit's."""
        return {
            path
            for folder in (self.out, self.tmp, self.cache)
            if folder.is_dir()
            for path in folder.iterdir()
            if _OURS.fullmatch(path.name)
        }

    def problems(self, before: list[int], verb: Verb, *, done: bool, late: bool) -> Iterator[str]:
        """Say what a fault has broken.

        Args:
            before: Versions of the modules before the verb.
            verb: The verb.
            done: Whether it returned.
            late: Whether a fault can come when all is verified.
        """
        moved = [module.version - old for module, old in zip(self.modules, before, strict=True)]
        written = [1] * verb.writes + [0] * (len(moved) - verb.writes)
        if moved != (written if done else [0, 0]) and not (late and moved == written):
            yield f"versions moved by {moved}"
        new = self.adapted if verb.adapts else state(NEW)
        for module, one in zip(self.modules, moved, strict=True):
            if module.gate.lost:
                yield "lost"
            elif not same(held(module), new if one else state(OLD)):
                yield "wrong weights"
        yield from self._of_files()

    def _of_files(self) -> Iterator[str]:
        if not (self.target.read_bytes() == self.written[self.target] or self._is_saved()):
            yield "the file is neither the old one nor the new one"
        if self.plan_file.read_bytes() != self.written[self.plan_file]:  # it is planned again alike
            yield "the plan is not whole"
        for file in self.cache.glob("*.refitplan"):
            refitkit.RefitPlan.load(file)

    def _is_saved(self) -> bool:
        with zipfile.ZipFile(io.BytesIO(self.target.read_bytes())) as archive:
            weights = archive.read("refitkit/weights.safetensors")
            return archive.testzip() is None and same(load_safetensors(weights), state(OLD))

    def untold(self, reason: str) -> Iterator[str]:
        """Say whether nobody was told why something was not done."""
        told = "\n".join(self.listener.told)
        if not any(
            one in told for one in (reason, "is written to the cache", "is read from the cache")
        ):
            yield f"told {told!r}"

    def left(self) -> Iterator[str]:
        """Say what lies around, or is open."""
        gc.collect()
        if found := self.litter() - self.kept:
            yield f"left: {sorted(path.name for path in found)}"
        if (found_open := _descriptors()) > self.descriptors:
            yield f"{found_open - self.descriptors} descriptors left open"


def held(module: refitkit.CompiledModule) -> dict[str, torch.Tensor]:
    """What a module holds."""
    return {slot.name: module.read(slot.name) for slot in module.slots}


def lora(world: World, base: object = None) -> Any:
    """The adapter on a base; on that in a file where None."""
    made = importlib.import_module("refitkit_peft").Lora
    return made(base or world.folder / "base.safetensors", {str(world.folder / "adapter"): 1.0})


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - opens less


@dataclass(frozen=True)
class Verb:
    """A verb to disturb.

    Attributes:
        run: Calls it.
        writes: How many of the modules get new weights.
        adapts: Whether those are the adapter's.
        tells: Whether it tells of what failed, and goes on.
    """

    run: Callable[[World], Any]
    writes: int = 0
    adapts: bool = False
    tells: bool = False


def _refit(file: str) -> Verb:
    return Verb(lambda world: world.pipeline.refit(world.modules[0], world.folder / file), writes=1)


def _refit_all(world: World) -> object:
    files = (world.folder / "w.safetensors", world.folder / "w.pt")
    return world.pipeline.refit_all(list(zip(world.modules, files, strict=True)))


def _restore(world: World) -> object:
    module = refitkit.Pipeline({"keep_base": False}).load(world.source)
    refitkit.refit(module, state(NEW))
    return module.restore(0)


def _plan_anew(world: World) -> object:
    with Faults.without():
        for file in world.cache.glob("*.refitplan"):
            file.unlink()
    return _plan_again(world)


def _plan_again(world: World) -> object:
    return world.caching.plan(world.program, backend=BACKEND)


def _mapped(world: World) -> object:
    base = importlib.import_module("refitkit_peft").Base(world.base, "mapped")
    return world.pipeline.refit(world.modules[0], lora(world, base))


class CommandError(Exception):
    """A command that failed; its text is that for users."""


def _command(*given: str) -> Verb:
    def run(world: World) -> None:
        names = {"MODULE": world.source, "TARGET": world.target, "PLAN": world.plan_file}
        args = [
            str(names.get(one, world.folder / one[1:] if one[0] == "@" else one)) for one in given
        ]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(args)
        if code:
            raise CommandError(f"{code}: {err.getvalue()}")

    return Verb(run)


VERBS = {
    "load": Verb(lambda world: world.pipeline.load(world.source)),
    "save": Verb(lambda world: world.modules[0].save(world.target)),
    "copy": Verb(lambda world: world.pipeline.copy(world.modules[0])),
    "inspect": Verb(lambda world: world.pipeline.describe(world.source)),
    "refit safetensors": _refit("w.safetensors"),
    "refit torch": _refit("w.pt"),
    "refit old torch": _refit("old.pt"),
    "refit sharded": _refit("sharded"),
    "refit distributed": _refit("distributed"),
    "refit_all": Verb(_refit_all, writes=2),
    "restore": Verb(_restore),
    "verify": Verb(lambda w: w.pipeline.verify(w.modules[0], w.folder / "base.safetensors")),
    "diff": Verb(lambda w: w.pipeline.diff(w.folder / "w.pt", w.folder / "base.safetensors")),
    "diff modules": Verb(lambda w: w.pipeline.diff(w.source, w.folder / "base.safetensors")),
    "plan": Verb(lambda world: world.pipeline.plan(world.program, world.modules[0])),
    "plan to cache": Verb(_plan_anew, tells=True),
    "plan from cache": Verb(_plan_again, tells=True),
    "plan file": Verb(lambda world: world.modules[0].plan.save(world.plan_file)),
    "read plan": Verb(lambda world: world.pipeline.read_plan(world.plan_file)),
    "command inspect": _command("inspect", "MODULE"),
    "command refit": _command("refit", "MODULE", "@base.safetensors", "-o", "TARGET"),
    "command verify": _command("verify", "MODULE", "@base.safetensors"),
    "command diff": _command("diff", "@w.pt", "@w.safetensors"),
    "command plan": _command("plan", "show", "PLAN"),
}

if HAS_ADAPTERS:
    VERBS |= {
        "adapter": Verb(lambda w: w.pipeline.refit(w.modules[0], lora(w)), writes=1, adapts=True),
        "mapped base": Verb(_mapped, writes=1, adapts=True),
    }


class Campaign:
    """Faults of one verb.

    Attributes:
        outcomes: How many verbs ended how.
        problems: What was broken, and where the fault came.
    """

    def __init__(self, name: str, source: Path, folder: Path) -> None:
        """Nothing has failed yet.

        Args:
            name: The verb.
            source: What ``make_file`` gave.
            folder: For worlds.
        """
        self._name, self._verb = name, VERBS[name]
        self._source, self._folder, self._worlds = source, folder, 0
        self._world = self._made()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def _made(self) -> World:
        self._worlds += 1
        return World(self._source, Path(tempfile.mkdtemp(dir=self._folder)))

    def close(self) -> None:
        """Forget the world."""
        self._world.close()

    def run(self, count: int, allocations: int, seed: int) -> None:
        """Let so many calls fail, and so many allocations."""
        drawn = random.Random(f"{seed} {self._name}")  # noqa: S311 - to be repeated
        for _ in range(2):  # the first time fills caches
            with Faults() as faults:
                self._verb.run(self._world)
            self._world.reset()
        calls = [(at, code) for at, name in enumerate(faults.calls) for code in CODES[name]]
        for at, code in _sampled(drawn, calls, count):
            self._disturb(Faults(at, code, lasting=drawn.random() < 0.5), os.strerror(code))
        for limit in _sampled(drawn, LIMITS, count):
            self._disturb(limit, limit.reason)
        with Exhausted(None, in_refitkit) as points:
            self._verb.run(self._world)
        self._world.reset()
        for at in _sampled(drawn, range(points.count), allocations):
            self._disturb(Exhausted(at, in_refitkit), "memory")
        for _ in range(allocations if _testcapi else 0):
            self._starve(int(10 ** drawn.uniform(0, _EXPONENT)))

    def _disturb(self, fault: Fault, reason: str) -> None:
        world = self._world
        before = [module.version for module in world.modules]
        world.listener.told.clear()
        error = self._run(fault)
        kind = "done" if error is None else type(error).__name__
        self.outcomes[f"{type(fault).__name__}: {kind}"] += 1
        problems = [] if error is None else list(_misreported(error, reason, fault.where))
        error = None  # it holds frames, and they hold folders
        late = isinstance(fault, Exhausted | Starved)
        problems += world.problems(before, self._verb, done=kind == "done", late=late)
        removing = fault.removing if isinstance(fault, Faults) else "_remove_own" in fault.where
        if isinstance(fault, Starved):  # os.open loses a descriptor for which it cannot make an int
            world.descriptors = max(world.descriptors, _descriptors())
        elif not removing:
            problems += world.left()
        if self._verb.tells and kind == "done" and not removing:
            problems += world.untold(reason)
        problems += self._next()
        if problems:
            at = f"{self._name} {fault.at} {reason} at {fault.where}"
            self.problems.append(f"{at}: {'; '.join(problems)}")
            world.close()
            self._world = self._made()
            list(self._next())

    def _starve(self, at: int) -> None:
        def disturbed() -> tuple[Counter[str], list[str]]:
            self.outcomes, self.problems = Counter(), []
            self._world.descriptors = _descriptors()
            faulthandler.disable()
            self._disturb(Starved(at), "memory")
            return self.outcomes, self.problems

        try:
            outcomes, problems = forked(disturbed)
        except KilledError:
            self.outcomes["Starved: died"] += 1  # C code of torch that expects no lack of memory
        else:
            self.outcomes += outcomes
            self.problems += problems
        self._world.reset()

    def _run(self, fault: Fault) -> Exception | None:
        gc.disable()
        try:
            with fault:
                self._verb.run(self._world)
        except Exception as exc:  # noqa: BLE001 - judged
            return exc
        except BaseException as exc:
            if type(exc).__name__ != "PanicException":  # of libraries in Rust, without memory
                raise
            return MemoryError()
        finally:
            gc.enable()
        return None

    def _next(self) -> Iterator[str]:
        """Say what keeps the verb from working now."""
        try:
            self._verb.run(self._world)
            self._world.reset()
        except Exception as exc:  # noqa: BLE001 - reported
            yield f"the next time: {type(exc).__name__}: {exc}"
        else:
            yield from self._world.left()


def _sampled(drawn: random.Random, places: Any, count: int) -> list[Any]:
    return drawn.sample(places, min(count, len(places)))


def _misreported(error: Exception, reason: str, where: str) -> Iterator[str]:
    text = str(error)
    if where == Starved.where and (isinstance(error, MemoryError) or _QUIRKS.search(text)):
        return
    if isinstance(error, MemoryError) and _UNGUARDED.match(where):
        return  # nothing of refitkit's was begun, or all is done
    if not isinstance(error, refitkit.ResourceError | CommandError):
        yield f"{type(error).__name__}: {text[:300]}"
        return
    if isinstance(error, CommandError) and not text.startswith("1: error: "):
        yield f"command: {text[:300]}"
    if reason not in text or _BLAMES.search(text) or text.count("\n") < 1:
        yield f"says {text[:300]!r}"


def main() -> int:
    """Run the whole campaign."""
    parser = argparse.ArgumentParser(description="Let calls of every verb fail, at random.")
    parser.add_argument("--count", type=int, default=120, help="calls of each verb that fail")
    parser.add_argument("--allocations", type=int, default=40, help="and allocations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("verbs", nargs="*", default=list(VERBS), help="of " + ", ".join(VERBS))
    given = parser.parse_args()
    failed, total = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        source = make_file(Path(folder))
        for name in given.verbs:
            campaign = Campaign(name, source, Path(folder))
            campaign.run(given.count, given.allocations, given.seed)
            campaign.close()
            print(name, dict(campaign.outcomes), f"{len(campaign.problems)} problems", flush=True)  # noqa: T201
            for problem in campaign.problems:
                print("  ", problem)  # noqa: T201
            failed += len(campaign.problems)
            total += campaign.outcomes
    print(dict(total))  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
