"""A random life of a module, compared slot by slot and bit for bit with a model of what it holds.

The engine has two sets of weights that take turns, and the set that does not serve may be stale in
some slots. The model here knows nothing of that: it is a dict of tensors, with lists of dicts of
what slots held before.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import bits, max_error, slots_of
from aoti_models import CASES

import refitkit
from refitkit.model import TensorInfo
from refitkit.pipeline.history import LoadOrigin

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CASE = CASES["mixed"]
PERSISTENT = ("a.weight", "a.bias", "b.weight", "b.bias", "kept", "count")
PINNED = "derived"
MODULES = 3
STEPS = 40
ODD_VALUES = (0.0, -0.0, 1e-42, -3.0e38)


class Interrupted(Exception):  # noqa: N818 - not an error of refitkit's
    """Raised where a fault is injected."""


class BreakingPlugin:
    """Refuses whatever was committed."""

    name = "breaking"

    @refitkit.hookimpl
    def refitkit_weights_changed(self, report: Any) -> None:
        if report.outcome == "committed":
            raise Interrupted


class BreakingSource:
    """A weight source that breaks at one of its reads."""

    def __init__(self, state: dict[str, torch.Tensor], reads: int) -> None:
        self.description = "a breaking source"
        self._state, self._left = state, reads

    def names(self) -> Any:
        return self._state.keys()

    def info(self, fqn: str) -> Any:
        tensor = self._state[fqn]
        return TensorInfo(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))

    def get(self, fqn: str) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise Interrupted
        return self._state[fqn]


class Past:
    """What slots of one module held before its refits, and at first."""

    def __init__(self, loaded: dict[str, torch.Tensor] | None = None) -> None:
        self.loaded = loaded or {}  # from a file, if it was; before calls changed anything
        self.befores: list[dict[str, torch.Tensor]] = []  # by version, less one
        self.base: dict[str, torch.Tensor] = {}
        self.given_up = 0  # the versions before this one

    def note(self, written: Any, before: dict[str, torch.Tensor]) -> None:
        self.befores.append({name: before[name] for name in written})
        for name in written:
            self.base.setdefault(name, self.loaded.get(name, before[name]))

    def back_to(self, version: int) -> dict[str, torch.Tensor]:
        """What slots have to hold that were written since."""
        found: dict[str, torch.Tensor] = {}
        for before in reversed(self.befores[version:]):
            found.update(before)
        return found


class Life:
    """Some modules and, for each, a dict of what its slots should hold."""

    def __init__(self, first: refitkit.CompiledModule, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)  # noqa: S311 - to be repeatable
        self.generator = torch.Generator().manual_seed(seed)
        self.folder = folder
        self.derived = first.read(PINNED)
        self.alive = [(first, {slot.name: first.read(slot.name) for slot in first.slots})]
        self.steps: dict[str, Callable[[refitkit.CompiledModule, dict[str, Any]], None]] = {
            name.removeprefix("_do_"): getattr(self, name)
            for name in sorted(dir(self))
            if name.startswith("_do_")
        }
        self.done: list[str] = []
        self.depth = seed % 4
        self.pipeline = refitkit.Pipeline({"keep_versions": self.depth, "keep_base": True})
        self.past = {first: Past(self.alive[0][1].copy())}

    def _refit(self, compiled: Any, held: dict[str, Any], state: Any, **how: Any) -> Any:
        before = {name: value.clone() for name, value in held.items()}
        result = self.pipeline.refit(compiled, state, **how)
        self._note(compiled, result.report, before)
        return result

    def _note(self, compiled: Any, report: Any, before: dict[str, torch.Tensor]) -> None:
        past = self.past[compiled]
        past.note([row.slot for row in report.ledger if row.strategy], before)
        assert len(past.befores) == compiled.version

    def step(self) -> None:
        compiled, held = self.random.choice(self.alive)
        name = self.random.choice(list(self.steps))
        self.done.append(name)
        self.steps[name](compiled, held)
        for number, (module, wanted) in enumerate(self.alive):
            found = slots_of(module)
            differing = [n for n in wanted if found[n] != bits(wanted[n])]
            assert not differing, f"module {number} after {self.done}"

    def _values(self, names: Any) -> dict[str, torch.Tensor]:
        return {name: self._value(name) for name in names}

    def _value(self, name: str) -> torch.Tensor:
        old = self.alive[0][1][name]
        if name == "count":
            return torch.tensor(self.random.randrange(1000))
        value = torch.randn(old.shape, generator=self.generator)
        value.view(-1)[self.random.randrange(value.numel())] = self.random.choice(ODD_VALUES)
        return value

    def _coin(self) -> bool:
        return self.random.random() < 0.5

    def _some(self) -> list[str]:
        names = [*PERSISTENT, PINNED]
        return self.random.sample(names, self.random.randint(1, len(names)))

    # -- what can happen --------------------------------------------------------------------

    def _do_refit(self, compiled: refitkit.CompiledModule, held: dict[str, Any]) -> None:
        state = self._values(PERSISTENT)
        if self.random.random() < 0.3:
            state[PINNED] = self._value(PINNED)
        how = {"verify": self.random.choice([None, "none"]), "delta": self._coin()}
        self._refit(compiled, held, state, **how)
        held.update({PINNED: self.derived, **state})

    def _do_change_some(self, compiled: Any, held: dict[str, Any]) -> None:
        """What a refit with ``delta`` is for; calls have changed ``count`` meanwhile."""
        state = {name: held[name].clone() for name in PERSISTENT}
        changed = [name for name in self._some() if name != PINNED]
        state.update(self._values(changed))
        if self._coin():
            state[PINNED] = held[PINNED].clone()
        report = self._refit(compiled, held, state, delta=True, verify="none").report
        assert report.slots_written + report.slots_unchanged == len(compiled.slots)
        assert report.slots_written >= len(changed)
        held.update({PINNED: self.derived, **state})

    def _do_refit_with_inputs(self, compiled: Any, held: dict[str, Any]) -> None:
        state = {n: t.clamp(-9, 9) for n, t in self._values(PERSISTENT).items()}
        self._refit(compiled, held, state, inputs=CASE.args())
        held.update({PINNED: self.derived, **state})

    def _do_partial(self, compiled: Any, held: dict[str, Any]) -> None:
        state = self._values(self._some())
        how = {"verify": self.random.choice([None, "none"]), "delta": self._coin()}
        self._refit(compiled, held, state, partial=True, **how)
        held.update(state)

    def _do_same_again(self, compiled: Any, held: dict[str, Any]) -> None:
        state = {name: held[name].clone() for name in self._some()}
        report = self._refit(compiled, held, state, partial=True, delta=self._coin()).report
        assert report.changed is False

    def _do_write_over(self, compiled: Any, held: dict[str, Any]) -> None:
        state = self._values(self._some())
        self._refit(compiled, held, state, partial=True, rollback=False)
        held.update(state)
        self.past[compiled].given_up = compiled.version

    def _do_go_back(self, compiled: Any, held: dict[str, Any]) -> None:
        past, present = self.past[compiled], compiled.version
        version = self.random.randint(max(0, present - self.depth - 1), present)
        try:
            report = self.pipeline.restore(compiled, version).report
        except refitkit.NotRefittableError:
            kept = self.depth > 1 and present - version <= self.depth
            assert not kept or version < past.given_up
            assert compiled.version == present
            return
        before = {name: value.clone() for name, value in held.items()}
        held.update(past.back_to(version))
        self._note(compiled, report, before)

    def _do_restore(self, compiled: Any, held: dict[str, Any]) -> None:
        past = self.past[compiled]
        before = {name: value.clone() for name, value in held.items()}
        origin = compiled.origin
        gone = past.given_up > 0 if origin is None else LoadOrigin.of(origin.path) != origin
        try:
            report = self.pipeline.restore(compiled).report
        except refitkit.NotRefittableError:
            assert gone
            return
        held.update(past.base)
        self._note(compiled, report, before)

    def _do_refused(self, compiled: Any, held: dict[str, Any]) -> None:
        state = self._values(PERSISTENT)
        name = self.random.choice(["a.weight", "b.bias", "kept"])
        if self.random.random() < 0.5:
            state[name] = state[name][:-1]
        else:
            state[name][..., 0] = torch.nan
        with pytest.raises(refitkit.WeightMismatchError):
            refitkit.refit(compiled, state, delta=self._coin())

    def _do_wrong_outputs(self, compiled: Any, held: dict[str, Any]) -> None:
        state = {n: t.clamp(-9, 9) for n, t in self._values(self._some()).items()}
        how: Any = {"inputs": CASE.args(), "reference": torch.zeros(1), "delta": self._coin()}
        with pytest.raises(refitkit.VerificationError):
            refitkit.refit(compiled, state, partial=True, **how)

    def _do_vetoed(self, compiled: Any, held: dict[str, Any]) -> None:
        pipeline = refitkit.Pipeline(plugins=[BreakingPlugin()])
        partial = self.random.random() < 0.5
        state = self._values(self._some() if partial else PERSISTENT)
        with pytest.raises(refitkit.PluginError):
            pipeline.refit(compiled, state, partial=partial, delta=self._coin())

    def _do_source_breaks(self, compiled: Any, held: dict[str, Any]) -> None:
        partial = self.random.random() < 0.5
        state = self._values(self._some() if partial else PERSISTENT)
        source = BreakingSource(state, self.random.randrange(2 * len(state)))
        settings = {"check_finite": self.random.random() < 0.5}
        with pytest.raises(refitkit.RefitError):
            refitkit.Pipeline(settings).refit(compiled, source, partial=partial, delta=self._coin())

    def _do_call(self, compiled: Any, held: dict[str, Any]) -> None:
        for _ in range(self.random.randint(1, 3)):
            compiled(*CASE.args())
            held["count"] = held["count"] + 1

    def _do_free_spare(self, compiled: Any, held: dict[str, Any]) -> None:
        compiled.free_spare()
        assert compiled.free_spare() == 0

    def _do_save_and_load(self, compiled: Any, held: dict[str, Any]) -> None:
        path = self.folder / "module.refit"
        compiled.save(path)
        self._add(self.pipeline.load(path), held)

    def _do_copy(self, compiled: Any, held: dict[str, Any]) -> None:
        state = self._values(self._some())
        result = self.pipeline.refit(compiled, state, partial=True, copy=True)
        assert result.module is not compiled
        self._add(result.module, {**held, **state})
        self._note(result.module, result.report, {n: v.clone() for n, v in held.items()})

    def _add(self, compiled: refitkit.CompiledModule, held: dict[str, Any]) -> None:
        self.alive.append((compiled, dict(held)))
        loaded = None if compiled.origin is None else {n: t.clone() for n, t in held.items()}
        self.past[compiled] = Past(loaded)
        if len(self.alive) > MODULES:
            del self.alive[self.random.randrange(len(self.alive))]


@pytest.mark.parametrize("seed", range(20))
def test_slots_hold_what_they_should(
    seed: int, fresh: Callable[[str], refitkit.CompiledModule], tmp_path: Path
) -> None:
    life = Life(fresh("mixed"), seed, tmp_path)
    for _ in range(STEPS):
        life.step()
    for compiled, held in life.alive:
        tame = {name: held[name].clamp(-9, 9) for name in (*PERSISTENT, PINNED)}
        refitkit.refit(compiled, tame, partial=True)
        found = compiled(*CASE.args())
        assert max_error(found, _eager(tame)) < 1e-3


def _eager(held: dict[str, torch.Tensor]) -> Any:
    model = CASE.model(0)
    model.load_state_dict({name: held[name] for name in PERSISTENT}, strict=False)
    model.derived.copy_(held[PINNED])
    return CASE.expected(model)


def test_every_step_happens(
    fresh: Callable[[str], refitkit.CompiledModule], tmp_path: Path
) -> None:
    """The lives above are long enough to try everything."""
    steps = Life(fresh("mixed"), 0, tmp_path).steps
    happened = set()
    for seed in range(10):
        life = Life(fresh("mixed"), seed, tmp_path)
        happened |= {life.random.choice(list(steps)) for _ in range(STEPS)}
    assert happened == steps.keys()
