"""The two sides of a diff: each is weights, or a module that holds some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
from refitkit.model import Fingerprint, PlanData, Rules
from refitkit.pipeline.check import check_weights
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.diff import compared
from refitkit.pipeline.gate import in_order, inside_all
from refitkit.pipeline.load import open_weights, require_unchanged
from refitkit.pipeline.mapping import map_slots, require_all
from refitkit.pipeline.slot_tensors import SlotTensors, given_by, held_by
from refitkit.pipeline.transform import Transformed, transformed
from refitkit.protocols import WeightSource
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refitkit.host import Host
    from refitkit.model import DiffReport, Slot
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
        host: All plugins.
        config: Settings.
        load: Opens a module, which runs the code in it.
        plan: How weights become slots, or what a program reads; None: the module's own.
        rules: Rules for A alone and for B alone; a field takes the place of that of the settings.
    """

    host: Host
    config: Config
    load: Callable[[object], CompiledModule]
    plan: RefitPlan | None = None
    rules: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})

    def diff(self, a: object, b: object) -> DiffReport:
        """What two sets of weights differ in; see ``Pipeline.diff``."""
        clock = StageClock(self.host, "diff")
        with clock.stage("open"):
            configs = [self._config_for(one) for one in self.rules]
            sides = self._opened(a, b)
            self._require_rules_of_weights(sides)
        with clock.stage("compare"):
            report = self._compared(sides, configs)
            for side in sides:
                if not isinstance(side, CompiledModule):
                    require_unchanged(side, reread=self.config.reread)
            return report

    # -- rules ------------------------------------------------------------------------------

    def _config_for(self, rules: Mapping[str, Any]) -> Config:
        """Settings of one side.

        Raises:
            ConfigError: Its rules do not exist or have wrong types; names all of them.
        """
        if not rules:
            return self.config
        all_rules = Config.of({"rules": {**self.config.rules.model_dump(), **rules}}).rules
        return self.config.model_copy(update={"rules": all_rules})

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
            return open_weights(self.host, thing, self.config)
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

    def _compared(self, sides: tuple[Side, Side], configs: Sequence[Config]) -> DiffReport:
        """What they differ in. No refit of a module comes between."""
        modules = {id(side): side for side in sides if isinstance(side, CompiledModule)}
        gates = in_order(module.gate for module in modules.values())
        return inside_all([gate.refit for gate in gates], lambda: self._compare(sides, configs))

    def _compare(self, sides: tuple[Side, Side], configs: Sequence[Config]) -> DiffReport:
        ties = () if self.plan is None else self.plan.data.ties
        sources = self._sources(*sides, *configs)
        notes = dict.fromkeys(note for one in sources for note in _notes_of(one))
        return compared(*sources, ties).model_copy(update={"notes": tuple(notes)})

    def _sources(
        self, a: Side, b: Side, config_a: Config, config_b: Config
    ) -> tuple[WeightSource, WeightSource]:
        if isinstance(a, CompiledModule):
            if isinstance(b, CompiledModule):
                _require_alike(a, b)
                return held_by(a, a.slots), held_by(b, b.slots)
            given = self._given_to(a, b, config_b)
            return held_by(a, given.slots), given
        if isinstance(b, CompiledModule):
            given = self._given_to(b, a, config_a)
            return given, held_by(b, given.slots)
        return self._as_read(a, config_a, "A"), self._as_read(b, config_b, "B")

    def _as_read(self, source: WeightSource, config: Config, side: str) -> WeightSource:
        """A source as the plan's program reads it.

        Without a plan names are those of the source, but for what rules of names say.
        """
        if self.plan is not None:
            try:
                return transformed(self.host, config, self.plan, source)
            except WeightMismatchError as exc:
                low = side.lower()
                exc.add_note(f"That is {side}. For it alone: rules_{low}=, or --{low}- for flags.")
                raise
        if config.rules == Rules():
            return source
        if config.rules.model_copy(update=_OF_NAMES) != Rules():
            raise ConfigError(
                "Packs, casts and wrappers make of weights what a program reads, and of weights "
                "alone nobody knows the program.",
                hint="Pass its plan: plan= in Python, --plan FILE on the command line.",
            )
        return transformed(self.host, config, _NO_PROGRAM, source)

    def _given_to(
        self, compiled: CompiledModule, source: WeightSource, config: Config
    ) -> SlotTensors:
        """What the slots of a module would get from a source, in a refit."""
        plan = self.plan or compiled.plan
        if plan is None:
            raise PlanMismatchError(
                "The module has no plan, so nobody knows which weight goes into which slot.",
                hint="Pass one, made from the program that was compiled.",
            )
        plan.check_engines(compiled.backend, compiled.slots)
        config = config.model_copy(update={"check_finite": False})  # NaN can be compared
        source = transformed(self.host, config, plan, source)
        opened = compiled.opened
        mapping = map_slots(self.host, plan, opened, source, compiled.program, config)
        check_weights(self.host, plan, opened, source, partial=False, config=config)
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
