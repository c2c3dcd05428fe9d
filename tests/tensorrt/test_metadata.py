"""Metadata of engines: real ones, those of other versions, hostile and damaged ones."""

from __future__ import annotations

import base64
import pickle
import re
import struct
from typing import TYPE_CHECKING, Any

import pytest
import sympy
import torch

from refitkit.builtin.torch_tensorrt.metadata import (
    ALLOWED_GLOBALS,
    DeviceValue,
    EnumValue,
    read_metadata,
)
from refitkit.builtin.torch_tensorrt.settings import settings_from
from refitkit.errors import NotRefittableError, UnsupportedTargetError
from refitkit.files.plain_pickle import PickleRefusedError, read_pickle
from tests.tensorrt.targets import compilation_settings

if TYPE_CHECKING:
    from collections.abc import Callable

RAN: list[str] = []
NAME = "_run_on_acc_0"


def ran(what: str) -> str:
    RAN.append(what)
    return what


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (ran, ("reduce",))


def encoded(value: Any, protocol: int = 4) -> str:
    return base64.b64encode(pickle.dumps(value, protocol)).decode()


def upstreams(torch_tensorrt: Any, settings: Any, **more: Any) -> str:
    """As ``TorchTensorRTModule._pack_engine_info`` writes it."""
    cls = torch_tensorrt.dynamo.runtime.TorchTensorRTModule
    metadata = {"settings": settings, "inout_symexprs": None, "output_tensors_are_unowned": False}
    text: str = cls.encode_metadata(cls.__new__(cls), metadata | more)
    return text


def options() -> list[dict[str, Any]]:
    return [
        {},
        {"torch_executed_ops": {"torch.ops.aten.mul.Tensor"}, "min_block_size": 1},
        {"torch_executed_ops": {torch.ops.aten.sin.default}},
        {"enable_autocast": True, "autocast_excluded_nodes": {"^a$"}, "dryrun": "graph.txt"},
        {"autocast_low_precision_type": torch.float16, "cpu_memory_budget": 7},
        {"optimization_level": 3, "max_aux_streams": 0, "lazy_engine_init": True},
    ]


@pytest.mark.parametrize("number", range(len(options())))
def test_real_settings_come_back_as_they_were(torch_tensorrt: Any, number: int) -> None:
    settings = compilation_settings(torch_tensorrt, **options()[number])
    metadata = read_metadata(upstreams(torch_tensorrt, settings), NAME)
    back = settings_from(metadata.settings, NAME)
    assert type(back) is type(settings)
    wanted = pickle.loads(pickle.dumps(settings))  # noqa: S301 - our own, as upstream reads it
    assert str(vars(back)) == str(vars(wanted))
    assert not metadata.outputs_unowned


def test_upstreams_own_enums(torch_tensorrt: Any) -> None:
    enums = torch_tensorrt._enums
    settings = compilation_settings(
        torch_tensorrt,
        engine_capability=enums.EngineCapability.SAFETY,
        autocast_low_precision_type=enums.dtype.bf16,
    )
    metadata = read_metadata(upstreams(torch_tensorrt, settings), NAME)
    assert metadata.settings["engine_capability"] == EnumValue(
        "EngineCapability", enums.EngineCapability.SAFETY.value
    )
    assert isinstance(metadata.settings["device"], DeviceValue)
    back = settings_from(metadata.settings, NAME)
    assert back.engine_capability is enums.EngineCapability.SAFETY
    assert back.autocast_low_precision_type is enums.dtype.bf16
    assert back.device.gpu_id == 0


def test_symbolic_shapes_and_name_maps_are_data(torch_tensorrt: Any) -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    shapes = {"inputs": [{"shape_exprs": [2 * size + 1, 3], "dtype": torch.float32, "name": "x"}]}
    names = {"a CONSTANT": ["a.weight", torch.float16], "b SCALE": [["b.w", "b.v"], torch.float32]}
    text = upstreams(
        torch_tensorrt,
        compilation_settings(torch_tensorrt),
        inout_symexprs=shapes,
        weight_name_map=names | {"constant_mapping": {}},
        output_tensors_are_unowned=True,
    )
    metadata = read_metadata(text, NAME)
    assert metadata.outputs_unowned
    assert metadata.symbolic_shapes == {
        "inputs": [
            {
                "shape_exprs": ["Add(One(), Mul(Integer(2), s0))", 3],
                "dtype": "torch.float32",
                "name": "x",
            }
        ]
    }
    assert metadata.weight_name_map == {
        "a CONSTANT": ["a.weight", "torch.float16"],
        "b SCALE": [["b.w", "b.v"], "torch.float32"],
        "constant_mapping": {},
    }


def with_state(torch_tensorrt: Any, change: Callable[[dict[str, Any]], Any]) -> str:
    settings = compilation_settings(torch_tensorrt)
    change(vars(settings))
    return encoded({"settings": settings})


def test_settings_of_an_older_version_get_defaults(torch_tensorrt: Any) -> None:
    def older(state: dict[str, Any]) -> None:
        del state["fallback_data_dependent_ops"], state["decompose_attention"]
        state["use_python_runtime"] = True
        state["enabled_precisions"] = {torch_tensorrt._enums.dtype.f32}

    metadata = read_metadata(with_state(torch_tensorrt, older), NAME)
    back = settings_from(metadata.settings, NAME)
    assert back.decompose_attention is False
    assert back.fallback_data_dependent_ops is False
    assert not hasattr(back, "enabled_precisions")


def test_settings_of_a_newer_version_are_refused_with_every_unknown_field(
    torch_tensorrt: Any,
) -> None:
    def newer(state: dict[str, Any]) -> None:
        state.update(tomorrow=1, the_day_after=2)

    metadata = read_metadata(with_state(torch_tensorrt, newer), NAME)
    with pytest.raises(UnsupportedTargetError, match="newer Torch-TensorRT") as caught:
        settings_from(metadata.settings, NAME)
    assert [problem.subject for problem in caught.value.problems] == ["tomorrow", "the_day_after"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_block_size", "5"),
        ("min_block_size", True),
        ("immutable_weights", 0),
        ("engine_capability", 1),
        ("torch_executed_ops", {1, 2}),
        ("torch_executed_ops", "torch.ops.aten.mul.Tensor"),
        ("timing_cache_path", b"bytes"),
        ("device", "cuda:0"),
    ],
)
def test_fields_of_another_type_are_refused(torch_tensorrt: Any, name: str, value: Any) -> None:
    settings = compilation_settings(torch_tensorrt)
    metadata = read_metadata(encoded({"settings": settings}), NAME)
    with pytest.raises(UnsupportedTargetError, match=name):
        settings_from({**metadata.settings, name: value}, NAME)


def test_settings_without_a_device_are_refused(torch_tensorrt: Any) -> None:
    metadata = read_metadata(with_state(torch_tensorrt, lambda state: state.pop("device")), NAME)
    with pytest.raises(UnsupportedTargetError, match="device: missing"):
        settings_from(metadata.settings, NAME)


@pytest.mark.parametrize("nothing", ["", b""])
def test_no_metadata_is_not_refittable(nothing: str | bytes) -> None:
    with pytest.raises(NotRefittableError, match="Recompile"):
        read_metadata(nothing, NAME)


def refused(text: str | bytes, match: str) -> None:
    RAN.clear()
    with pytest.raises(UnsupportedTargetError, match=match):
        read_metadata(text, NAME)
    assert RAN == []


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["settings", "inout_symexprs", "else"])
def test_code_in_a_pickle_never_runs(torch_tensorrt: Any, protocol: int, where: str) -> None:
    metadata: dict[str, Any] = {"settings": compilation_settings(torch_tensorrt), where: Runs()}
    hostile = encoded(metadata, protocol)
    RAN.clear()
    pickle.loads(base64.b64decode(hostile))  # noqa: S301 - our own: the bait is live
    assert RAN == ["reduce"]
    refused(hostile, "is refused")


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def calls(module: str, name: str, arguments: bytes) -> str:
    """A pickle of protocol 4 that calls something, by hand."""
    body = b"\x80\x04" + text(module) + text(name) + b"\x93" + arguments + b"R."
    return base64.b64encode(body).decode()


HANDMADE = {
    "os.system": calls("os", "system", text("true") + b"\x85"),
    "a dotted name": calls("torch", "os.system", text("true") + b"\x85"),
    "torch.load": calls("torch.serialization", "load", text("x") + b"\x85"),
    "eval": calls("builtins", "eval", text("1") + b"\x85"),
    "getattr": calls("builtins", "getattr", text("1") + text("x") + b"\x86"),
    "sympify": calls("sympy.core.sympify", "sympify", text("1") + b"\x85"),
    "a registered extension": base64.b64encode(b"\x80\x02\x82\x01.").decode(),
    "a persistent name": base64.b64encode(b"\x80\x02" + text("x") + b"Q.").decode(),
    "an old instance": base64.b64encode(b"(ios\nsystem\n.").decode(),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_pickles_made_by_hand_are_refused(name: str) -> None:
    refused(HANDMADE[name], "is refused: it (names|has the opcode|is damaged)")


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        (
            ("torch.utils._sympy.functions", "FloorDiv", ("__import__('os')", 2)),
            "not an expression",
        ),
        (("sympy.core.symbol", "Symbol", (1,)), "another way than sympy"),
        (("torch_tensorrt._enums", "dtype", ("f32",)), "another way than upstream"),
        (("torch", "float32", ()), "not allowed at this place"),
    ],
)
def test_admitted_names_get_no_strings_that_upstream_would_evaluate(
    torch_tensorrt: Any, expression: tuple[str, str, tuple[Any, ...]], match: str
) -> None:
    module, name, arguments = expression
    settings = pickle.dumps(compilation_settings(torch_tensorrt), 4)[11:-1]  # without its frame
    call = text(module) + text(name) + b"\x93" + pickle.dumps(arguments, 2)[2:-1] + b"R"
    body = b"\x80\x04}(" + text("settings") + settings + text("inout_symexprs") + call + b"u."
    refused(base64.b64encode(body), match)


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 1000, -1])
def test_truncated_metadata(torch_tensorrt: Any, keep: int) -> None:
    data = pickle.dumps({"settings": compilation_settings(torch_tensorrt)})[:keep]
    if not data:
        return
    refused(base64.b64encode(data), "is refused")


@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        ("!!!", "not valid base64"),
        ("AAAA\nAAAA", "not valid base64"),
        ("ééé", "not valid base64"),
        (base64.b64encode(pickle.dumps({"settings": 1})), "no compilation settings"),
        (base64.b64encode(pickle.dumps({})), "no compilation settings"),
        (base64.b64encode(pickle.dumps([1])), "not a mapping"),
        (base64.b64encode(pickle.dumps(1) + b"more"), "after its end"),
        (base64.b64encode(b"\x80\x04]]."), "one value"),
        (base64.b64encode(b"\x80\x04((t."), "damaged"),
    ],
)
def test_damaged_metadata(damaged: str | bytes, match: str) -> None:
    refused(damaged, match)


def test_every_flipped_byte_is_refused_or_read(torch_tensorrt: Any) -> None:
    data = pickle.dumps({"settings": compilation_settings(torch_tensorrt)})
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 0x15
        try:
            metadata = read_metadata(base64.b64encode(changed), NAME)
            settings_from(metadata.settings, NAME)
        except UnsupportedTargetError:
            pass


def bomb(levels: int) -> bytes:
    """Tuples of tuples: small in the file, vast when walked."""
    body = b"\x80\x04(" + text("x") + b"\x94"
    for level in range(levels):
        body += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x94"
    return body + b"t"


def test_bombs_are_refused_in_no_time() -> None:
    with pytest.raises(PickleRefusedError, match="too large"):
        read_pickle(bomb(40) + b".", ALLOWED_GLOBALS)
    with pytest.raises(PickleRefusedError, match="key or set member"):
        read_pickle(b"\x80\x04}" + bomb(40)[2:] + b"Ns.", ALLOWED_GLOBALS)


def test_cycles_are_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(PickleRefusedError, match="nested too deeply"):
        read_pickle(pickle.dumps(cycle), ALLOWED_GLOBALS)


def test_metadata_has_a_size_limit() -> None:
    refused("A" * ((1 << 26) + 4), "the limit is")


def test_no_admitted_name_is_a_function() -> None:
    assert not {name for _, name in ALLOWED_GLOBALS if re.fullmatch(r"[a-z_]+", name)} - {
        "dtype",
        "bool",
    }
