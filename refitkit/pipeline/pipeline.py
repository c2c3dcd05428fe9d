"""The pipeline: plugins, settings, and the verbs that work with them. Start reading here.

Each verb is one call into the stages: ``refit.py`` and ``transaction.py`` for refits,
``restore.py`` for earlier weights, ``planning.py`` for plans, ``targets.py`` for loading.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from refitkit.errors import resources
from refitkit.pipeline.context import Context
from refitkit.pipeline.diff import Differ
from refitkit.pipeline.module import CompiledModule, RefitResult, RefitResults
from refitkit.pipeline.planning import Compiler
from refitkit.pipeline.receive import receive
from refitkit.pipeline.refit import get_ready, refit_task, refit_tasks, run
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
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.model import DiffReport, VerificationResult
    from refitkit.pipeline.receive import Delivery, Part
    from refitkit.pipeline.refit import Task
    from refitkit.protocols import Backend, SharedMemory, WeightSource
    from refitkit.recipe import RefitPlan


P = ParamSpec("P")
T = TypeVar("T")


def _as_operation(failure: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return the decorator of a verb that users call: ``verb``, with events at start and end.

    Args:
        failure: See ``verb``.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        name = method.__name__.removesuffix("_all")
        # here as well, so that the event has the error that the caller gets
        body = resources(failure)(method)

        @wraps(method)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            pipeline: Any = args[0]
            with pipeline.context.operating(name, _label(*args[1:2], **kwargs)) as operation:
                result = body(*args, **kwargs)
                operation.result = result
                return result

        return verb(failure)(run)

    return decorate


def _label(first: object = None, **named: object) -> str:
    """Name of the module that a verb is given; empty if it is given none, or several."""
    target = named.get("target", named.get("compiled", first))
    return str(target.name) if isinstance(target, CompiledModule) else ""


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
            ConfigError: A setting does not exist or has a wrong type, or ``plugins`` is not a list.
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

    @_as_operation("The program cannot be compiled")
    def compile(
        self,
        program: ExportedProgram,
        backend: str = "aotinductor",
        options: Mapping[str, Any] | None = None,
        *,
        prove: bool = True,
    ) -> CompiledModule:
        """Compile a program into a refittable module, and plan it in the same pass.

        The program, its tensors and the model that it came from are not changed.

        Args:
            program: The result of ``torch.export.export(model, inputs)``.
            backend: Name of a backend.
            options: Options of the backend.
            prove: Whether to prove on the example inputs that the module answers like the program
                with other weights too. The proof costs a refit, two calls and a copy of the
                weights.

        Raises:
            UnsupportedTargetError: ``program`` is not an ExportedProgram.
            ConfigError: There is no such backend or option.
            CompileError: The compiler refused the program, or a tool is missing.
            NotRefittableError: An option makes refits impossible, or the proof failed.
        """
        return Compiler(self.context, program, options, self).compile(backend, prove=prove)

    @_as_operation("The module cannot be loaded")
    def load(
        self,
        target: object,
        *,
        warm: bool = False,
        num_models: int = 1,
        shared: SharedMemory | None = None,
    ) -> CompiledModule:
        """Open a module that was compiled or saved before.

        A saved module holds machine code, and loading it runs that code. Load only files that you
        trust as you would trust a program.

        Args:
            target: A path, or an object that a plugin can open.
            warm: Whether to do the work now that would make the first refit slow; see
                ``CompiledModule.warm``.
            num_models: How many calls run side by side; further ones wait for their turn. Give each
                of them cores: ``torch.set_num_threads(1)`` before the model is compiled.
            shared: Weights to serve from instead of the target's own: ``compiled.share()`` of
                another process, which ``multiprocessing`` has passed to this one.

        Raises:
            ConfigError: The module cannot serve so many calls at once, or cannot share weights;
                says why.
            WeightMismatchError: The shared weights belong to another module.
            UnsupportedTargetError: The target is missing or damaged, or no plugin can open it.
            PlanMismatchError: The plan inside it is damaged.
        """
        return load_module(
            self.context, target, self, warm=warm, num_models=num_models, shared=shared
        )

    @_as_operation("The program cannot be planned")
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

        A module without a plan keeps this one, and is saved with it. Before that, a copy of the
        module is refitted to other weights, and its outputs are compared with the program's.

        Args:
            program: The program that was compiled, and no other export of the model.
            target: The module, or anything that ``load`` opens. None: plan offline, if the backend
                can.
            backend: Name of the backend; needed without a target.
            options: Options of the backend for planning offline. A target knows its own.
            prove: Which proofs with other weights to make. True: compare every slot's value with
                the backend's own, which costs two more plannings. None: only refit a copy of a
                module that has no plan. False: neither.

        Raises:
            PlanMismatchError: The program is not the one that was compiled.
            NotRefittableError: Weights of the program are not weights of the engines, or only
                parts of them are.
            ConfigError: Neither target nor backend was given.
        """
        compiler = Compiler(self.context, program, options, self)
        compiled = self._compiled(target) if target is not None else None
        return compiler.plan(compiled, backend, prove=prove)

    @_as_operation("The module cannot be refitted")
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
        donate: bool = False,
    ) -> RefitResult:
        """Put new weights into a compiled module: all of them, verified, or none.

        Args:
            target: A compiled module, which is changed in place, or anything that ``load`` opens.
            weights: A state_dict, module, program or path: anything that a plugin can read.
            plan: How weights become slots; None: the module's own plan.
            inputs: Inputs for the verifier ``outputs``: a tuple of positional inputs, a dict of
                keyword inputs, or a pair of both: ``((x,), {"mask": mask})``.
            reference: A callable or outputs to compare with. None: the program that the module was
                compiled from, with the new weights.
            verify: Name of a verifier, or ``none``. None: ``outputs`` if inputs are given, else
                ``weights`` if the engines can be read, else no verifier.
            partial: Whether slots without new weights keep their values. Otherwise missing weights
                are an error.
            copy: Whether to refit a second module and leave this one alone.
            delta: Whether to write only the slots whose weights changed since the last refit of
                this module with ``delta``. The first refit with ``delta`` writes all slots. None:
                ``Config.delta`` decides.
            rollback: Whether the old weights are held until the new ones are verified. If False,
                engines that can do so write over them, which saves a second set of weights; a
                failure after the checks loses the module. None: ``Config.rollback`` decides.
            reset_state: Whether state that calls write (KV caches, counters) and that the weights
                do not contain is reset to its value at export. Otherwise it is kept, as
                ``load_state_dict`` does. ``report.state`` says which.
            donate: Whether the module may keep the tensors of ``weights`` as its own memory, so
                that nothing is copied. They must not be written to afterwards, by whatever means.
                Tensors that do not fit (strides, alignment, a part of a larger one) are copied.

        Raises:
            SourceError: The weights cannot be read.
            WeightMismatchError: The weights do not fit; lists every problem.
            PlanMismatchError: The plan is for another module.
            VerificationError: The result is wrong; the old weights are live again.
            ModuleLostError: The old weights could not be restored; the module refuses calls.
            RefitError: Any other reason; the module answers as before.
        """
        compiled = self._compiled(target)
        # a file was opened for this refit alone; an object is the user's, and stays as it is
        if copy and (compiled is target or compiled.target is not None):
            compiled = self.copy(compiled)
        # ``refit_task`` drops those that are None, so that the settings decide
        options = {
            "plan": plan,
            "inputs": inputs,
            "reference": reference,
            "verify": verify,
            "partial": partial,
            "delta": delta,
            "rollback": rollback,
            "reset_state": reset_state,
            "donate": donate,
        }
        return self._run([refit_task(self.context, compiled, weights, options)])[0]

    @_as_operation("The update failed")
    def receive(
        self,
        parts: Sequence[Part],
        delivery: Delivery,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResults:
        """Refit modules to weights that arrive in buckets, for :class:`refitkit.WeightReceiver`.

        Args:
            parts: The modules.
            delivery: How the weights come.
            inputs: As for ``refit``.
            reference: As for ``refit``.
            verify: As for ``refit``.

        Raises:
            RefitError: As for ``refit``.
        """
        drafts = receive(
            self.context, parts, delivery, inputs=inputs, reference=reference, verify=verify
        )
        pairs = zip(parts, drafts, strict=True)
        return RefitResults(RefitResult(part.compiled, draft, self) for part, draft in pairs)

    @_as_operation("The modules cannot be refitted")
    def refit_all(self, modules: Iterable[Sequence[Any]], **options: Any) -> RefitResults:
        """Refit several modules in one transaction: all of them, or none.

        All modules serve while weights are staged. Then the calls of all of them wait until all are
        committed and verified.

        Args:
            modules: ``(target, weights)`` for each module, or
                ``(target, weights, {"inputs": (x,)})`` with arguments of ``refit`` for it alone.
            **options: Arguments of ``refit`` for all: ``verify``, ``partial``, ``delta``, ...

        Raises:
            ConfigError: A module is given twice, or there is no such argument.
            RefitError: As ``refit`` raises it, with the problems of all modules. Unless it is a
                ``ModuleLostError``, all modules answer as before.
        """
        return self._run(refit_tasks(self.context, modules, options, self._compiled))

    @_as_operation("The weights cannot be restored")
    def restore(
        self,
        compiled: CompiledModule,
        version: int = 0,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
    ) -> RefitResult:
        """Restore earlier weights of a module. This is a refit, and counts as a new version.

        Args:
            compiled: The module, which is changed in place.
            version: Version of the weights; 0 are the weights that the module was compiled or
                loaded with. Those are read from ``compiled.base`` if it is set, or from the file
                that the module was loaded from, by opening a second module. Other versions come
                from copies or from the engines.
            inputs: As for ``refit``.
            reference: A callable or outputs to compare with, if inputs are given.
            verify: As for ``refit``. None: ``outputs`` if inputs and a reference are given, else
                ``weights`` if the engines can be read, else no verifier.

        Raises:
            ConfigError: ``compiled`` is not a compiled module, or ``version`` is not an integer.
            NotRefittableError: The weights are not held any more; lists those that are.
            RefitError: As ``refit`` raises it. Unless it is a ``ModuleLostError``, the module
                answers as before.
        """
        # first, because ``restore_task`` already reads attributes of the handle
        as_versions([(compiled, version)])
        request = RestoreRequest(version=version, inputs=inputs, reference=reference, verify=verify)
        return self._run([restore_task(self.context, compiled, request)])[0]

    @_as_operation("The weights cannot be restored")
    def restore_all(self, modules: Iterable[tuple[CompiledModule, int]]) -> RefitResults:
        """Restore earlier weights of several modules in one transaction.

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

    @_as_operation("The module cannot be copied")
    def copy(self, compiled: CompiledModule) -> CompiledModule:
        """A second module with the same weights, plan and program, to be refitted on its own.

        Raises:
            RefitError: The backend cannot open the module a second time; says why.
        """
        return copy_of(self.context, compiled, self)

    def with_weights(
        self, compiled: CompiledModule, weights: object, **options: Any
    ) -> CompiledModule:
        """A second module with other weights; see :meth:`CompiledModule.with_weights`.

        Args:
            compiled: The module, which stays as it is.
            weights: As for ``refit``.
            **options: Arguments of ``refit``.

        Raises:
            RefitError: As ``refit`` raises it.
        """
        return self.refit(compiled, weights, copy=True, **options).module

    @_as_operation("The weights cannot be verified")
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
        """Verify that a module holds given weights, without changing it.

        Args:
            target: A compiled module, or anything that ``load`` opens.
            weights: The weights that it should hold.
            plan: How weights become slots; None: the module's own plan.
            inputs: As for ``refit``.
            reference: As for ``refit``.
            with_: Name of a verifier, like ``verify`` of ``refit``.

        Raises:
            WeightMismatchError: The weights belong to another model.
            VerificationError: The module holds other weights; ``problems`` lists the differences,
                and ``report`` is the :class:`~refitkit.model.VerificationResult`.
        """
        options = VerifyOptions(inputs=inputs, reference=reference, verify=with_)
        return verify_live(self.context, self._compiled(target), weights, plan, options)

    @_as_operation("The weights cannot be compared")
    def diff(
        self,
        a: object,
        b: object,
        *,
        plan: RefitPlan | None = None,
        rules_a: Mapping[str, Any] | None = None,
        rules_b: Mapping[str, Any] | None = None,
    ) -> DiffReport:
        """Compare two sets of weights, tensor by tensor and in all elements.

        Nothing is changed, and one pair of tensors is in memory at a time. If one side is a module,
        the values of its slots are compared with those that a refit would give them. Two modules
        must be of one model. Two weights are compared by name, or with a plan as its program reads
        them.

        Args:
            a: Anything that a plugin can read as weights; or else a compiled module, or anything
                that ``load`` opens, which runs the code in it.
            b: As for ``a``. Changes are relative to ``a``.
            plan: How weights become slots; None: the module's own plan.
            rules_a: Rules for A alone, like ``Config.rules``: ``{"subtree": "ema."}``. A given rule
                takes the place of the same rule in the settings.
            rules_b: Rules for B alone.

        Returns:
            One row for each tensor.

        Raises:
            SourceError: A side is neither weights nor a module, or cannot be read; lists all
                reasons.
            WeightMismatchError: The weights do not fit the module, or the modules are of different
                models; lists every problem.
            UnsupportedTargetError: The values of a module are unknown: its engines cannot be read,
                and were not refitted since they were opened.
            PlanMismatchError: The module has no plan, or the plan is for another module.
            ConfigError: There are rules for a module, or rules that need a program and no plan.
        """
        rules = rules_a or {}, rules_b or {}
        return Differ(self.context, self.load, plan, rules).diff(a, b)

    @_as_operation("The weights cannot be opened")
    def open_weights(self, weights: object, plan: RefitPlan | None = None) -> WeightSource:
        """A weight source for weights.

        Args:
            weights: A state_dict, module, program or path: anything that a plugin can read.
            plan: A plan whose program will read them. Then the transforms of all plugins turn the
                entries into those that the program reads. None: the entries as they are.

        Raises:
            SourceError: The weights cannot be read.
            WeightMismatchError: A transform cannot use entries that belong to it.
        """
        source = open_weights(self.context, weights)
        return source if plan is None else transformed(self.context, plan, source)

    @_as_operation("The module cannot be described")
    def describe(self, path: str | Path) -> Mapping[str, Any]:
        """The facts about a saved module, without running any of its code.

        Returns:
            Names and values, as the backend that saved it gives them.

        Raises:
            UnsupportedTargetError: The path is missing or damaged, or no backend saved it.
        """
        return describe(self.context, path)

    @_as_operation("The plan cannot be read")
    def read_plan(self, path: str | Path) -> RefitPlan:
        """The plan in a plan file or in a saved module, without running any code of either.

        Raises:
            PlanMismatchError: The path is missing, or holds no readable plan.
            UnsupportedTargetError: The path is a saved module that is damaged.
        """
        return plan_in(self.context, path)

    def _compiled(self, target: object) -> CompiledModule:
        return target if isinstance(target, CompiledModule) else self.load(target)

    def _run(self, tasks: Sequence[Task]) -> RefitResults:
        drafts = run(self.context, tasks)
        # drafts, not reports: a report with a row for each slot can take longer than the refit
        return RefitResults(
            RefitResult(task.compiled, draft, self)
            for task, draft in zip(tasks, drafts, strict=True)
        )

    def get_ready(self) -> None:
        """Ask plugins for what they give to each refit. Many import it when they are first asked.

        A plugin that fails is passed over: refits will say so.
        """
        get_ready(self.context)

    @_as_operation("The module cannot be saved")
    def save(self, compiled: CompiledModule, path: str | Path) -> None:
        """Write a module with its present weights, plan and program; see ``CompiledModule.save``.

        Raises:
            RefitError: The path cannot be written; says why.
        """
        save_module(self.context, compiled, path)
