"""The pipeline: one file a stage, and :mod:`refitkit.pipeline.pipeline`, which runs them."""

from refitkit.pipeline.module import CompiledModule, RefitResult, RefitResults
from refitkit.pipeline.pipeline import Pipeline

__all__ = ["CompiledModule", "Pipeline", "RefitResult", "RefitResults"]
