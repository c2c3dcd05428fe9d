"""Which ops recipes may hold, how literals are written, and what is exact on every device."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refitkit.model import CallRef, Number, OpCall, PinnedRef, SourceRef, Tensor, TorchName
from refitkit.model.slot import ITEM_BYTES
from refitkit.recipe import ops

ALL = [
    f"aten.{packet}.{overload or 'default'}"
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("aten::")
    for packet, _, overload in [name.removeprefix("aten::").partition(".")]
]
ALLOWED = [name for name in ALL if ops.is_allowed(name)]


def words(text: str) -> list[str]:
    return text.split()


def schema_of(name: str) -> Any:
    return ops.overload(name)._schema


# -- the list ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    words(
        """
        aten.mul.Tensor aten.add.Tensor aten.sub.Tensor aten.div.Tensor aten.div.Tensor_mode
        aten.pow.Tensor_Scalar aten.rsqrt.default aten.sqrt.default aten._to_copy.default
        aten.to.dtype aten.clone.default aten.view.default aten._unsafe_view.default
        aten.reshape.default aten.permute.default aten.t.default aten.transpose.int
        aten.expand.default aten.select.int aten.slice.Tensor aten.split.Tensor
        aten.split_with_sizes.default aten.chunk.default aten.unbind.int aten.cat.default
        aten.stack.default aten.flip.default aten.roll.default aten.constant_pad_nd.default
        aten.gather.default aten.index.Tensor aten.index_select.default aten.scatter.src
        aten.masked_fill.Scalar aten.where.self aten.tril.default aten.cumsum.default
        aten.sum.dim_IntList aten.mean.dim aten.amax.default aten.linalg_vector_norm.default
        aten.norm.ScalarOpt_dim aten._softmax.default aten.matmul.default aten.mm.default
        aten.bmm.default aten.addmm.default aten.linear.default aten.convolution.default
        aten.native_layer_norm.default aten._native_batch_norm_legit_no_training.default
        aten.embedding.default aten.sort.default aten.topk.default aten.nonzero.default
        aten.view_as_real.default aten.view_as_complex.default aten.real.default
        aten.polar.default aten.bitwise_and.Tensor aten.__rshift__.Scalar aten.eq.Scalar
        aten.clamp.default aten.fake_quantize_per_channel_affine.default aten.view.dtype
        aten.as_strided.default aten.as_strided_scatter.default aten.slice_scatter.default
        aten.select_scatter.default aten.add_.Tensor aten.copy_.default aten.fill_.Scalar
        aten.zero_.default aten._weight_norm_interface.default aten.upsample_bicubic2d.default
        aten.repeat.default aten.unflatten.int aten.contiguous.default
        """
    ),
)
def test_what_folding_does_with_weights_is_allowed(name: str) -> None:
    assert ops.is_allowed(name)
    assert str(ops.overload(name)) == name


@pytest.mark.parametrize(
    "name",
    words(
        """
        aten.rand.default aten.bernoulli.default aten.bernoulli_.float aten.dropout.default
        aten.multinomial.default aten.normal_.default aten.rrelu.default
        aten.native_dropout.default aten.empty.memory_format aten.empty_like.default
        aten.new_empty.default aten.zeros.default aten.arange.start aten.full.default
        aten.resize_.default aten.set_.source_Storage aten.set_.source_Tensor
        aten._local_scalar_dense.default aten.item.default aten.equal.default
        aten.is_nonzero.default aten.size.int aten.mul.out aten.add.out aten.sum.dim_DimnameList
        aten.native_batch_norm.default aten.batch_norm.default aten.cudnn_batch_norm.default
        aten.instance_norm.default aten.quantize_per_tensor.default aten.to_sparse.default
        aten.to_mkldnn.default aten._pin_memory.default aten.pin_memory.default aten.to.device
        aten.from_file.default aten.save.default aten.bincount.default aten.combinations.default
        aten.diff.default aten.repeat_interleave.Tensor aten.requires_grad_.default
        aten._foreach_add_.Scalar aten._index_put_impl_.default aten._assert_async.default
        aten.record_stream.default aten.embedding_renorm_.default
        aten.as_strided_.default aten.detach_.default aten.matmul_.default
        """
    ),
)
def test_what_is_no_computation_is_not(name: str) -> None:
    assert not ops.is_allowed(name)
    with pytest.raises(KeyError):
        ops.overload(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "aten", "aten.mul", "aten.mul.", "aten..Tensor", "mul.Tensor", "aten.mul.Tensor.x"),
        *("aten.mul.__class__", "aten.__class__.default", "aten.mul.op", "aten.mul.overloads"),
        *(
            "prims.mul.default",
            "prim.device.default",
            "torchvision.nms.default",
            "aten::mul.Tensor",
        ),
        *("aten.mul.Tensor ", " aten.mul.Tensor", "ATEN.mul.Tensor", "aten.mul__.Tensor"),
        *("aten.mul.Scälar", "aten.mul\0.Tensor", "os.system", "aten." + "x" * 10_000),
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert not ops.is_allowed(name)


REFUSED = ("Storage", "Stream", "Generator", "Dimname", "QScheme")


def test_nothing_on_the_list_is_random_or_writes_where_it_does_not_say_so() -> None:
    assert len(ALLOWED) > 800
    for name in ALLOWED:
        op, schema = ops.overload(name), schema_of(name)
        assert torch.Tag.nondeterministic_seeded not in op.tags, name
        assert not any(a.is_out for a in schema.arguments), name
        written = [
            i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        assert written == ([0] if ops.writes_to_operand(op) else []), name
        assert {str(r.type) for r in schema.returns} <= {"Tensor", "List[Tensor]"}, name
        assert not written or [str(r.type) for r in schema.returns] == ["Tensor"], name
        kinds = {str(a.real_type) for a in schema.arguments}
        assert not [k for k in kinds if any(w in k for w in REFUSED)], name


def test_every_name_on_the_list_is_an_op() -> None:
    """A misspelt one would go unseen for ever."""
    found = {name.split(".")[1] for name in ALLOWED}
    assert sorted(p for p in ops._PACKETS if not {p, f"{p}_"} & found) == []


# -- literals ---------------------------------------------------------------------------------


def through_json(value: Any) -> Any:
    """A literal after it was written to a manifest and read again."""
    call = OpCall(op="aten.mul.Tensor", args=(ops.encode(value),), results=())
    text = call.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return ops.decode(OpCall.model_validate_json(text).args[0])


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.floats(allow_nan=False))
def test_floats_come_back_bit_for_bit(value: float) -> None:
    found = through_json(value)
    assert type(found) is float
    assert bits(found) == bits(value)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 1e-5, 5e-324, 1.7976931348623157e308, 0.1])
def test_floats_that_are_whole_or_extreme_stay_floats(value: float) -> None:
    found = through_json(value)
    assert (type(found), bits(found)) == (float, bits(value))


def test_nan() -> None:
    assert math.isnan(through_json(math.nan))


@given(st.complex_numbers(allow_nan=False))
def test_complex_numbers(value: complex) -> None:
    found = through_json(value)
    assert (bits(found.real), bits(found.imag)) == (bits(value.real), bits(value.imag))


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.text(), st.none()))
def test_the_other_literals(value: Any) -> None:
    found = through_json(value)
    assert (type(found), found) == (type(value), value)


@given(st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none(), st.floats())))
def test_lists(value: list[Any]) -> None:
    found = through_json(value)
    assert list(map(repr, found)) == list(map(repr, value))
    assert list(map(repr, through_json(tuple(value)))) == list(map(repr, value))


@pytest.mark.parametrize(
    "value",
    [
        *(getattr(torch, name) for name in ITEM_BYTES),
        *(torch.strided, torch.contiguous_format, torch.preserve_format),
        *(torch.channels_last, torch.channels_last_3d),
    ],
    ids=str,
)
def test_constants_of_torch(value: Any) -> None:
    assert through_json(value) is value


@pytest.mark.parametrize("value", [SourceRef(fqn="w"), PinnedRef(name="p"), CallRef(call=3)])
def test_references_stay_as_they_are(value: Any) -> None:
    assert ops.encode(value) is value
    assert through_json([value, None]) == [value, None]


@pytest.mark.parametrize(
    "value",
    [
        torch.device("cpu"), torch.ones(1), torch.sparse_coo, torch.qint8, object(), {}, b"x",
        [[1]], [torch.device("cpu")], torch.Generator(), range(3), {1},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_written(value: Any) -> None:
    with pytest.raises(TypeError, match="does not occur in recipes"):
        ops.encode(value)


def test_numbers_that_depend_on_inputs_cannot_be_written() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with pytest.raises(TypeError, match="SymInt"):
        ops.encode(ShapeEnv().create_unbacked_symint())


def test_numbers_of_a_subclass_cannot_be_written() -> None:
    """They may be more than their value."""

    class Odd(int):
        pass

    with pytest.raises(TypeError, match="Odd"):
        ops.encode(Odd(3))


@pytest.mark.parametrize("name", ["", "float", "os", "ops", "load", "__dict__", "qint8", "float23"])
def test_constants_that_a_recipe_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match="no constant"):
        ops.decode(TorchName(name=name))


@pytest.mark.parametrize("text", ["", "1", "1.5", "infinity", "-nan", "1e999", "x", "j1", "1+j)"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no number|malformed|could not convert"):
        ops.decode(Number(text=text))


# -- exactness --------------------------------------------------------------------------------

W = SourceRef(fqn="w")


def exact(
    op: str, *args: Any, dtype: str = "float32", of: tuple[str, ...] = (), **kwargs: Any
) -> bool:
    result = Tensor(dtype=dtype, shape=(2,))
    call = OpCall(op=f"aten.{op}", args=(W, *args), kwargs=kwargs, results=(result,))
    return ops.is_exact_anywhere(call, of)


F, H, B, I64 = ("float32",), ("float16",), ("bfloat16",), ("int64",)


@pytest.mark.parametrize(
    "answer",
    [
        exact("reshape.default", (2,)),
        exact("t.default"),
        exact("cat.default"),
        exact("t_.default"),
        exact("index.Tensor", (W,)),
        exact("as_strided.default", (2,), (1,)),
        exact("where.self", W, W),
        exact("masked_fill.Scalar", W, 0.1),
        exact("clone.default", dtype="int64"),
        exact("_to_copy.default"),
        exact("_to_copy.default", dtype="bfloat16"),
        exact("_to_copy.default", dtype="int32", of=I64),
        exact("_to_copy.default", dtype="bool"),
        exact("mul.Tensor", W),
        exact("mul.Tensor", 0.1),
        exact("add.Tensor", W, alpha=1),
        exact("sub.Scalar", 2, 1),
        exact("div.Tensor", W),
        exact("neg.default"),
        exact("add.Tensor", W, dtype="float16", of=(*H, *H)),
        exact("neg.default", dtype="bfloat16", of=B),
        exact("abs.default", of=F),
        exact("mul.Tensor", 3, dtype="int64"),
        exact("mul_.Tensor", W),
        exact("clamp.default", 0, 5, dtype="int64", of=I64),
        exact("sum.default", dtype="int64", of=I64),
        exact("eq.Tensor", W, dtype="bool", of=(*F, *F)),
        exact("bitwise_and.Tensor", W, dtype="int8"),
        exact("__rshift__.Scalar", 4, dtype="uint8"),
        exact("trunc.default"),
        exact("eq.Scalar", 1.5, dtype="bool", of=F),
        exact("mul.Tensor", W, dtype="int64", of=(*I64, *I64)),
        exact("_to_copy.default", dtype="float8_e4m3fn", of=("float8_e4m3fn",)),
        exact("add.Tensor", W, dtype="int64", of=(*I64, *I64), alpha=2),
    ],
)
def test_what_gives_the_same_bits_everywhere(answer: bool) -> None:
    assert answer is True


@pytest.mark.parametrize(
    "answer",
    [
        exact("rsqrt.default"),
        exact("sqrt.default"),
        exact("exp.default"),
        exact("pow.Tensor_Scalar", 2),
        exact("mm.default", W),
        exact("sum.default"),
        exact("mean.dim", (0,)),
        exact("linalg_vector_norm.default"),
        exact("add.Tensor", W, alpha=2),
        exact("add.Tensor", W, alpha=0.5),
        exact("rsub.Scalar", 1, 3),
        exact("div.Tensor", 3.0),
        exact("div.Scalar", 3),
        exact("div.Tensor_mode", W, rounding_mode="floor"),
        exact("mul.Tensor", 0.1, dtype="float16", of=H),
        exact("mul.Tensor", W, dtype="float16"),
        exact("mul.Tensor", W, dtype="float16", of=(*H, *F)),
        exact("mul.Tensor", W, dtype="complex64"),
        exact("abs.default"),
        exact("abs.default", of=("complex64",)),
        exact("clamp.default", 0),
        exact("maximum.default", W, of=(*F, *F)),
        exact("relu.default"),
        exact("scatter.src", 0, W, W),
        exact("index_put.default", (W,), W),
        exact("_to_copy.default", dtype="int32"),
        exact("_to_copy.default", dtype="int32", of=F),
        exact("_to_copy.default", dtype="float8_e4m3fn", of=F),
        exact("sum.default", dtype="int64", of=F),
        exact("eq.Scalar", 0.1, dtype="bool"),
        exact("gt.Scalar", 2.5, dtype="bool", of=I64),
        exact("mul.Tensor", W, dtype="float16", of=(*H, *I64)),
        exact("eq.Scalar", 0.1, dtype="bool", of=H),
        exact("cumsum.default", 0),
        exact("isclose.default", W, dtype="bool", of=F),
        exact("mul.Tensor", Number(text="nan"), dtype="bfloat16", of=B),
        exact("no_such_op.default"),
    ],
)
def test_what_may_not(answer: bool) -> None:
    assert answer is False
