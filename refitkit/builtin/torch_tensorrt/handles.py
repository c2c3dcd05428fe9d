"""What a TensorRT engine inside somebody's module offers, whichever runtime holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

Runtime = Literal["python", "cpp"]


@dataclass(frozen=True)
class Binding:
    """One input or output of an engine.

    Attributes:
        name: Its name.
        dtype: torch's name without the ``torch.``.
        shape: Sizes; -1 where they are dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class EngineHandle(Protocol):
    """One TensorRT engine in a target.

    The Python runtime holds a live ``ICudaEngine``, which a refitter changes in place. The C++
    runtime keeps its engine to itself: it is refitted by way of its bytes.
    """

    @property
    def name(self) -> str:
        """Name of the child that it is, such as ``_run_on_acc_0``."""

    @property
    def runtime(self) -> Runtime:
        """Which runtime holds it."""

    @property
    def settings(self) -> Any:
        """Its ``torch_tensorrt.dynamo.CompilationSettings``."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of its inputs, in the order of its call."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs, in order."""

    @property
    def weight_name_map(self) -> Any:
        """The cached map of torch-tensorrt 2.11 and 2.12; None where there is none."""

    def engine_bytes(self) -> bytes:
        """The engine as it is stored in the target. Flushes what ``on_stale`` left pending."""

    def cuda_engine(self) -> Any:
        """The live ``ICudaEngine``; None where the C++ runtime holds it."""

    def prepare(self, engine_bytes: bytes) -> Any:
        """Make another engine, which takes long, and put it nowhere yet.

        Raises:
            EngineError: The runtime refuses the bytes.
        """

    def present(self) -> Any:
        """What is in place, live and stored, to be put back later."""

    def put(self, engine: Any) -> None:
        """Put what ``prepare`` or ``present`` gave in place, live and stored. Fast.

        What was stale about the engine that goes is forgotten.
        """

    def replace(self, engine_bytes: bytes) -> None:
        """Put another engine in its place: ``prepare`` and ``put`` in one.

        Raises:
            EngineError: The runtime refuses the bytes; the old engine is still in place.
        """

    def on_stale(self, flush: Callable[[], bytes] | None) -> None:
        """Note that the live engine was refitted in place, so that the stored bytes are stale.

        Args:
            flush: Serializes the live engine. Called, once, before anybody reads the stored bytes:
                ``engine_bytes``, a deepcopy, a pickle, a save. None: they are right as they are.
        """

    def drop_captured(self) -> None:
        """Drop CUDA graphs that were captured with the old weights."""
