"""Saving, loading, compiling: what is in the file, what it needs, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import (
    CHILDREN,
    answer_of,
    bits,
    child_environment,
    digest,
    max_error,
    members_of,
    slots_of,
    start_child,
)
from aoti_models import CASES
from safetensors.torch import load as load_safetensors

import refitkit
from refitkit.files import archive

if TYPE_CHECKING:
    from collections.abc import Callable

    Fresh = Callable[[str], refitkit.CompiledModule]
    Saved = Callable[[str], Path]

MANIFEST = "refitkit/manifest.json"
WEIGHTS = "refitkit/weights.safetensors"


# -- the way there and back -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "mixed", "storage", "bfloat16", "transformer"])
def test_another_process_loads_the_same_bits(name: str, fresh: Fresh, tmp_path: Path) -> None:
    case, compiled = CASES[name], fresh(name)
    refitkit.refit(compiled, case.model(1))
    compiled.save(tmp_path / "b.refit")
    told = answer_of(start_child("load_and_tell.py", tmp_path / "b.refit", name))
    held = slots_of(compiled)
    assert told["slots"] == {n: hashlib.sha256(held[n]).hexdigest() for n in held}
    assert told["outputs"] == digest(compiled(*case.args(), **case.kwargs()))
    refitkit.refit(compiled, case.model(2))
    assert told["refitted"] == digest(compiled(*case.args(), **case.kwargs()))


def test_saving_again_gives_the_same_file(fresh: Fresh, tmp_path: Path) -> None:
    compiled = fresh("small")
    paths = [tmp_path / "1.refit", tmp_path / "2.refit"]
    compiled.save(paths[0])
    refitkit.load(paths[0]).save(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_module_may_be_saved_over_the_file_it_came_from(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "m.refit"
    path.write_bytes(saved("small").read_bytes())
    compiled = refitkit.load(path)
    refitkit.refit(compiled, CASES["small"].model(1))
    compiled.save(path)
    assert slots_of(refitkit.load(path)) == slots_of(compiled)


def test_a_module_outlives_its_file(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "m.refit"
    path.write_bytes(saved("small").read_bytes())
    compiled = refitkit.load(path)
    path.unlink()
    refitkit.refit(compiled, CASES["small"].model(1), inputs=CASES["small"].inputs())
    compiled.save(path)
    assert slots_of(refitkit.load(path)) == slots_of(compiled)


def test_a_copy_is_independent(fresh: Fresh) -> None:
    case, compiled = CASES["small"], fresh("small")
    refitkit.refit(compiled, case.model(1))
    before = digest(compiled(*case.args()))
    result = refitkit.refit(compiled, case.model(2), copy=True, inputs=case.inputs())
    assert result.module is not compiled
    assert max_error(result.module(*case.args()), case.expected(case.model(2))) < 1e-6
    assert digest(compiled(*case.args())) == before
    after = digest(result.module(*case.args()))
    refitkit.refit(compiled, case.model(3))
    assert digest(result.module(*case.args())) == after
    del compiled
    assert digest(result.module(*case.args())) == after


def test_a_refused_refit_of_a_copy_leaves_the_first_alone(fresh: Fresh) -> None:
    compiled = fresh("small")
    before = slots_of(compiled)
    with pytest.raises(refitkit.WeightMismatchError):
        refitkit.refit(compiled, {"a.bias": torch.zeros(1)}, partial=True, copy=True)
    assert slots_of(compiled) == before
    assert compiled.version == 0


def test_a_path_can_be_refitted_directly(saved: Saved) -> None:
    case = CASES["small"]
    content = saved("small").read_bytes()
    result = refitkit.refit(str(saved("small")), case.model(1), inputs=case.inputs())
    assert max_error(result.module(*case.args()), case.expected(case.model(1))) < 1e-6
    assert saved("small").read_bytes() == content


def test_no_folders_are_left_behind(saved: Saved, tmp_path: Path) -> None:
    code = (
        "import sys, gc, refitkit\n"
        "for _ in range(3):\n"
        "    compiled = refitkit.load(sys.argv[1])\n"
        "    copied = refitkit.Pipeline().copy(compiled)\n"
        "    compiled.save(sys.argv[2])\n"
    )
    environment = child_environment(TMPDIR=str(tmp_path))
    command = [sys.executable, "-c", code, str(saved("small")), str(tmp_path / "saved.refit")]
    subprocess.run(command, env=environment, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.refit"]


def test_weights_are_opened_and_copied_without_a_file(saved: Saved) -> None:
    """A file on a full file system, or one that is cut, ends the process when it is mapped."""
    members = members_of(saved("wide"))
    limit = max(len(content) for name, content in members.items() if name != WEIGHTS)
    assert limit < len(members[WEIGHTS])
    code = (
        "import resource, sys, refitkit\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "refitkit.Pipeline().copy(refitkit.load(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(saved("wide")), str(limit)], check=True)


# -- what is in the file ----------------------------------------------------------------------


def test_the_file_is_a_plain_zip_with_the_documented_members(fresh: Fresh, tmp_path: Path) -> None:
    case, compiled, path = CASES["mixed"], fresh("mixed"), tmp_path / "m.refit"
    refitkit.refit(compiled, case.model(1))
    compiled.save(path)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        names = file.namelist()
    manifest = json.loads(members_of(path)[MANIFEST])
    engine = {f"aotinductor/{name}" for name in manifest["files"]}
    attached = {f"refitkit/attachments/{name}" for name in manifest["attachments"]}
    assert set(names) == {MANIFEST, WEIGHTS} | engine | attached
    assert f"aotinductor/{manifest['library']}" in engine
    assert {slot["name"] for slot in manifest["slots"]} == {slot.name for slot in compiled.slots}
    weights = load_safetensors(members_of(path)[WEIGHTS])
    assert {name: bits(tensor) for name, tensor in weights.items()} == slots_of(compiled)


def test_the_file_holds_weights_once_and_no_pickle(fresh: Fresh, tmp_path: Path) -> None:
    path = tmp_path / "m.refit"
    compiled = fresh("wide")
    refitkit.refit(compiled, CASES["wide"].model(1))
    compiled.save(path)
    members = members_of(path)
    size = sum(slot.nbytes for slot in compiled.slots)
    assert path.stat().st_size < size + 4 * 2**20
    marks = {name for name in members if name.endswith((".pkl", ".pickle", ".pt"))}
    assert not marks
    for name, content in members.items():
        if not name.endswith(".so"):
            assert not content.startswith(b"\x80\x02"), name  # pickle protocols begin so
            assert not content.startswith((b"\x80\x03", b"\x80\x04", b"\x80\x05")), name


def test_loading_unpickles_nothing(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    case = CASES["small"]
    compiled = refitkit.load(saved("small"))
    refitkit.refit(compiled, case.model(1).state_dict(), inputs=case.inputs())


def test_describing_a_file_runs_none_of_its_code(saved: Saved) -> None:
    code = (
        "import sys, refitkit\n"
        "print(sorted(refitkit.inspect(sys.argv[1]))[0])\n"
        "mapped = open('/proc/self/maps').read()\n"
        "assert 'wrapper.so' not in mapped\n"
        "refitkit.load(sys.argv[1])\n"
        "assert 'wrapper.so' in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(saved("small"))], check=True)


# -- crashes while saving ---------------------------------------------------------------------


@pytest.mark.parametrize("written", [1, 200_000, 1_400_000])
def test_a_process_killed_while_saving_leaves_the_old_file(
    written: int, saved: Saved, tmp_path: Path
) -> None:
    path = tmp_path / "m.refit"
    path.write_bytes(saved("small").read_bytes())
    command = [sys.executable, str(CHILDREN / "save_slowly.py"), str(saved("small")), str(path)]
    (tmp_path / "scratch").mkdir()
    environment = child_environment(TMPDIR=str(tmp_path / "scratch"))
    child = subprocess.Popen(
        [*command, str(written)], env=environment, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stuck\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == saved("small").read_bytes()
    left = {other.suffix for other in tmp_path.iterdir()}
    assert left == {"", ".refit", ".part"}, "the child was killed too early or late"
    assert slots_of(refitkit.load(path)) == slots_of(refitkit.load(saved("small")))


def test_a_failure_while_saving_leaves_the_old_file_alone(
    fresh: Fresh, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.refit"
    old = saved("small").read_bytes()
    path.write_bytes(old)
    compiled = fresh("small")
    refitkit.refit(compiled, CASES["small"].model(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (archive.shutil, "copyfileobj"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(
                refitkit.RefitError, match=r"m\.refit' cannot be written: No space left"
            ):
                compiled.save(path)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]
    compiled.save(path)
    assert slots_of(refitkit.load(path)) == slots_of(compiled)


def test_saving_where_nothing_can_be_written_raises(fresh: Fresh, tmp_path: Path) -> None:
    with pytest.raises(refitkit.RefitError, match=r"m\.refit' .*: there is no folder .*nowhere'"):
        fresh("small").save(tmp_path / "nowhere" / "m.refit")
    with pytest.raises(refitkit.RefitError, match="cannot be written: it is a folder"):
        fresh("small").save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- packages of torch's own ------------------------------------------------------------------


def test_torchs_package_can_be_planned_refitted_and_saved(
    torch_package: Callable[[bool], Path], tmp_path: Path
) -> None:
    case = CASES["small"]
    compiled = refitkit.load(torch_package(True))
    assert digest(compiled(*case.args())) == digest(
        refitkit.load(torch_package(True))(*case.args())
    )
    with pytest.raises(refitkit.PlanMismatchError, match=r"refitkit\.plan"):
        refitkit.refit(compiled, case.model(1))
    plan = refitkit.plan(case.program(0), target=compiled)
    expected = case.expected(case.model(1))
    refitkit.refit(
        compiled, case.model(1), plan=plan, inputs=case.inputs(), reference=case.model(1)
    )
    assert max_error(compiled(*case.args()), expected) < 1e-6
    compiled.save(tmp_path / "ours.refit")
    again = refitkit.load(tmp_path / "ours.refit")
    assert slots_of(again) == slots_of(compiled)
    assert digest(again(*case.args())) == digest(compiled(*case.args()))
    refitkit.refit(again, case.model(2), plan=plan)
    assert max_error(again(*case.args()), case.expected(case.model(2))) < 1e-6


def test_a_package_with_inlined_weights_is_refused_and_the_flag_named(
    torch_package: Callable[[bool], Path],
) -> None:
    compiled = refitkit.load(torch_package(False))
    with pytest.raises(refitkit.NotRefittableError, match="always_keep_tensor_constants") as raised:
        refitkit.plan(CASES["small"].program(0), target=compiled)
    assert {problem.subject for problem in raised.value.problems} == {"b.bias", "scale"}


def test_a_package_whose_weights_may_be_folded_is_refused(tmp_path: Path) -> None:
    """torch folds weights of one element, which shows nowhere when they are used twice."""
    program = torch.export.export(_Twice().eval(), (torch.ones(2, 3),))
    path = tmp_path / "twice.pt2"
    configs = {"always_keep_tensor_constants": True}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=configs
    )
    with pytest.raises(refitkit.NotRefittableError, match="joint_graph_constant_folding") as raised:
        refitkit.plan(program, target=refitkit.load(path))
    assert [problem.subject for problem in raised.value.problems] == ["scale"]


class _Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.exp() + self.scale


def test_a_plan_of_another_program_is_refused(fresh: Fresh, saved: Saved) -> None:
    compiled = fresh("small")
    other = CASES["batch"].program(0)  # the same names in other sizes
    with pytest.raises(refitkit.PlanMismatchError) as raised:
        refitkit.plan(other, target=compiled)
    assert "a.weight" in str(raised.value)
    plan = fresh("batch").plan
    with pytest.raises(refitkit.PlanMismatchError) as raised:
        refitkit.refit(compiled, CASES["small"].model(1), plan=plan)
    assert "a.weight" in str(raised.value)


# -- compiling --------------------------------------------------------------------------------


def test_without_a_toolchain_loading_and_refitting_work(saved: Saved, tmp_path: Path) -> None:
    environment = child_environment(PATH=str(tmp_path), CXX=None, CC=None)
    told = answer_of(start_child("without_tools.py", saved("small"), env=environment))
    assert told["tools"] == []
    assert told["error"] < 1e-6
    assert "g++" in told["message"]
    assert "openssl" in told["message"]
    assert "apt-get install" in told["message"]


def test_unfit_options_are_refused_by_name() -> None:
    program = CASES["small"].program(0)
    unfit = {"freezing": True, "always_keep_tensor_constants": False}
    unfit |= {"joint_graph_constant_folding": True}
    unfit |= {"aot_inductor.use_runtime_constant_folding": True}
    with pytest.raises(refitkit.NotRefittableError) as raised:
        refitkit.compile(program, options=unfit)
    assert {problem.subject for problem in raised.value.problems} == unfit.keys()
    for problem in raised.value.problems:
        assert problem.found == repr(unfit[problem.subject])
        assert problem.wanted == repr(not unfit[problem.subject])


def test_unknown_options_and_backends_are_refused_by_name() -> None:
    program = CASES["small"].program(0)
    with pytest.raises(refitkit.ConfigError) as raised:
        refitkit.compile(program, options={"freezign": True, "aot_inductor.package": False})
    assert {p.subject for p in raised.value.problems} == {"freezign", "aot_inductor.package"}
    with pytest.raises(refitkit.ConfigError, match="aotinductor"):
        refitkit.compile(program, backend="tensorrtx")
    with pytest.raises(refitkit.UnsupportedTargetError, match=r"torch\.export"):
        refitkit.compile(CASES["small"].model(0))


def test_options_that_are_fit_reach_inductor(tmp_path: Path) -> None:
    case = CASES["small"]
    options = {"aot_inductor.compile_wrapper_opt_level": "O0", "freezing": False}
    compiled = refitkit.compile(case.program(0), options=options)
    compiled.save(tmp_path / "m.refit")
    settings = refitkit.inspect(tmp_path / "m.refit")["settings"]
    assert settings["aot_inductor.compile_wrapper_opt_level"] == "'O0'"
    assert settings["always_keep_tensor_constants"] == "True"
    refitkit.refit(compiled, case.model(1), inputs=case.inputs())


def test_compiling_changes_nothing_of_program_and_model() -> None:
    model = CASES["storage"].model(0).train()
    model.bias.requires_grad_(False)
    (model.one * 2).backward()
    args = CASES["storage"].args()
    program = torch.export.export(model, args)
    text, before = str(program), _state(model)
    held = {name: _facts(tensor) for name, tensor in program.state_dict.items()}
    grad = torch.is_grad_enabled()
    refitkit.compile(program)
    assert _state(model) == before
    assert {name: _facts(tensor) for name, tensor in program.state_dict.items()} == held
    assert str(program) == text
    assert torch.is_grad_enabled() is grad
    assert program.example_inputs[0][0] is args[0]


def _state(model: torch.nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {"training": model.training, **{name: _facts(t) for name, t in tensors.items()}}


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    gradient = None if tensor.grad is None else bits(tensor.grad)
    place = storage.data_ptr(), storage.nbytes(), tensor.storage_offset(), tensor.stride()
    return bits(tensor), tensor.requires_grad, gradient, tensor._version, place, type(tensor)
