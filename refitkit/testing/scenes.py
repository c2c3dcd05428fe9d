"""An engine in a module, refitted by refitkit's own pipeline, with nobody's plugins in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.hookspecs import hookimpl
from refitkit.model import VerificationResult
from refitkit.pipeline.pipeline import Pipeline
from refitkit.pipeline.saved import PLAN
from refitkit.testing.fakes import FakeModule
from refitkit.testing.isolation import isolated_config
from refitkit.testing.plans import plan_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from refitkit.protocols import Engine, OpenedModule, VerifyRequest

VERDICT = "conformance-verdict"


class SceneModule(FakeModule):
    """A module around any engines. It answers with nothing: no check of an engine calls it."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer with nothing."""


def planned_module(engines: Sequence[Engine]) -> SceneModule:
    """A module around engines, with a plan that takes each slot from the parameter of its name."""
    module = SceneModule(engines)
    module.attachments = {PLAN: plan_for(module).to_bytes()}
    return module


class ScenePlugin:
    """Opens a ``SceneModule``, and judges refits as it was told."""

    name = "conformance-scene"

    def __init__(self) -> None:
        """Content with everything."""
        self.verdict = True

    @hookimpl
    def refitkit_load_module(self, target: object) -> OpenedModule | None:
        """Open what is open."""
        return target if isinstance(target, SceneModule) else None

    @hookimpl
    def refitkit_verifiers(self) -> list[SceneVerifier]:
        """Offer the verdict."""
        return [SceneVerifier(verdict=self.verdict)]


class SceneVerifier:
    """Says what it was told to say."""

    name = VERDICT

    def __init__(self, *, verdict: bool) -> None:
        """Take the verdict."""
        self._verdict = verdict

    def prepare(
        self,
        request: VerifyRequest,  # noqa: ARG002 - the protocol's
    ) -> Callable[[OpenedModule], VerificationResult]:
        """Judge without looking."""
        result = VerificationResult(verifier=VERDICT, ok=self._verdict, note="as told")
        return lambda _: result


class EngineScene:
    """One engine in a module of its own.

    Attributes:
        compiled: The module.
    """

    def __init__(self, engine: Engine) -> None:
        """Put it into a module whose plan takes every slot from the parameter of its name."""
        self._plugin = ScenePlugin()
        self._pipeline = Pipeline(isolated_config(), [self._plugin])
        self.compiled = self._pipeline.load(planned_module([engine]))

    def refit(self, values: Mapping[str, torch.Tensor], *, verdict: bool = True) -> None:
        """Refit it through all stages.

        Args:
            values: A value for every slot.
            verdict: What the verifier says.

        Raises:
            RefitError: As the pipeline raises it.
        """
        self._plugin.verdict = verdict
        self._pipeline.refit(self.compiled, dict(values), verify=VERDICT)
