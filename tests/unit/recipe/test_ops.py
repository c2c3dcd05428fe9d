"""Which ops recipes may hold, and what is exact on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refitkit.model import Number, OpCall, SourceRef, Tensor
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
