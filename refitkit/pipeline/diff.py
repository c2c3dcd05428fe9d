"""Diff: the differences between two sets of weights, tensor by tensor and from all elements.

A side is weights or a compiled module. The module hides how both sides become sources with the same
names. Read it in this order:

- ``Differ`` opens both sides and turns each into a ``WeightSource``. Weights beside a module become
  the slot values that a refit would write.
- ``compare_sources`` compares two sources, one name after another. At most one pair of tensors is
  in memory, apart from tensors that a source or the replay of recipes keeps.
- ``SlotTensors`` is a module's slots as a source, with live values or with new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from refitkit.config import Config
from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    Problem,
    SourceError,
    UnsupportedTargetError,
    WeightMismatchError,
    raised_as,
)
from refitkit.model import DiffReport, DiffRow, Fingerprint, PlanData, Rules, TensorInfo
from refitkit.pipeline.checks import check_weights
from refitkit.pipeline.gate import in_lock_order, inside_all
from refitkit.pipeline.mapping import map_slots, require_all_slots
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.stage import live_reader
from refitkit.pipeline.targets import open_weights, require_unchanged
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.program.distance import Distance, chunks, distance, is_whole
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import SupportsReadback, WeightSource
from refitkit.recipe import RefitPlan
from refitkit.recipe.foreign import info_of
from refitkit.recipe.reads import name_in, twins_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Slot
    from refitkit.pipeline.context import Context
    from refitkit.protocols import Engine, SlotValue


_NAME_RULE_DEFAULTS = {"subtree": "", "ignore": (), "rename": ()}
"""Defaults of the rules that need no program."""
_NO_PROGRAM = RefitPlan(
    PlanData(backend="", leaves=(), ledger=(), fingerprint=Fingerprint(graph="", slots="")), {}
)

Side: TypeAlias = CompiledModule | WeightSource


# -- both sides as sources ------------------------------------------------------------------------


@dataclass(frozen=True)
class Differ:
    """Compares two sides with the plugins and settings of a pipeline.

    Attributes:
        context: Plugins and settings.
        load: Opens a module, which runs the code in it.
        plan: The plan that turns weights into slots, or renames them as its program reads them;
            None: the module's own plan.
        rules: Rules for A and rules for B. A field replaces the one in the settings.
    """

    context: Context
    load: Callable[[object], CompiledModule]
    plan: RefitPlan | None = None
    rules: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})

    def diff(self, a: object, b: object) -> DiffReport:
        """The differences between two sides; see ``Pipeline.diff`` for arguments and errors."""
        clock = self.context.clock("diff")
        with clock.stage("open"):
            contexts = [self._context_for(one) for one in self.rules]
            sides = self._opened(a, b)
            self._require_rules_of_weights(sides)
        with clock.stage("compare"):
            report = self._compare_without_refits(sides, contexts)
            # If a file changed while it was read, the report would mix two sets of weights.
            for side in sides:
                if not isinstance(side, CompiledModule):
                    require_unchanged(side, reread=self.context.config.reread)
            return report

    # -- rules ------------------------------------------------------------------------------

    def _context_for(self, rules: Mapping[str, Any]) -> Context:
        """Plugins and settings for one side.

        Raises:
            ConfigError: Rules do not exist or have wrong types; names all of them.
        """
        if not rules:
            return self.context
        own = {**self.context.config.rules.model_dump(), **rules}
        return self.context.with_settings(rules=Config.of({"rules": own}).rules)

    def _require_rules_of_weights(self, sides: tuple[Side, Side]) -> None:
        """Refuse rules for a module.

        Raises:
            ConfigError: A side that has rules is a module; names the sides.
        """
        problems = [
            Problem(name, "is a module", hint=f"leave out its rules: {', '.join(rules)}")
            for name, side, rules in zip("AB", sides, self.rules, strict=True)
            if rules and isinstance(side, CompiledModule)
        ]
        if problems:
            raise ConfigError("Rules are for weights, not for modules.", problems=problems)

    # -- opening ----------------------------------------------------------------------------

    def _opened(self, a: object, b: object) -> tuple[Side, Side]:
        """Both sides, each as weights if they can be read as such, else as a module.

        Raises:
            SourceError: One or both sides are neither; gives the reasons for each.
        """
        found = [self._side(thing) for thing in (a, b)]
        wrong = [side for side in found if isinstance(side, SourceError)]
        if len(wrong) > 1:
            problems = [
                Problem(n, "cannot be read", hint=str(e)) for n, e in zip("AB", wrong, strict=True)
            ]
            raise SourceError("Neither A nor B can be read.", problems=problems) from wrong[0]
        one, other = found
        if isinstance(one, SourceError):
            raise one
        if isinstance(other, SourceError):
            raise other
        return one, other

    def _side(self, thing: object) -> Side | SourceError:
        """One side, or the reason why it cannot be read, so that both reasons can be reported."""
        if isinstance(thing, CompiledModule):
            return thing
        # Weights first: opening a module runs the code in it.
        try:
            return open_weights(self.context, thing)
        except SourceError as exc:
            as_weights = exc
        try:
            return self.load(thing)
        except UnsupportedTargetError as exc:
            if not isinstance(thing, str | Path) or not Path(thing).exists():
                return as_weights
            problems = [
                Problem("as weights", as_weights.message),
                Problem("as a module", exc.message),
            ]
            message = f"{str(thing)!r} holds neither weights nor a module that can be read."
            return SourceError(message, problems=problems)

    # -- comparing --------------------------------------------------------------------------

    def _compare_without_refits(
        self, sides: tuple[Side, Side], contexts: Sequence[Context]
    ) -> DiffReport:
        """The differences. Refits of the modules wait until the comparison is done."""
        # One module may be both sides, and a thread cannot enter its gate twice.
        modules = {id(side): side for side in sides if isinstance(side, CompiledModule)}
        gates = in_lock_order(module.gate for module in modules.values())
        return inside_all([gate.refit for gate in gates], lambda: self._compare(sides, contexts))

    def _compare(self, sides: tuple[Side, Side], contexts: Sequence[Context]) -> DiffReport:
        ties = () if self.plan is None else self.plan.data.ties
        sources = self._sources(*sides, *contexts)
        notes = dict.fromkeys(note for one in sources for note in _notes_of(one))
        return compare_sources(*sources, ties).model_copy(update={"notes": tuple(notes)})

    def _sources(
        self, a: Side, b: Side, context_a: Context, context_b: Context
    ) -> tuple[WeightSource, WeightSource]:
        """Both sides as sources with the same names: of slots if one side is a module."""
        if isinstance(a, CompiledModule):
            if isinstance(b, CompiledModule):
                _require_same_slots(a, b)
                return live_tensors(a, a.slots), live_tensors(b, b.slots)
            # Only slots that get a value: frozen slots do not follow from the weights.
            new = self._values_for(a, b, context_b)
            return live_tensors(a, new.slots), new
        if isinstance(b, CompiledModule):
            new = self._values_for(b, a, context_a)
            return new, live_tensors(b, new.slots)
        return self._as_read(a, context_a, "A"), self._as_read(b, context_b, "B")

    def _as_read(self, source: WeightSource, context: Context, side: str) -> WeightSource:
        """A source with the names, packing and dtypes that the plan's program reads.

        Without a plan, only rules of names are applied.

        Raises:
            ConfigError: There are other rules and no plan.
            WeightMismatchError: A transform cannot use some entries; lists all of them.
        """
        if self.plan is not None:
            try:
                return transformed(context, self.plan, source)
            except WeightMismatchError as exc:
                low = side.lower()
                exc.add_note(
                    f"This is about {side}. To set rules for {side} only, use rules_{low}= in "
                    f"Python, or --{low}-... on the command line."
                )
                raise
        if context.config.rules == Rules():
            return source
        if context.config.rules.model_copy(update=_NAME_RULE_DEFAULTS) != Rules():
            raise ConfigError(
                "Rules for packs, casts and wrappers need a plan.",
                hint="Pass the plan of the program: plan= in Python, --plan FILE on the command "
                "line.",
            )
        return transformed(context, _NO_PROGRAM, source)

    def _values_for(
        self, compiled: CompiledModule, source: WeightSource, context: Context
    ) -> SlotTensors:
        """The slot values that a refit of a module would write.

        Raises:
            PlanMismatchError: The module has no plan, or the plan is for another module.
            WeightMismatchError: The weights do not fit; lists every problem.
            UnmappedSlotError: Slots would get no value; lists them.
        """
        plan = self.plan or compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so the weight of each slot is unknown.",
                hint="Pass a plan that was made from the program that was compiled.",
            )
        plan.check_engines(compiled.backend, compiled.slots)
        context = context.with_settings(check_finite=False)  # NaN can be compared
        opened = compiled.opened
        source = transformed(context, plan, source, opened)
        mapping = map_slots(context, plan, opened, source, compiled.program)
        # Weights that do not fit may be why slots have no value, so they are reported first.
        check_weights(context, plan, opened, source, partial=False)
        with raised_as(SourceError, f"{source.description} cannot be read"):
            require_all_slots(mapping, source)
        return mapped_tensors(
            source.description, compiled, mapping.values.values(), notes=_notes_of(source)
        )


def _notes_of(source: WeightSource) -> tuple[str, ...]:
    """Notes of transforms about the names of a source."""
    if isinstance(source, SlotTensors):
        return source.notes
    return source.notes() if isinstance(source, Transformed) else ()


def _require_same_slots(a: CompiledModule, b: CompiledModule) -> None:
    """Refuse modules of different models.

    Raises:
        WeightMismatchError: Lists the slots that only one module has, or that differ in dtype,
            shape or number of elements.
    """
    problems = list(_slot_differences({s.key: s for s in a.slots}, {s.key: s for s in b.slots}))
    if problems:
        message = "The modules are of different models, or were compiled differently."
        raise WeightMismatchError(message, problems=problems)


def _slot_differences(
    a: dict[tuple[str, str], Slot], b: dict[tuple[str, str], Slot]
) -> Iterator[Problem]:
    for key in dict.fromkeys([*a, *b]):
        name, one, other = "/".join(key), a.get(key), b.get(key)
        if one is None or other is None:
            yield Problem(name, "only in A" if other is None else "only in B")
        elif (one.dtype, one.shape, one.count) != (other.dtype, other.shape, other.count):
            found, wanted = (f"{s.dtype} {s.shape or s.count}" for s in (one, other))
            yield Problem(name, "differs in type", found, wanted)


# -- two sources ----------------------------------------------------------------------------------

_Entry: TypeAlias = "tuple[WeightSource, str]"
"""A source and the name of an entry in it."""


def compare_sources(
    a: WeightSource, b: WeightSource, ties: Iterable[tuple[str, ...]] = ()
) -> DiffReport:
    """The differences between two sources: one row for each name.

    A source may have one name or all names of a tied weight. A name that only one source has is
    compared with a name of the other source for the same tensor.

    Args:
        a: A source. Relative changes are relative to it.
        b: Another source.
        ties: Names that are known to be one tensor, beside those that the sources show.

    Raises:
        SourceError: Entries cannot be read, or do not have the announced dtype or shape; lists all
            of them.
    """
    names, problems, rows = dict.fromkeys([*a.names(), *b.names()]), list[Problem](), []
    # Two sources with equal names are the common case, and need no look at ties.
    alike = len(names) == len(a.names()) == len(b.names())
    twins = {} if alike else twins_of((a, b), ties)
    for name in names:
        try:
            with raised_as(SourceError, f"{name!r} cannot be read"):
                rows.append(_row(name, a, b, twins))
        except SourceError as exc:
            problems += exc.problems or [Problem(name, "cannot be read", exc.message)]
    if problems:
        message = f"{a.description} and {b.description} cannot be compared."
        raise SourceError(message, problems=problems)
    return DiffReport(a=a.description, b=b.description, rows=tuple(sorted(rows, key=_sort_key)))


def _sort_key(row: DiffRow) -> tuple[int, float, float, str]:
    """Order of rows: first those without a number, then by relative change, then equal tensors."""
    rank = 2 if row.state == "same" else 0 if row.relative is None else 1
    return rank, -(row.relative or 0.0), -(row.largest or 0.0), row.name


def _row(
    name: str, a: WeightSource, b: WeightSource, twins: Mapping[str, tuple[str, ...]]
) -> DiffRow:
    in_a, in_b = name_in(a.names(), name, twins), name_in(b.names(), name, twins)
    if in_b is None:
        return _make_row(name, "only in A", info_of(a, name))
    if in_a is None:
        return _make_row(name, "only in B", info_of(b, name))
    row = _row_of_both(name, (a, in_a), (b, in_b))
    tied = [f"{which} has it as {n!r}" for which, n in (("A", in_a), ("B", in_b)) if n != name]
    return row.model_copy(update={"note": "; ".join(filter(None, (*tied, row.note)))})


def _row_of_both(name: str, a: _Entry, b: _Entry) -> DiffRow:
    """A row of an entry that both sources have."""
    one, other = (info_of(source, there) for source, there in (a, b))
    unusable = [f"{which}: {i.unusable}" for which, i in (("A", one), ("B", other)) if i.unusable]
    if unusable:
        return _make_row(name, "not usable", one, other, note="; ".join(unusable))
    if one.shape != other.shape:
        return _make_row(name, "other shape", one, other)
    return _row_of_values(name, a, b, one, other)


def _row_of_values(name: str, a: _Entry, b: _Entry, one: TensorInfo, other: TensorInfo) -> DiffRow:
    """A row of two tensors of one shape, with the distance between them if there is one."""
    if one.dtype == other.dtype:
        found = distance(_read(*a, one), _read(*b, other))
        state = "changed" if found.differing else "same"
        return _with_distance(_make_row(name, state, one), found)
    row, common = _make_row(name, "other dtype", one, other), _common_dtype(one, other)
    if common is None:
        return row
    # Piece by piece, so that no whole tensor is converted to the common dtype.
    pieces = chunks(_read(*a, one), _read(*b, other))
    parts = (distance(x.to(common), y.to(common)) for x, y in pieces)
    return _with_distance(row, sum(parts, start=Distance()))


def _make_row(
    name: str, state: str, info: TensorInfo, other: TensorInfo | None = None, note: str = ""
) -> DiffRow:
    return DiffRow.model_validate(
        {
            "name": name,
            "state": state,
            "dtype": info.dtype,
            "shape": info.shape,
            "other_dtype": other.dtype if other and other.dtype != info.dtype else "",
            "other_shape": other.shape if other and other.shape != info.shape else None,
            "note": note,
        }
    )


def _with_distance(row: DiffRow, found: Distance) -> DiffRow:
    numbers = {"relative": found.relative, "largest": found.largest, "share": found.share}
    return row.model_copy(update=numbers)


def _common_dtype(one: TensorInfo, other: TensorInfo) -> torch.dtype | None:
    """The dtype in which two tensors are subtracted: float32, float64 or complex128.

    None if one of them has integers or bools: their distance from floats means nothing.
    """
    kinds = dtype_of(one.dtype), dtype_of(other.dtype)
    if any(map(is_whole, kinds)):
        return None
    if any(kind.is_complex for kind in kinds):
        return torch.complex128
    return torch.float64 if torch.float64 in kinds else torch.float32


def _read(source: WeightSource, name: str, info: TensorInfo) -> torch.Tensor:
    """A tensor of a source.

    Raises:
        SourceError: The tensor does not have the announced dtype and shape.
    """
    value = source.get(name)
    if value.dtype is not dtype_of(info.dtype) or tuple(value.shape) != info.shape:
        found = f"{value.dtype} {tuple(value.shape)}"
        problem = Problem(name, "unlike its header", found, f"{info.dtype} {info.shape}")
        message = f"{source.description} has tensors that do not match their headers."
        raise SourceError(message, problems=[problem])
    return value


# -- slots as a source ----------------------------------------------------------------------------


class SlotTensors:
    """Tensors of slots as a weight source. Each is read or computed on demand.

    Attributes:
        description: Description for messages.
        notes: Notes of transforms about the names of the weights that the tensors come from.
    """

    def __init__(
        self,
        description: str,
        tensors: Iterable[tuple[Slot, Callable[[], torch.Tensor]]],
        *,
        engines: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Read nothing yet.

        Args:
            description: Description for messages.
            tensors: Slots, each with a function that loads its tensor.
            engines: Number of engines of the module. If there are several, names of entries begin
                with the engine's name.
            notes: Notes of transforms about the names of the weights.
        """
        self.description, self.notes = description, notes
        self._tensors: Mapping[str, tuple[Slot, Callable[[], torch.Tensor]]] = {
            slot.name if engines == 1 else f"{slot.engine}/{slot.name}": (slot, load)
            for slot, load in tensors
        }

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots that there are tensors for."""
        return tuple(slot for slot, _ in self._tensors.values())

    def names(self) -> Collection[str]:
        """Names of the slots."""
        return self._tensors.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of a slot. The shape is flat if the engine knows none."""
        slot, _ = self._tensors[fqn]
        return TensorInfo(dtype=slot.dtype, shape=_shape(slot))

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of a slot, in the announced shape if it has as many elements."""
        slot, load = self._tensors[fqn]
        value = load()
        return value.reshape(_shape(slot)) if value.numel() == slot.count else value


def live_tensors(compiled: CompiledModule, slots: Iterable[Slot]) -> SlotTensors:
    """Live values of slots of a module, read or remembered.

    Raises:
        UnsupportedTargetError: Engines cannot be read and do not remember the values of all slots;
            lists the engines.
    """
    # Checked for all engines before anything is read, so that the error lists all of them.
    engines, listed = compiled.engines, tuple(slots)
    unknown = [
        name
        for name, engine in engines.items()
        if not isinstance(engine, SupportsReadback)
        and any(_live_value(engine, slot.name) is None for slot in listed if slot.engine == name)
    ]
    if unknown:
        raise UnsupportedTargetError(
            "The live weights of the module are unknown: some of its engines cannot be read, and "
            "were not refitted since they were opened.",
            problems=[Problem(name, "cannot be read") for name in unknown],
            hint="Compare with the weights of its last refit, or with those it was compiled from.",
        )
    loads = [(slot, _live_loader(engines[slot.engine], slot.name)) for slot in listed]
    return SlotTensors(f"a module of {compiled.backend}", loads, engines=len(engines))


def mapped_tensors(
    description: str,
    compiled: CompiledModule,
    values: Iterable[SlotValue],
    *,
    notes: tuple[str, ...] = (),
) -> SlotTensors:
    """New values for slots of a module.

    Args:
        description: Description of the weights for messages.
        compiled: The module.
        values: The values.
        notes: Notes of transforms about the names of the weights.
    """
    # The module's own slots, as for live values: a plan may know shapes that the engine does not.
    loads = [(compiled.engines[v.slot.engine].slots[v.slot.name], v.load) for v in values]
    return SlotTensors(description, loads, engines=len(compiled.engines), notes=notes)


def _shape(slot: Slot) -> tuple[int, ...]:
    return slot.shape if slot.shape is not None else (slot.count,)


def _live_value(engine: Engine, slot: str) -> torch.Tensor | None:
    read = live_reader(engine)
    return None if read is None else read(slot)


def _live_loader(engine: Engine, slot: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        value = _live_value(engine, slot)
        if value is None:
            raise SourceError(f"The engine {engine.name!r} no longer knows the value of {slot!r}.")
        return value

    return load
