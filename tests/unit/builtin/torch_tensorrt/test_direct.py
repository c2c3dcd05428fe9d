"""Refits past the refitter: how a layout is learned and proved, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from refitkit.builtin.torch_tensorrt.direct import known, route
from refitkit.builtin.torch_tensorrt.direct.folds import Fold
from refitkit.builtin.torch_tensorrt.direct.layout import EngineLayout
from refitkit.builtin.torch_tensorrt.direct.learning import UnknownLayoutError
from refitkit.builtin.torch_tensorrt.direct.places import Place
from refitkit.errors import UnsupportedTargetError
from tests.fakes import Tripwire, same_state
from tests.unit.builtin.torch_tensorrt.fake_trt import (
    FakeRuntime,
    PlacedEngine,
    TellingRefitter,
    engine_from,
    fake_trt,
    laid_out,
)
from tests.unit.builtin.torch_tensorrt.scenes import CPU, engine_of, slot_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.unit.builtin.torch_tensorrt.fake_trt import FakeHandle

Values = dict[str, torch.Tensor]
NORM = "n/norm"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is known of any engine."""
    known._of_process.clear()
    yield
    known._of_process.clear()


def values_of(seed: int) -> Values:
    g = torch.Generator().manual_seed(seed)
    return {
        "linear": torch.randn(6, 8, generator=g),
        "half": torch.randn(10, generator=g).half(),
        "one": torch.randn(1, generator=g),
        "sizes": torch.tensor([3, 5], dtype=torch.int32),
        f"{NORM}_weight CONSTANT": torch.randn(4, generator=g),
        f"{NORM}_bias CONSTANT": torch.randn(4, generator=g),
        f"{NORM}_running_mean CONSTANT": torch.randn(4, generator=g),
        f"{NORM}_running_var CONSTANT": torch.rand(4, generator=g) + 0.5,
        f"{NORM}_eps CONSTANT": torch.tensor([1e-5]),
    }


A, B, C = map(values_of, range(3))


class Folding(PlacedEngine):
    """Keeps the scale and the shift of a norm where its weight and its bias would be."""

    def __init__(self, *args: Any) -> None:
        self.given: Values = {}
        super().__init__(*args)

    def write(self, name: str, data: bytes) -> None:
        place = self.places[name]
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(place.dtype)
        self.given[name] = flat
        if not name.startswith(NORM):
            super().write(name, data)
            return
        w, b, mean, var, eps = (
            self.given.get(f"{NORM}_{end} CONSTANT")
            for end in ("weight", "bias", "running_mean", "running_var", "eps")
        )
        if w is None or b is None or mean is None or var is None or eps is None:
            return
        scale = w / (var + eps).double().sqrt().float()
        shift = (b.double() - mean.double() * scale.double()).float()
        self._put("weight", scale)
        self._put("bias", shift)

    def _put(self, end: str, value: torch.Tensor) -> None:
        place = self.places[f"{NORM}_{end} CONSTANT"]
        place.copy_(value.view(place.shape))

    def read(self, name: str) -> bytes:
        """Of a norm: what it was given last, as the memory does not tell."""
        if name.startswith(NORM) and name in self.given:
            return self.given[name].numpy().tobytes()
        return super().read(name)

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return super().answer(x) if not self.given else self._of_memory(x)

    def _of_memory(self, x: torch.Tensor) -> torch.Tensor:
        self.pieces[0].add_(1)
        placed = [n for n in self.places if n.endswith(("t CONSTANT", "s CONSTANT"))]
        names = sorted({*placed, *(n for n in self.places if not n.startswith(NORM))})
        flat = [self.places[name].reshape(-1).double() for name in names]
        return (sum((f * torch.arange(1, len(f) + 1)).sum() for f in flat) + x.double()).float()


def engine_with(kind: type[PlacedEngine], values: Values = A, **more: Any) -> Any:
    """An engine whose memory is of some kind, and its handle."""
    wire = Tripwire()
    runtime = type("Runtime", (FakeRuntime,), {"placed": kind})
    trt = fake_trt(wire, TellingRefitter, runtime=runtime)
    return engine_of("e", values, wire, runtime="direct", trt=trt, **more)


def refit(engine: Any, values: Mapping[str, torch.Tensor]) -> Any:
    staged = engine.stage(slot_values(engine, values))
    staged.commit()
    return staged


def memory(handle: FakeHandle, name: str) -> torch.Tensor:
    engine: Any = handle.engine
    return engine.places[name].reshape(-1).clone()


def flat(values: Mapping[str, torch.Tensor]) -> Values:
    return {name: value.reshape(-1) for name, value in values.items()}


# -- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((), ()),
        ((5,), (1,)),
        ((5,), (3,)),
        ((3, 4), (4, 1)),
        ((3, 4), (1, 3)),
        ((2, 3, 4), (4, 8, 1)),
    ],
)
def test_a_place_is_found_from_its_elements(
    sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    words = torch.arange(100)
    where = words.as_strided(sizes, strides, 7).reshape(-1)
    place = Place.of(where)
    assert place is not None
    assert place.of_piece(words).reshape(-1).tolist() == where.tolist()
    assert (place.count, place.start, place.end) == (len(where), 7, int(where.max()) + 1)


@pytest.mark.parametrize("where", [[0, 1, 3], [0, 2, 1, 5], [3, 2, 1], [0, 1, 0, 1], [4, 4]])
def test_elements_that_no_strides_give_have_no_place(where: list[int]) -> None:
    assert Place.of(torch.tensor(where)) is None


def layout_of(**more: Any) -> EngineLayout:
    places = {"a": Place(0, ((4, 2),)), "b": Place(1, ((4, 2),))}
    dtypes = dict.fromkeys(places, torch.float32)
    return EngineLayout(**{"piece": 0, "nbytes": 32, "places": places, "dtypes": dtypes, **more})


def test_weights_may_lie_between_one_another() -> None:
    layout_of().check({"a": 4, "b": 4}, CPU)


@pytest.mark.parametrize(
    ("more", "counts", "kind"),
    [
        ({"nbytes": 31}, {"a": 4, "b": 4}, "outside the memory of the weights"),
        ({}, {"a": 4, "b": 5}, "elements"),
        ({}, {"a": 4}, "no such weight"),
        ({}, {"a": 4, "b": 4, "c": 1}, "no place"),
        ({"places": {"a": Place(0, ((4, 0),))}}, {"a": 4}, "two elements at one place"),
        ({"places": {"a": Place(-1, ((4, 1),))}}, {"a": 4}, "outside the memory of the weights"),
        (
            {"places": {"a": Place(0, ((4, 2),)), "b": Place(2, ((4, 1),))}},
            {"a": 4, "b": 4},
            "overlap",
        ),
    ],
)
def test_a_layout_that_would_write_elsewhere_is_refused(
    more: dict[str, Any], counts: dict[str, int], kind: str
) -> None:
    with pytest.raises(UnsupportedTargetError) as info:
        layout_of(**more).check(counts, CPU)
    assert kind in [problem.kind for problem in info.value.problems]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_is_folded_step_by_step(dtype: torch.dtype) -> None:
    fold = Fold("w", "b", "m", "v", "e")
    g = torch.Generator().manual_seed(0)
    values = {n: torch.rand(64, generator=g) + 0.1 for n in "wbmv"} | {"e": torch.tensor([1e-3])}
    values = {name: value.to(dtype) for name, value in values.items()}
    scale = values["w"].numpy() / np.sqrt(values["v"].numpy() + values["e"].numpy())
    assert torch.equal(fold.scale(values), torch.from_numpy(scale))
    wide = values["b"].double().numpy() - values["m"].double().numpy() * scale.astype("float64")
    assert torch.equal(fold.shift(values), torch.from_numpy(wide.astype(scale.dtype)))


# -- refits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PlacedEngine, Folding])
def test_a_refit_is_that_of_the_refitter(kind: type[PlacedEngine]) -> None:
    if kind is PlacedEngine:
        values = [{n: v for n, v in one.items() if not n.startswith(NORM)} for one in (A, B, C)]
    else:
        values = [A, B, C]
    engine, handle = engine_with(kind, values[0])
    other, by_refitter = engine_with(kind, values[0], direct=False)
    for one in (*values[1:], values[0]):
        refit(engine, one)
        assert engine.route == ("direct", "")
        refit(other, one)
        assert other.route == ("refitter", "direct=False in the config")
        placed = kind(by_refitter.engine, _Anywhere())
        for name in placed.places:
            if "running" not in name and "eps" not in name:
                assert torch.equal(memory(handle, name), placed.places[name].reshape(-1)), name


class _Anywhere:
    """Memory that stays."""

    ready = True

    def allocate(self, size: int, _alignment: int, _flags: int) -> int:
        _KEPT.append(torch.zeros(size, dtype=torch.uint8))
        return _KEPT[-1].data_ptr()


_KEPT: list[torch.Tensor] = []


def test_the_live_engine_is_never_refitted_by_tensorrt() -> None:
    engine, handle = engine_with(Folding)
    refit(engine, B)
    writes: list[str] = []
    handle.engine.write = lambda name, _: writes.append(name)
    refit(engine, C)
    staged = refit(engine, B)
    staged.rollback()
    assert not writes
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])


def test_a_commit_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison waits for the device, and calls would wait with it."""
    engine, handle = engine_with(Folding)
    for values in (B, C):  # the first puts another engine in place
        staged = engine.stage(slot_values(engine, values))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "equal", None)
            staged.commit()
        assert engine.route == ("direct", "")
        assert torch.equal(memory(handle, "linear"), flat(values)["linear"])


def test_partial_refits_and_undo() -> None:
    engine, handle = engine_with(Folding)
    refit(engine, B)
    staged = engine.stage_partial(slot_values(engine, {"half": C["half"]}))
    staged.commit()
    assert torch.equal(memory(handle, "half"), C["half"])
    assert torch.equal(memory(handle, "linear"), flat(B)["linear"])
    staged.rollback()
    assert torch.equal(memory(handle, "half"), B["half"])


def test_a_change_of_what_stays_fixed_goes_through_the_refitter() -> None:
    engine, handle = engine_with(Folding)
    refit(engine, B)
    other = {**C, "sizes": torch.tensor([4, 4], dtype=torch.int32)}
    refit(engine, other)
    assert engine.route == ("refitter", "weights changed that can only be refitted")
    assert torch.equal(memory(handle, "sizes"), other["sizes"])
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])
    refit(engine, B)
    assert same_state({"sizes": memory(handle, "sizes")}, {"sizes": B["sizes"]})


@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_a_first_refit_that_changes_what_stays_fixed(adopted: bool, cached: bool) -> None:
    if cached:
        refit(engine_with(Folding)[0], B)
    engine, handle = engine_with(Folding)
    if adopted:
        engine.adopt(slot_values(engine, A))
    other = {**C, "sizes": torch.tensor([4, 4], dtype=torch.int32)}
    refit(engine, other)
    found = handle.engine.values()
    assert torch.equal(found["sizes"], other["sizes"])
    assert torch.equal(found["linear"], flat(C)["linear"])
    refit(engine, {**B, "sizes": other["sizes"]})
    assert torch.equal(handle.engine.values()["sizes"], other["sizes"])


def test_what_stays_fixed_is_that_of_the_engine_in_place() -> None:
    """The first refit is never committed, and the second one is made by TensorRT."""
    engine, handle = engine_with(Folding)
    engine.stage(slot_values(engine, B)).discard()
    other = {**C, "sizes": torch.tensor([4, 4], dtype=torch.int32)}
    refit(engine, other)
    refit(engine, {**B, "sizes": other["sizes"]})
    found = handle.engine.values()
    assert torch.equal(found["sizes"], other["sizes"])
    assert torch.equal(found["linear"], flat(B)["linear"])


def test_a_layout_of_other_memory_is_not_believed() -> None:
    engine, handle = engine_with(Folding)
    refit(engine, B)
    for key, found in list(known._of_process.items()):
        known._of_process[key] = found._replace(memory=bytes(16))
    second, its = engine_with(Folding)
    made = second._trt.Refitter.made
    refit(second, C)
    assert second.route == ("direct", "")
    assert second._trt.Refitter.made > made + 2  # a third one, to learn it anew
    assert torch.equal(memory(its, "linear"), flat(C)["linear"])
    del handle


def test_a_failed_first_refit_leaves_the_engine_of_before() -> None:
    engine, handle = engine_with(Folding)
    before = handle.engine.values()
    staged = engine.stage(slot_values(engine, B))
    staged.commit()
    staged.rollback()
    assert same_state(handle.engine.values(), before)


def test_a_layout_is_learned_once_for_the_same_bytes() -> None:
    engine, _ = engine_with(Folding)
    refit(engine, B)
    made = engine._trt.Refitter.made
    second, handle = engine_with(Folding)
    refit(second, C)
    assert second.route == ("direct", "")
    assert torch.equal(memory(handle, "linear"), flat(C)["linear"])
    assert second._trt.Refitter.made == 2 < made  # of the two engines, neither with a refit
    del engine


def test_weights_that_are_not_finite_prove_nothing_yet() -> None:
    engine, _ = engine_with(Folding, check_finite=False)
    refit(engine, {**B, "one": torch.tensor([float("nan")])})
    assert engine.route[0] == "refitter"
    assert "not finite" in engine.route[1]
    assert engine._direct.writer is None
    refit(engine, B)
    assert engine.route == ("direct", "")
    assert engine._direct.writer is not None


# -- engines that cannot be trusted ---------------------------------------------------------------


class Permuted(PlacedEngine):
    """One weight lies where no strides lead."""

    def placed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = super().placed(values)
        self.order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        return found

    def write(self, name: str, data: bytes) -> None:
        if name == "linear":
            words = torch.frombuffer(bytearray(data), dtype=torch.float32)[self.order]
            data = words.numpy().tobytes()
        super().write(name, data)


class Scaled(PlacedEngine):
    """One weight is stored as a sixth."""

    def write(self, name: str, data: bytes) -> None:
        if name == "linear":
            data = (torch.frombuffer(bytearray(data), dtype=torch.float32) / 6).numpy().tobytes()
        super().write(name, data)


class Twice(PlacedEngine):
    """One weight lies in its memory, and a copy somewhere else answers."""

    def write(self, name: str, data: bytes) -> None:
        super().write(name, data)
        if name == "linear":
            self.copy = torch.frombuffer(bytearray(data), dtype=torch.float32)

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return super().answer(x) + self.copy.sum()


class Apart(PlacedEngine):
    """One weight lies in a piece of its own."""

    def placed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.pieces.append(self._memory(self._allocator, 512))
        alone = laid_out({"linear": values["linear"]}, self.pieces[-1])
        return {**super().placed(values), **alone}

    def _memory(self, allocator: Any, size: int) -> torch.Tensor:
        self._allocator = allocator
        return super()._memory(allocator, size)


class Scribbling(PlacedEngine):
    """Calls write between the weights."""

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        gap = self.pieces[1][256 + 64 : 256 + 64 + 8]
        gap.add_(1)
        return super().answer(x)


class Deaf(PlacedEngine):
    """Answers do not depend on weights."""

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Unsteady(PlacedEngine):
    """Answers to the same inputs differ."""

    def answer(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().answer(x) + self.calls


class Dynamic(PlacedEngine):
    """Takes inputs of several sizes."""

    shape = (-1,)


class Remembering(PlacedEngine):
    """Each context keeps a weight as it was when the context was made."""

    def create_execution_context(self) -> Any:
        context = super().create_execution_context()
        kept = self.places["one"].clone()
        answer = self.answer
        context.engine = type("E", (), {"answer": staticmethod(lambda x: answer(x) + kept)})
        return context


class Built(PlacedEngine):
    """A single number is built into the code."""

    def placed(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**super().placed(values), "one": torch.zeros(1)}


def test_a_number_in_the_code_stays_as_it_is() -> None:
    engine, handle = engine_with(Built, PLAIN)
    new = {n: v for n, v in B.items() if n in PLAIN}
    refit(engine, {**new, "one": A["one"]})
    assert engine.route == ("direct", "")
    assert engine._direct.writer.layout.fixed == {"one", "sizes"}
    writes: list[str] = []
    write = handle.engine.write
    handle.engine.write = lambda name, data: (writes.append(name), write(name, data))
    refit(engine, {**PLAIN})
    assert not writes
    refit(engine, new)  # another number: TensorRT has to do it
    assert sorted(writes) == sorted(PLAIN)
    assert same_state(handle.engine.values(), flat(new))


PLAIN = {n: v for n, v in A.items() if not n.startswith(NORM)}
PLAIN_B = {n: v for n, v in B.items() if n in PLAIN}


def test_warming_learns_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, handle = engine_with(Folding)
    engine.adopt(slot_values(engine, A))
    engine.warm(lambda _: None)
    monkeypatch.setattr(route, "learn", None)
    assert engine.route == ("direct", "")
    assert torch.equal(memory(handle, "linear"), flat(A)["linear"])
    refit(engine, B)
    assert torch.equal(memory(handle, "linear"), flat(B)["linear"])


def test_bytes_of_a_refitted_engine_need_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, handle = engine_with(PlacedEngine, PLAIN)
    refit(engine, PLAIN_B)
    refit(engine, PLAIN)
    data = handle.engine_bytes()
    monkeypatch.setattr(route, "learn", None)
    second, its = engine_with(PlacedEngine, PLAIN)
    its.stored = data
    its.engine = engine_from(data, its.wire)
    refit(second, PLAIN_B)
    assert second.route == ("direct", "")
    assert torch.equal(memory(its, "linear"), flat(B)["linear"])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Permuted, "elements of linear were not found"),
        (Scaled, "elements of linear were not found"),
        (Twice, "other answers"),
        (Apart, "several pieces"),
        (Scribbling, "calls write between its weights"),
        (Deaf, "do not depend on its weights"),
        (Unsteady, "differ from call to call"),
        (Dynamic, "its shapes are dynamic"),
        (Remembering, "other answers"),
    ],
)
def test_what_is_not_proved_goes_through_the_refitter(kind: type[PlacedEngine], why: str) -> None:
    engine, handle = engine_with(kind, PLAIN)
    new = {n: v for n, v in B.items() if n in PLAIN}
    refit(engine, new)
    name, reason = engine.route
    assert name == "refitter"
    assert why in reason
    assert same_state(handle.engine.values(), flat(new))  # TensorRT's own engine was refitted
    assert type(handle.engine) is not kind


def test_the_search_leaves_memory_to_those_who_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 8 * free))
    values, device = {"a": torch.zeros(1000)}, torch.device("cuda")
    route._require_memory(100_000, values, device)
    with pytest.raises(UnknownLayoutError, match=r"more than half of the 1 MB of free memory"):
        route._require_memory(200_000, values, device)


@pytest.mark.parametrize("setting", ["enable_weight_streaming", "sparse_weights"])
def test_settings_for_which_nothing_is_proved(setting: str) -> None:
    engine, handle = engine_with(Folding)
    handle.settings = type("Settings", (), {setting: True})
    refit(engine, B)
    assert engine.route[0] == "refitter"
    assert engine.route[1] in route._SETTINGS.values()


def test_integers_stay_as_they_are() -> None:
    values = {"a": torch.ones(4), "b": torch.tensor([1, 2, 3])}
    engine, _ = engine_with(PlacedEngine, values)
    refit(engine, {**values, "a": torch.full((4,), 2.0)})
    assert engine.route == ("direct", "")


def test_weights_of_eight_bits_go_through_the_refitter() -> None:
    values = {"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}
    engine, _ = engine_with(PlacedEngine, values)
    refit(engine, values)
    assert engine.route == ("refitter", "it has weights of float8_e4m3fn")
