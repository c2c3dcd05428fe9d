"""Where in a base the modules of an adapter are.

An adapter was trained on a model whose names may have a prefix more, or less, than the base: a head
around an encoder, ``model.`` of a trainer. One prefix has to do for the whole adapter, and no other
one may do as well: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING

from refitkit.errors import Problem
from refitkit.model.rules import WRAPPERS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_WRAPPERS = frozenset(WRAPPERS) - {"model"}
"""Parts that wrappers add to names; ``model`` is a part of names of models, too."""
_SHOWN = 4
_SUGGESTIONS = 10
_LEAVES = ("weight", "in_proj_weight")
"""What factors add to: of layers, and of ``torch.nn.MultiheadAttention``, the first that is there.

``MultiheadAttention`` in ``tuners/lora/layer.py``, peft 0.21.2.
"""


@dataclass(frozen=True)
class Shift:
    """What has to be done to a path of the adapter to get that of the base.

    Attributes:
        cut: So many parts are taken away at its beginning.
        prefix: Then this is put before it, with its dot.
    """

    cut: int = 0
    prefix: str = ""

    def of(self, path: str) -> str:
        """The path in the base."""
        return self.prefix + ".".join(path.split(".")[self.cut :])

    def keeps_apart(self, *groups: Collection[str]) -> bool:
        """Whether no two paths of a group become one."""
        return all(len({*map(self.of, group)}) == len({*group}) for group in groups)


class Places:
    """Names of a base, to look up modules in."""

    def __init__(self, names: Collection[str] | Mapping[str, str]) -> None:
        """Take its names; or other names for them."""
        self._names = names if isinstance(names, Mapping) else {name: name for name in names}
        modules = (name.rpartition(".")[0] for name in names if _leaf(name) in _LEAVES)
        self._flat: dict[str, list[str]] = {}
        for module in dict.fromkeys(modules):
            self._flat.setdefault(module.replace(".", "_"), []).append(module)

    def weight_of(self, module: str) -> str | None:
        """Name of the weight that factors for a module add to; None where there is none."""
        found = (self.find(f"{module}.{leaf}" if module else leaf) for leaf in _LEAVES)
        return next((name for name in found if name is not None), None)

    def find(self, name: str) -> str | None:
        """What the base calls an entry; None where there is none."""
        return self._names.get(name) or (self._bare.find(name) if self._bare else None)

    @cached_property
    def _bare(self) -> Places | None:
        """The same without parts of wrappers; None where the base has none, or in there."""
        others: dict[str, list[str]] = {}
        for name in self._names:
            bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            others.setdefault(bare, []).append(name)
        if others.keys() == self._names.keys():
            return None
        return Places({bare: found[0] for bare, found in others.items() if len(found) == 1})

    def flat(self, path: str) -> list[str]:
        """Modules whose paths are this one, written with underscores."""
        return self._flat.get(path, [])

    def shift(
        self, modules: Collection[str], wholes: Collection[str]
    ) -> tuple[Shift | None, list[Problem]]:
        """The one shift that does for all modules and whole weights; or why there is none.

        Where some are nowhere it is the one that does for most, to look at those.
        """
        wanted = [*modules, *wholes]
        if not wanted or self._all(Shift(), modules, wholes):
            return Shift(), []
        some, leaves = (list(modules), _LEAVES) if modules else (list(wholes), ("",))
        found = self._shifts({some[0], some[len(some) // 2], some[-1]}, leaves)
        candidates = [one for one in found if one.keeps_apart(modules, wholes)]
        fitting = [one for one in candidates if self._all(one, modules, wholes)]
        if len(fitting) == 1:
            return fitting[0], []
        if fitting:
            return None, [_ambiguous(some[0], fitting)]
        if self._bare is not None:
            shift, problems = self._bare.shift(modules, wholes)
            if not problems:
                return shift, []
        best = max([Shift(), *candidates], key=lambda one: self._count(one, modules, wholes))
        return best, list(self._lacking(best, modules, wholes))

    def _all(self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]) -> bool:
        return all(self.weight_of(shift.of(one)) for one in modules) and all(
            self.find(shift.of(one)) for one in wholes
        )

    def _count(self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]) -> int:
        found = sum(self.weight_of(shift.of(one)) is not None for one in modules)
        return found + sum(self.find(shift.of(one)) is not None for one in wholes)

    def _shifts(self, paths: Collection[str], leaves: Collection[str]) -> list[Shift]:
        """Shifts that lead from one of some paths to something in the base."""
        ends = [f"{path}.{leaf}" if leaf else path for path in paths for leaf in leaves]
        longer = {
            Shift(0, name.removesuffix(end))
            for name in self._names
            for end in ends
            if name.endswith(f".{end}")
        }
        shorter = {
            Shift(cut)
            for end in ends
            for cut in range(1, end.count(".") + 1)
            if Shift(cut).of(end) in self._names
        }
        return sorted(longer | shorter, key=lambda one: (one.cut, one.prefix))

    def _lacking(
        self, shift: Shift, modules: Iterable[str], wholes: Iterable[str]
    ) -> Iterator[Problem]:
        lacking = [one for one in modules if self.weight_of(shift.of(one)) is None]
        known = sorted({name.rpartition(".")[0] for name in self._names})
        for number, module in enumerate(lacking):
            path = shift.of(module)
            near = get_close_matches(path, known, n=1, cutoff=0.8) if number < _SUGGESTIONS else []
            hint = f"did you mean {near[0]!r}?" if near else "the base has no weight for it"
            yield Problem(module, "unknown module", hint=hint)
        for name in wholes:
            if self.find(shift.of(name)) is None:
                yield Problem(name, "unexpected", hint="the base has no such entry")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ambiguous(module: str, fitting: Collection[Shift]) -> Problem:
    shown = ", ".join(repr(shift.of(module)) for shift in list(fitting)[:_SHOWN])
    more = f" and {len(fitting) - _SHOWN} more" if len(fitting) > _SHOWN else ""
    hint = "give the base the names that the adapter was trained with"
    if all(shift.prefix for shift in fitting):
        prefixes = (repr(shift.prefix) for shift in list(fitting)[:_SHOWN])
        begin = " or ".join(prefixes)
        hint = f"rules.subtree, or --subtree, says which: names begin with {begin}"
    return Problem(module, "ambiguous", f"{shown}{more}", "one place in the base", hint)


def ambiguous_flat(path: str, found: Mapping[str, object] | Collection[str]) -> Problem:
    """Several modules are one path with underscores."""
    shown = ", ".join(repr(one) for one in list(found)[:_SHOWN])
    return Problem(path, "ambiguous", shown, "one module of the base")
