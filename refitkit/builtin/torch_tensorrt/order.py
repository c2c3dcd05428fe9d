"""The order of calls and commits on a GPU: neither waits for the other on the host.

A call launches its work and returns, and a commit is work, too. A commit has to come after all
calls that were launched before it, and before all calls after it. Streams know no such order, so
events make it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_MOST_STREAMS = 64
"""So many streams are remembered; of more, those that have ended their work are forgotten."""


class CallOrder:
    """Puts calls of one module and commits to it in order, on all of its devices.

    Calls go through ``call``. A commit begins with ``order`` and ends with ``committed``, and no
    call is inside ``call`` meanwhile but those of the commit's own thread.
    """

    def __init__(self, devices: Iterable[torch.device], cuda: Any = torch.cuda) -> None:
        """Remember no calls.

        Args:
            devices: Devices on which the module runs. Those without streams need no order.
            cuda: What makes streams and events.
        """
        self._devices = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self._cuda = cuda
        self._calls: dict[tuple[torch.device, int], Any] = {}
        """Event after the last call on each stream. None: the call is inside, or was interrupted"""
        self._commits: dict[torch.device, Any] = {}
        self._lock = ForkedLock()

    def call(self, do: Callable[[], T]) -> T:
        """Return the result of a function that launches work on the current streams.

        It must have the current streams wait for whatever it launches on others, as PyTorch wants
        it anyway. While a CUDA graph is captured nothing is put in order: replays are.
        """
        if not self._devices or self._cuda.is_current_stream_capturing():
            return do()
        keys = []
        for device in self._devices:
            stream, commit = self._cuda.current_stream(device), self._commits.get(device)
            keys.append((device, stream))
            if commit is not None:
                stream.wait_event(commit)
            self._calls[device, stream.cuda_stream] = None
        try:
            return do()
        finally:  # after an error, too: some of the work may be launched
            for device, stream in keys:
                event = self._cuda.Event()
                # The event that is stored last is recorded last, of all threads on a stream.
                with self._lock.held:
                    event.record(stream)
                    self._calls[device, stream.cuda_stream] = event

    def order(self) -> None:
        """Have what follows on the current streams wait for all calls and commits so far."""
        if len(self._calls) > _MOST_STREAMS:
            self._calls = {k: e for k, e in self._calls.items() if e is None or not e.query()}
        for (device, _), event in self._calls.items():
            if event is None:
                self._cuda.synchronize(device)
            else:
                self._cuda.current_stream(device).wait_event(event)
        for device, event in self._commits.items():
            self._cuda.current_stream(device).wait_event(event)

    def committed(self) -> None:
        """Have all calls from now on wait for what was launched on the current streams."""
        for device in self._devices:
            event = self._cuda.Event()
            event.record(self._cuda.current_stream(device))
            self._commits[device] = event

    def settle(self) -> None:
        """Wait on the host for the last commit. Later calls need not wait for it any more."""
        for device, event in list(self._commits.items()):
            event.synchronize()
            if self._commits.get(device) is event:
                del self._commits[device]
