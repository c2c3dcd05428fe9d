"""One refit past the refitter: staged in the engine's own layout, committed by one copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout


class DirectWriter:
    """Writes the weights in an arena to the memory of an engine."""

    def __init__(
        self, layout: EngineLayout, piece: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> None:
        """Allocate a second piece.

        Args:
            layout: The engine's layout, proved.
            piece: The memory of its weights, as ``uint8``: an alias.
            values: Weights to write, flat: memory that stays where it is.
        """
        self._layout, self._live, self._values = layout, piece, values
        self._fixed = {name: values[name].clone() for name in layout.fixed}
        self._next = piece.clone()  # with what lies between the weights
        self._replay: torch.cuda.CUDAGraph | None = None

    @property
    def nbytes(self) -> int:
        """Size of the second piece."""
        return self._next.numel()

    def takes(self) -> bool:
        """Return whether weights that cannot be written still have their values."""
        return all(torch.equal(self._values[name], one) for name, one in self._fixed.items())

    def prepare(self) -> None:
        """Write the values to the second piece, on the current stream, while the engine serves."""
        if not self._live.is_cuda:
            self._write()
            return
        if self._replay is None:
            self._replay = self._captured()
        self._replay.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return all copies as one graph: a launch of each would take longer than the copies."""
        stream, graph = torch.cuda.Stream(self._live.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._live.device))
        with torch.cuda.stream(stream):
            self._write()  # what torch does only once must not happen in a capture
        torch.cuda.current_stream(self._live.device).wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self._write()
        return graph

    def _write(self) -> None:
        self._layout.write(self._next, self._values)

    def commit(self) -> None:
        """Copy the second piece over the weights, on the current stream. No call may run."""
        first, last = self._layout.span
        self._live[first:last].copy_(self._next[first:last])
