"""Opening targets: every kind, what is refused, stale bytes, copies, files."""

from __future__ import annotations

import base64
import copy
import io
import pickle
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.children import ENGINE, METADATA, info_of
from refitkit.builtin.torch_tensorrt.module import (
    EngineFactory,
    TorchTensorRTOpened,
    describe_file,
    open_target,
    read_attachments,
)
from refitkit.builtin.torch_tensorrt.settings import settings_text
from refitkit.builtin.torch_tensorrt.targets import REST
from refitkit.errors import EngineError, NotRefittableError, UnsupportedTargetError
from refitkit.files.plain_pickle import read_pickle
from tests.tensorrt.targets import (
    ENGINES,
    REFUSED,
    TORCH_PART,
    CppEngine,
    Parts,
    build_parts,
    compilation_settings,
    compiled,
    upstream_part,
    use_runtime,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = ENGINES
FRESH = b"vtrt refitted"


@pytest.fixture(scope="module")
def parts(torch_tensorrt: Any) -> Parts:
    return build_parts(torch_tensorrt)


@pytest.fixture(params=["python", "cpp"])
def runtime(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, torch_tensorrt: Any
) -> str:
    use_runtime(monkeypatch, torch_tensorrt, request.param)
    return str(request.param)


@pytest.fixture
def python_runtime(monkeypatch: pytest.MonkeyPatch, torch_tensorrt: Any) -> None:
    use_runtime(monkeypatch, torch_tensorrt, "python")


FACTORY = EngineFactory(engine=lambda handle: ("engine", handle), torch_part=lambda *part: part)  # type: ignore[arg-type, return-value]


def opened(target: object) -> TorchTensorRTOpened:
    module = open_target(target, FACTORY)
    assert module is not None
    return module


def program_of(module: torch.fx.GraphModule) -> torch.export.ExportedProgram:
    """With inlined engines, as ``torch_tensorrt.dynamo.export`` makes it."""
    export = upstream_part("dynamo._exporter").export
    with pytest.warns(UserWarning, match="get_attr"):
        program: torch.export.ExportedProgram = export(module, use_legacy_exporter=True)
    return program


def retraced(module: torch.fx.GraphModule) -> torch.nn.Module:
    """Children that are bare modules with an engine, and guards, as after an export."""
    root = torch.nn.Module()
    for name in ENGINES:
        child = torch.nn.Module()
        child.engine = getattr(module, name).engine
        root.add_module(name, child)
    root.add_module(TORCH_PART, getattr(module, TORCH_PART))
    root.add_module("_guards_fn", torch.export._unlift.GuardsFn())
    return root


KINDS: dict[str, Callable[[torch.fx.GraphModule], Any]] = {
    "children": lambda module: module,
    "program": program_of,
    "inlined": lambda module: program_of(module).module(),
    "retraced": retraced,
}


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, runtime: str, torch_tensorrt: Any, parts: Parts) -> Any:
    return KINDS[request.param](compiled(parts, compilation_settings(torch_tensorrt)))


def test_every_kind_of_target_has_its_engines(
    target: Any, runtime: str, parts: Parts, torch_tensorrt: Any
) -> None:
    module = opened(target)
    engines = module.target.engines
    assert tuple(engines) == ENGINES
    for name, engine in engines.items():
        assert engine.name == name
        assert engine.runtime == runtime
        assert engine.engine_bytes() == parts.engine_bytes[name]
        assert (list(engine.input_names), list(engine.output_names)) == parts.names[name]
        assert (engine.cuda_engine() is None) == (runtime == "cpp")
        assert engine.weight_name_map is None
    wanted = settings_text(compilation_settings(torch_tensorrt))
    assert settings_text(module.target.settings) == wanted
    assert module.backend == "torch_tensorrt"
    assert not module.target.stripped
    assert dict(module.attachments) == {}


def test_parts_that_torch_executes(target: Any) -> None:
    (name,) = opened(target).target.torch_parts
    assert name in {TORCH_PART, REST}
    (state,) = opened(target).target.torch_parts[name].parameters()
    assert torch.equal(state, torch.full((4,), 2.0))


def test_opening_leaves_the_target_as_it_was(target: Any) -> None:
    if isinstance(target, torch.export.ExportedProgram):
        before: Any = dict(target.constants)
        opened(target)
        assert {name: id(one) for name, one in before.items()} == {
            name: id(one) for name, one in target.constants.items()
        }
        return
    before = {path: (module, dict(vars(module))) for path, module in target.named_modules()}
    opened(target)
    after = {path: (module, dict(vars(module))) for path, module in target.named_modules()}
    assert before.keys() == after.keys()
    for path, (module, attributes) in before.items():
        assert after[path][0] is module
        assert after[path][1].keys() == attributes.keys()
        assert all(after[path][1][key] is value for key, value in attributes.items())


def test_lazy_engines_are_opened_without_a_gpu(torch_tensorrt: Any, parts: Parts) -> None:
    settings = compilation_settings(torch_tensorrt, lazy_engine_init=True)
    module = opened(compiled(parts, settings))
    assert module.target.engines[FIRST].engine_bytes() == parts.engine_bytes[FIRST]
    with pytest.raises(UnsupportedTargetError, match="tensorrt_network"):
        module.target.engines[FIRST].set_up()
    with pytest.raises(UnsupportedTargetError, match="needs a GPU"):
        module.run((torch.ones(2, 4),), {})


def test_lazy_engines_are_set_up_on_first_need(
    torch_tensorrt: Any, parts: Parts, python_runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compilation_settings(torch_tensorrt, lazy_engine_init=True)
    engine = opened(compiled(parts, settings)).target.engines[FIRST]
    monkeypatch.setattr(upstream, "has_gpu", lambda: True)
    assert engine.cuda_engine().engine_bytes == parts.engine_bytes[FIRST]


@pytest.mark.parametrize("foreign", [3, "text", torch.nn.Linear(2, 2), {"a": 1}, None])
def test_what_is_not_ours_is_left_to_others(torch_tensorrt: Any, foreign: object) -> None:
    assert open_target(foreign, FACTORY) is None


def test_a_program_without_engines_is_left_to_others(torch_tensorrt: Any) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    assert open_target(program, FACTORY) is None


def test_nothing_is_looked_at_before_torch_tensorrt_is_imported(
    monkeypatch: pytest.MonkeyPatch, torch_tensorrt: Any, parts: Parts
) -> None:
    target = compiled(parts, compilation_settings(torch_tensorrt, lazy_engine_init=True))
    monkeypatch.setattr(upstream, "is_imported", lambda: False)
    assert open_target(target, FACTORY) is None


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"immutable_weights": True}, "immutable_weights=False"),
        ({"refit_identical_engine_weights": True}, "refit_identical_engine_weights=False"),
    ],
)
def test_engines_that_cannot_take_other_weights(
    torch_tensorrt: Any, parts: Parts, options: dict[str, Any], flag: str
) -> None:
    settings = compilation_settings(torch_tensorrt, lazy_engine_init=True, **options)
    with pytest.raises(NotRefittableError, match=flag):
        open_target(compiled(parts, settings), FACTORY)


def test_stripped_engines_are_opened_and_told_of(torch_tensorrt: Any, parts: Parts) -> None:
    settings = compilation_settings(
        torch_tensorrt, lazy_engine_init=True, strip_engine_weights=True
    )
    assert opened(compiled(parts, settings)).target.stripped


def test_engines_of_other_settings_are_refused_with_every_difference(
    torch_tensorrt: Any, parts: Parts
) -> None:
    one = compilation_settings(torch_tensorrt, lazy_engine_init=True)
    other = compilation_settings(
        torch_tensorrt, lazy_engine_init=True, min_block_size=9, use_fp32_acc=True
    )
    with pytest.raises(UnsupportedTargetError) as caught:
        open_target(compiled(parts, one, **{SECOND: other}), FACTORY)
    subjects = [problem.subject for problem in caught.value.problems]
    assert subjects == [f"{SECOND}: min_block_size", f"{SECOND}: use_fp32_acc"]


def test_an_engine_without_metadata(torch_tensorrt: Any, parts: Parts, runtime: str) -> None:
    target = retraced(compiled(parts, compilation_settings(torch_tensorrt)))
    engine: Any = getattr(target, SECOND).engine
    fields = engine.fields if runtime == "cpp" else engine.serialized_info
    fields[METADATA] = ""
    with pytest.raises(NotRefittableError, match=SECOND):
        open_target(target, FACTORY)


@pytest.mark.parametrize("name", ["one engine", "nested", "empty", "packed", "wrapped", "mutable"])
def test_targets_that_have_to_be_opened_in_another_way(
    name: str, torch_tensorrt: Any, parts: Parts, runtime: str
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    cases: dict[str, Callable[[], tuple[Any, str]]] = {
        "one engine": lambda: (getattr(module, FIRST), "module that contains the engine"),
        "nested": lambda: (torch.nn.Sequential(module), f"0.{FIRST}"),
        "empty": lambda: (emptied(module), "contains no engine"),
        "packed": lambda: (packed(program_of(module)), "Load the saved file"),
        "wrapped": lambda: (wrapper(), "compiled_module"),
        "mutable": lambda: (mutable(), "'gm'"),
    }
    target, match = cases[name]()
    with pytest.raises(UnsupportedTargetError, match=match):
        open_target(target, FACTORY)


def emptied(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    getattr(module, SECOND).serialized_engine = None
    return module


def packed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    serializer = upstream_part("dynamo.runtime._TRTEngine").EngineSerializer
    for name, engine in list(program.constants.items()):
        program.constants[name] = serializer(info_of(engine, name).packed())  # type: ignore[arg-type]
    return program


def mutable() -> Any:
    kind: Any = upstream_part(
        "dynamo.runtime._MutableTorchTensorRTModule"
    ).MutableTorchTensorRTModule
    return object.__new__(kind)


def wrapper() -> Any:
    cls = upstream_part("dynamo.runtime._CudaGraphsTorchTensorRTModule")
    kind: Any = cls.CudaGraphsTorchTensorRTModule
    wrapped = kind.__new__(kind)
    vars(wrapped)["cudagraph"] = None  # what its __del__ looks for
    return wrapped


# ---- stale bytes --------------------------------------------------------------------------------


class Serialize:
    """Serializes a live engine, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return FRESH


def stored_in(info: Any) -> bytes:
    """An engine's bytes, which some readers get in base64."""
    field = info[ENGINE]
    text = field.encode() if isinstance(field, str) else field
    return text if text.startswith(b"vtrt") else base64.b64decode(text)


READERS: dict[str, Callable[[Any], bytes]] = {
    "attribute": lambda child: child.serialized_engine,
    "deepcopy": lambda child: copy.deepcopy(child).serialized_engine,
    "copy": lambda child: copy.copy(child).serialized_engine,
    "pickle": lambda child: unpickled(child).serialized_engine,
    "torch.save": lambda child: saved(child).serialized_engine,
    "extra state": lambda child: stored_in(child.get_extra_state()[1]),
    "state_dict": lambda child: stored_in(child.state_dict()["_extra_state"][1]),
    "pack": lambda child: stored_in(child._pack_engine_info()),
    "getstate": lambda child: child.__getstate__()["serialized_engine"],
    "engine deepcopy": lambda child: stored_in(copy.deepcopy(child.engine).serialized_info),
    "engine deepcopy runs": lambda child: copy.deepcopy(child.engine).cuda_engine.engine_bytes,
    "engine getstate": lambda child: stored_in(child.engine.__getstate__()[0]),
    "engine pickle": lambda child: stored_in(unpickled(child.engine).serialized_info),
    "engine list": lambda child: stored_in(child.engine.serialized_info),
    "engine list deepcopy": lambda child: stored_in(copy.deepcopy(child.engine.serialized_info)),
    "engine list pickle": lambda child: stored_in(unpickled(child.engine.serialized_info)),
    "engine list copy": lambda child: stored_in(child.engine.serialized_info.copy()),
    "engine tuple": lambda child: stored_in(tuple(child.engine.serialized_info)),
}


def unpickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own


def saved(child: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(child, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("reader", READERS)
def test_nobody_sees_stale_bytes(
    reader: str, torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    engine = opened(module).target.engines[FIRST]
    child: Any = getattr(module, FIRST)
    plain = type(child)
    serialize = Serialize()
    engine.on_stale(serialize)
    assert serialize.calls == 0
    assert isinstance(child, plain)
    assert READERS[reader](child) == FRESH
    assert READERS[reader](child) == FRESH
    assert engine.engine_bytes() == FRESH
    assert serialize.calls == 1
    assert type(child) is plain
    assert type(child.engine.serialized_info) is list
    assert child.engine.serialized_engine == FRESH
    assert getattr(module, SECOND).serialized_engine == parts.engine_bytes[SECOND]


def test_copies_of_stale_children_are_upstreams_own_class(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    opened(module).target.engines[FIRST].on_stale(Serialize())
    copied = copy.deepcopy(module)
    assert type(getattr(copied, FIRST)) is upstream_part("dynamo.runtime").TorchTensorRTModule


def test_whole_programs_are_saved_with_fresh_bytes(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    program = program_of(compiled(parts, compilation_settings(torch_tensorrt)))
    opened(program).target.engines[FIRST].on_stale(Serialize())
    normalize = upstream_part("_compile")._normalize_engine_constants_to_python
    normalize(program)  # what torch_tensorrt.save does before it writes
    (first, _) = program.constants.values()
    assert stored_in(first.serialized_info) == FRESH  # type: ignore[union-attr]


def test_bytes_that_somebody_stores_win_over_a_pending_flush(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    engine = opened(module).target.engines[FIRST]
    child: Any = getattr(module, FIRST)
    serialize = Serialize()
    engine.on_stale(serialize)
    child.serialized_engine = b"vtrt upstream's refit"
    child.engine.serialized_info[ENGINE] = b"vtrt upstream's refit"
    assert engine.engine_bytes() == b"vtrt upstream's refit"
    assert stored_in(child.engine.serialized_info) == b"vtrt upstream's refit"
    engine.on_stale(serialize)
    child.engine.serialized_info[ENGINE] = b"vtrt again"
    assert stored_in(child.engine.serialized_info) == b"vtrt again"
    engine.on_stale(serialize)
    engine.on_stale(None)
    assert engine.engine_bytes() == b"vtrt upstream's refit"
    assert serialize.calls == 0


def test_a_flush_that_fails_leaves_the_bytes_stale(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    engine = opened(module).target.engines[FIRST]

    def fail() -> bytes:
        raise EngineError("no memory")

    engine.on_stale(fail)
    for _ in range(2):
        with pytest.raises(EngineError, match="no memory"):
            copy.deepcopy(module)
    engine.on_stale(Serialize())
    assert getattr(copy.deepcopy(module), FIRST).serialized_engine == FRESH


# ---- another engine in the place of one ---------------------------------------------------------


def live_bytes(engine: Any, runtime: str) -> bytes:
    held = engine.child.engine if hasattr(engine, "child") else engine.engine
    cuda: Any = held.cuda_engine if runtime == "python" else held.cuda
    assert isinstance(cuda.engine_bytes, bytes)
    return cuda.engine_bytes


def test_another_engine_is_live_and_stored(target: Any, runtime: str, parts: Parts) -> None:
    engine = opened(target).target.engines[FIRST]
    engine.replace(FRESH)
    assert live_bytes(engine, runtime) == FRESH
    assert engine.engine_bytes() == FRESH
    assert opened(target).target.engines[FIRST].engine_bytes() == FRESH
    assert engine.settings.min_block_size == 5
    assert opened(target).target.engines[SECOND].engine_bytes() == parts.engine_bytes[SECOND]


def test_a_refused_engine_leaves_the_old_one(target: Any, runtime: str, parts: Parts) -> None:
    engine = opened(target).target.engines[FIRST]
    with pytest.raises(EngineError, match=FIRST):
        engine.replace(REFUSED)
    assert live_bytes(engine, runtime) == parts.engine_bytes[FIRST]
    assert engine.engine_bytes() == parts.engine_bytes[FIRST]


def test_replacing_never_serializes_the_engine_that_goes(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    for kind in KINDS.values():
        target = kind(compiled(parts, compilation_settings(torch_tensorrt)))
        engine = opened(target).target.engines[FIRST]
        serialize = Serialize()
        engine.on_stale(serialize)
        with pytest.raises(EngineError):
            engine.replace(REFUSED)
        assert serialize.calls == 0
        assert engine.engine_bytes() == FRESH  # what was pending still was
        engine.on_stale(serialize)
        engine.replace(b"vtrt another")
        assert engine.engine_bytes() == b"vtrt another"
        assert serialize.calls == 1


def test_what_users_set_on_an_engine_stays(target: Any, runtime: str) -> None:
    engine: Any = opened(target).target.engines[FIRST]
    held = engine.child.engine if hasattr(engine, "child") else engine.engine
    held.set_output_tensors_as_unowned(True)
    held.use_pre_allocated_outputs = True
    engine.replace(FRESH)
    new = engine.child.engine if hasattr(engine, "child") else engine.engine
    assert new is not held
    assert new.are_output_tensors_unowned()
    assert new.use_pre_allocated_outputs


def test_captured_graphs_are_dropped(target: Any, runtime: str) -> None:
    engine: Any = opened(target).target.engines[FIRST]
    held = engine.child.engine if hasattr(engine, "child") else engine.engine
    if runtime == "cpp":
        engine.drop_captured()
        assert held.graphs_dropped == 1
        return
    held.runtime_states.context_changed = False
    engine.drop_captured()
    assert held.runtime_states.context_changed  # so that the next call captures again


# ---- copies -------------------------------------------------------------------------------------


def test_a_second_module_is_independent(target: Any, runtime: str, parts: Parts) -> None:
    first = opened(target)
    first.target.engines[SECOND].replace(FRESH)
    second = first.reopen()
    assert second.target.engines[SECOND].engine_bytes() == FRESH
    assert live_bytes(second.target.engines[SECOND], runtime) == FRESH
    for name in ENGINES:
        one, two = first.target.engines[name], second.target.engines[name]
        holders = [e.child if hasattr(e, "child") else e for e in (one, two)]
        assert holders[0].engine is not holders[1].engine
    second.target.engines[FIRST].replace(b"another")
    assert first.target.engines[FIRST].engine_bytes() == parts.engine_bytes[FIRST]
    assert opened(target).target.engines[FIRST].engine_bytes() == parts.engine_bytes[FIRST]
    for name, part in first.target.torch_parts.items():
        (mine,) = part.parameters()
        (theirs,) = second.target.torch_parts[name].parameters()
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_a_second_program_is_saved_with_its_own_engines(
    torch_tensorrt: Any, parts: Parts, runtime: str, tmp_path: Path
) -> None:
    program = program_of(compiled(parts, compilation_settings(torch_tensorrt)))
    first = opened(program)
    second = first.reopen()
    second.target.engines[FIRST].replace(FRESH)
    for module, size in ((first, len(parts.engine_bytes[FIRST])), (second, len(FRESH))):
        path = tmp_path / "model.ep"
        module.save(path, {})
        described = describe_file(path)
        assert described is not None
        assert described["engines"][FIRST]["bytes"] == size


def test_upstreams_own_copy_shares_the_engine(
    torch_tensorrt: Any, parts: Parts, python_runtime: None
) -> None:
    """The fault that ``reopen`` works around; where this fails, it is mended upstream."""
    module = compiled(parts, compilation_settings(torch_tensorrt))
    assert getattr(copy.deepcopy(module), FIRST).engine is getattr(module, FIRST).engine


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture(params=["children", "program"])
def savable(request: pytest.FixtureRequest, runtime: str, torch_tensorrt: Any, parts: Parts) -> Any:
    return KINDS[request.param](compiled(parts, compilation_settings(torch_tensorrt)))


def test_a_saved_file_is_upstreams_and_keeps_attachments(
    savable: Any, runtime: str, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = opened(savable)
    module.target.engines[SECOND].replace(FRESH)
    (part,) = module.target.torch_parts.values()
    with torch.no_grad():
        next(part.parameters()).fill_(5.0)
    path = tmp_path / "model.ep"
    attachments = {"plan.refitplan": bytes(range(256)), "empty": b""}
    module.save(path, attachments)
    assert open_target(savable, FACTORY) is not None  # saving left it as it was
    assert read_attachments(path) == attachments
    described = describe_file(path)
    assert described is not None
    assert described["attachments"] == ["empty", "plan.refitplan"]
    assert described["engines"][SECOND]["bytes"] == len(FRESH)
    assert described["engines"][FIRST]["inputs"] == parts.names[FIRST][0]
    with pytest.raises(UnsupportedTargetError, match="GPU"):
        open_target(path, FACTORY)
    monkeypatch.setattr(upstream, "has_gpu", lambda: True)
    again = opened(path)
    assert dict(again.attachments) == attachments
    assert again.target.engines[SECOND].engine_bytes() == FRESH
    assert again.target.engines[FIRST].engine_bytes() == parts.engine_bytes[FIRST]
    (loaded,) = again.target.torch_parts[REST].parameters()
    assert torch.equal(loaded, torch.full((4,), 5.0))
    again.save(path, {})
    assert read_attachments(path) == {}


def test_a_file_that_upstream_wrote_after_a_refit(
    torch_tensorrt: Any, parts: Parts, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = compiled(parts, compilation_settings(torch_tensorrt))
    engine = opened(module).target.engines[FIRST]
    if runtime == "python":
        engine.on_stale(Serialize())
    else:
        engine.replace(FRESH)
        # the stand-in for the C++ engine is not what upstream looks for when it packs engines
        monkeypatch.setattr(torch._C, "ScriptObject", CppEngine)
    path = tmp_path / "upstream.ep"
    with pytest.warns(UserWarning, match="get_attr"):
        torch_tensorrt.save(module, str(path), retrace=False)
    monkeypatch.setattr(upstream, "has_gpu", lambda: True)
    again = opened(path)
    assert again.target.engines[FIRST].engine_bytes() == FRESH
    assert again.target.engines[SECOND].engine_bytes() == parts.engine_bytes[SECOND]
    assert dict(again.attachments) == {}


@pytest.mark.parametrize("kind", ["inlined", "retraced"])
def test_what_upstream_cannot_export_again_is_not_saved(
    kind: str, torch_tensorrt: Any, parts: Parts, python_runtime: None, tmp_path: Path
) -> None:
    target = KINDS[kind](compiled(parts, compilation_settings(torch_tensorrt)))
    with pytest.raises(UnsupportedTargetError, match="Open the ExportedProgram"):
        opened(target).save(tmp_path / "model.ep", {})
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


RAN: list[str] = []


def ran(what: str) -> str:
    RAN.append(what)
    return what


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (ran, ("reduce",))


def hostile_engine(name: str, data: bytes) -> bytes:
    return pickle.dumps(Runs()) if "opaque_obj_1" in name else data


def hostile_inputs(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save((Runs(),), buffer)
    return buffer.getvalue() if "sample_inputs" in name else data


def hostile_metadata(name: str, data: bytes) -> bytes:
    if "opaque_obj_0" not in name:
        return data
    engine = upstream_part("dynamo.runtime._TRTEngine")
    packer = (engine.__name__, "_reconstruct_trt_engine")
    (fields,) = read_pickle(data, {packer}).args
    fields[METADATA] = base64.b64encode(pickle.dumps({"settings": Runs()})).decode()

    class Fake:
        def __reduce__(self) -> tuple[Any, ...]:
            return (engine._reconstruct_trt_engine, (fields,))

    return pickle.dumps(Fake())


def hostile_weights(name: str, data: bytes) -> bytes:
    if name.endswith("weights_config.json"):
        return data.replace(b'"use_pickle": false', b'"use_pickle": true')
    return hostile_inputs("sample_inputs", b"") if name.endswith("weight_0") else data


@pytest.mark.parametrize(
    "change", [hostile_engine, hostile_inputs, hostile_metadata, hostile_weights]
)
def test_hostile_files_are_refused_and_nothing_ran(
    change: Callable[[str, bytes], bytes],
    torch_tensorrt: Any,
    parts: Parts,
    python_runtime: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.ep"
    opened(compiled(parts, compilation_settings(torch_tensorrt))).save(path, {})
    rewritten(path, change)
    monkeypatch.setattr(upstream, "has_gpu", lambda: True)
    RAN.clear()
    with pytest.raises(UnsupportedTargetError, match="refused"):
        open_target(path, FACTORY)
    assert RAN == []
    with suppress(Exception):
        torch.export.load(io.BytesIO(path.read_bytes()))
    assert RAN  # the bait was live


def test_damaged_files(
    torch_tensorrt: Any, parts: Parts, python_runtime: None, tmp_path: Path
) -> None:
    path = tmp_path / "model.ep"
    opened(compiled(parts, compilation_settings(torch_tensorrt))).save(path, {"plan": b"12"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for read in (lambda: open_target(path, FACTORY), lambda: describe_file(path)):
        with pytest.raises(UnsupportedTargetError, match="damaged"):
            read()
    path.write_bytes(whole)
    rewritten(
        path, lambda name, data: b"no json" if name.endswith("constants_config.json") else data
    )
    with pytest.raises(UnsupportedTargetError, match="damaged"):
        open_target(path, FACTORY)
    path.write_bytes(whole)
    rewritten(path, lambda name, data: b"[" * 99999 if name.endswith("_config.json") else data)
    with pytest.raises(UnsupportedTargetError, match="damaged"):
        describe_file(path)
    path.write_bytes(whole)
    rewritten(path, lambda name, data: b"!" if name.endswith("/plan") else data)
    with pytest.raises(UnsupportedTargetError, match="damaged"):
        read_attachments(path)


def test_other_files_are_left_to_others(tmp_path: Path, torch_tensorrt: Any) -> None:
    text = tmp_path / "a.txt"
    text.write_text("PK is not enough"[2:])
    other = tmp_path / "a.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    plain = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), plain)
    for path in (text, other, plain):
        assert open_target(path, FACTORY) is None
        assert describe_file(path) is None
        assert read_attachments(path) == {}
    assert open_target(tmp_path, FACTORY) is None


def test_a_double_of_the_cpp_engine_is_taken_for_one() -> None:
    """The tests above stand on it."""
    assert CppEngine([""] * 3 + [b"x"] + [""] * 9)._type().qualified_name().endswith(".Engine")
