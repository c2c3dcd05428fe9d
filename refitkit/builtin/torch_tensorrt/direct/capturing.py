"""Many launches as one: a CUDA graph of work that is always the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.refitter import current_device

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_FAILURES = 3


class Captured:
    """Work on one device that only launches kernels and copies, at the same addresses each time.

    The first time its calls are made one by one, which compiles and loads all kernels. The second
    time they are captured. Where that fails, they are made one by one as before.
    """

    def __init__(
        self, device: torch.device, capture: Callable[[Callable[[], None]], Any] | None = None
    ) -> None:
        """Capture nothing yet.

        Args:
            device: The device.
            capture: Returns the graph of some work without doing it; None: CUDA's on a GPU.
        """
        self._device = device
        if capture is None and device.type == "cuda":
            capture = self._capture
        self._new = capture
        self._graph: Any = None
        self._was_done = False
        self._failures = 0

    def get_ready(self, work: Callable[[], None]) -> None:
        """Capture work whose kernels are loaded, and do none of it.

        Args:
            work: See ``do``.
        """
        self._was_done = True
        with current_device(self._device):
            self._captured(work)

    def do(self, work: Callable[[], None]) -> None:
        """Do the work, on the current stream.

        Args:
            work: The same calls each time. It may be done twice if something fails. All memory that
                it uses has to outlive this object.
        """
        with current_device(self._device):
            graph = self._captured(work) if self._was_done else None
            if graph is not None:
                try:
                    graph.replay()
                except Exception:  # noqa: BLE001 - the calls may still work
                    self._forget()
                else:
                    return
            work()
            self._was_done = True

    def _captured(self, work: Callable[[], None]) -> Any:
        if self._graph is None and self._new is not None and self._failures < _MOST_FAILURES:
            try:
                self._graph = self._new(work)
            except Exception:  # noqa: BLE001 - as when other code has called the driver meanwhile
                self._forget()
        return self._graph

    def _forget(self) -> None:
        self._graph = None
        self._failures += 1

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # not ``torch.cuda.graph``: that waits for the device and empties torch's cache
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch's
        with torch.cuda.stream(stream):
            # other threads go on calling what they like
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
