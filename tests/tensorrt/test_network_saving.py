"""Folders and engine files of network modules: what survives, and what damage does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import refitkit
from refitkit import (
    CompileError,
    Pipeline,
    PlanMismatchError,
    RefitError,
    UnsupportedTargetError,
    WeightMismatchError,
)
from refitkit.builtin.torch_tensorrt.network import saving
from refitkit.files import replacing
from tests.tensorrt.helpers import (
    CASES,
    Case,
    bytes_of,
    compiled_from,
    needs_torch_tensorrt,
    values_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Members = dict[str, bytes]

pytestmark = needs_torch_tensorrt
CASE = CASES["odd"]
INDEX = "refitkit.network"
PART = "_run_on_acc_0"


class TwoParts(torch.nn.Module):
    """An engine, something that torch runs, and another engine."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.table = torch.nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(self.a(x)) * self.table)


TWO = Case(
    TwoParts,
    ((2, 4),),
    options={"torch_executed_ops": [torch.ops.aten.sin.default, torch.ops.aten.mul.Tensor]},
    engines=2,
)


@pytest.fixture(scope="module")
def compiled() -> refitkit.CompiledModule:
    return compiled_from(CASE)


@pytest.fixture(scope="module")
def saved(compiled: refitkit.CompiledModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    compiled.save(path)
    return path


def weights(seed: int, case: Case = CASE) -> dict[str, torch.Tensor]:
    return case.model(seed).state_dict()


# -- what survives --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, CASES["lstm"], TWO], ids=["odd", "lstm", "two parts"])
def test_a_loaded_module_refits_to_the_bytes_of_a_build_from_scratch(
    case: Case, tmp_path: Path
) -> None:
    first = compiled_from(case)
    refitkit.refit(first, weights(1, case))
    path = tmp_path / "model"
    first.save(path)
    loaded = refitkit.load(path)
    assert bytes_of(loaded) == bytes_of(first)
    held, wanted = values_of(loaded), values_of(first)
    assert all(torch.equal(held[key], wanted[key]) for key in wanted)
    assert held.keys() == wanted.keys()
    assert loaded.plan is not None
    refitkit.refit(loaded, weights(2, case), verify="engine-bytes")
    assert bytes_of(loaded) == bytes_of(compiled_from(case, 2))
    assert bytes_of(first) == bytes_of(compiled_from(case, 1))


def test_what_a_folder_holds(tmp_path: Path) -> None:
    compiled = compiled_from(TWO)
    path = tmp_path / "model"
    compiled.save(path)
    engines = [name for name, content in bytes_of(compiled).items() if content]
    torch_parts = compiled.engines.keys() - set(engines)
    assert len(engines) == 2
    wanted = {f"{name}.engine" for name in engines} | {f"{n}.safetensors" for n in torch_parts}
    assert {one.name for one in path.iterdir()} == {*wanted, INDEX}
    for name in engines:
        assert (path / f"{name}.engine").read_bytes() == bytes_of(compiled)[name]


def test_one_engine_as_a_file_and_several_are_refused(
    compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    path = tmp_path / "model.engine"
    compiled.save(path)
    assert path.read_bytes() == bytes_of(compiled)[PART]
    several = compiled_from(TWO)
    with pytest.raises(UnsupportedTargetError, match="parts") as info:
        several.save(tmp_path / "other.engine")
    assert {p.subject for p in info.value.problems} == set(several.engines)
    assert [one.name for one in tmp_path.iterdir()] == ["model.engine"]


def test_inspecting_and_reading_the_plan_of_a_folder(
    compiled: refitkit.CompiledModule, saved: Path
) -> None:
    found = refitkit.inspect(saved)
    assert list(found["parts"]) == [PART]
    assert compiled.plan is not None
    assert Pipeline().read_plan(saved).data == compiled.plan.data
    with pytest.raises(UnsupportedTargetError, match="not a saved module"):
        refitkit.inspect(saved.parent)
    with pytest.raises(PlanMismatchError, match="cannot be read"):
        Pipeline().read_plan(saved.parent)


@pytest.mark.parametrize("by", ["Pipeline.copy", "copy=True"])
def test_a_copy_is_independent(compiled: refitkit.CompiledModule, by: str) -> None:
    before = bytes_of(compiled)
    if by == "copy=True":
        copy = refitkit.refit(compiled, weights(1), copy=True).module
    else:
        copy = Pipeline().copy(compiled)
        assert bytes_of(copy) == before
        refitkit.refit(copy, weights(1))
    assert bytes_of(compiled) == before
    assert bytes_of(copy) == bytes_of(compiled_from(CASE, 1))
    refitkit.refit(copy, weights(0), verify="engine-bytes")


# -- what is replaced -----------------------------------------------------------------------------


def test_what_is_somebody_elses_is_not_replaced(
    compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    for path in (folder, file):
        with pytest.raises(UnsupportedTargetError, match="not replaced"):
            compiled.save(path)
    assert (folder / "mine").read_text() == file.read_text() == "mine"
    assert {one.name for one in tmp_path.iterdir()} == {"folder", "file"}


def test_a_module_is_replaced_as_a_whole_and_a_link_stays(
    compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    path, link = tmp_path / "model", tmp_path / "link"
    compiled_from(TWO).save(path)
    link.symlink_to(path)
    compiled.save(link)
    assert {one.name for one in path.iterdir()} == {INDEX, f"{PART}.engine"}
    assert link.is_symlink()
    assert {one.name for one in tmp_path.iterdir()} == {"model", "link"}


@pytest.mark.parametrize(
    ("owner", "name"),
    [(saving, "streamed"), (saving, "write_archive"), (replacing, "_move_into_place")],
)
def test_a_save_that_fails_leaves_what_was_there(
    compiled: refitkit.CompiledModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    path = tmp_path / "model"
    compiled.save(path)
    before = {one.name: one.read_bytes() for one in path.iterdir()}
    real: Any = getattr(owner, name)

    def fails(*args: Any) -> None:
        if name != "_move_into_place":
            real(*args)
        raise OSError("as told")

    other = refitkit.refit(compiled, weights(1), copy=True).module
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(refitkit.RefitError, match="cannot be written: as told"):
        other.save(path)
    assert {one.name: one.read_bytes() for one in path.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


# -- damage ---------------------------------------------------------------------------------------


def _manifest(members: Members) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(members["manifest.json"])
    return found


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        manifest = _manifest(members)
        change(manifest)
        members["manifest.json"] = json.dumps(manifest).encode()

    return apply


def named(*names: str) -> Callable[[Members], None]:
    """The one part of the module, under other names."""

    def change(manifest: dict[str, Any]) -> None:
        (part,) = manifest["parts"]
        manifest["parts"] = [
            {**part, "structure": {**part["structure"], "name": name}} for name in names
        ]

    return changed(change)


def option(name: str, value: Any) -> Callable[[Members], None]:
    return changed(lambda manifest: manifest["options"].update({name: value}))


def content(name: str, value: bytes) -> Callable[[Members], None]:
    return lambda members: members.update({name: value})


def cut(name: str) -> Callable[[Members], None]:
    return lambda members: members.update({name: members[name][: len(members[name]) // 2]})


def other_shape(members: Members) -> None:
    values = load_tensors(members[f"{PART}.safetensors"])
    name = next(iter(values))
    values[name] = torch.zeros(values[name].numel() + 1)
    members[f"{PART}.safetensors"] = save_tensors(values)


def other_slots(members: Members) -> None:
    """Slots and values agree, and are those of another network."""
    values = load_tensors(members[f"{PART}.safetensors"])
    name = next(iter(values))
    values["other"] = values.pop(name)
    members[f"{PART}.safetensors"] = save_tensors(values)
    manifest = _manifest(members)
    for slot in manifest["parts"][0]["slots"]:
        slot["name"] = "other" if slot["name"] == name else slot["name"]
    members["manifest.json"] = json.dumps(manifest).encode()


def huge(members: Members) -> None:
    facts = json.loads(members["template-facts.json"])
    facts["leaves"][0]["shape"] = [2**40, 2**20]
    members["template-facts.json"] = json.dumps(facts).encode()


DEEP = b"[" * 100_000
DAMAGE: dict[str, Callable[[Members], None]] = {
    "part name ../x": named("../x"),
    "part name absolute": named("/etc/passwd"),
    "part name empty": named(""),
    "part names twice": named(PART, PART),
    "part name long": named("x" * 10**6),
    "another part": named("_run_on_acc_7"),
    "no parts": named(),
    "sha256": changed(lambda m: m["parts"][0].update(sha256="0" * 64)),
    "unknown option": option("min_blok_size", 1),
    "option of a wrong type": option("min_block_size", "many"),
    "option that is a function": option("torch_executed_ops", "torch.hub.load"),
    "imports": option("imports", ["antigravity"]),
    "imports that are no names": option("imports", [1, None]),
    "imports that are no list": option("imports", {"a": 1}),
    "manifest of another format": changed(lambda m: m.update(format="refitkit-network/2")),
    "manifest nested deeply": content("manifest.json", DEEP),
    "facts nested deeply": content("template-facts.json", DEEP),
    "graph nested deeply": content("template.json", DEEP),
    "facts of another kind": content("template-facts.json", b"[1]"),
    "facts of nothing": content("template-facts.json", b'{"leaves": [null], "ties": [1]}'),
    "graph of nothing": content("template.json", b"{}"),
    "huge tensors": huge,
    "values of another shape": other_shape,
    "slots of another network": other_slots,
    **{
        f"{name} is missing": (lambda members, name=name: members.pop(name))
        for name in (
            "manifest.json",
            "template.json",
            "template-facts.json",
            "template-constants.safetensors",
            f"{PART}.safetensors",
            "attachments/plan.refitplan",
        )
    },
    **{
        f"{name} is cut": cut(name)
        for name in (
            "manifest.json",
            "template.json",
            "template-facts.json",
            "template-constants.safetensors",
            f"{PART}.safetensors",
            "attachments/plan.refitplan",
        )
    },
}


def copied(saved: Path, to: Path, change: Callable[[Members], object]) -> Path:
    """A folder with an archive that was changed."""
    to.mkdir()
    for one in saved.iterdir():
        (to / one.name).write_bytes(one.read_bytes())
    with zipfile.ZipFile(saved / INDEX) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(to / INDEX, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return to


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(saved: Path, tmp_path: Path, damage: str) -> None:
    path = copied(saved, tmp_path / "model", DAMAGE[damage])
    with pytest.raises((UnsupportedTargetError, PlanMismatchError, refitkit.ConfigError)):
        refitkit.load(path)


def test_the_same_folder_undamaged_is_loaded(saved: Path, tmp_path: Path) -> None:
    refitkit.load(copied(saved, tmp_path / "model", lambda _: None))


def test_a_flipped_byte_anywhere_in_the_archive_is_noticed_or_harmless(
    saved: Path, compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    whole = (saved / INDEX).read_bytes()
    path = copied(saved, tmp_path / "model", lambda _: None)
    for start in range(0, len(whole), len(whole) // 12):
        damaged = bytearray(whole)
        damaged[start] ^= 0x20
        (path / INDEX).write_bytes(damaged)
        try:
            loaded = refitkit.load(path)
        except RefitError:
            continue
        assert bytes_of(loaded) == bytes_of(compiled)


def test_an_archive_that_is_cut_is_refused(saved: Path, tmp_path: Path) -> None:
    path = copied(saved, tmp_path / "model", lambda _: None)
    whole = (path / INDEX).read_bytes()
    for part in (0, 1, len(whole) // 2, len(whole) - 1):
        (path / INDEX).write_bytes(whole[:part])
        with pytest.raises(UnsupportedTargetError):
            refitkit.load(path)


@pytest.mark.parametrize("how", ["missing", "flipped", "a folder"])
def test_an_engine_that_is_not_the_saved_one_is_refused(
    saved: Path, tmp_path: Path, how: str
) -> None:
    path = copied(saved, tmp_path / "model", lambda _: None)
    engine = path / f"{PART}.engine"
    flipped = bytearray(engine.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    engine.unlink()
    if how == "flipped":
        engine.write_bytes(flipped)
    elif how == "a folder":
        engine.mkdir()
    with pytest.raises(UnsupportedTargetError, match=PART):
        refitkit.load(path)


def test_an_engine_of_another_model_with_its_checksum_is_found_by_the_verifier(
    saved: Path, tmp_path: Path
) -> None:
    other = b"another engine"
    path = copied(
        saved,
        tmp_path / "model",
        changed(lambda m: m["parts"][0].update(sha256=hashlib.sha256(other).hexdigest())),
    )
    (path / f"{PART}.engine").write_bytes(other)
    loaded = refitkit.load(path)
    with pytest.raises(refitkit.VerificationError):
        refitkit.verify(loaded, weights(0), with_="engine-bytes")


IMPORTING = """
import sys
import refitkit
from refitkit.files import replacing
try:
    refitkit.load(sys.argv[1])
except refitkit.UnsupportedTargetError as exc:
    print([p.subject for p in exc.problems])
import harmless_converters
refitkit.load(sys.argv[1])
print("loaded")
"""


def test_a_file_cannot_have_a_module_imported_that_the_user_has_not(
    tmp_path: Path,
) -> None:
    bait = tmp_path / "imported"
    (tmp_path / "harmless_converters.py").write_text(
        f"import os\nopen({str(bait)!r}, 'a').write(f'{{os.getpid()}} ')\n"
    )
    script = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    make = (
        script + "import torch, refitkit\n"
        "program = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.randn(2, 4),))\n"
        "options = {'min_block_size': 1, 'imports': ['harmless_converters']}\n"
        "refitkit.compile(program, 'tensorrt_network', options, prove=False).save(sys.argv[1])\n"
    )
    path = tmp_path / "model"
    _python(make, path)
    assert len(bait.read_text().split()) == 1  # in the session alone
    bait.unlink()
    check = script + IMPORTING.replace(
        "import harmless_converters",
        f"import os\nassert not os.path.exists({str(bait)!r})\nimport harmless_converters",
    )
    said = _python(check, path)
    assert said.split("\n")[:2] == ["['harmless_converters']", "loaded"]


def _python(script: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weights_of_another_model_are_refused(compiled: refitkit.CompiledModule) -> None:
    with pytest.raises(WeightMismatchError):
        refitkit.refit(compiled, weights(0, CASES["lstm"]))


def test_a_program_that_cannot_be_kept_is_refused_before_anything_is_built() -> None:
    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = Case(Holder, ((2, 2),)).program(0)
    program._constants["object"] = object()  # type: ignore[assignment]
    with pytest.raises(CompileError, match="custom objects"):
        refitkit.compile(program, "tensorrt_network", {"min_block_size": 1})
