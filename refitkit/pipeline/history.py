"""The weights that a module holds, the weights that it held before, and the ways back to those.

``WeightState`` is one frozen value. A refit replaces it by one assignment and a rollback puts the
old one back, so an interrupt comes before or after and never between.

There are three ways back:

- **Undo.** A ``Record`` keeps, for the slots that one refit wrote, the values from before it. The
  newest refit needs no copies if the engines still have the old values (``HoldsPrevious``).
- **Base.** ``Config.keep_base`` copies each slot when it is first written.
- **The file** that the module was loaded from (``LoadOrigin``) is opened again, so nothing is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from refitkit.errors import (
    EngineError,
    NotRefittableError,
    Problem,
    raise_if_resource,
    raised_as,
    resources,
)
from refitkit.files.file_state import FileState
from refitkit.model import KeptWeights, SlotKey
from refitkit.pipeline.stage import live_reader
from refitkit.protocols import HoldsPrevious, SupportsReadback

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import torch

    from refitkit.config import Config
    from refitkit.pipeline.delta import LiveSources
    from refitkit.protocols import OpenedModule
    from refitkit.recipe import RefitPlan

Values: TypeAlias = Mapping[SlotKey, "torch.Tensor"]

FIRST = "as compiled or loaded"
"""Description of the weights of version 0."""

NO_ROLLBACK = "a refit with rollback=False wrote over them"
NO_COPIES = "Config.keep_base=True would have kept copies of them"
BY_OTHERS = "another process has refitted the shared weights, and its earlier weights are unknown"
ELSEWHERE = "no copies were made, as compiled.base or the loaded file had them"


@dataclass(frozen=True)
class WeightState:
    """The facts about the weights that a module holds.

    Attributes:
        version: 0 as compiled or loaded, one more with every committed refit.
        label: The caller's name of the weights; empty if nobody has given them one.
        source: Description of the weights.
        live: The sources of each slot's value, if the last refit was one with ``delta``.
        overridden: Leaves that no state_dict holds and that a refit gave another value than the
            plan keeps.
        history: The ways back to earlier weights.
    """

    version: int = 0
    label: str = ""
    source: str = FIRST
    live: LiveSources | None = None
    overridden: frozenset[str] = frozenset()
    history: History = field(default_factory=lambda: History())  # noqa: PLW0108 - defined below

    @classmethod
    def first(cls, overridden: frozenset[str], label: str = "") -> WeightState:
        """The state of a module that was just opened."""
        history = History(overridden=overridden, label=label)
        return cls(label=label, overridden=overridden, history=history)

    def elsewhere(
        self, version: int, slots: Iterable[SlotKey], overridden: frozenset[str]
    ) -> WeightState:
        """The state once another process has changed the weights: nothing else is known of them.

        Args:
            version: Version of the weights.
            slots: All slots; the other process may have written any of them.
            overridden: All leaves that it may have overridden.
        """
        first = self.history.first
        history = History(
            base_lost=BY_OTHERS,
            written=frozenset(slots),
            overridden=first.overridden,
            label=first.label,
        )
        source = "weights of another process"
        return WeightState(version=version, source=source, overridden=overridden, history=history)


@dataclass(frozen=True)
class Record:
    """One refit that may be undone.

    Attributes:
        before: The state before the refit, without its history.
        written: Slots that the refit wrote.
        kept: Copies of their values from before. Only the engines may have the others.
        in_engines: Whether the engines have the values that were not copied, until the next refit.
    """

    before: WeightState
    written: frozenset[SlotKey]
    kept: Values
    in_engines: bool = False

    @property
    def version(self) -> int:
        """Version of the weights that the refit brought."""
        return self.before.version + 1

    @property
    def is_whole(self) -> bool:
        """Whether there are copies of all written slots."""
        return self.written <= self.kept.keys()


@dataclass(frozen=True)
class RestorePoint:
    """Earlier weights, ready to be restored.

    Attributes:
        values: Values of the slots that hold another value now.
        state: The state of then, without its history.
        aliases: Slots whose values are the engines' own memory: valid until something is staged.
    """

    values: Values
    state: WeightState
    aliases: frozenset[SlotKey] = frozenset()


@dataclass(frozen=True)
class History:
    """The ways back from the present weights.

    Attributes:
        records: Refits that may be undone, the newest last, without a gap.
        base: First values of the slots that were written since. The other slots still hold theirs.
        base_lost: Why ``base`` is incomplete; empty if it is complete.
        written: All slots that were ever written.
        plan: The plan of the newest refit.
        overridden: ``WeightState.overridden`` of version 0.
        label: ``WeightState.label`` of version 0.
    """

    records: tuple[Record, ...] = ()
    base: Values = field(default_factory=dict)
    base_lost: str = ""
    written: frozenset[SlotKey] = frozenset()
    plan: RefitPlan | None = None
    overridden: frozenset[str] = frozenset()
    label: str = ""

    @property
    def first(self) -> WeightState:
        """The state of version 0, without its history."""
        return WeightState(label=self.label, overridden=self.overridden)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies. The base and records share some of them."""
        kept = [self.base, *(record.kept for record in self.records)]
        return sum({id(v): v.nbytes for values in kept for v in values.values()}.values())

    def restorable(
        self,
        origin: LoadOrigin | None,
        module: OpenedModule | None = None,
        *,
        has_named_base: bool = False,
        engines_spent: bool = False,
    ) -> tuple[KeptWeights, ...]:
        """The weights that can be restored, the oldest first, and the bytes that they cost.

        Args:
            origin: The file that the module was loaded from, if it can be opened again.
            module: The module, to ask its engines what they still have. None right after a refit,
                when they have all that they should.
            has_named_base: Whether ``compiled.base`` names the first weights.
            engines_spent: Whether a failed refit has used up what the engines had.

        Raises:
            EngineError: An engine failed to report.
        """
        shared = {id(value) for value in self.base.values()}
        rows: list[KeptWeights] = []
        for record in reversed(self.records):
            in_engines = record.in_engines and not engines_spent
            if not (record.is_whole or (in_engines and _is_in_engines(record, module))):
                break  # older weights are reached through this record
            own = sum(v.nbytes for v in record.kept.values() if id(v) not in shared)
            where = "host" if record.is_whole else "engine"
            version, source = record.before.version, record.before.source
            rows.insert(0, KeptWeights(version=version, source=source, bytes=own, where=where))
        by_base = not self.base_lost and self.plan is not None
        # records that reach back to version 0 make the file unnecessary
        by_file = origin is not None and not (rows and not rows[0].version)
        if not has_named_base and not by_base and not by_file:
            return tuple(rows)
        size = sum(value.nbytes for value in self.base.values())
        where = "base" if has_named_base else "host" if by_base else "file"
        first = KeptWeights(version=0, source=FIRST, bytes=size, where=where)
        return (first, *(row for row in rows if row.version))

    def restore_point(
        self, version: int, present: int, module: OpenedModule
    ) -> RestorePoint | None:
        """The weights of an earlier version, from copies or engines; None if neither has them.

        Args:
            version: The wanted version.
            present: The version that the module holds.
            module: The module.

        Raises:
            EngineError: An engine failed to report its previous values.
        """
        later = [record for record in self.records if record.version > version]
        befores = [_before(record, module, newest=record.version == present) for record in later]
        # without a gap: a refit whose record is missing may have written any slot
        if later and len(later) == present - version and None not in befores:
            # the newest first, so that the oldest value of a slot wins: it is the one from
            # ``version``
            values = {key: v for before in reversed(befores) for key, v in (before or {}).items()}
            copies = {id(v) for record in later for v in record.kept.values()}
            aliases = frozenset(key for key, v in values.items() if id(v) not in copies)
            return RestorePoint(values, later[0].before, aliases)
        if version == 0 and not self.base_lost:
            return RestorePoint(self.base, self.first)
        return None

    def not_restorable(self, version: int, rows: Iterable[KeptWeights]) -> NotRefittableError:
        """The error for a version that cannot be restored. It lists those that can be.

        Args:
            version: The wanted version.
            rows: The result of ``restorable``.
        """
        problems = as_problems(rows)
        if self.base_lost and not any(problem.subject == "version 0" for problem in problems):
            problems.append(Problem("version 0", "not held", hint=self.base_lost))
        elif self.base_lost == BY_OTHERS:
            problems.append(Problem(f"version {version}", "not held", hint=self.base_lost))
        return NotRefittableError(
            f"The weights of version {version} are not held.",
            problems=problems,
            hint="Config.keep_versions is the number of refits that can be undone, "
            "Config.keep_limit the bytes that they may take. compiled.base names weights that "
            "restore() reads instead.",
        )


class SnapshotBuilder:
    """Copies values before a refit writes over them, within the limits of the settings.

    Attributes:
        history: The history so far, without what the limits or the refit itself cost.
    """

    def __init__(
        self,
        module: OpenedModule,
        before: WeightState,
        written: Iterable[SlotKey],
        config: Config,
        *,
        with_base: bool,
    ) -> None:
        """Make the copies.

        Args:
            module: The module, with its old weights.
            before: The state of those.
            written: Slots that will be written.
            config: ``keep_versions`` and ``keep_limit``.
            with_base: Whether to copy values of version 0.

        Raises:
            EngineError: An engine failed to report the values that it holds.
        """
        self._module, self._before, self._config = module, before, config
        in_order = tuple(written)
        self._written = frozenset(in_order)
        self._copies: dict[SlotKey, torch.Tensor] = {}
        # the oldest records go first, which makes room below ``keep_limit``
        self.history = _without_gaps(before.history, config.keep_versions)
        if with_base:
            self._base = self._missing_in_base()
        else:
            self._base = self._lose_base(ELSEWHERE if config.keep_base else NO_COPIES)
        self._own = self._not_in_engines()
        # the limit is checked against sizes alone, before any value is copied
        if self._base or self._own:
            self._fit_limit()
        with raised_as(EngineError, "An engine failed to report the values that it holds"):
            self._copy()
            undone = in_order if config.keep_versions else ()
            kept = self._kept
            self._in_engines = self._will_be_in_engines([key for key in undone if key not in kept])

    def _missing_in_base(self) -> frozenset[SlotKey]:
        # an incomplete base cannot be restored, so nothing is added to it
        if self.history.base_lost:
            return frozenset()
        return self._written - self.history.base.keys()

    def _not_in_engines(self) -> frozenset[SlotKey]:
        """Slots that have to be copied so that this refit can be undone."""
        depth = self._config.keep_versions
        if depth != 1:  # engines have the old values until the next refit only
            return self._written if depth else frozenset()
        engines = self._module.engines.items()
        keepers = {name for name, engine in engines if isinstance(engine, HoldsPrevious)}
        return frozenset(key for key in self._written if key[0] not in keepers)

    def _fit_limit(self) -> None:
        """Keep less if it would take more bytes than are allowed; the oldest copies go first."""
        limit = self._config.keep_limit
        while limit is not None and self._size() > limit and self.history.records:
            self.history = replace(self.history, records=self.history.records[1:])
        if limit is not None and self._size() > limit:
            self._own = frozenset()
        if limit is not None and self._size() > limit:
            why = f"they take {self._size()} bytes, and keep_limit is {limit}"
            self._base = self._lose_base(why)

    def _lose_base(self, why: str) -> frozenset[SlotKey]:
        """Free the base, and copy none of it from now on."""
        self.history = replace(self.history, base={}, base_lost=self.history.base_lost or why)
        return frozenset()

    def _size(self) -> int:
        engines = self._module.engines
        new = self._base | self._own
        return self.history.nbytes + sum(engines[name].slots[slot].nbytes for name, slot in new)

    def _copy(self) -> None:
        # one copy serves both: a slot without a first value in the base still holds it now
        values = live_values(self._module, self._base | self._own)
        unknown = next((key for key in values if values[key] is None and key in self._base), None)
        if unknown is not None:
            self._base = self._lose_base(f"the engine {unknown[0]!r} cannot report what it held")
        for key in sorted(self._base | self._own):
            value = values[key]
            if value is not None:
                # ``copy=True`` for values on the CPU, which alias the engine's memory
                self._copies[key] = value.detach().to("cpu", copy=True)

    def _will_be_in_engines(self, keys: Collection[SlotKey]) -> bool:
        """Whether the engines keep these slots' present values through the refit."""
        by_engine: dict[str, list[str]] = defaultdict(list)
        for name, slot in keys:
            by_engine[name].append(slot)
        for name, slots in by_engine.items():
            engine = self._module.engines[name]
            read = live_reader(engine)
            if read is None or not isinstance(engine, HoldsPrevious):
                return False
            # an engine that is not read knows the values of all slots or of none
            asked = slots if isinstance(engine, SupportsReadback) else slots[:1]
            if any(read(slot) is None for slot in asked):
                return False
        return True

    @property
    def _kept(self) -> dict[SlotKey, torch.Tensor]:
        return {key: self._copies[key] for key in self._own if key in self._copies}

    def copy_mutable(self) -> None:
        """Copy again the slots that calls may have written since. No call runs any more."""
        engines = self._module.engines
        mutable = [key for key in self._copies if engines[key[0]].slots[key[1]].mutable]
        for key, value in live_values(self._module, mutable).items():
            if value is not None:
                self._copies[key].copy_(value.detach())

    def after(self, plan: RefitPlan) -> History:
        """The history once the refit is committed.

        Args:
            plan: The plan that the refit follows.
        """
        base = {**self.history.base, **{key: self._copies[key] for key in self._base}}
        # without its history: otherwise each record would keep all earlier copies alive
        before = replace(self._before, history=History())
        record = Record(before, self._written, self._kept, self._in_engines)
        depth = self._config.keep_versions
        records = (*self.history.records, record)[-depth:] if depth else ()
        written = self.history.written | self._written
        return replace(self.history, base=base, records=records, written=written, plan=plan)


Mark: TypeAlias = tuple[str, FileState]
"""Name of a file below the path, and its state."""


@dataclass(frozen=True)
class LoadOrigin:
    """The path that a module was loaded from, and the state of the files there.

    Attributes:
        path: Path of a file or folder.
        marks: States of the file, or of all files in the folder.
    """

    path: Path
    marks: tuple[Mark, ...]

    @classmethod
    def of(cls, target: object) -> LoadOrigin | None:
        """Take the state of the files at a path. None if the target is not a file's path."""
        if not isinstance(target, str | Path):
            return None
        try:
            path = Path(target).absolute()
            return cls(path, _marks(path)) if path.exists() else None
        except (OSError, ValueError) as exc:  # a plugin's own name, which no file can have
            raise_if_resource(exc, f"{str(target)!r} cannot be read")
            return None

    def is_unchanged(self) -> bool:
        """Whether the files are those that the module was loaded from."""
        try:
            return _marks(self.path) == self.marks
        except OSError:
            return False

    def require_unchanged(self) -> None:
        """Raise unless the files are those that the module was loaded from.

        Raises:
            NotRefittableError: They are not; names the path.
            ResourceError: The system does not let them be looked at.
        """
        # first, and only for its error: ``is_unchanged`` takes every OSError for a change
        with suppress(OSError), resources(f"{str(self.path)!r} cannot be read"):
            _marks(self.path)
        if not self.is_unchanged():
            raise NotRefittableError(
                "The weights that the module was loaded with are not held any more.",
                problems=[Problem(str(self.path), "changed since the module was loaded")],
                hint="compiled.base names weights that restore() reads instead.",
            )


def _marks(path: Path) -> tuple[Mark, ...]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple(
        (str(file.relative_to(path)), FileState.settled(file.stat))
        for file in files
        if file.is_file()
    )


def live_values(
    module: OpenedModule, keys: Collection[SlotKey]
) -> dict[SlotKey, torch.Tensor | None]:
    """Live values of slots, in the order of their names; None for those that cannot be read.

    The values alias the engines' memory.
    """
    # an engine is asked once for its reader: that takes longer than reading a slot
    names = dict.fromkeys(name for name, _ in keys)
    readers = {name: live_reader(module.engines[name]) for name in names}
    found: dict[SlotKey, torch.Tensor | None] = {}
    for engine, slot in sorted(keys):
        read = readers[engine]
        found[engine, slot] = None if read is None else read(slot)
    return found


def as_problems(rows: Iterable[KeptWeights]) -> list[Problem]:
    """The weights that are held, as problems of an error about weights that are not."""
    return [Problem(f"version {row.version}", "held", row.source) for row in rows]


def _without_gaps(history: History, depth: int) -> History:
    """The part of a history that survives one more refit.

    The refit overwrites the values that only engines have, and no older refit can be undone then.
    """
    # one place is left for the record of the coming refit
    records = history.records[1 - depth :] if depth > 1 else ()
    gaps = [number for number, record in enumerate(records) if not record.is_whole]
    return replace(history, records=records[gaps[-1] + 1 :] if gaps else records)


def _is_in_engines(record: Record, module: OpenedModule | None) -> bool:
    """Whether the engines still have the values that were not copied. No value is looked at."""
    if module is None:
        return True
    lacking = sorted(record.written - record.kept.keys())
    return all(slot in held for held, slot in _previous(module, lacking))


def _before(record: Record, module: OpenedModule, *, newest: bool) -> Values | None:
    """The values before a refit; None if one of them is lost."""
    lacking = sorted(record.written - record.kept.keys())
    if not lacking:
        return record.kept
    if not newest:
        return None
    with raised_as(EngineError, "An engine failed to report its previous values"):
        previous = zip(lacking, _previous(module, lacking), strict=True)
        found = {key: held[slot] for key, (held, slot) in previous if slot in held}
    return {**record.kept, **found} if len(found) == len(lacking) else None


def _previous(
    module: OpenedModule, keys: Collection[SlotKey]
) -> Iterator[tuple[Mapping[str, torch.Tensor], str]]:
    """The previous values of each key's engine, and the slot's name, by key."""
    previous: dict[str, Mapping[str, torch.Tensor]] = {}
    for name, slot in keys:
        if name not in previous:
            engine = module.engines[name]
            with raised_as(EngineError, f"The engine {name!r} failed to report previous values"):
                previous[name] = engine.previous() if isinstance(engine, HoldsPrevious) else {}
        yield previous[name], slot
