"""One update of a receiver, and the thread that carries it out.

The thread runs the refit (``pipeline/receive.py``). Callers hand it buckets, and wait until each is
staged or copied. A failure in the thread is raised in the call that waits for it.
"""

from __future__ import annotations

import queue
import threading
import uuid
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import xxhash

from refitkit.errors import Problem, RefitError, UpdateStateError, WeightMismatchError
from refitkit.pipeline.receive import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.model import UpdateManifest
    from refitkit.pipeline import Pipeline, RefitResults
    from refitkit.pipeline.receive import Part

_POLL = 0.05  # seconds between two looks at whether the thread of an update has ended

State: TypeAlias = Literal["idle", "staging", "committing", "lost"]


class _Abort(BaseException):
    """Raised in the thread of an update to give it up. Its operation then ends as ``Aborted``."""


@dataclass
class _Message:
    """One bucket on its way to the thread of an update.

    Attributes:
        bucket: Tensors by name; None: nothing more comes.
        taken: Set once it is staged or kept.
    """

    bucket: Mapping[str, torch.Tensor] | None
    taken: threading.Event = field(default_factory=threading.Event)


class Update:
    """One update, and the thread that carries it out.

    Attributes:
        id: Identifier of the update.
        state: See ``ReceiverStatus``.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        parts: list[Part],
        label: str,
        manifest: UpdateManifest | None,
        options: Mapping[str, Any],
        timeout: float,
        at_start: Callable[[], None],
    ) -> None:
        self.id = uuid.uuid4().hex
        self.state: State = "staging"
        self._pipeline, self._parts, self._options = pipeline, parts, options
        self._label, self._timeout = label, timeout
        self._entries = {one.name: one for one in manifest.entries} if manifest else {}
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self.sending = threading.RLock()  # one call that sends or finishes at a time
        self._at_start = at_start
        self._is_ready, self._over, self._is_aborted = threading.Event(), threading.Event(), False
        self._deciding = threading.Lock()  # between abort and commit
        self._result: RefitResults | None = None
        self._failure: BaseException | None = None
        self._count = self._bytes = self._held = self._peak = 0
        self._thread = threading.Thread(target=self._run, name="refitkit-update", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is the thread of the update."""
        return threading.current_thread() is self._thread

    @property
    def is_over(self) -> bool:
        """Whether it has ended. A forked child does not have the thread."""
        return self._over.is_set() or not self._thread.is_alive()

    @property
    def has_succeeded(self) -> bool:
        """Whether the weights of the update are live."""
        return self._result is not None

    def wait_until_ready(self) -> None:
        """Wait until buckets are taken.

        Raises:
            UpdateStateError: The update was aborted.
            RefitError: The update failed.
        """
        while not self._is_ready.wait(_POLL):
            if self.is_over:
                break
        if not self._is_ready.is_set():
            raise self.error()

    def facts(self) -> dict[str, Any]:
        """Fields of ``ReceiverStatus``."""
        return {
            "update": self.id,
            "version": self._label,
            "entries": self._count,
            "bytes": self._bytes,
            "held_bytes": self._held,
            "peak_held_bytes": self._peak,
        }

    # -- in the threads of callers -----------------------------------------------------------

    def send(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Hand a bucket over, and wait until it is staged or kept.

        Raises:
            WeightMismatchError: A digest differs from the manifest's.
            UpdateStateError: The update was aborted.
            RefitError: The update failed.
        """
        for device in {tensor.device for tensor in bucket.values()}:
            if device.type == "cuda":  # the update reads the tensors on a stream of its own
                torch.cuda.current_stream(device).synchronize()
        self._require_digests(bucket)
        self._hand_over(_Message(bucket))
        self._count += len(bucket)
        self._bytes += sum(tensor.nbytes for tensor in bucket.values())

    def finish(self) -> RefitResults:
        """Say that all has arrived, and wait for the commit.

        Raises:
            UpdateStateError: The update was aborted.
            RefitError: The update failed.
        """
        self._inbox.put(_Message(None))
        self._wait_for_end()
        if self._result is None:
            raise self.error()
        return self._result

    def abort(self) -> bool:
        """Give up, and wait for the end; return False if it was too late."""
        with self._deciding:
            self._is_aborted = True
        self._inbox.put(_Message(None))
        self._wait_for_end()
        return self._result is None

    def _wait_for_end(self) -> None:
        # a forked child does not have the thread
        while not self._over.wait(_POLL) and self._thread.is_alive():
            pass

    def _hand_over(self, message: _Message) -> None:
        self._inbox.put(message)
        while not message.taken.wait(_POLL):
            if self.is_over:
                break
        # a bucket that made the update fail is never taken
        if not message.taken.is_set():
            raise self.error()

    def error(self) -> BaseException:
        """Why the update has ended."""
        failure = self._failure
        if isinstance(failure, _Abort) or failure is None:
            return UpdateStateError(
                "The update was aborted.", hint="Begin another one with start_weight_update()."
            )
        return failure

    def _require_digests(self, bucket: Mapping[str, torch.Tensor]) -> None:
        problems = []
        for name, tensor in bucket.items():
            entry = self._entries.get(name)
            if entry is not None and entry.digest and digest_of_bytes(tensor) != entry.digest:
                hint = "its bytes differ from those that the manifest announced"
                problems.append(Problem(name, "digest", hint=hint))
        if problems:
            raise WeightMismatchError("A bucket is damaged.", problems=problems)

    # -- in the thread of the update ---------------------------------------------------------

    def _run(self) -> None:
        try:
            delivery = Delivery(
                buckets=self._buckets(),
                description=f"the update {self._label or self.id}",
                label=self._label,
                at_start=self._at_start,
                before_commit=self._decide,
                on_held=self._note_held,
            )
            self._result = self._pipeline.receive(self._parts, delivery, **self._options)
        except BaseException as exc:  # noqa: BLE001 - raised in the thread of the caller
            self._failure = exc
        finally:
            self._parts = []
            self._over.set()

    def _buckets(self) -> Iterator[Mapping[str, torch.Tensor]]:
        last = monotonic()
        self._is_ready.set()
        while True:
            self._require_not_aborted()
            try:
                message = self._inbox.get(timeout=self._timeout)
            except queue.Empty:
                waited = monotonic() - last
                raise RefitError(
                    f"Nothing has arrived for {waited:.0f} s, so the update was given up.",
                    hint="Begin again, or raise the receiver's timeout=.",
                ) from None
            last = monotonic()
            self._require_not_aborted()
            if message.bucket is None:
                return
            yield message.bucket
            message.bucket = None  # the caller may use the memory again
            message.taken.set()

    def _note_held(self, nbytes: int) -> None:
        self._held, self._peak = nbytes, max(self._peak, nbytes)

    def _require_not_aborted(self) -> None:
        if self._is_aborted:
            raise _Abort

    def _decide(self) -> None:
        """Commit from here on, unless the update was aborted before."""
        with self._deciding:
            self._require_not_aborted()
            self.state = "committing"


def digest_of_bytes(tensor: torch.Tensor) -> str:
    """XXH3 hash of a tensor's bytes, contiguous, in 32 hexadecimal digits."""
    value = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw = value.view(torch.uint8).numpy().data if value.numel() else b""
    return xxhash.xxh3_128_hexdigest(raw)
