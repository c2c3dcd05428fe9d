"""One ``tensorrt.Refitter`` for the life of an engine.

A new refitter compiles its own kernels at its first refit, for seconds; the next refit takes
milliseconds. So there is one for each engine, its names are set once, to buffers that stay, and a
refit reads what is in them then. Rules are from ``NvInfer.h``, class ``IRefitter`` (TensorRT 10 to
11, TensorRT-RTX 1.4 to 1.7).
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.trtlog import Listener, uncollected
from refitkit.builtin.torch_tensorrt.weighttypes import WeightFact, fact_of_slot, fact_of_trt
from refitkit.errors import EngineError, NotRefittableError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from refitkit.model import Slot

_COUNT = re.compile(r"prototype count (\d+)")
_GUESSES = ("FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "FP8", "BOOL")


class PersistentRefitter:
    """A thin and exact wrapper: every result is looked at, and what TensorRT logs is told.

    Attributes:
        engine: The ``ICudaEngine`` that it refits.
    """

    def __init__(self, engine: Any, trt: Any, device: torch.device) -> None:
        """Make the refitter. Fast; the first ``refit`` is not.

        Args:
            engine: A live ``ICudaEngine``.
            trt: The package ``tensorrt``.
            device: Where the engine runs, and where buffers will be.

        Raises:
            NotRefittableError: The engine was built without the flag for refits.
        """
        self.engine = engine
        self._trt = trt
        self._device = device
        self._heard = Listener(trt)
        if not engine.refittable:
            raise NotRefittableError(
                "The engine was built without TensorRT's flag REFIT.",
                hint="Compile it with immutable_weights=False.",
            )
        with current(device), uncollected():
            self._refitter = trt.Refitter(engine, self._heard.logger)
        self._refitter.error_recorder = self._heard.recorder
        self._refitter.weights_validation = True
        self._bound: dict[str, torch.Tensor] = {}
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's

    def names(self) -> tuple[str, ...]:
        """Names of all weights that can be refitted."""
        return tuple(self._refitter.get_all_weights())

    # -- facts ------------------------------------------------------------------------------

    def facts(self, known: Mapping[str, Slot]) -> dict[str, WeightFact]:
        """Dtype and count of every weight, as the engine has them.

        Args:
            known: What somebody else knows of the weights: shapes, and all where this TensorRT has
                no prototypes.

        Raises:
            NotRefittableError: Nobody knows; names the weights.
        """
        found = {name: self._fact(name, known.get(name)) for name in self.names()}
        lost = [Problem(name, "unknown dtype and count") for name, f in found.items() if f is None]
        if lost:
            raise NotRefittableError(
                "This version of TensorRT does not tell what its weights are.",
                problems=lost,
                hint="Open the module with the plan that was made when it was compiled.",
            )
        return {name: fact for name, fact in found.items() if fact is not None}

    def _fact(self, name: str, slot: Slot | None) -> WeightFact | None:
        fact = self._prototype(name)
        if fact is None:
            return fact_of_slot(slot) if slot is not None else self._tried(name)
        fits = slot is not None and (slot.dtype, slot.count) == (fact.dtype, fact.count)
        return replace(fact, shape=slot.shape) if slot is not None and fits else fact

    def _prototype(self, name: str) -> WeightFact | None:
        if not hasattr(self._refitter, "get_weights_prototype"):
            return None
        weights = self._refitter.get_weights_prototype(name)
        if weights.size < 0:
            return None
        return fact_of_trt(name, weights.dtype, weights.size)

    def _tried(self, name: str) -> WeightFact | None:
        """Learn a fact from refusals, which name the count that was expected, and acceptance.

        Some versions take other types, too, and warn: a type is believed only if it is the one
        that TensorRT takes without a word.
        """
        count = self._tried_count(name)
        if count is None:
            return None
        quiet = [
            guess for guess in self._guesses() if self._takes(name, guess, count) == (True, "")
        ]
        if len(quiet) != 1:
            return None
        return fact_of_trt(name, getattr(self._trt.DataType, quiet[0]), count)

    def _tried_count(self, name: str) -> int | None:
        for guess in self._guesses():
            taken, said = self._takes(name, guess, 1)
            wanted = _COUNT.search(said)
            if taken or wanted:
                return int(wanted[1]) if wanted else 1
        return None

    def _guesses(self) -> list[str]:
        return [guess for guess in _GUESSES if hasattr(self._trt.DataType, guess)]

    def _takes(self, name: str, guess: str, count: int) -> tuple[bool, str]:
        """Whether TensorRT takes weights, and what it says.

        It does not read them before a refit, and before that ``bind`` sets others.
        """
        place = torch.zeros(1, dtype=torch.int64)
        kind = getattr(self._trt.DataType, guess)
        self._heard.take()
        taken = self._set(name, self._trt.Weights(kind, place.data_ptr() if count else 0, count))
        return taken, " ".join(self._heard.take())

    # -- binding ----------------------------------------------------------------------------

    def bind(self, facts: Mapping[str, WeightFact], buffers: Mapping[str, torch.Tensor]) -> None:
        """Set every name, once, to the buffer that later refits read.

        Args:
            facts: What the engine asks of each weight.
            buffers: A contiguous tensor for each name; kept alive from now on.

        Raises:
            EngineError: TensorRT refuses some, or lacks some; lists all of them.
        """
        self._heard.take()
        self._bound = dict(buffers)
        refused = []
        for name, buffer in buffers.items():
            fact = facts[name]
            kind = getattr(self._trt.DataType, fact.trt_type)
            address = buffer.data_ptr() if fact.count else 0
            weights = self._trt.Weights(kind, address, fact.trt_count)
            if not self._set(name, weights, buffer.device.type):
                refused.append(Problem(name, "refused", f"{fact.trt_count} x {fact.trt_type}"))
        refused += [Problem(n, "missing") for n in self._refitter.get_missing_weights()]
        if refused:
            reason = self._heard.quote()
            raise EngineError(f"TensorRT does not take its weights{reason}.", problems=refused)

    def _set(self, name: str, weights: Any, kind: str = "cpu") -> bool:
        location = self._trt.TensorLocation
        where = location.DEVICE if kind == "cuda" else location.HOST
        return bool(self._refitter.set_named_weights(name, weights, where))

    # -- refitting --------------------------------------------------------------------------

    def refit(self, *, idle: bool = False) -> None:
        """Give the engine what the buffers hold; when this returns, it is done.

        Work that is pending on the current stream is waited for, and so is all other work of the
        device: TensorRT leaves undefined what happens to calls that are still running. That wait
        takes up to two milliseconds even where there is nothing to wait for.

        Args:
            idle: Whether no call of the engine can be pending: then only the stream is waited for.

        Raises:
            EngineError: TensorRT failed. Some of the weights may be new by then, and others not.
        """
        self._heard.take()
        with current(self._device):
            done = self._run(idle=idle)
        if not done:
            missing = self._refitter.get_missing_weights()
            raise EngineError(
                f"TensorRT failed to refit the engine{self._heard.quote()}.",
                problems=[Problem(name, "missing") for name in missing],
            )

    def _run(self, *, idle: bool) -> bool:
        if self._stream is None:
            return bool(self._refitter.refit_cuda_engine())
        if idle:
            torch.cuda.current_stream(self._device).synchronize()
        else:
            torch.cuda.synchronize(self._device)
        try:
            return bool(self._refitter.refit_cuda_engine_async(self._stream.cuda_stream))
        finally:
            self._stream.synchronize()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, as TensorRT wants it for all that it does."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
