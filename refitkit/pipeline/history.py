"""What a module held before: the refits that can be taken back, and the weights it began with.

Of a refit, the values are kept that its slots held before it: weights that touch a few slots, such
as adapters, cost no more than those. The newest refit costs nothing where the engines have its old
values anyway. Of what the module was compiled or loaded with, a slot is copied when it is first
written. ``keeping.py`` makes the copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from refitkit.errors import EngineError, NotRefittableError, Problem, raised_as
from refitkit.model import KeptWeights, SlotKey
from refitkit.protocols import HoldsPrevious

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import torch

    from refitkit.pipeline.delta import Live
    from refitkit.pipeline.origin import LoadOrigin
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

Values: TypeAlias = Mapping[SlotKey, "torch.Tensor"]

FIRST = "as compiled or loaded"
"""What the weights of version 0 are, in words."""


@dataclass(frozen=True)
class Record:
    """A refit that may be taken back.

    Attributes:
        version: Number of the weights that it brought.
        written: The slots that it wrote.
        kept: What they held before it. Of the others at most the engines have that.
        source: What the module held before it, in words.
        live: What was known of that; see ``Held``.
        overridden: Likewise.
        lent: Whether engines have what was not copied, until the next refit.
    """

    version: int
    written: frozenset[SlotKey]
    kept: Values
    source: str
    live: Live | None
    overridden: frozenset[str]
    lent: bool = False

    @property
    def whole(self) -> bool:
        """Whether the copies suffice."""
        return self.written <= self.kept.keys()


@dataclass(frozen=True)
class RestorePoint:
    """A way back to earlier weights.

    Attributes:
        values: What slots held then; all others hold it still.
        source: What they were, in words.
        live: What was known of them, under the number that they had; see ``Held``.
        overridden: Likewise.
        lent: Slots whose values are the engines' own: usable until they are staged, no longer.
    """

    values: Values
    source: str
    live: Live | None
    overridden: frozenset[str]
    lent: frozenset[SlotKey] = frozenset()


@dataclass(frozen=True)
class History:
    """What is kept.

    Attributes:
        records: Refits, the newest last, without a gap.
        base: What slots held at first, of all that were written since. All others hold it still.
        base_lost: Why that is not whole; empty where it is.
        written: All slots that were ever written.
        plan: The plan of the newest refit.
        overridden: What was overridden at first; see ``Held``.
    """

    records: tuple[Record, ...] = ()
    base: Values = field(default_factory=dict)
    base_lost: str = ""
    written: frozenset[SlotKey] = frozenset()
    plan: RefitPlan | None = None
    overridden: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies; the base and records share some."""
        held = [self.base, *(record.kept for record in self.records)]
        return sum({id(v): v.nbytes for values in held for v in values.values()}.values())

    def shown(
        self,
        origin: LoadOrigin | None,
        module: OpenedModule | None = None,
        *,
        named: bool = False,
        spent: bool = False,
    ) -> tuple[KeptWeights, ...]:
        """What can be gone back to, the oldest first, and what keeping it costs.

        Args:
            origin: What the module was loaded from, if it was.
            module: The module, to ask engines what they still have. None: right after a refit they
                have what they should.
            named: Whether ``compiled.base`` names the first weights.
            spent: Whether engines have nothing any more, because a refit failed.

        Raises:
            EngineError: An engine failed to tell.
        """
        shared = {id(value) for value in self.base.values()}
        rows: list[KeptWeights] = []
        for record in reversed(self.records):
            if not (record.whole or (record.lent and not spent and _is_lent(record, module))):
                break  # older ones are reached through this one
            own = sum(v.nbytes for v in record.kept.values() if id(v) not in shared)
            where = "host" if record.whole else "engine"
            version = record.version - 1
            row = KeptWeights(version=version, source=record.source, bytes=own, where=where)
            rows.insert(0, row)
        whole = not self.base_lost and self.plan is not None
        by_file = origin is not None and not (rows and not rows[0].version)
        if not named and not whole and not by_file:
            return tuple(rows)
        size = sum(value.nbytes for value in self.base.values())
        where = "base" if named else "host" if whole else "file"
        first = KeptWeights(version=0, source=FIRST, bytes=size, where=where)
        return (first, *(row for row in rows if row.version))

    def way_to(self, version: int, present: int, module: OpenedModule) -> RestorePoint | None:
        """How to go back; None where that is not held.

        Args:
            version: Number of the weights that are wanted.
            present: Number of the weights that the module holds.
            module: The module.

        Raises:
            EngineError: An engine failed to tell what it held.
        """
        later = [record for record in self.records if record.version > version]
        befores = [_before(record, module, newest=record.version == present) for record in later]
        if later and len(later) == present - version and None not in befores:
            values = {key: v for before in reversed(befores) for key, v in (before or {}).items()}
            first = later[0]
            lent = frozenset(k for k, v in values.items() if not _is_copy(v, later, k))
            return RestorePoint(values, first.source, first.live, first.overridden, lent)
        if version == 0 and not self.base_lost:
            return RestorePoint(self.base, FIRST, None, self.overridden)
        return None

    def no_way_to(self, version: int, rows: Iterable[KeptWeights]) -> NotRefittableError:
        """The error where that is so: says what is held, and names the settings.

        Args:
            version: Number of the weights that are wanted.
            rows: All that can be gone back to, as ``compiled.kept`` lists it.
        """
        problems = as_problems(rows)
        if self.base_lost and not any(problem.subject == "version 0" for problem in problems):
            problems.append(Problem("version 0", "not held", hint=self.base_lost))
        return NotRefittableError(
            f"The weights of version {version} are not held.",
            problems=problems,
            hint="Config.keep_versions is how many refits can be undone, Config.keep_limit how "
            "many bytes that may take; compiled.base names weights that restore() reads instead.",
        )


def as_problems(rows: Iterable[KeptWeights]) -> list[Problem]:
    """What is held, for an error about something that is not."""
    return [Problem(f"version {row.version}", "held", row.source) for row in rows]


def _is_lent(record: Record, module: OpenedModule | None) -> bool:
    """Whether the engines still have what was not copied; no value is looked at."""
    if module is None:
        return True
    lacking = sorted(record.written - record.kept.keys())
    return all(slot in held for held, slot in _places(module, lacking))


def _is_copy(value: torch.Tensor, records: Iterable[Record], key: SlotKey) -> bool:
    """Whether a value is one of the copies that records keep."""
    return any(record.kept.get(key) is value for record in records)


def _before(record: Record, module: OpenedModule, *, newest: bool) -> Values | None:
    """What slots held before a refit; None where that is not known of all of them."""
    lacking = record.written - record.kept.keys()
    if not lacking:
        return record.kept
    found = _of_engines(module, sorted(lacking)) if newest else {}
    return {**record.kept, **found} if lacking <= found.keys() else None


def _of_engines(module: OpenedModule, keys: Collection[SlotKey]) -> dict[SlotKey, torch.Tensor]:
    """What the engines still have of values from before the newest refit."""
    with raised_as(EngineError, "An engine failed to tell what it held"):
        places = zip(keys, _places(module, keys), strict=True)
        return {key: held[slot] for key, (held, slot) in places if slot in held}


def _places(
    module: OpenedModule, keys: Collection[SlotKey]
) -> Iterator[tuple[Mapping[str, torch.Tensor], str]]:
    """For each key what its engine has of values from before, and the slot's name."""
    held: dict[str, Mapping[str, torch.Tensor]] = {}
    for name, slot in keys:
        if name not in held:
            engine = module.engines[name]
            with raised_as(EngineError, f"The engine {name!r} failed to tell what it held"):
                held[name] = engine.previous() if isinstance(engine, HoldsPrevious) else {}
        yield held[name], slot
