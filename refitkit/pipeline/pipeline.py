"""The pipeline: plugins, settings, and the verbs that run on them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.config import Config
from refitkit.errors import ConfigError, Problem, UnsupportedTargetError
from refitkit.host import Host, make_host
from refitkit.model import Step
from refitkit.pipeline import load as loading
from refitkit.pipeline.cache import PlanCache, wanted
from refitkit.pipeline.clock import Clock
from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.diff_sides import Differ
from refitkit.pipeline.held import Held
from refitkit.pipeline.judge import judge_module
from refitkit.pipeline.origin import Origin
from refitkit.pipeline.overrides import overridden_as, overridden_in
from refitkit.pipeline.plan import make_plan
from refitkit.pipeline.prove import prove as prove_refit
from refitkit.pipeline.prove_plan import prove_plan
from refitkit.pipeline.refit import Refit, Wish, as_jobs
from refitkit.pipeline.restore import Back, Return, as_ways
from refitkit.pipeline.result import RefitResult, RefitResults
from refitkit.pipeline.together import Task, each, run
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.transform import transformed
from refitkit.recipe import RefitPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.export import ExportedProgram

    from refitkit.model import DiffReport, VerificationResult
    from refitkit.program import KeptProgram
    from refitkit.protocols import Backend, OpenedModule, WeightSource

PLAN = "plan.refitplan"
PROGRAM = "program.json"
OVERRIDDEN = "overridden.json"


class Pipeline:
    """The verbs ``compile``, ``load``, ``plan``, ``refit``, ``verify``, with plugins and settings.

    Attributes:
        config: Its settings.
        host: Its plugins.
    """

    def __init__(
        self,
        config: Config | Mapping[str, object] | None = None,
        plugins: Iterable[object] = (),
    ) -> None:
        """Register all plugins.

        Args:
            config: Settings, as a ``Config`` or as plain data.
            plugins: Plugins beside the built-in and installed ones; they win over both.

        Raises:
            ConfigError: A setting does not exist or has a wrong type.
            PluginError: A plugin cannot be registered; names it.
        """
        self.config = Config.of(config)
        self.host: Host = make_host(self.config, plugins)
        _check_settings(self.config, self.host)
        self._backends: dict[str, Backend] | None = None

    # -- backends ---------------------------------------------------------------------------

    @property
    def backends(self) -> Mapping[str, Backend]:
        """All backends by name."""
        if self._backends is None:
            self._backends = self._registered()
        return self._backends

    def _registered(self) -> dict[str, Backend]:
        hook = "refitkit_register_backends"
        owners: dict[str, str] = {}
        backends: dict[str, Backend] = {}
        for info in self.host.plugins():
            given: list[Backend] = []
            if hook in info.hooks:
                self.host.call_one(info.name, hook, register=given.append)
            for backend in given:
                self.host.claim(owners, backend, info.name, hook)
                backends[backend.name] = backend
        return backends

    def backend(self, name: str) -> Backend:
        """A backend by name.

        Raises:
            ConfigError: There is none of this name; lists those that there are.
        """
        if name not in self.backends:
            hint = f"There are: {', '.join(sorted(self.backends))}."
            raise ConfigError(f"There is no backend {name!r}.", hint=hint)
        return self.backends[name]

    # -- verbs ------------------------------------------------------------------------------

    def compile(
        self,
        program: ExportedProgram,
        backend: str = "aotinductor",
        options: Mapping[str, Any] | None = None,
        *,
        prove: bool = True,
    ) -> CompiledModule:
        """Compile a program into a refittable module, planned in the same pass.

        The program, its tensors and the model that it came from are not changed.

        Args:
            program: What ``torch.export.export(model, inputs)`` gives.
            backend: Name of a backend.
            options: The backend's options.
            prove: Whether to try, on the example inputs, that the module answers like the program
                with other weights, too. It costs a refit, two calls and a copy of the weights.

        Raises:
            UnsupportedTargetError: It is no ExportedProgram.
            ConfigError: There is no such backend or option.
            CompileError: The compiler refused the program, or a tool is missing.
            NotRefittableError: An option makes the engine unfit for refits, or the proof failed.
        """
        _check_program(program)
        chosen, clock = self.backend(backend), Clock(self.host, "compile")
        with clock.stage("compile"):
            tools = tools_for(self.host, self.config, "compile", "compile")
            opened = chosen.compile(program, dict(options or {}), tools)
        with clock.stage("plan"):
            plan = self._planned(program, opened, chosen, {})
            kept = self._kept(program)
        compiled = CompiledModule(opened, plan, kept, self)
        if prove:
            with clock.stage("prove"):
                self._prove(compiled, program)
        return compiled

    def _planned(
        self,
        program: ExportedProgram,
        opened: OpenedModule | None,
        backend: Backend,
        options: Mapping[str, Any],
    ) -> RefitPlan:
        opener, folder = self._opened_for, self.config.cache_folder()

        def make() -> RefitPlan:
            return make_plan(self.host, program, opened, backend, options, self.config, opener)

        if folder is None:
            return make()
        tools = tools_for(self.host, self.config, "plan", "plan")
        wish = wanted(self.host, backend, program, opened, options, tools)
        return make() if wish is None else PlanCache(folder, tools.tell, opener).get(wish, make)

    def _prove(self, compiled: CompiledModule, program: ExportedProgram) -> None:
        missing = prove_refit(self, compiled, program) if compiled.program else ""
        if missing:
            self.host.emit(Step("compile", "prove", f"there is no proof by trial: {missing}"))

    def _kept(self, program: ExportedProgram) -> KeptProgram | None:
        from refitkit.program import KeptProgram  # noqa: PLC0415 - imports torch

        kept = KeptProgram.of(program)
        if kept is None:
            text = "the program cannot be kept: no proof, and verify='outputs' needs reference="
            self.host.emit(Step("plan", "plan", text))
        return kept

    def load(self, target: object, *, warm: bool = False) -> CompiledModule:
        """Open what was compiled or saved before.

        A saved module holds machine code: loading it runs that code. Load only files that you
        trust as you would a program.

        Args:
            target: A path, or an object that a plugin knows.
            warm: Whether to do now what would make the first refit slow; see
                ``CompiledModule.warm``.

        Raises:
            UnsupportedTargetError: It is missing, damaged, or no plugin can open it.
            PlanMismatchError: The plan inside it is damaged.
        """
        with Clock(self.host, "load").stage("open"):
            tools = tools_for(self.host, self.config, "load", "open")
            origin = Origin.of(target)
            compiled = self._handle(loading.open_target(self.host, target, self.config, tools))
            compiled.origin = origin
            compiled.target = None if isinstance(target, str | Path) else target
        if warm:
            with Clock(self.host, "load").stage("warm"):
                compiled.warm(tools_for(self.host, self.config, "load", "warm").tell)
        return compiled

    def _handle(self, opened: OpenedModule) -> CompiledModule:
        from refitkit.program import KeptProgram  # noqa: PLC0415 - imports torch

        attached = opened.attachments
        if PLAN not in attached:
            return CompiledModule(opened, None, None, self)
        plan = RefitPlan.from_bytes(attached[PLAN], "the plan of this module", self._opened_for)
        data = plan.data
        kept = (
            KeptProgram(attached[PROGRAM], data.leaves, data.ties) if PROGRAM in attached else None
        )
        compiled = CompiledModule(opened, plan, kept, self)
        compiled.held = Held.first(overridden_in(attached.get(OVERRIDDEN, b"[]")))
        return compiled

    def plan(
        self,
        program: ExportedProgram,
        target: object = None,
        backend: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        prove: bool | None = None,
    ) -> RefitPlan:
        """Make a plan for a program and the module that was compiled from it.

        A module that has no plan yet keeps this one, and is saved with it; before, a copy of it is
        refitted to other weights and its outputs compared with the program's.

        Args:
            program: The very program that was compiled.
            target: The module, or anything ``load`` opens; None: plan offline, where the backend
                can.
            backend: Name of the backend; needed without a target.
            options: The backend's options, when planning offline; a target knows its own.
            prove: Whether to try that the plan is right with other weights than the program's: what
                it computes is compared with what the backend makes of them, slot by slot, and a
                copy of a module that has no plan yet is refitted to them and its outputs compared.
                The first costs two plannings more, and is done only where True; the second is left
                out only where False.

        Raises:
            PlanMismatchError: The program is not the one that was compiled.
            NotRefittableError: Weights of the program are not weights of the engines, or are but
                in part.
            ConfigError: Neither target nor backend was given.
        """
        _check_program(program)
        compiled = self._compiled(target) if target is not None else None
        name = backend or (compiled.backend if compiled else None)
        if name is None:
            raise ConfigError(
                "A plan is for a target or, offline, for a backend: pass one of them."
            )
        opened = compiled.opened if compiled else None
        with Clock(self.host, "plan").stage("plan"):
            plan = self._planned(program, opened, self.backend(name), dict(options or {}))
        if prove:
            with Clock(self.host, "plan").stage("prove"):
                self._prove_plan(plan, program, opened, dict(options or {}))
        if compiled is not None and compiled.plan is None:
            with Clock(self.host, "plan").stage("adopt"):
                self._adopt(compiled, plan, program, prove=prove is not False)
        return plan

    def _prove_plan(
        self,
        plan: RefitPlan,
        program: ExportedProgram,
        opened: OpenedModule | None,
        options: Mapping[str, Any],
    ) -> None:
        missing = prove_plan(self.host, self.config, plan, program, opened, options)
        if missing:
            self.host.emit(Step("plan", "prove", f"there is no proof by trial: {missing}"))

    def _adopt(
        self, compiled: CompiledModule, plan: RefitPlan, program: ExportedProgram, *, prove: bool
    ) -> None:
        """Give a plan to a module that somebody else compiled, once a copy of it is proved."""
        kept = self._kept(program)
        if prove:
            copy = CompiledModule(compiled.opened.reopen(), plan, kept, self)
            self._prove(copy, program)
        compiled.plan, compiled.program = plan, kept

    def refit(  # noqa: PLR0913 - one verb; all but two are given by name
        self,
        target: object,
        weights: object,
        *,
        plan: RefitPlan | None = None,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
        partial: bool = False,
        copy: bool = False,
        delta: bool | None = None,
        rollback: bool | None = None,
    ) -> RefitResult:
        """Put new weights into a compiled module: wholly and verified, or not at all.

        Args:
            target: A compiled module, changed in place, or anything ``load`` opens.
            weights: A state_dict, module, program, path: anything a plugin can read.
            plan: How weights become slots; the module's own if it has one.
            inputs: Inputs for the verifier ``outputs``: a tuple of positional ones, a dict of
                keyword ones, or a pair of both: ``((x,), {"mask": mask})``.
            reference: What outputs are compared with: a callable or the outputs themselves. The
                program that the module was compiled from, bound to the new weights, where None.
            verify: Name of a verifier, or ``none``. Where None: ``outputs`` when inputs are given,
                else ``weights`` where engines can be read, else nothing.
            partial: Whether slots that the weights have nothing for keep what they hold. Otherwise
                something missing is an error.
            copy: Whether to refit a second module and leave this one alone.
            delta: Whether to write only what changed since the last refit with ``delta`` of this
                module: slots whose weights have the same bits are left as they are. The first such
                refit writes everything. None: as ``Config.delta`` says.
            rollback: Whether the weights from before are held until the new ones are verified.
                False: engines that can write over them, and need no memory for a second set; what
                fails after the checks loses the module. None: as ``Config.rollback`` says.

        Raises:
            SourceError: The weights cannot be read.
            WeightMismatchError: They do not fit; lists every problem.
            PlanMismatchError: The plan is for another module.
            VerificationError: The result is not right; the old weights are back.
            ModuleLostError: The old weights could not be brought back; the module refuses calls.
            RefitError: Any other reason; the module answers as before.
        """
        compiled = self._compiled(target)
        if copy and compiled is target:
            compiled = self.copy(compiled)
        options = {
            "plan": plan,
            "inputs": inputs,
            "reference": reference,
            "verify": verify,
            "partial": partial,
            "delta": delta,
            "rollback": rollback,
        }
        wish = self._wish(weights, options)
        return self._run([Refit(self.host, self.config, compiled, wish)])[0]

    def refit_all(self, modules: Iterable[Sequence[Any]], **how: Any) -> RefitResults:
        """Refit several modules in one transaction: all of them, or none.

        While weights are staged all modules serve; then the calls of all of them wait until all are
        committed and verified.

        Args:
            modules: ``(target, weights)`` for each, or ``(target, weights, {"inputs": (x,)})`` with
                arguments of ``refit`` for this one.
            **how: Arguments of ``refit`` for all: ``verify``, ``partial``, ``delta``, ...

        Raises:
            ConfigError: A module is given twice, or there is no such argument.
            RefitError: As ``refit`` raises it, with the problems of all modules; unless it is a
                ``ModuleLostError``, all of them answer as before.
        """
        jobs = as_jobs(modules, how)
        opened = self._all_compiled([target for target, _, _ in jobs])
        tasks = [
            Refit(self.host, self.config, compiled, self._wish(weights, options))
            for compiled, (_, weights, options) in zip(opened, jobs, strict=True)
        ]
        return self._run(tasks)

    def _all_compiled(self, targets: Sequence[object]) -> list[CompiledModule]:
        """Handles of targets: the same one for an object that is given twice, which is refused."""
        handles: dict[int, CompiledModule] = {}

        def handle(target: object) -> CompiledModule:
            if isinstance(target, str | Path):  # each is opened anew
                return self._compiled(target)
            if id(target) not in handles:
                handles[id(target)] = self._compiled(target)
            return handles[id(target)]

        names = [f"module {number}" for number in range(1, len(targets) + 1)]
        return each(names, [partial(handle, target) for target in targets])

    def _wish(self, weights: object, options: Mapping[str, Any]) -> Wish:
        chosen = {name: value for name, value in options.items() if value is not None}
        defaults = {"delta": self.config.delta, "rollback": self.config.rollback}
        return Wish(weights, **{**defaults, **chosen})

    def restore(
        self,
        compiled: CompiledModule,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Go back to earlier weights of a module; that is a refit, with a number of its own.

        Args:
            compiled: The module, changed in place.
            version: Number of the weights: 0 are those that it was compiled or loaded with. Those
                are read from ``compiled.base`` where that is set, or from the file or folder that
                the module was loaded from, for which a second module is opened. All others come
                from copies, or from the engines.
            inputs: As for ``refit``.
            reference: What outputs are compared with, if inputs are given, too.
            verify: As for ``refit``. Where None: ``outputs`` when inputs and a reference are given,
                else ``weights`` where engines can be read, else nothing.

        Raises:
            ConfigError: That is no compiled module, or no whole number.
            NotRefittableError: The weights are not held any more; says what is.
            RefitError: As ``refit`` raises it; unless it is a ``ModuleLostError``, the module
                answers as before.
        """
        as_ways([(compiled, version)])
        if version == 0 and compiled.base is not None:
            return self.refit(
                compiled, compiled.base, inputs=inputs, reference=reference, verify=verify
            )
        back = Back(version, inputs, reference, verify)
        return self._run([Return(self.host, self.config, compiled, back)])[0]

    def restore_all(self, back: Iterable[tuple[CompiledModule, int]]) -> RefitResults:
        """Go back to earlier weights of several modules, in one transaction.

        Args:
            back: Modules, and the numbers of their weights; see ``restore``.

        Raises:
            RefitError: As ``restore`` raises it, with the problems of all modules.
        """
        return self._run([self._way_back(*way) for way in as_ways(back)])

    def _way_back(self, compiled: CompiledModule, version: int) -> Task:
        if version == 0 and compiled.base is not None:
            wish = self._wish(compiled.base, {"delta": False})
            return Refit(self.host, self.config, compiled, wish)
        return Return(self.host, self.config, compiled, Back(version))

    def _run(self, tasks: Sequence[Task]) -> RefitResults:
        reports = run(self.host, self.config, tasks)
        return RefitResults(
            RefitResult(task.compiled, report, self)
            for task, report in zip(tasks, reports, strict=True)
        )

    def copy(self, compiled: CompiledModule) -> CompiledModule:
        """A second module with the same weights, plan and program, refitted on its own."""
        with compiled.gate.refit(), compiled.gate.call():
            opened = compiled.opened.reopen()
        copy = CompiledModule(opened, compiled.plan, compiled.program, self)
        copy.held = Held.first(compiled.held.overridden)
        return copy

    def verify(
        self,
        target: object,
        weights: object,
        *,
        plan: RefitPlan | None = None,
        inputs: Any = None,
        reference: Any = None,
        with_: str | None = None,
    ) -> VerificationResult:
        """Judge whether a module holds these weights, without changing it.

        Args:
            target: A compiled module, or anything ``load`` opens.
            weights: What it should hold.
            plan: The module's own where None.
            inputs: As for ``refit``.
            reference: As for ``refit``.
            with_: Name of a verifier; as ``verify`` of ``refit``.

        Raises:
            WeightMismatchError: They are weights of another model.
            VerificationError: It does not; ``problems`` lists what differs, and ``report`` is the
                :class:`~refitkit.model.VerificationResult`.
        """
        wish = Wish(weights, plan, inputs, reference, with_)
        return judge_module(self.host, self.config, self._compiled(target), wish)

    def diff(self, a: object, b: object, *, plan: RefitPlan | None = None) -> DiffReport:
        """What two sets of weights differ in, tensor by tensor and from all elements.

        Nothing is changed, and no more than a pair of tensors is in memory at a time. With a module
        and weights, what its slots hold is compared with what a refit would give them. Two modules
        have to be of one model. Two weights are compared by their names, as they are; with a plan,
        as its program reads them.

        Args:
            a: Anything that a plugin can read as weights; else a compiled module, or anything
                ``load`` opens, which runs the code in it.
            b: Likewise; relative changes are relative to A.
            plan: How weights become slots; the module's own where None.

        Raises:
            SourceError: Neither weights nor a module, or it cannot be read; lists all of it.
            WeightMismatchError: The weights do not fit the module, or the modules are of different
                models; lists every problem.
            UnsupportedTargetError: Nobody knows what a module holds: its engines cannot be read,
                and were not refitted since they were opened.
            PlanMismatchError: The module has no plan, or the plan is for another one.
            ConfigError: There are rules, and no program to apply them for.
        """
        clock, differ = Clock(self.host, "diff"), Differ(self.host, self.config, self.load, plan)
        with clock.stage("open"):
            sides = differ.opened(a, b)
        with clock.stage("compare"):
            return differ.diff(*sides)

    def open_weights(self, weights: object, plan: RefitPlan | None = None) -> WeightSource:
        """Anything that a plugin can read, as a weight source.

        Args:
            weights: A state_dict, module, program, path: anything a plugin can read.
            plan: The plan that it is for: then the transforms of all plugins make of it what the
                program reads. None: as it was given.

        Raises:
            SourceError: It cannot be read.
            WeightMismatchError: A transform cannot use entries that belong to it.
        """
        source = loading.open_weights(self.host, weights, self.config)
        return source if plan is None else transformed(self.host, self.config, plan, source)

    def _opened_for(self, weights: Any, plan: RefitPlan) -> WeightSource:
        return self.open_weights(weights, plan)

    def describe(self, path: str | Path) -> Mapping[str, Any]:
        """What a saved module holds, without running any of its code.

        Raises:
            UnsupportedTargetError: It is missing, damaged, or of no backend.
        """
        path = Path(path)
        if not path.exists():
            raise UnsupportedTargetError(f"There is no file {str(path)!r}.")
        for backend in self.backends.values():
            found = backend.describe(path)
            if found is not None:
                return found
        raise UnsupportedTargetError(f"{str(path)!r} is no saved module of any backend.")

    def read_plan(self, path: str | Path) -> RefitPlan:
        """The plan in a plan file or in a saved module, without running any code of either.

        Raises:
            PlanMismatchError: It is missing, or there is no plan in it that can be read.
            UnsupportedTargetError: It is a saved module, and damaged.
        """
        path = Path(path)
        for backend in self.backends.values() if path.exists() else ():
            attached = backend.attachments(path)
            if PLAN in attached:
                what = f"the plan of {str(path)!r}"
                return RefitPlan.from_bytes(attached[PLAN], what, self._opened_for)
        return RefitPlan.load(path)

    def _compiled(self, target: object) -> CompiledModule:
        return target if isinstance(target, CompiledModule) else self.load(target)

    def save(self, compiled: CompiledModule, path: str | Path) -> None:
        """Write a module with its present weights, plan and program; see its own ``save``."""
        attachments: dict[str, bytes] = {}
        if compiled.plan is not None:
            attachments[PLAN] = compiled.plan.to_bytes()
        if compiled.program is not None:
            attachments[PROGRAM] = compiled.program.to_bytes()
        if compiled.held.overridden:
            attachments[OVERRIDDEN] = overridden_as(compiled.held.overridden)
        with Clock(self.host, "save").stage("save"):
            compiled.opened.save(Path(path), attachments)


def _check_settings(config: Config, host: Host) -> None:
    names = {info.name for info in host.plugins()}
    strange = [name for name in config.plugin_settings if name not in names]
    if strange:
        problems = [Problem(f"plugin_settings.{name}", "no such plugin") for name in strange]
        hint = f"There are: {', '.join(sorted(names))}."
        raise ConfigError(
            "There are settings of plugins that do not exist.", problems=problems, hint=hint
        )


def _check_program(program: object) -> None:
    from torch.export import ExportedProgram  # noqa: PLC0415 - slow to import

    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError(
            f"A {type(program).__name__} cannot be compiled or planned.",
            hint="Export it first: program = torch.export.export(model, inputs).",
        )
