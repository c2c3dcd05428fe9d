"""Calls and commits on streams that work in any order that their events allow."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt.order import CallOrder

if TYPE_CHECKING:
    from collections.abc import Callable

GPU = torch.device("cuda", 0)
WORDS = 3


class Event:
    """Is done once its stream has come to where it was recorded."""

    def __init__(self) -> None:
        self.done = True

    def record(self, stream: Stream) -> None:
        self.done = False
        stream.queue.append(self._reached)

    def _reached(self) -> bool:
        self.done = True
        return True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            Cuda.step()


class Stream:
    """Work in order. Each step returns whether it could be done."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.queue = number, list[Any]()

    def launch(self, do: Callable[[], None]) -> None:
        self.queue.append(lambda: do() or True)

    def wait_event(self, event: Event) -> None:
        self.queue.append(lambda: event.done)


class Cuda:
    """Streams that work whenever a seed says so."""

    Event = Event
    streams: list[Stream]
    rng: random.Random
    capturing = False

    @classmethod
    def new(cls, seed: int, streams: int) -> type[Cuda]:
        cls.streams, cls.rng = [Stream(n) for n in range(streams)], random.Random(seed)  # noqa: S311
        cls.now = cls.streams[0]
        return cls

    @classmethod
    def current_stream(cls, device: torch.device) -> Stream:
        assert device == GPU
        return cls.now

    @classmethod
    def is_current_stream_capturing(cls) -> bool:
        return cls.capturing

    @classmethod
    def step(cls) -> None:
        stream = cls.rng.choice(cls.streams)
        if stream.queue and stream.queue[0]():
            stream.queue.pop(0)

    @classmethod
    def synchronize(cls, _: torch.device | None = None) -> None:
        while any(stream.queue for stream in cls.streams):
            cls.step()


class Service:
    """A memory that commits write word by word and that calls read word by word."""

    def __init__(self, order: CallOrder) -> None:
        self.order, self.memory = order, [0] * WORDS
        self.version = 0
        self.answers: list[tuple[int, list[int]]] = []

    def call(self) -> None:
        answer: list[int] = []
        self.answers.append((self.version, answer))
        self.order.call(lambda: self._read(answer))

    def _read(self, answer: list[int]) -> None:
        for word in range(WORDS):
            Cuda.now.launch(lambda word=word: answer.append(self.memory[word]))

    def commit(self) -> None:
        self.order.order()
        self.version += 1
        for word in range(WORDS):
            Cuda.now.launch(lambda word=word, v=self.version: self._write(word, v))
        self.order.committed()

    def _write(self, word: int, version: int) -> None:
        self.memory[word] = version

    def wrong(self) -> int:
        """Answers that mix versions, or are of another one than that of their launch."""
        Cuda.synchronize()
        return sum(answer != [version] * WORDS for version, answer in self.answers)


def served(seed: int, kind: type[CallOrder] = CallOrder) -> int:
    """Wrong answers of a service with 4 streams for calls and 2 for commits."""
    cuda = Cuda.new(seed, 6)
    service = Service(kind([GPU], cuda))
    for _ in range(40):
        commits = cuda.rng.random() < 0.3
        cuda.now = cuda.rng.choice(cuda.streams[4:] if commits else cuda.streams[:4])
        (service.commit if commits else service.call)()
        for _ in range(cuda.rng.randrange(12)):
            cuda.step()
    return service.wrong()


class WithoutOrder(CallOrder):
    def order(self) -> None:
        pass


class WithoutCommitted(CallOrder):
    def committed(self) -> None:
        pass


def test_no_answer_is_torn_or_of_another_version() -> None:
    assert sum(map(served, range(300))) == 0


@pytest.mark.parametrize("kind", [WithoutOrder, WithoutCommitted])
def test_without_either_side_some_are(kind: type[CallOrder]) -> None:
    assert sum(served(seed, kind) for seed in range(30)) > 0


def test_a_call_that_was_interrupted_is_waited_for() -> None:
    cuda = Cuda.new(0, 2)
    service = Service(CallOrder([GPU], cuda))

    def interrupted() -> None:
        service._read([])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.order.call(interrupted)
    service.call()
    # the interrupt comes before the event is made
    service.order._calls = dict.fromkeys(service.order._calls)
    cuda.now = cuda.streams[1]
    service.commit()
    assert service.wrong() == 0


def test_a_commit_is_waited_for_on_the_host() -> None:
    cuda = Cuda.new(0, 1)
    service = Service(CallOrder([GPU], cuda))
    service.order.settle()  # nothing yet
    service.commit()
    service.order.settle()
    assert service.memory == [1] * WORDS


def test_a_capture_records_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda.new(0, 1)
    order = CallOrder([GPU], cuda)
    monkeypatch.setattr(cuda, "capturing", True)
    assert order.call(lambda: 5) == 5
    assert not order._calls


def test_streams_that_are_done_are_forgotten() -> None:
    cuda = Cuda.new(0, 100)
    order = CallOrder([GPU], cuda)
    for stream in cuda.streams:
        cuda.now = stream
        order.call(lambda: None)
    cuda.synchronize()
    order.order()
    assert not order._calls


def test_a_machine_without_streams_needs_no_order() -> None:
    order = CallOrder([torch.device("cpu")], None)
    assert order.call(lambda: 5) == 5
    order.order()
    order.committed()
    order.settle()


def test_the_event_of_the_later_call_is_kept() -> None:
    """The second thread calls between the moment when the first has recorded and when it stores."""
    cuda = Cuda.new(0, 1)
    order = CallOrder([GPU], cuda)
    made: list[Event] = []

    class Noted(Event):
        def record(self, stream: Stream) -> None:
            super().record(stream)
            made.append(self)
            if len(made) == 1:
                second.start()
                second.join(0.2)

    second = threading.Thread(target=lambda: order.call(lambda: None))
    cuda.Event = Noted
    try:
        order.call(lambda: None)
    finally:
        cuda.Event = Event
    second.join()
    assert list(order._calls.values()) == [made[1]]
