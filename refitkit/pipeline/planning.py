"""Planning: compile a program, make its plan or read it from the cache, and prove both by trial.

Read it in this order:

- ``Compiler`` carries out the verbs ``compile`` and ``plan`` for one program.
- ``make_plan`` makes a plan from the facts of the program and the backend's draft of its slots.
- ``PlanCache`` keeps plans in a folder, so that one machine does not plan a program twice. A file
  is named by the digest of everything that its plan depends on (``PlanInputs``).
"""

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
    CompileError,
    ConfigError,
    NotRefittableError,
    PlanMismatchError,
    PluginError,
    Problem,
    RefitError,
    UnsupportedTargetError,
    raised_as,
)
from refitkit.model import FORMAT, Fingerprint, PlanData, fingerprint_of_slots
from refitkit.offered import received, received_module
from refitkit.pipeline.mapping import map_slots, partition
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.needs import (
    explain_unreached,
    layer_type_needs,
    require_complete_plan,
    with_needs,
)
from refitkit.pipeline.proof import prove as prove_refit
from refitkit.pipeline.proof import prove_plan
from refitkit.pipeline.targets import reopened, weight_opener
from refitkit.pipeline.transform import with_attached_data
from refitkit.program import KeptProgram, facts_of
from refitkit.program.facts import tensors_of
from refitkit.program.views import lost_views
from refitkit.protocols import KnowsPlanKey, PlanDraft
from refitkit.recipe import RefitPlan, TensorMap
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from refitkit.host import Host
    from refitkit.model import LedgerRow, PinnedTensor, Slot
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.module import Verbs
    from refitkit.program import ProgramFacts
    from refitkit.protocols import Backend, OpenedModule, PlanKey, SlotValue, Tools
    from refitkit.recipe.plan import Opener


# -- the verbs ----------------------------------------------------------------------------------


class Compiler:
    """Compiles and plans one program with the plugins and settings of a pipeline."""

    def __init__(
        self,
        context: Context,
        program: ExportedProgram,
        options: Mapping[str, Any] | None,
        verbs: Verbs,
    ) -> None:
        """Check the program, and compile nothing yet.

        Args:
            context: Plugins and settings.
            program: The program; it is not changed.
            options: Options of the backend.
            verbs: The pipeline, for the handles of modules.

        Raises:
            UnsupportedTargetError: The program is not an ExportedProgram.
        """
        _require_program(program)
        self._context, self._program, self._verbs = context, program, verbs
        self._options = dict(options or {})

    def compile(self, name: str, *, prove: bool) -> CompiledModule:
        """A compiled module with its plan; see ``Pipeline.compile``.

        Args:
            name: Name of the backend.
            prove: Whether to prove the module by trial.
        """
        backend, clock = self._context.backend(name), self._context.clock("compile")
        # Compiling may take minutes, so a program that cannot be planned is refused first.
        require_followable(self._program)
        with clock.stage("compile"):
            tools = self._context.tools("compile", "compile")
            who = self._context.who_made(name)
            doing = "The program cannot be compiled"
            with raised_as(CompileError, f"{who} failed to compile", doing=doing):
                found = backend.compile(self._program, self._options, tools)
            opened = received_module(found, who)
        with clock.stage("plan"):
            # No options: they are for planning offline, and a module knows its own.
            plan = self._plan(opened, backend, {})
            kept = self._keep_program()
        compiled = CompiledModule(opened, plan, kept, self._verbs)
        if prove:
            with clock.stage("prove"):
                plan = self._prove(compiled, plan)
                compiled.plan = plan
        self._emit_unseen("compile", plan)
        return compiled

    def plan(
        self, compiled: CompiledModule | None, name: str | None, *, prove: bool | None
    ) -> RefitPlan:
        """A plan for a module, or an offline plan for a backend; see ``Pipeline.plan``.

        Args:
            compiled: The module; None when planning offline.
            name: Name of the backend; None: the module's.
            prove: True: compare the plan with engines made from other weights. None: only refit a
                copy of a module that has no plan yet. False: prove nothing.

        Raises:
            ConfigError: Neither a module nor a backend is given.
        """
        name = name or (compiled.backend if compiled else None)
        if name is None:
            raise ConfigError(
                "A plan is for a target or, offline, for a backend: pass one of them."
            )
        opened, clock = compiled.opened if compiled else None, self._context.clock("plan")
        with clock.stage("plan"):
            plan = self._plan(opened, self._context.backend(name), self._options)
        if prove:
            with clock.stage("prove"):
                plan = self._prove_plan(plan, opened)
        if compiled is not None and compiled.plan is None:
            with clock.stage("adopt"):
                plan = self._adopt(compiled, plan, prove=prove is not False)
        elif compiled is not None and compiled.plan is not None:
            plan = _with_earlier_proof(plan, compiled.plan)
        self._emit_unseen("plan", plan)
        return plan

    def _plan(
        self, opened: OpenedModule | None, backend: Backend, options: Mapping[str, Any]
    ) -> RefitPlan:
        """The plan, new or from the cache, with the data that transforms attach."""
        # the cache keeps no such data: it depends on settings of plugins
        plan = self._cached_plan(opened, backend, options)
        return with_attached_data(self._context, plan, self._program)

    def _cached_plan(
        self, opened: OpenedModule | None, backend: Backend, options: Mapping[str, Any]
    ) -> RefitPlan:
        """The plan in the cache, or a new one if there is no cache or no usable file in it."""
        context, program, folder = self._context, self._program, self._context.config.cache_folder()

        def make() -> RefitPlan:
            return make_plan(context, program, opened, backend, options)

        if folder is None:
            return make()
        tools = context.tools("plan", "plan")
        inputs = plan_inputs(context.host, backend, program, opened, options, tools)
        if inputs is None:
            return make()
        return PlanCache(folder, tools.progress, weight_opener(context)).get(inputs, make)

    def _keep_program(self) -> KeptProgram | None:
        """The program without its weights. None, with an event, if it cannot be kept."""
        kept = KeptProgram.of(self._program)
        if kept is None:
            text = "the program cannot be kept: no proof, and verify='outputs' needs reference="
            self._context.step("plan", "plan", text)
        return kept

    def _adopt(self, compiled: CompiledModule, plan: RefitPlan, *, prove: bool) -> RefitPlan:
        """Give a plan to a module that another tool compiled, and return it with its needs."""
        kept = self._keep_program()
        if prove:
            # A proof refits to arbitrary weights. It uses a copy, because the module may be serving
            # calls and its present weights need not be the program's.
            second = reopened(self._context, compiled.opened)
            copy = CompiledModule(second, plan, kept, self._verbs)
            plan = self._prove(copy, plan)
        # only after the proof: the module must not keep a plan that failed it
        compiled.plan, compiled.program = plan, kept
        return plan

    def _prove(self, compiled: CompiledModule, plan: RefitPlan) -> RefitPlan:
        """The plan with the results of its proof by a refit of a module."""
        if not compiled.program:
            return plan
        proof = prove_refit(self._context, compiled, self._program)
        self._emit_missing("compile", proof.missing)
        return proof.noted_in(plan)

    def _prove_plan(self, plan: RefitPlan, opened: OpenedModule | None) -> RefitPlan:
        """The plan with the results of its proof by engines with other weights."""
        proof = prove_plan(self._context, plan, self._program, opened, self._options)
        self._emit_missing("plan", proof.missing)
        return proof.noted_in(plan)

    def _emit_missing(self, verb: str, missing: str) -> None:
        """Emit an event with the reason if there is no proof."""
        if missing:
            self._context.step(verb, "prove", f"there is no proof by trial: {missing}")

    def _emit_unseen(self, verb: str, plan: RefitPlan) -> None:
        """Emit an event with the slots whose values may hold a weight that nobody saw, if any."""
        if plan.data.unseen:
            text = "made outside of torch, and no proof shows that no weight is in them"
            self._context.step(verb, "plan", f"{text}: {', '.join(plan.data.unseen)}")


def _require_program(program: object) -> None:
    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError(
            f"A {type(program).__name__} cannot be compiled or planned.",
            hint="Export it first: program = torch.export.export(model, inputs).",
        )


def _with_earlier_proof(plan: RefitPlan, before: RefitPlan) -> RefitPlan:
    """A plan with the results of an earlier plan's proof, if both have the same ledger."""
    if list(map(_unproved, plan.ledger)) != list(map(_unproved, before.ledger)):
        return plan
    pairs = zip(plan.ledger, before.ledger, strict=True)
    ledger = tuple(old if new.unseen else new for new, old in pairs)
    return with_needs(plan.noting(ledger=ledger), before.data.needs)


def _unproved(row: LedgerRow) -> LedgerRow:
    """A row without what a proof changes."""
    return row.model_copy(update={"unseen": False, "reason": ""})


# -- making a plan --------------------------------------------------------------------------------


def make_plan(
    context: Context,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: Backend,
    options: Mapping[str, Any],
) -> RefitPlan:
    """A new plan for a program, checked against the module that was compiled from it.

    Args:
        context: Plugins and settings.
        program: The program; it is not changed.
        module: The opened target; None when planning offline.
        backend: The backend, which drafts the rows of the slots.
        options: Options of the backend.

    Raises:
        PlanMismatchError: The module was compiled from another program.
        NotRefittableError: Weights reach no slot, or tensors share memory with weights in a way
            that no recipe can follow; lists them.
        PluginError: No plugin can cut programs for this backend.
    """
    facts = require_followable(program)
    tools = context.tools("plan", "plan")
    cutter, parts = partition(context, program, module, backend.name, options, tools)
    who = context.who_made(backend.name)
    doing = "The program cannot be planned"
    failed = f"{who} failed to draft a plan from the parts of {cutter}"
    with raised_as(PluginError, failed, doing=doing):
        draft = received(backend.draft(parts, module, tools), PlanDraft, who)
    with raised_as(PluginError, f"{who} gave a draft with wrong fields", doing=doing):
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
            needs=layer_type_needs(context.host, draft.layer_types),
        )
    # In a second step, because the reasons follow from the rest of the plan.
    data = data.model_copy(update={"unreached": explain_unreached(data)})
    plan = RefitPlan(data, draft.pinned, weight_opener(context))
    if module is None:
        require_complete_plan(context.host, data, None)
    else:
        slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
        plan.check_engines(backend.name, slots)

        # A function, because mapping takes time and most plans are complete without it.
        def own_values() -> Iterable[SlotValue]:
            own = TensorMap(program.state_dict)
            return map_slots(context, plan, module, own, None).values.values()

        require_complete_plan(context.host, data, own_values)
    return plan


def require_followable(program: ExportedProgram) -> ProgramFacts:
    """Facts of a program, if recipes can follow all memory that its leaves share.

    Raises:
        NotRefittableError: Tensors share memory with weights in a way that no recipe can follow,
            the program's file does not say which constants are views of weights, or no engine can
            be refitted in a dtype; lists the tensors.
    """
    facts = facts_of(program)
    if facts.conflicts:
        raise NotRefittableError(
            "Tensors of the program share memory with its weights, and no recipe can follow them. "
            "A refit would leave them stale.",
            problems=facts.conflicts,
            hint="Give each tensor memory of its own (.clone()) if it must not follow the weight, "
            "or compute it from the weight in forward().",
        )
    lost = tuple(lost_views(program, facts.leaves, facts.ties, tensors_of(program)))
    if lost:
        raise NotRefittableError(
            "The program was read from a file, and some of its constants have the bits of weights. "
            "The file does not say whether the constants are views of weights in the model, which "
            "follow new weights, or copies, which do not.",
            problems=lost,
            hint="Compile or plan in the process that exports the model: there refitkit sees which "
            "tensors share memory.",
        )
    return facts


# -- the plan cache -------------------------------------------------------------------------------

_SUFFIX = ".refitplan"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan depends on, known before planning.

    Attributes:
        backend: Name of the backend.
        program: The program.
        facts: Leaves, ties and fingerprint of the program.
        constants: Index entries of tensors that no state_dict holds and plans keep, by FQN.
        slots: Slots of the target, sorted; None when planning offline.
        key: The backend's key of the plan.
        plugins: Plugins and layer types that may influence the plan, as text.
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
        """Name of the plan's file without suffix: sha256 over all inputs, in hexadecimal."""
        parts = {
            "format": FORMAT,
            "code": code_digest(_PACKAGE),
            "backend": self.backend,
            "graph": self.facts.graph,
            # Programs with the same graph may differ in the ranges of their dynamic shapes.
            "ranges": sorted(f"{s}: {r}" for s, r in self.program.range_constraints.items()),
            "inputs": _describe_inputs(self.program.example_inputs),
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


def plan_inputs(
    host: Host,
    backend: Backend,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> PlanInputs | None:
    """The inputs of a plan; None if the backend's plans cannot be cached.

    Args:
        host: All plugins.
        backend: The backend.
        program: The program.
        module: The opened target; None when planning offline.
        options: Options of the backend.
        tools: Objects that the pipeline lends to plugins.

    Raises:
        ConfigError: An option is invalid.
    """
    key = backend.plan_key(program, module, options) if isinstance(backend, KnowsPlanKey) else None
    if key is None:
        return None
    facts, tensors = facts_of(program), tensors_of(program)
    # A plan contains these values, so a program with other values needs another plan.
    kept = {leaf.fqn: tensors[leaf.fqn] for leaf in facts.leaves if leaf.kept}
    plugins = [f"{one.name} {one.origin}" for one in host.plugins()]
    plugins += [f"layer type {one.model_dump_json()}" for one in tools.layer_types.values()]
    return PlanInputs(
        backend=backend.name,
        program=program,
        facts=facts,
        constants=index_of(kept),
        slots=_sorted_slots(module),
        key=key,
        plugins=tuple(plugins),
    )


def _sorted_slots(module: OpenedModule | None) -> tuple[Slot, ...] | None:
    if module is None:
        return None
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return tuple(sorted(slots, key=lambda slot: slot.key))


def _describe_inputs(inputs: object) -> list[str]:
    """Structure, dtypes, shapes and devices of example inputs. Engines do not depend on values."""
    leaves, form = pytree.tree_flatten(inputs)
    return [str(form), *map(_describe_input, leaves)]


def _describe_input(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)} {value.device}"
    return repr(value)


@cache
def code_digest(folder: Path) -> str:
    """sha256 over names and contents of all Python files in a folder, in hexadecimal.

    The contents of a plan depend on refitkit's code, which may change without its version. A cached
    plan of an older recorder must not survive that change.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        # With the length, no two different sets of files give the same bytes.
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class PlanCache:
    """Plans as files in a folder.

    The name of a file is not trusted. Its plan is checked like any plan file and compared with the
    program, the target and the installed versions. A damaged or unsuitable file is reported as
    progress and replaced. Planning continues if the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        progress: Callable[[str], None],
        opener: Opener,
    ) -> None:
        """Touch no file yet.

        Args:
            folder: The folder of the plans; created when the first plan is written.
            progress: Called with one line of text for each step.
            opener: Function that turns weights into sources.
        """
        self._folder, self._progress, self._opener = folder, progress, opener

    def get(self, inputs: PlanInputs, make: Callable[[], RefitPlan]) -> RefitPlan:
        """The cached plan, or a new plan, which is then written to the cache.

        Args:
            inputs: Everything that the plan depends on.
            make: Makes a new plan.
        """
        path = self._folder / f"{inputs.digest}{_SUFFIX}"
        cached = self._read(path, inputs)
        if cached is not None:
            self._progress(f"the plan is read from the cache: {path}")
            return cached
        plan = make()
        self._write(path, plan)
        return plan

    def _read(self, path: Path, inputs: PlanInputs) -> RefitPlan | None:
        """The plan in a file; None, with progress, if there is none or it cannot be used."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # the usual miss, which needs no message
            return None
        except OSError as exc:
            self._progress(f"the plan cache cannot be read: {exc}")
            return None
        try:
            plan = RefitPlan.from_bytes(content, f"{str(path)!r}", self._opener)
            self._check(plan, inputs)
        except RefitError as exc:
            self._progress(f"a plan in the cache is not used, and made again: {exc}")
            return None
        return plan

    def _check(self, plan: RefitPlan, inputs: PlanInputs) -> None:
        """Raise unless a plan belongs to these inputs.

        Raises:
            PlanMismatchError: The plan belongs to other inputs; lists the differences.
            SourceError: The guards of the plan cannot be evaluated.
        """
        problems = list(_differing(plan, inputs))
        # Guards compare values of weights, which the digest does not contain.
        if not problems and plan.data.guards:
            problems = list(plan.broken_guards(self._opener(inputs.program, plan)))
        if problems:
            raise PlanMismatchError(
                f"{plan.backend}: the plan belongs to something else.", problems=problems
            )
        if inputs.slots is not None:
            plan.check_engines(inputs.backend, inputs.slots)

    def _write(self, path: Path, plan: RefitPlan) -> None:
        # A full disk or a read-only folder must not fail a plan that was just made.
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            plan.save(path)
        except (OSError, RefitError) as exc:
            self._progress(f"the plan cannot be written to the cache: {exc}")
        else:
            self._progress(f"the plan is written to the cache: {path}")


def _differing(plan: RefitPlan, inputs: PlanInputs) -> Iterator[Problem]:
    """A problem for each input that a plan was not made from."""
    data, facts = plan.data, inputs.facts
    made, key = data.fingerprint, inputs.key
    pairs: list[tuple[str, object, object]] = [
        ("backend", data.backend, inputs.backend),
        ("graph", made.graph, facts.graph),
        ("leaves", data.leaves, facts.leaves),
        ("ties", data.ties, facts.ties),
        ("versions", made.versions, dict(key.versions)),
        ("platform", made.platform, key.platform),
    ]
    # Some backends know the settings only after planning.
    if key.settings is not None:
        pairs.append(("settings", made.settings, dict(key.settings)))
    pairs += [(f"constant {n}", data.pinned.get(n), one) for n, one in inputs.constants.items()]
    for name, found, wanted in pairs:
        if found != wanted:
            yield Problem(name, "differs")
