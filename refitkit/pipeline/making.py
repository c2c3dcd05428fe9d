"""Making: compiling programs, planning them, and proving by trial that both are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from refitkit.errors import ConfigError, UnsupportedTargetError
from refitkit.model import Step
from refitkit.pipeline.cache import PlanCache, wanted
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.needs import needing
from refitkit.pipeline.plan import make_plan, require_followable
from refitkit.pipeline.prove import prove as prove_refit
from refitkit.pipeline.prove_plan import prove_plan
from refitkit.pipeline.tools import tools_for
from refitkit.program import KeptProgram

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.pipeline.pipeline import Pipeline
    from refitkit.protocols import Backend, OpenedModule
    from refitkit.recipe import RefitPlan


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
        self, pipeline: Pipeline, program: ExportedProgram, options: Mapping[str, Any] | None
    ) -> None:
        """Touch nothing yet.

        Args:
            pipeline: What has the plugins, and refits modules for their proof.
            program: The program; it is not changed.
            options: The backend's.

        Raises:
            UnsupportedTargetError: It is no ExportedProgram.
        """
        _require_program(program)
        self._pipeline, self._program, self._options = pipeline, program, dict(options or {})
        self._host, self._config = pipeline.host, pipeline.config

    def compile(self, name: str, *, prove: bool) -> CompiledModule:
        """Compile it; see ``Pipeline.compile``."""
        backend, clock = self._pipeline.backend(name), StageClock(self._host, "compile")
        require_followable(self._program)
        with clock.stage("compile"):
            tools = tools_for(self._host, self._config, "compile", "compile")
            opened = backend.compile(self._program, self._options, tools)
        with clock.stage("plan"):
            plan = self._planned(opened, backend, {})
            kept = self._kept()
        compiled = CompiledModule(opened, plan, kept, self._pipeline)
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
        opened, clock = compiled.opened if compiled else None, StageClock(self._host, "plan")
        with clock.stage("plan"):
            plan = self._planned(opened, self._pipeline.backend(name), self._options)
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
        host, config, program = self._host, self._config, self._program
        opener, folder = self._pipeline.open_weights, config.cache_folder()

        def make() -> RefitPlan:
            return make_plan(host, program, opened, backend, options, config, opener)

        if folder is None:
            return make()
        tools = tools_for(host, config, "plan", "plan")
        wish = wanted(host, backend, program, opened, options, tools)
        return make() if wish is None else PlanCache(folder, tools.progress, opener).get(wish, make)

    def _kept(self) -> KeptProgram | None:
        kept = KeptProgram.of(self._program)
        if kept is None:
            text = "the program cannot be kept: no proof, and verify='outputs' needs reference="
            self._host.emit(Step("plan", "plan", text))
        return kept

    def _adopt(self, compiled: CompiledModule, plan: RefitPlan, *, prove: bool) -> RefitPlan:
        """Give the plan to a module that somebody else compiled, once a copy of it is proved."""
        kept = self._kept()
        if prove:
            copy = CompiledModule(compiled.opened.reopen(), plan, kept, self._pipeline)
            plan = self._prove(copy, plan)
        compiled.plan, compiled.program = plan, kept
        return plan

    def _prove(self, compiled: CompiledModule, plan: RefitPlan) -> RefitPlan:
        """The plan with what its proof needed."""
        if not compiled.program:
            return plan
        proof = prove_refit(self._pipeline, compiled, self._program)
        self._tell("compile", proof.missing)
        return needing(plan, proof.needs)

    def _prove_plan(self, plan: RefitPlan, opened: OpenedModule | None) -> RefitPlan:
        host, config, options = self._host, self._config, self._options
        proof = prove_plan(host, config, plan, self._program, opened, options)
        self._tell("plan", proof.missing)
        return needing(plan, proof.needs)

    def _tell(self, verb: str, missing: str) -> None:
        """Tell why there is no proof, if there is none."""
        if missing:
            self._host.emit(Step(verb, "prove", f"there is no proof by trial: {missing}"))
