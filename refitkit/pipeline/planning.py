"""Making: compiling programs, planning them, and proving by trial that both are right."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from refitkit.errors import (
    ConfigError,
    NotRefittableError,
    PlanMismatchError,
    Problem,
    RefitError,
    UnsupportedTargetError,
)
from refitkit.model import FORMAT, Fingerprint, PlanData, Step, fingerprint_of_slots
from refitkit.pipeline.mapping import map_slots, partition
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.needs import needing, of_layer_types, require_planned, stated
from refitkit.pipeline.proof import prove as prove_refit
from refitkit.pipeline.proof import prove_plan
from refitkit.pipeline.targets import weight_opener
from refitkit.program import KeptProgram, facts_of
from refitkit.program.facts import tensors_of
from refitkit.program.views import lost_views
from refitkit.protocols import KnowsPlanKey
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from refitkit.host import Host
    from refitkit.model import PinnedTensor, Slot
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.module import Verbs
    from refitkit.program import ProgramFacts
    from refitkit.protocols import Backend, OpenedModule, PlanKey, SlotValue, Tools
    from refitkit.recipe.plan import Opener


def _require_program(program: object) -> None:
    """Check that something can be compiled or planned.

    Raises:
        UnsupportedTargetError: It is no ExportedProgram.
    """
    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError(
            f"A {type(program).__name__} cannot be compiled or planned.",
            hint="Export it first: program = torch.export.export(model, inputs).",
        )


def _as_proved(plan: RefitPlan, before: RefitPlan) -> RefitPlan:
    """A plan with what the proof of the same plan needed."""
    return needing(plan, before.data.needs) if plan.ledger == before.ledger else plan


class Compiler:
    """Compiles and plans one program with the plugins and settings of a pipeline."""

    def __init__(
        self,
        context: Context,
        program: ExportedProgram,
        options: Mapping[str, Any] | None,
        verbs: Verbs,
    ) -> None:
        """Touch nothing yet.

        Args:
            context: Plugins and settings.
            program: The program; it is not changed.
            options: Options of the backend.
            verbs: The pipeline, for the handles.

        Raises:
            UnsupportedTargetError: The program is no ExportedProgram.
        """
        _require_program(program)
        self._context, self._program, self._verbs = context, program, verbs
        self._options = dict(options or {})

    def compile(self, name: str, *, prove: bool) -> CompiledModule:
        """Compile it; see ``Pipeline.compile``."""
        backend, clock = self._context.backend(name), self._context.clock("compile")
        require_followable(self._program)
        with clock.stage("compile"):
            tools = self._context.tools("compile", "compile")
            opened = backend.compile(self._program, self._options, tools)
        with clock.stage("plan"):
            plan = self._planned(opened, backend, {})
            kept = self._kept()
        compiled = CompiledModule(opened, plan, kept, self._verbs)
        if prove:
            with clock.stage("prove"):
                compiled.plan = self._prove(compiled, plan)
        return compiled

    def plan(
        self, compiled: CompiledModule | None, name: str | None, *, prove: bool | None
    ) -> RefitPlan:
        """Plan it, for a module or offline; see ``Pipeline.plan``."""
        name = name or (compiled.backend if compiled else None)
        if name is None:
            raise ConfigError(
                "A plan is for a target or, offline, for a backend: pass one of them."
            )
        opened, clock = compiled.opened if compiled else None, self._context.clock("plan")
        with clock.stage("plan"):
            plan = self._planned(opened, self._context.backend(name), self._options)
        if prove:
            with clock.stage("prove"):
                plan = self._prove_plan(plan, opened)
        if compiled is not None and compiled.plan is None:
            with clock.stage("adopt"):
                plan = self._adopt(compiled, plan, prove=prove is not False)
        elif compiled is not None and compiled.plan is not None:
            plan = _as_proved(plan, compiled.plan)
        return plan

    def _planned(
        self, opened: OpenedModule | None, backend: Backend, options: Mapping[str, Any]
    ) -> RefitPlan:
        """A plan, made now or found where plans are kept."""
        context, program, folder = self._context, self._program, self._context.config.cache_folder()

        def make() -> RefitPlan:
            return make_plan(context, program, opened, backend, options)

        if folder is None:
            return make()
        tools = context.tools("plan", "plan")
        key = wanted(context.host, backend, program, opened, options, tools)
        if key is None:
            return make()
        return PlanCache(folder, tools.progress, weight_opener(context)).get(key, make)

    def _kept(self) -> KeptProgram | None:
        kept = KeptProgram.of(self._program)
        if kept is None:
            text = "the program cannot be kept: no proof, and verify='outputs' needs reference="
            self._context.host.emit(Step("plan", "plan", text))
        return kept

    def _adopt(self, compiled: CompiledModule, plan: RefitPlan, *, prove: bool) -> RefitPlan:
        """Give the plan to a module that somebody else compiled, once a copy of it is proved."""
        kept = self._kept()
        if prove:
            copy = CompiledModule(compiled.opened.reopen(), plan, kept, self._verbs)
            plan = self._prove(copy, plan)
        compiled.plan, compiled.program = plan, kept
        return plan

    def _prove(self, compiled: CompiledModule, plan: RefitPlan) -> RefitPlan:
        """The plan with what its proof needed."""
        if not compiled.program:
            return plan
        proof = prove_refit(self._context, compiled, self._program)
        self._tell("compile", proof.missing)
        return needing(plan, proof.needs)

    def _prove_plan(self, plan: RefitPlan, opened: OpenedModule | None) -> RefitPlan:
        proof = prove_plan(self._context, plan, self._program, opened, self._options)
        self._tell("plan", proof.missing)
        return needing(plan, proof.needs)

    def _tell(self, verb: str, missing: str) -> None:
        """Tell why there is no proof, if there is none."""
        if missing:
            self._context.host.emit(Step(verb, "prove", f"there is no proof by trial: {missing}"))


# MERGED plan: Making a plan: facts of the program, and what the backend knows of its slots.


def require_followable(program: ExportedProgram) -> ProgramFacts:
    """Facts of a program, if recipes can follow all memory that its leaves share.

    Raises:
        NotRefittableError: Some cannot be followed; lists them with the leaves that they share
            memory with.
    """
    facts = facts_of(program)
    if facts.conflicts:
        raise NotRefittableError(
            "Tensors of the program share memory with its weights, and no recipe can follow them. "
            "A refit would leave them stale.",
            problems=facts.conflicts,
            hint="Give such a tensor memory of its own (.clone()) if it shall not follow, or "
            "compute it from the weight in forward().",
        )
    lost = tuple(lost_views(program, facts.leaves, facts.ties, tensors_of(program)))
    if lost:
        raise NotRefittableError(
            "The program was read from a file, and some of its constants have the bits of weights. "
            "The file does not say whether the model has views of the weights there, which follow "
            "new weights, or copies, which do not.",
            problems=lost,
            hint="Compile or plan in the process that exports the model: there refitkit sees which "
            "tensors share memory.",
        )
    return facts


def make_plan(
    context: Context,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: Backend,
    options: Mapping[str, Any],
) -> RefitPlan:
    """A plan for a program and, where there is one, the module that was compiled from it.

    Raises:
        PlanMismatchError: The program is not the one that was compiled.
        NotRefittableError: Weights of the program are not weights of the engines, or tensors of
            the program share memory in a way that no recipe can follow; names them.
    """
    facts = require_followable(program)
    tools = context.tools("plan", "plan")
    parts = partition(context, program, module, backend.name, options, tools)
    draft = backend.draft(parts, module, tools)
    data = PlanData(
        backend=backend.name,
        leaves=facts.leaves,
        ties=facts.ties,
        ledger=draft.rows,
        calls=draft.calls,
        guards=draft.guards,
        pinned=index_of(draft.pinned),
        fingerprint=Fingerprint(
            graph=facts.graph,
            slots=fingerprint_of_slots(row.slot for row in draft.rows),
            settings=dict(draft.settings),
            versions=dict(draft.versions),
            platform=draft.platform,
        ),
        needs=of_layer_types(context.host, draft.layer_types),
    )
    data = data.model_copy(update={"unreached": stated(data)})
    plan = RefitPlan(data, draft.pinned, weight_opener(context))
    if module is None:
        require_planned(context.host, data, None)
    else:
        slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
        plan.check_engines(backend.name, slots)

        def served() -> Iterable[SlotValue]:
            own = TensorMap(program.state_dict)
            return map_slots(context, plan, module, own, None).values.values()

        require_planned(context.host, data, served)
    return plan


# MERGED cache: Plans kept in a folder, so that the same program is not planned twice on one machine.
#
# A file is named by the digest of all that its plan depends on. What is found under that name is
# checked all the same, like any plan file, and held against the program, the target and the versions
# at hand: a file that is damaged or does not fit is ignored, said so, and replaced.

_SUFFIX = ".refitplan"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Wanted:
    """What a plan is wanted for, and all that it depends on.

    Attributes:
        backend: Name of the backend.
        program: The program.
        facts: Its leaves, ties and fingerprint.
        constants: What no state_dict holds and plans keep, by FQN.
        slots: Slots of the target, sorted; None when planning offline.
        key: What the backend tells.
        plugins: Who may have a say in it.
    """

    backend: str
    program: ExportedProgram
    facts: ProgramFacts
    constants: Mapping[str, PinnedTensor]
    slots: tuple[Slot, ...] | None
    key: PlanKey
    plugins: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 over everything: the name of the file."""
        parts = {
            "format": FORMAT,
            "code": code_digest(_PACKAGE),
            "backend": self.backend,
            "graph": self.facts.graph,
            "ranges": sorted(f"{s}: {r}" for s, r in self.program.range_constraints.items()),
            "inputs": _described(self.program.example_inputs),
            "leaves": [leaf.model_dump(mode="json") for leaf in self.facts.leaves],
            "ties": self.facts.ties,
            "constants": {name: one.model_dump() for name, one in self.constants.items()},
            "slots": None if self.slots is None else [one.model_dump() for one in self.slots],
            "text": self.key.text,
            "versions": dict(self.key.versions),
            "platform": self.key.platform,
            "plugins": self.plugins,
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def wanted(
    host: Host,
    backend: Backend,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Wanted | None:
    """What a plan would be wanted for; None where the backend's plans cannot be kept.

    Raises:
        ConfigError: An option cannot be meant.
    """
    key = backend.plan_key(program, module, options) if isinstance(backend, KnowsPlanKey) else None
    if key is None:
        return None
    facts, tensors = facts_of(program), tensors_of(program)
    kept = {leaf.fqn: tensors[leaf.fqn] for leaf in facts.leaves if leaf.kept}
    plugins = [f"{one.name} {one.origin}" for one in host.plugins()]
    plugins += [f"layer type {one.model_dump_json()}" for one in tools.layer_types.values()]
    return Wanted(
        backend=backend.name,
        program=program,
        facts=facts,
        constants=index_of(kept),
        slots=_slots_of(module),
        key=key,
        plugins=tuple(plugins),
    )


@cache
def code_digest(folder: Path) -> str:
    """sha256 over all modules of a package.

    What plans hold is decided by refitkit's code, which can change without its version: a plan that
    an older recorder made is not to outlive it.
    """
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


class PlanCache:
    """Plans in a folder."""

    def __init__(
        self,
        folder: Path,
        progress: Callable[[str], None],
        opener: Opener,
    ) -> None:
        """Touch nothing yet.

        Args:
            folder: Where files are; it is made when the first one is written.
            progress: Called with one line of text for each step.
            opener: What turns weights into sources.
        """
        self._folder, self._tell, self._opener = folder, progress, opener

    def get(self, wish: Wanted, make: Callable[[], RefitPlan]) -> RefitPlan:
        """The plan that is kept, or one that is made now and kept.

        Args:
            wish: What it is wanted for.
            make: Makes one.
        """
        path = self._folder / f"{wish.digest}{_SUFFIX}"
        found = self._read(path, wish)
        if found is not None:
            self._tell(f"the plan was made before: {path}")
            return found
        plan = make()
        self._write(path, plan)
        return plan

    def _read(self, path: Path, wish: Wanted) -> RefitPlan | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            self._tell(f"the plan cache cannot be read: {exc}")
            return None
        try:
            plan = RefitPlan.from_bytes(content, f"{str(path)!r}", self._opener)
            self._check(plan, wish)
        except RefitError as exc:
            self._tell(f"a plan in the cache is not used, and made again: {exc}")
            return None
        return plan

    def _check(self, plan: RefitPlan, wish: Wanted) -> None:
        """Check that a plan is for what is wanted, whatever the name of its file says.

        Raises:
            PlanMismatchError: It is not; lists what differs.
            SourceError: Its guards cannot be evaluated.
        """
        problems = list(_differences(plan, wish))
        if not problems and plan.data.guards:
            problems = list(plan.broken_guards(self._opener(wish.program, plan)))
        if problems:
            raise PlanMismatchError(f"{plan.backend}: it is of something else.", problems=problems)
        if wish.slots is not None:
            plan.check_engines(wish.backend, wish.slots)

    def _write(self, path: Path, plan: RefitPlan) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            plan.save(path)
        except (OSError, RefitError) as exc:
            self._tell(f"the plan cannot be kept for the next time: {exc}")
        else:
            self._tell(f"the plan is kept for the next time: {path}")


def _differences(plan: RefitPlan, wish: Wanted) -> Iterator[Problem]:
    data, facts = plan.data, wish.facts
    made, key = data.fingerprint, wish.key
    pairs: list[tuple[str, object, object]] = [
        ("backend", data.backend, wish.backend),
        ("graph", made.graph, facts.graph),
        ("leaves", data.leaves, facts.leaves),
        ("ties", data.ties, facts.ties),
        ("versions", made.versions, dict(key.versions)),
        ("platform", made.platform, key.platform),
    ]
    if key.settings is not None:
        pairs.append(("settings", made.settings, dict(key.settings)))
    pairs += [(f"constant {n}", data.pinned.get(n), one) for n, one in wish.constants.items()]
    for name, found, wanted_ in pairs:
        if found != wanted_:
            yield Problem(name, "differs")


def _slots_of(module: OpenedModule | None) -> tuple[Slot, ...] | None:
    if module is None:
        return None
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return tuple(sorted(slots, key=lambda slot: slot.key))


def _described(inputs: object) -> list[str]:
    """Example inputs without the values of tensors: shapes and dtypes decide how engines are."""
    leaves, form = pytree.tree_flatten(inputs)
    return [str(form), *map(_text, leaves)]


def _text(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)} {value.device}"
    return repr(value)
