"""What two sets of weights differ in: of sources, of modules, or one of each.

Everything is read once, tensor by tensor, and all elements count. No more than one pair of tensors
is in memory at a time, but for what a source or the replay of recipes keeps.
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
from refitkit.pipeline.gate import in_order, inside_all
from refitkit.pipeline.mapping import map_slots, require_all
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.stage import live_reader
from refitkit.pipeline.targets import open_weights, require_unchanged
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.program.distance import Distance, chunks, distance, is_whole
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import SupportsReadback, WeightSource
from refitkit.recipe import RefitPlan
from refitkit.recipe.reads import name_in, twins_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import Slot
    from refitkit.pipeline.context import Context
    from refitkit.protocols import Engine, SlotValue


# MERGED diff_sides: The two sides of a diff: each is weights, or a module that holds some.

_OF_NAMES = {"subtree": "", "ignore": (), "rename": ()}
"""Rules that need no program."""
_NO_PROGRAM = RefitPlan(
    PlanData(backend="", leaves=(), ledger=(), fingerprint=Fingerprint(graph="", slots="")), {}
)

Side: TypeAlias = CompiledModule | WeightSource


@dataclass(frozen=True)
class Differ:
    """Compares two sides with the plugins and settings of a pipeline.

    Attributes:
        context: Plugins and settings.
        load: Opens a module, which runs the code in it.
        plan: How weights become slots, or what a program reads; None: the module's own.
        rules: Rules for A alone and for B alone; a field takes the place of that of the settings.
    """

    context: Context
    load: Callable[[object], CompiledModule]
    plan: RefitPlan | None = None
    rules: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})

    def diff(self, a: object, b: object) -> DiffReport:
        """What two sets of weights differ in; see ``Pipeline.diff``."""
        clock = self.context.clock("diff")
        with clock.stage("open"):
            contexts = [self._context_for(one) for one in self.rules]
            sides = self._opened(a, b)
            self._require_rules_of_weights(sides)
        with clock.stage("compare"):
            report = self._compared(sides, contexts)
            for side in sides:
                if not isinstance(side, CompiledModule):
                    require_unchanged(side, reread=self.context.config.reread)
            return report

    # -- rules ------------------------------------------------------------------------------

    def _context_for(self, rules: Mapping[str, Any]) -> Context:
        """Plugins and settings for one side.

        Raises:
            ConfigError: Its rules do not exist or have wrong types; names all of them.
        """
        if not rules:
            return self.context
        own = {**self.context.config.rules.model_dump(), **rules}
        return self.context.with_settings(rules=Config.of({"rules": own}).rules)

    def _require_rules_of_weights(self, sides: tuple[Side, Side]) -> None:
        """Refuse rules for a module.

        Raises:
            ConfigError: A side that has rules of its own is a module; names the sides.
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
        """Both, each as weights if it can be read as such, else as a module.

        Raises:
            SourceError: One or both are neither; says why, of each.
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
        if isinstance(thing, CompiledModule):
            return thing
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

    def _compared(self, sides: tuple[Side, Side], contexts: Sequence[Context]) -> DiffReport:
        """What they differ in. No refit of a module comes between."""
        modules = {id(side): side for side in sides if isinstance(side, CompiledModule)}
        gates = in_order(module.gate for module in modules.values())
        return inside_all([gate.refit for gate in gates], lambda: self._compare(sides, contexts))

    def _compare(self, sides: tuple[Side, Side], contexts: Sequence[Context]) -> DiffReport:
        ties = () if self.plan is None else self.plan.data.ties
        sources = self._sources(*sides, *contexts)
        notes = dict.fromkeys(note for one in sources for note in _notes_of(one))
        return compared(*sources, ties).model_copy(update={"notes": tuple(notes)})

    def _sources(
        self, a: Side, b: Side, context_a: Context, context_b: Context
    ) -> tuple[WeightSource, WeightSource]:
        if isinstance(a, CompiledModule):
            if isinstance(b, CompiledModule):
                _require_alike(a, b)
                return held_by(a, a.slots), held_by(b, b.slots)
            given = self._given_to(a, b, context_b)
            return held_by(a, given.slots), given
        if isinstance(b, CompiledModule):
            given = self._given_to(b, a, context_a)
            return given, held_by(b, given.slots)
        return self._as_read(a, context_a, "A"), self._as_read(b, context_b, "B")

    def _as_read(self, source: WeightSource, context: Context, side: str) -> WeightSource:
        """A source as the plan's program reads it.

        Without a plan names are those of the source, but for what rules of names say.
        """
        if self.plan is not None:
            try:
                return transformed(context, self.plan, source)
            except WeightMismatchError as exc:
                low = side.lower()
                exc.add_note(f"That is {side}. For it alone: rules_{low}=, or --{low}- for flags.")
                raise
        if context.config.rules == Rules():
            return source
        if context.config.rules.model_copy(update=_OF_NAMES) != Rules():
            raise ConfigError(
                "Packs, casts and wrappers make of weights what a program reads, and of weights "
                "alone nobody knows the program.",
                hint="Pass its plan: plan= in Python, --plan FILE on the command line.",
            )
        return transformed(context, _NO_PROGRAM, source)

    def _given_to(
        self, compiled: CompiledModule, source: WeightSource, context: Context
    ) -> SlotTensors:
        """What the slots of a module would get from a source, in a refit."""
        plan = self.plan or compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so nobody knows which weight goes into which slot.",
                hint="Pass one, made from the program that was compiled.",
            )
        plan.check_engines(compiled.backend, compiled.slots)
        context = context.with_settings(check_finite=False)  # NaN can be compared
        source = transformed(context, plan, source)
        opened = compiled.opened
        mapping = map_slots(context, plan, opened, source, compiled.program)
        check_weights(context, plan, opened, source, partial=False)
        with raised_as(SourceError, f"{source.description} cannot be read"):
            require_all(mapping, source)
        return given_by(
            source.description, compiled, mapping.values.values(), notes=_notes_of(source)
        )


def _notes_of(source: WeightSource) -> tuple[str, ...]:
    """How the names of a source were read, where that was not as they are."""
    if isinstance(source, SlotTensors):
        return source.notes
    return source.notes() if isinstance(source, Transformed) else ()


def _require_alike(a: CompiledModule, b: CompiledModule) -> None:
    """Refuse modules of other models.

    Raises:
        WeightMismatchError: Lists the slots that only one has, or that are not alike.
    """
    problems = list(_unlike({s.key: s for s in a.slots}, {s.key: s for s in b.slots}))
    if problems:
        message = "The modules are of different models, or were compiled differently."
        raise WeightMismatchError(message, problems=problems)


def _unlike(a: dict[tuple[str, str], Slot], b: dict[tuple[str, str], Slot]) -> Iterator[Problem]:
    for key in dict.fromkeys([*a, *b]):
        name, one, other = "/".join(key), a.get(key), b.get(key)
        if one is None or other is None:
            yield Problem(name, "only in A" if other is None else "only in B")
        elif (one.dtype, one.shape, one.count) != (other.dtype, other.shape, other.count):
            found, wanted = (f"{s.dtype} {s.shape or s.count}" for s in (one, other))
            yield Problem(name, "not alike", found, wanted)


_Entry: TypeAlias = "tuple[WeightSource, str]"
"""A source, and the name of an entry in it."""


def compared(a: WeightSource, b: WeightSource, ties: Iterable[tuple[str, ...]] = ()) -> DiffReport:
    """What two sources differ in, name by name.

    Of tied weights a source may have all names or one: a name that only one source has is compared
    with a name of the other one that is the same tensor.

    Args:
        a: A source.
        b: Another one.
        ties: Names that are known to be one tensor, beside those that the sources show.

    Raises:
        SourceError: Entries cannot be read, or are not what the source said; lists all of them.
    """
    names, problems, rows = dict.fromkeys([*a.names(), *b.names()]), list[Problem](), []
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
    return DiffReport(a=a.description, b=b.description, rows=tuple(sorted(rows, key=_place)))


def _place(row: DiffRow) -> tuple[int, float, float, str]:
    """Where a row stands: without a number, then by relative change, then the same."""
    rank = 2 if row.state == "same" else 0 if row.relative is None else 1
    return rank, -(row.relative or 0.0), -(row.largest or 0.0), row.name


def _row(
    name: str, a: WeightSource, b: WeightSource, twins: Mapping[str, tuple[str, ...]]
) -> DiffRow:
    in_a, in_b = name_in(a.names(), name, twins), name_in(b.names(), name, twins)
    if in_b is None:
        return _described(name, "only in A", a.info(name))
    if in_a is None:
        return _described(name, "only in B", b.info(name))
    row = _of_both(name, (a, in_a), (b, in_b))
    tied = [f"{which} has it as {n!r}" for which, n in (("A", in_a), ("B", in_b)) if n != name]
    return row.model_copy(update={"note": "; ".join(filter(None, (*tied, row.note)))})


def _of_both(name: str, a: _Entry, b: _Entry) -> DiffRow:
    one, other = (source.info(there) for source, there in (a, b))
    unusable = [f"{which}: {i.unusable}" for which, i in (("A", one), ("B", other)) if i.unusable]
    if unusable:
        return _described(name, "not usable", one, other, note="; ".join(unusable))
    if one.shape != other.shape:
        return _described(name, "other shape", one, other)
    return _subtracted(name, a, b, one, other)


def _subtracted(name: str, a: _Entry, b: _Entry, one: TensorInfo, other: TensorInfo) -> DiffRow:
    """A row of two tensors of one shape."""
    if one.dtype == other.dtype:
        found = distance(_read(*a, one), _read(*b, other))
        state = "changed" if found.differing else "same"
        return _measured(_described(name, state, one), found)
    row, wider = _described(name, "other dtype", one, other), _wider(one, other)
    if wider is None:
        return row
    pieces = chunks(_read(*a, one), _read(*b, other))
    parts = (distance(x.to(wider), y.to(wider)) for x, y in pieces)
    return _measured(row, sum(parts, start=Distance()))


def _described(
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


def _measured(row: DiffRow, found: Distance) -> DiffRow:
    numbers = {"relative": found.relative, "largest": found.largest, "share": found.share}
    return row.model_copy(update=numbers)


def _wider(one: TensorInfo, other: TensorInfo) -> torch.dtype | None:
    """What two types can be converted to and subtracted in; None where that means nothing."""
    kinds = dtype_of(one.dtype), dtype_of(other.dtype)
    if any(map(is_whole, kinds)):
        return None
    if any(kind.is_complex for kind in kinds):
        return torch.complex128
    return torch.float64 if torch.float64 in kinds else torch.float32


def _read(source: WeightSource, name: str, info: TensorInfo) -> torch.Tensor:
    """A tensor, if it is what was said of it."""
    value = source.get(name)
    if value.dtype is not dtype_of(info.dtype) or tuple(value.shape) != info.shape:
        found = f"{value.dtype} {tuple(value.shape)}"
        problem = Problem(name, "not what was announced", found, f"{info.dtype} {info.shape}")
        raise SourceError(f"{source.description} is not what it says.", problems=[problem])
    return value


# MERGED slot_tensors: Tensors by slot as a weight source: what a module holds, and what a source would give it.


class SlotTensors:
    """Tensors by slot, read or computed when they are asked for.

    Attributes:
        description: What they are, in words.
        notes: How the names of the weights that they come from were read.
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
            description: What they are, in words.
            tensors: Slots, each with what loads its tensor.
            engines: Number of engines of the module: of several, names begin with the engine's.
            notes: How the names of the weights that they come from were read.
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
        """What the engine says of a slot; where it knows no shape, the tensor is flat."""
        slot, _ = self._tensors[fqn]
        return TensorInfo(dtype=slot.dtype, shape=_shape(slot))

    def get(self, fqn: str) -> torch.Tensor:
        """Its tensor."""
        slot, load = self._tensors[fqn]
        value = load()
        return value.reshape(_shape(slot)) if value.numel() == slot.count else value


def held_by(compiled: CompiledModule, slots: Iterable[Slot]) -> SlotTensors:
    """What slots of a module hold, read or remembered.

    Raises:
        UnsupportedTargetError: Nobody knows it; lists the engines.
    """
    engines, listed = compiled.engines, tuple(slots)
    unknown = [
        name
        for name, engine in engines.items()
        if not isinstance(engine, SupportsReadback)
        and any(_known(engine, slot.name) is None for slot in listed if slot.engine == name)
    ]
    if unknown:
        raise UnsupportedTargetError(
            "Nobody knows what the module holds: some of its engines cannot be read, and were not "
            "refitted since they were opened.",
            problems=[Problem(name, "cannot be read") for name in unknown],
            hint="Compare with the weights that it was last refitted to, or made from.",
        )
    loads = [(slot, _reading(engines[slot.engine], slot.name)) for slot in listed]
    return SlotTensors(f"a module of {compiled.backend}", loads, engines=len(engines))


def given_by(
    description: str,
    compiled: CompiledModule,
    values: Iterable[SlotValue],
    *,
    notes: tuple[str, ...] = (),
) -> SlotTensors:
    """What slots of a module would get. A plan may know shapes that the engine does not."""
    loads = [(compiled.engines[v.slot.engine].slots[v.slot.name], v.load) for v in values]
    return SlotTensors(description, loads, engines=len(compiled.engines), notes=notes)


def _shape(slot: Slot) -> tuple[int, ...]:
    return slot.shape if slot.shape is not None else (slot.count,)


def _known(engine: Engine, slot: str) -> torch.Tensor | None:
    read = live_reader(engine)
    return None if read is None else read(slot)


def _reading(engine: Engine, slot: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        value = _known(engine, slot)
        if value is None:
            raise SourceError(f"The engine {engine.name!r} does not know {slot!r} any more.")
        return value

    return load
