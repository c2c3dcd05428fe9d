"""The pipeline: plugins, settings, and the verbs that work with them. Start reading here.

Each verb is one call into the stages: ``refit.py`` and ``transaction.py`` for refits,
``restore.py`` for the way back, ``planning.py`` for plans, ``targets.py`` for loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.errors import resources
from refitkit.pipeline.context import Context
from refitkit.pipeline.diff import Differ
from refitkit.pipeline.module import CompiledModule, RefitResult, RefitResults
from refitkit.pipeline.planning import Compiler
from refitkit.pipeline.refit import refit_task, refit_tasks, run
from refitkit.pipeline.restore import RestoreRequest, as_versions, restore_task
from refitkit.pipeline.targets import (
    copy_of,
    describe,
    load_module,
    open_weights,
    plan_in,
    save_module,
)
from refitkit.pipeline.transform import transformed
from refitkit.pipeline.verify import VerifyOptions, verify_live
from refitkit.program.ambient import verb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import DiffReport, VerificationResult
    from refitkit.pipeline.refit import Task
    from refitkit.protocols import Backend, WeightSource
    from refitkit.recipe import RefitPlan


class Pipeline:
    """The verbs ``compile``, ``load``, ``plan``, ``refit``, ``verify``, with plugins and settings.

    Attributes:
        context: The plugins and settings, as the stages get them.
    """

    @resources("A pipeline cannot be made")
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
            ConfigError: A setting does not exist or has a wrong type, or ``plugins`` is no list.
            PluginError: A plugin cannot be registered; names it.
        """
        self.context = Context.of(config, plugins)

    @property
    def config(self) -> Config:
        """The settings."""
        return self.context.config

    @property
    def host(self) -> Host:
        """The registered plugins."""
        return self.context.host

    @property
    def backends(self) -> Mapping[str, Backend]:
        """All backends by name.

        Raises:
            PluginError: A plugin failed, or two plugins register one name; names them.
        """
        return self.context.backends

    def backend(self, name: str) -> Backend:
        """The backend of a name.

        Raises:
            ConfigError: No plugin registers this name; lists the names that there are.
        """
        return self.context.backend(name)

    @verb("The program cannot be compiled")
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
        return Compiler(self.context, program, options, self).compile(backend, prove=prove)

    @verb("The module cannot be loaded")
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
        return load_module(self.context, target, self, warm=warm)

    @verb("The program cannot be planned")
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
        compiler = Compiler(self.context, program, options, self)
        compiled = self._compiled(target) if target is not None else None
        return compiler.plan(compiled, backend, prove=prove)

    @verb("The module cannot be refitted")
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
        reset_state: bool = False,
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
            reset_state: Whether state that calls write (KV caches, counters) and that the weights
                do not contain gets its value of the export again. Otherwise it is kept, as
                ``load_state_dict`` does. ``report.state`` says which.

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
            "reset_state": reset_state,
        }
        return self._run([refit_task(self.context, compiled, weights, options)])[0]

    @verb("The modules cannot be refitted")
    def refit_all(self, modules: Iterable[Sequence[Any]], **options: Any) -> RefitResults:
        """Refit several modules in one transaction: all of them, or none.

        While weights are staged all modules serve; then the calls of all of them wait until all are
        committed and verified.

        Args:
            modules: ``(target, weights)`` for each, or ``(target, weights, {"inputs": (x,)})`` with
                arguments of ``refit`` for this one.
            **options: Arguments of ``refit`` for all: ``verify``, ``partial``, ``delta``, ...

        Raises:
            ConfigError: A module is given twice, or there is no such argument.
            RefitError: As ``refit`` raises it, with the problems of all modules; unless it is a
                ``ModuleLostError``, all of them answer as before.
        """
        return self._run(refit_tasks(self.context, modules, options, self._compiled))

    @verb("The weights cannot be restored")
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
        as_versions([(compiled, version)])
        request = RestoreRequest(version=version, inputs=inputs, reference=reference, verify=verify)
        return self._run([restore_task(self.context, compiled, request)])[0]

    @verb("The weights cannot be restored")
    def restore_all(self, modules: Iterable[tuple[CompiledModule, int]]) -> RefitResults:
        """Go back to earlier weights of several modules, in one transaction.

        Args:
            modules: Modules, each with a version of its weights; see ``restore``.

        Raises:
            RefitError: As ``restore`` raises it, with the problems of all modules.
        """
        return self._run(
            [
                restore_task(self.context, one, RestoreRequest(version=version), delta=False)
                for one, version in as_versions(modules)
            ]
        )

    @verb("The module cannot be copied")
    def copy(self, compiled: CompiledModule) -> CompiledModule:
        """A second module with the same weights, plan and program, refitted on its own."""
        return copy_of(compiled, self)

    @verb("The weights cannot be judged")
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
        options = VerifyOptions(inputs=inputs, reference=reference, verify=with_)
        return verify_live(self.context, self._compiled(target), weights, plan, options)

    @verb("The weights cannot be compared")
    def diff(
        self,
        a: object,
        b: object,
        *,
        plan: RefitPlan | None = None,
        rules_a: Mapping[str, Any] | None = None,
        rules_b: Mapping[str, Any] | None = None,
    ) -> DiffReport:
        """What two sets of weights differ in, tensor by tensor and from all elements.

        Nothing is changed, and no more than a pair of tensors is in memory at a time. With a module
        and weights, what its slots hold is compared with what a refit would give them. Two modules
        have to be of one model. Two weights are compared by their names, as they are or as rules
        of names make them; with a plan, as its program reads them.

        Args:
            a: Anything that a plugin can read as weights; else a compiled module, or anything
                ``load`` opens, which runs the code in it.
            b: Likewise; relative changes are relative to A.
            plan: How weights become slots; the module's own where None.
            rules_a: Rules for A alone, as ``Config.rules`` has them: ``{"subtree": "ema."}``. What
                is given takes the place of what the settings say of the same rule.
            rules_b: Likewise for B.

        Raises:
            SourceError: Neither weights nor a module, or it cannot be read; lists all of it.
            WeightMismatchError: The weights do not fit the module, or the modules are of different
                models; lists every problem.
            UnsupportedTargetError: Nobody knows what a module holds: its engines cannot be read,
                and were not refitted since they were opened.
            PlanMismatchError: The module has no plan, or the plan is for another one.
            ConfigError: There are rules for a module, or packs or casts and no program to follow
                them for.
        """
        rules = rules_a or {}, rules_b or {}
        return Differ(self.context, self.load, plan, rules).diff(a, b)

    @verb("The weights cannot be opened")
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
        source = open_weights(self.context, weights)
        return source if plan is None else transformed(self.context, plan, source)

    @verb("The module cannot be described")
    def describe(self, path: str | Path) -> Mapping[str, Any]:
        """What a saved module holds, without running any of its code.

        Raises:
            UnsupportedTargetError: It is missing, damaged, or of no backend.
        """
        return describe(self.context, path)

    @verb("The plan cannot be read")
    def read_plan(self, path: str | Path) -> RefitPlan:
        """The plan in a plan file or in a saved module, without running any code of either.

        Raises:
            PlanMismatchError: It is missing, or there is no plan in it that can be read.
            UnsupportedTargetError: It is a saved module, and damaged.
        """
        return plan_in(self.context, path)

    def _compiled(self, target: object) -> CompiledModule:
        return target if isinstance(target, CompiledModule) else self.load(target)

    def _run(self, tasks: Sequence[Task]) -> RefitResults:
        drafts = run(self.context, tasks)
        return RefitResults(
            RefitResult(task.compiled, draft, self)
            for task, draft in zip(tasks, drafts, strict=True)
        )

    @verb("The module cannot be saved")
    def save(self, compiled: CompiledModule, path: str | Path) -> None:
        """Write a module with its present weights, plan and program; see its own ``save``."""
        save_module(self.context, compiled, path)
