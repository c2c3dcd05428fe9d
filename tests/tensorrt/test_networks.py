"""Weights of networks: those that the interpreter records and those that a scan finds."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import LAYER_TYPES
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.parts import lower, partition_program
from refitkit.builtin.torch_tensorrt.recording import own_copy
from refitkit.builtin.torch_tensorrt.settings import settings_from_options
from refitkit.errors import CompileError, NotRefittableError
from refitkit.program.bits import same_bits
from tests.tensorrt.models import CASES, Case

if TYPE_CHECKING:
    from refitkit.builtin.torch_tensorrt.parts import ProgramPart

pytestmark = pytest.mark.usefixtures("torch_tensorrt")

TYPES = {one.name: one for one in LAYER_TYPES}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = ["mobilenet_v3_small", "bert", "llama", "lstm", "transposed", "odd", "scattered"]


def networks_of(case: Case, seed: int = 0, types: Any = TYPES) -> list[Network]:
    settings = settings_from_options(case.settings)
    parts = partition_program(lower(case.program(seed), settings), settings).parts
    return [Network(part, settings, types) for part in parts if part.structure.accelerated]


@pytest.mark.parametrize(
    ("name", "dtype"),
    # 2.14 cannot convert a batch norm without weights in half precision
    [(n, d) for n in SMALL for d in DTYPES if (n, d) == ("odd", torch.float32) or n != "odd"],
    ids=str,
)
def test_what_is_recorded_and_what_is_found_agree(name: str, dtype: torch.dtype) -> None:
    """Every name that both know, bit for bit, in every dtype; a scan misses nothing."""
    found = CASES[name]
    case = Case(found.make, found.shapes, dtype, found.tokens, found.options, found.engines)
    compared = 0
    for network in networks_of(case):
        assert network.scanned
        for slot, value in network.scanned.items():
            if slot in network.recorded:
                recorded = network.recorded[slot].detach().contiguous().reshape(-1)
                assert same_bits(recorded, value), slot
                compared += 1
        lost = network.recorded.keys() - network.scanned.keys()
        # 2.14 records transposed convolutions under the names of convolutions
        assert all("[CONVOLUTION]" in one for one in lost)
        assert not lost or name == "transposed"
    assert compared


def test_transposed_convolutions_are_found_by_the_scan_alone() -> None:
    (network,) = networks_of(CASES["transposed"])
    kernels = [n for n in network.scanned if n.startswith("[DECONVOLUTION]") and "KERNEL" in n]
    model = CASES["transposed"].model(0)
    values = [network.scanned[name] for name in kernels]
    assert len(kernels) == 2
    wanted: list[Any] = [model.up.weight, model.up2.weight]
    for value, weight in zip(values, wanted, strict=True):
        assert torch.equal(value, weight.detach().reshape(-1))
    assert not network.recorded.keys() & set(kernels)


def test_values_outlive_their_network() -> None:
    """They were views once, into memory that the interpreter frees."""
    case = CASES["odd"]
    (network,) = networks_of(case)
    kept = {name: value.clone() for name, value in network.scanned.items()}
    values = dict(network.scanned)
    del network
    gc.collect()
    litter = [torch.full((8, 8), float("nan")) for _ in range(200)]
    assert all(same_bits(values[name], value) for name, value in kept.items())
    assert litter


def test_a_weight_that_is_recorded_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext

    record = ConversionContext.record_weight

    def wrong(self: Any, name: str, weight: torch.Tensor) -> None:
        record(self, name, weight + 1 if name.startswith("b/linear") else weight)

    monkeypatch.setattr(ConversionContext, "record_weight", wrong)
    with pytest.raises(NotRefittableError) as info:
        networks_of(CASES["odd"])
    (kind,) = {p.kind for p in info.value.problems}
    assert kind == "the recorded value differs from the layer's value"
    assert all(p.subject.startswith("b/linear") for p in info.value.problems)


def test_two_weights_of_one_name_are_refused() -> None:
    twice = {
        **TYPES,
        "CONSTANT": TYPES["CONSTANT"].model_copy(
            update={"weights": (("weights", "CONSTANT"), ("weights", "CONSTANT"))}
        ),
    }
    with pytest.raises(NotRefittableError) as info:
        networks_of(CASES["odd"], types=twice)
    assert {p.kind for p in info.value.problems} == {"two weights with one name"}


def test_a_layer_type_that_is_not_registered_hides_its_weights() -> None:
    fewer = {name: one for name, one in TYPES.items() if name != "DECONVOLUTION"}
    (whole,), (lacking,) = (networks_of(CASES["transposed"], types=one) for one in (TYPES, fewer))
    hidden = whole.scanned.keys() - lacking.scanned.keys()
    assert hidden
    assert {name.partition("-")[0] for name in hidden} == {"[DECONVOLUTION]"}


def test_lowering_leaves_the_users_program_alone() -> None:
    case = CASES["odd"]
    program = case.program(0)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    text = str(program.graph)
    lower(own_copy(program), settings_from_options(case.settings))
    assert str(program.graph) == text
    assert all(same_bits(program.state_dict[name], value) for name, value in before.items())


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


def test_programs_that_change_buffers_are_refused() -> None:
    case = Case(Counting, ((2, 2),))
    with pytest.raises(CompileError) as info:
        lower(case.program(0), settings_from_options({}))
    assert [p.subject for p in info.value.problems] == ["count"]


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"min_block_size": 100}, "odd"),
        ({"torch_executed_ops": ["torch.ops.aten.relu.default"]}, None),
    ],
    ids=["too few ops", "none supported"],
)
def test_nothing_to_accelerate_is_an_error(options: dict[str, Any], make: str | None) -> None:
    """Upstream returns the model as it was, uncompiled."""
    case = CASES[make] if make else Case(torch.nn.ReLU, ((2, 2),))
    settings = settings_from_options(options)
    with pytest.raises(CompileError, match="min_block_size") as info:
        partition_program(lower(case.program(0), settings), settings)
    assert info.value.problems


def parts_of(case: Case, **options: Any) -> list[ProgramPart]:
    settings = settings_from_options({**case.settings, **options})
    return list(partition_program(lower(case.program(0), settings), settings).parts)


def test_the_global_partitioner_takes_over_where_the_fast_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.fx.passes.splitter_base import FxNetSplitterInternalError
    from torch_tensorrt.dynamo import partitioning

    def fails(*_: Any, **__: Any) -> Any:
        raise FxNetSplitterInternalError("as told")

    wanted = parts_of(CASES["odd"], use_fast_partitioner=False)
    monkeypatch.setattr(partitioning, "fast_partition", fails)
    found = parts_of(CASES["odd"])
    assert [part.structure for part in found] == [part.structure for part in wanted]


def test_doubles_are_truncated_where_the_user_wants_it() -> None:
    case = Case(lambda: torch.nn.Linear(4, 4), ((2, 4),), torch.float64)
    (part,) = parts_of(case, truncate_double=True)
    settings = settings_from_options({"truncate_double": True, "min_block_size": 1})
    network = Network(part, settings, TYPES)
    assert {value.dtype for value in network.scanned.values()} == {torch.float32}


def test_dynamic_shapes_become_ranges() -> None:
    model = CASES["odd"].make().eval()
    batch = torch.export.Dim("batch", min=3, max=8)
    program = torch.export.export(
        torch.nn.Sequential(model.a, torch.nn.ReLU(), model.b),
        (torch.randn(4, 8),),
        dynamic_shapes=({0: batch},),
    )
    settings = settings_from_options({"min_block_size": 1})
    (part,) = partition_program(lower(program, settings), settings).parts
    (given,) = part.inputs
    assert (given.shape["min_shape"], given.shape["max_shape"]) == ((3, 8), (8, 8))
    assert Network(part, settings, TYPES).scanned
