"""For any adapter the sum is right, or a typed error lists the problems."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_models import make_net
from refitkit.errors import RefitError, SourceError, WeightMismatchError
from refitkit.recipe import TensorMap
from safetensors.torch import save

from refitkit_peft.base import Base
from refitkit_peft.config import AdapterConfig
from refitkit_peft.keys import read_key
from refitkit_peft.lora import Lora

NET = make_net().state_dict()
FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

MODULES = st.sampled_from(
    ["lin", "flat", "two", "small", "one", "emb", "head", "norm", "x.lin", ""]
)
FORMS = st.sampled_from([
    "{}.lora_A.weight", "{}.lora_B.weight", "{}.lora_B.bias", "{}.lora_embedding_A",
    "{}.lora_embedding_B", "{}.lora_magnitude_vector", "{}.alpha", "{}.weight", "{}.bias",
    "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight",
    "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha",
    "unet.{}.lora_A.weight", "{}.base_layer.weight", "{}.modules_to_save.a.weight", "{}.diff",
])  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 11, 12, 20]), max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool])


def opened(thing):
    return thing if isinstance(thing, TensorMap) else TensorMap(thing)


def base_with(tensors, config=None, alpha=None):
    base = Base.with_opener(NET, opened)
    base.add("a", tensors, config, alpha=alpha)
    return base


@st.composite
def adapters(draw):
    keys = draw(st.lists(st.tuples(FORMS, MODULES, SHAPES, DTYPES), min_size=1, max_size=6))
    return {
        form.format(module): torch.ones(shape, dtype=dtype) for form, module, shape, dtype in keys
    }


@FAST
@given(adapters(), st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([None, "rank", 3]))
def test_any_entries_are_used_or_told(tensors, scale, alpha):
    try:
        base = base_with(tensors, alpha=alpha)
        source = base.source(Lora(base, {"a": scale}))
    except (SourceError, WeightMismatchError) as exc:
        told = exc.problems or "contains no factors" in exc.message
        assert told, exc  # noqa: PT017 - it may be raised or not
        return
    for name in source.names():
        value = source.get(name)
        assert (value.shape, value.dtype) == (NET[name].shape, NET[name].dtype)
        if name not in source.touched:
            assert value is source._store.get(name) or torch.equal(value, NET[name])


@FAST
@given(
    st.dictionaries(
        st.sampled_from([*AdapterConfig.model_fields, "layer_replication", "new_thing"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-3, 1 << 70)
            | st.floats()
            | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=9), inner, max_size=3)
            ),
            max_leaves=4,
        ),
        max_size=5,
    )
)
def test_any_config_is_used_or_told(fields):
    tensors = {"lin.lora_A.weight": torch.ones(4, 12), "lin.lora_B.weight": torch.ones(20, 4)}
    try:
        base = base_with(tensors, fields)
        source = base.source(Lora(base, {"a": 1.0}))
    except (SourceError, WeightMismatchError) as exc:
        assert exc.problems  # noqa: PT017 - it may be raised or not
        return
    config = AdapterConfig.model_validate(fields)
    delta = source.get("lin.weight").double() - NET["lin.weight"].double()
    wanted = 4 * config.scaling(4, "lin")
    torch.testing.assert_close(delta, torch.full_like(delta, wanted), rtol=1e-4, atol=1e-5)


@FAST
@given(
    st.text(max_size=60)
    | st.from_regex(r"[a-c._]{0,9}\.lora_[AB](\.x)?(\.weight)?", fullmatch=True)
)
def test_any_key_is_read(text):
    key = read_key(text)
    assert key.text == text


@pytest.fixture(scope="module")
def content():
    tensors = {"lin.lora_A.weight": torch.ones(4, 12), "lin.lora_B.weight": torch.ones(20, 4)}
    config = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 4})}
    return save(tensors, config)


@FAST
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_file_is_survived(content, tmp_path_factory, changes):
    import refitkit

    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged)
    base = Base.with_opener(NET, refitkit.Pipeline().open_weights)
    try:
        source = base.source(Lora(base, {str(path): 1.0}))
    except RefitError:
        return
    for name in source.touched:
        source.get(name)


@st.composite
def sums(draw):
    """A weight, and a few pairs of factors with scales."""
    numbers = st.integers(-4, 4)
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    kernel = draw(st.sampled_from([(), (1, 1), (3,), (2, 2), (1, 2, 2)]))
    shape = (rows, columns, *kernel)

    def drawn(*sizes):
        count = int(torch.Size(sizes).numel())
        listed = draw(st.lists(numbers, min_size=count, max_size=count))
        return torch.tensor(listed, dtype=torch.float32).reshape(sizes)

    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 4))
        ones = (1,) * len(kernel)
        pairs.append((drawn(rank, columns, *kernel), drawn(rows, rank, *ones)))
    scales = [draw(st.sampled_from([1.0, 0.5, -0.25, 2.0])) for _ in pairs]
    return (
        drawn(*shape),
        pairs,
        scales,
        draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])),
    )


@FAST
@given(sums())
def test_sums_are_exact_and_rounded_once(case):
    """Small integers and powers of two are exact in float32, so the truth is known."""
    weight, pairs, scales, dtype = case
    base = Base.with_opener({"w.weight": weight.to(dtype)}, opened)
    exact = weight.double()
    for number, ((down, up), scale) in enumerate(zip(pairs, scales, strict=True)):
        base.add(str(number), {"w.lora_A.weight": down, "w.lora_B.weight": up}, alpha="rank")
        product = up.flatten(1).double() @ down.flatten(1).double()
        exact += scale * product.reshape(weight.shape)
    source = base.source(Lora(base, {str(n): scale for n, scale in enumerate(scales)}))
    assert torch.equal(source.get("w.weight"), exact.to(dtype))
