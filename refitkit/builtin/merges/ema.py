"""An exponential moving average of weights in training: updated as they go, opened when wanted."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.merges.descriptions import Merge
from refitkit.builtin.merges.sources import (
    Infos,
    Made,
    broken,
    infos_of,
    is_summed,
    misfits,
    narrowed,
    read_as,
    twins_where_needed,
    widened,
)
from refitkit.errors import ConfigError, Problem, SourceError, WeightMismatchError
from refitkit.processes import ForkedLock
from refitkit.program.ambient import verb
from refitkit.program.dtypes import dtype_name, dtype_of
from refitkit.protocols import KnowsTies, WeightSource
from refitkit.recipe import TensorMap
from refitkit.recipe.reads import name_in
from refitkit.recipe.sources import ModuleWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from refitkit.model import TensorInfo


class Ema(Merge):
    """``average = decay x average + (1 - decay) x weights``, once for each update.

    The formula and kernel of ``torch.optim.swa_utils.get_ema_multi_avg_fn``: after the same updates
    an average of float32 is equal to that of an ``AveragedModel``. What is different: the average
    is held in float32 (float64 for float64) whatever the weights are, because in bfloat16 a decay
    of 0.999 would change nothing any more; it is rounded when it is read. An element that is equal
    to its average leaves it as it is, an infinity, too, which would become NaN. And entries are
    those of a state_dict: buffers of floats are averaged as parameters are (there:
    ``use_buffers=True``); integers, bools and 8-bit floats are those of the last update.

    Pass it wherever weights are taken, also as a part of a merge: it is then opened as it is at
    that moment, and later updates do not reach what was opened. It keeps copies of its own, on the
    devices of ``start``: nobody sees or changes them. While it is updated, a second set of
    averages is in memory. Several threads may use it.
    """

    @verb("The weights cannot be averaged")
    def __init__(self, decay: float, start: object) -> None:
        """Begin with a copy of weights.

        Args:
            decay: From 0 (the last weights alone) to 1 (those at the start).
            start: A state_dict, a module, or an opened source (``Pipeline().open_weights(path)``).

        Raises:
            ConfigError: ``decay`` is no such number.
            SourceError: Entries cannot be weights, or ``start`` is something else.
        """
        self._decay = _checked(decay)
        source = _source(start)
        self._infos = infos_of(source)
        self._ties = tuple(source.ties()) if isinstance(source, KnowsTies) else ()
        odd = _unusable(self._infos)
        if odd:
            raise SourceError(f"{source.description} cannot be averaged.", problems=odd)
        shadows = {name: _copy(read_as(info, source, name)) for name, info in self._infos.items()}
        self._state = _State(shadows, 0)
        self._updating = ForkedLock()
        self._self = object()  # what revisions are of: no other average ever has it

    @property
    def updates(self) -> int:
        """How many there were."""
        return self._state.updates

    @verb("The weights cannot be averaged")
    def update(self, weights: object) -> None:
        """Take in the weights after one more step.

        Args:
            weights: A state_dict, a module, or an opened source, like the one at the start; on any
                device. It is copied from, and not kept.

        Raises:
            WeightMismatchError: Names, dtypes or shapes are other ones, or entries are unusable;
                lists all of them. Nothing was updated.
            SourceError: An entry cannot be read. Nothing was updated.
        """
        source = _source(weights)
        infos = infos_of(source)
        twins = twins_where_needed([source], [self._infos, infos], self._ties)
        called = {name: name_in(infos, name, twins) for name in self._infos}
        here = {name: there for name, there in called.items() if there is not None}
        problems = list(misfits(self._infos, infos, "the average", source.description, twins))
        problems += _unusable({there: infos[there] for there in here.values()})
        problems += [] if problems else broken(set(twins.values()), source)
        if problems:
            what = f"{source.description} is no update of this average; nothing was updated."
            raise WeightMismatchError(what, problems=problems)
        with self._updating.held:
            old = self._state
            new = {
                name: self._updated(old.shadows[name], source, there, self._infos[name])
                for name, there in here.items()
            }
            self._state = _State({**old.shadows, **new}, old.updates + 1)

    def _updated(
        self, shadow: torch.Tensor, source: WeightSource, name: str, info: TensorInfo
    ) -> torch.Tensor:
        value = read_as(info, source, name).to(shadow.device)
        if not is_summed(info.dtype):
            return _copy(value)
        with torch.no_grad():
            wide = widened(value)
            new = torch.lerp(shadow, wide, 1 - self._decay)
            return torch.where(wide == shadow, shadow, new)  # inf less inf would be NaN for ever

    def open(self, open_weights: Callable[[object], WeightSource]) -> WeightSource:  # noqa: ARG002 - has no parts
        """The average as it is now."""
        state = self._state
        what = f"a moving average (updates: {state.updates})"
        return Snapshot(self._infos, state.shadows, (self._self, state.updates), what, self._ties)


@dataclass(frozen=True)
class _State:
    """Averages after a number of updates. Its tensors are never written to."""

    shadows: Mapping[str, torch.Tensor]
    updates: int


class Snapshot:
    """An average as it was at one moment; rounded to the dtypes of the weights when it is read."""

    def __init__(
        self,
        infos: Infos,
        shadows: Mapping[str, torch.Tensor],
        revision: Hashable,
        description: str,
        ties: Collection[tuple[str, ...]] = (),
    ) -> None:
        """Keep tensors that nobody writes to."""
        self._ties = ties
        self.description = description
        self._infos, self._shadows, self._revision = infos, shadows, revision
        self._made = Made(0)

    def names(self) -> Collection[str]:
        """Names at the start."""
        return self._infos.keys()

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that were one tensor at the start; see ``refitkit.protocols.KnowsTies``."""
        return self._ties

    def namings(self) -> Collection[WeightSource]:
        """Also by other names of the same tensors; see ``refitkit.protocols.HasNamings``."""
        renamed: dict[str, dict[str, str]] = {}
        for tie in self._ties:
            mine = [name for name in tie if name in self._infos]
            more = {name: mine[0] for name in tie if name not in self._infos} if mine else {}
            renamed |= dict.fromkeys(mine, more) if more else {}
        if not renamed:
            return ()
        names = {
            new: old for name in self._infos for new, old in renamed.get(name, {name: name}).items()
        }
        other = copy(self)
        other._infos = {new: self._infos[old] for new, old in names.items()}  # noqa: SLF001
        other._shadows = {new: self._shadows[old] for new, old in names.items()}  # noqa: SLF001
        return self, other

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape at the start."""
        return self._infos[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """The average, rounded to the dtype that the weights have."""
        shadow, dtype = self._shadows[fqn], dtype_of(self._infos[fqn].dtype)
        if not is_summed(self._infos[fqn].dtype):
            return shadow
        if shadow.dtype is dtype.to_real():
            return narrowed(shadow, dtype)  # a view
        return self._made.get(fqn, lambda: narrowed(shadow, dtype))

    def keeping(self, limit: int | None) -> Snapshot:
        """The same, which keeps what it rounds; see ``refitkit.protocols.KeepsMade``."""
        one = copy(self)
        one._made = Made(limit)  # noqa: SLF001 - it is one of these
        return one

    def revision(self, fqn: str) -> Hashable:
        """The average that it is of, the number of updates, and the name."""
        if fqn not in self._infos:
            raise KeyError(fqn)
        return (self._revision, fqn)


def _checked(decay: Any) -> float:
    if not isinstance(decay, Real) or not 0 <= float(decay) <= 1:  # NaN, too
        problem = Problem("decay", "out of range", repr(decay), "a number from 0 to 1")
        raise ConfigError("An average cannot decay like that.", problems=[problem])
    return float(decay)


def _source(thing: object) -> WeightSource:
    """What can be opened without a pipeline.

    Raises:
        SourceError: It is something else.
    """
    if isinstance(thing, WeightSource):
        return thing
    if isinstance(thing, Merge):
        return thing.open(_source)
    if isinstance(thing, torch.nn.Module):
        return ModuleWeights(thing).without_plan
    if isinstance(thing, Mapping) and all(isinstance(name, str) for name in thing):
        return TensorMap(thing, f"a state_dict of {len(thing)} entries")
    raise SourceError(
        f"An average is made of a state_dict, a module or an opened source, not of {thing!r:.60}.",
        hint="refitkit.Pipeline().open_weights(...) opens anything that is called weights.",
    )


def _unusable(infos: Infos) -> list[Problem]:
    return [Problem(n, "unusable", info.unusable) for n, info in infos.items() if info.unusable]


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A copy in the dtype that sums are made in, or in its own where there are none."""
    value = value.detach()
    return (widened(value) if is_summed(dtype_name(value.dtype)) else value).clone()
