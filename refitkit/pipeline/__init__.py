"""The pipeline: one file a stage, and :mod:`refitkit.pipeline.pipeline`, which runs them."""

from refitkit.pipeline.compiled import CompiledModule
from refitkit.pipeline.pipeline import Pipeline
from refitkit.pipeline.result import RefitResult, RefitResults

__all__ = ["CompiledModule", "Pipeline", "RefitResult", "RefitResults"]
