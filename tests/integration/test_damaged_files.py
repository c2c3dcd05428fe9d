"""A damaged or mixed-up file is refused with a typed error; opening it never ends the process.

Raw AOTInductor dies of SIGBUS where weights are cut short. Files are opened in children.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from aoti_helpers import answer_of, digest, members_of, start_child, write_members
from aoti_models import CASES
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Members = dict[str, bytes]

MANIFEST = "refitkit/manifest.json"
WEIGHTS = "refitkit/weights.safetensors"
PLAN = "refitkit/attachments/plan.refitplan"
PROGRAM = "refitkit/attachments/program.json"
UNSUPPORTED = "UnsupportedTargetError"
MISMATCH = "PlanMismatchError"


def _library(members: Members) -> str:
    return next(name for name in members if name.endswith(".so"))


def _manifest(**changes: Any) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        manifest = json.loads(members[MANIFEST])
        manifest.update(changes)
        members[MANIFEST] = json.dumps(manifest).encode()

    return change


def _slot(key: str, value: Any) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        manifest = json.loads(members[MANIFEST])
        manifest["slots"][0][key] = value
        members[MANIFEST] = json.dumps(manifest).encode()

    return change


def _content(name: str, content: bytes) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        members[name] = content

    return change


def _cut(name: str, keep: float) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        members[name] = members[name][: int(len(members[name]) * keep)]

    return change


def _weights(change_values: Callable[[dict[str, Any]], None]) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        values = load_safetensors(members[WEIGHTS])
        change_values(values)
        members[WEIGHTS] = save_safetensors(values)

    return change


def _swap(*names: str) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        for name in names:
            members[name] = other[name]

    return change


def _other_library(members: Members, other: Members) -> None:
    members[_library(members)] = other[_library(other)]


def _library_changed(members: Members, other: Members) -> None:
    """One byte in its middle, with a checksum of the archive's that fits."""
    content = bytearray(members[_library(members)])
    content[len(content) // 2] ^= 0x20
    members[_library(members)] = bytes(content)


def _other_library_believed(members: Members, other: Members) -> None:
    """A manifest that vouches for a library of another model with weights of the same names."""
    name = _library(members)
    content = members[name] = other[_library(other)]
    manifest = json.loads(members[MANIFEST])
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name.removeprefix("aotinductor/")] = {"size": len(content), "sha256": digest}
    members[MANIFEST] = json.dumps(manifest).encode()


def _dropped(name: str) -> Callable[[Members, Members], None]:
    def change(members: Members, other: Members) -> None:
        del members[name]

    return change


def _library_gone(members: Members, other: Members) -> None:
    del members[_library(members)]


def _path_as_name(members: Members, other: Members) -> None:
    """A manifest that would have a file written outside of the private folder."""
    manifest = json.loads(members[MANIFEST])
    name = _library(members)
    content = members.pop(name)
    escape = "../escaped.so"
    manifest["files"][escape] = manifest["files"].pop(name.removeprefix("aotinductor/"))
    manifest["library"] = escape
    members["aotinductor/" + escape] = content
    members[MANIFEST] = json.dumps(manifest).encode()


DAMAGES: dict[str, tuple[Callable[[Members, Members], None], str]] = {
    "weights cut": (_cut(WEIGHTS, 0.7), UNSUPPORTED),
    "weights empty": (_cut(WEIGHTS, 0), UNSUPPORTED),
    "weights of another model": (_swap(WEIGHTS), UNSUPPORTED),
    "weights lack one": (_weights(lambda v: v.pop("a.bias")), UNSUPPORTED),
    "weights have one more": (_weights(lambda v: v.update(x=v["a.bias"] + 1)), UNSUPPORTED),
    "weights of another dtype": (
        _weights(lambda v: v.update({"a.bias": v["a.bias"].double()})),
        UNSUPPORTED,
    ),
    "library of another model": (_other_library, UNSUPPORTED),
    "library of another model, believed": (_other_library_believed, UNSUPPORTED),
    "library changed": (_library_changed, UNSUPPORTED),
    "library gone": (_library_gone, UNSUPPORTED),
    "manifest gone": (_dropped(MANIFEST), UNSUPPORTED),
    "manifest no JSON": (_content(MANIFEST, b"\xff\x00{"), UNSUPPORTED),
    "manifest of the future": (_manifest(format="refitkit-aotinductor/99"), UNSUPPORTED),
    "manifest of another model": (_swap(MANIFEST), UNSUPPORTED),
    "manifest with a path": (_path_as_name, UNSUPPORTED),
    "manifest with a huge blob": (_manifest(blob_bytes=1 << 62), UNSUPPORTED),
    "manifest with an unknown dtype": (_slot("dtype", "float99"), UNSUPPORTED),
    "manifest with another shape": (_slot("shape", [7]), UNSUPPORTED),
    "plan no archive": (_content(PLAN, b"nothing"), MISMATCH),
    "plan cut": (_cut(PLAN, 0.6), MISMATCH),
    "plan of another model": (_swap(PLAN), MISMATCH),
    "plan gone": (_dropped(PLAN), UNSUPPORTED),
    "program no JSON": (_content(PROGRAM, b"nothing"), f"{UNSUPPORTED} or {MISMATCH}"),
    "program of another kind": (_content(PROGRAM, b'{"x": 1}'), f"{UNSUPPORTED} or {MISMATCH}"),
}


@pytest.fixture(scope="module")
def outcomes(
    saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What happened to each damaged file, opened by a child."""
    folder = tmp_path_factory.mktemp("damaged")
    files = {}
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        members, other = members_of(saved("small")), members_of(saved("batch"))
        damage(members, other)
        files[name] = str(write_members(folder / f"{number}.refit", members))
    told = answer_of(start_child("open_files.py", *files.values()))
    assert not (folder / "escaped.so").exists()
    return {name: told[path] for name, path in files.items()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_members_are_refused(damage: str, outcomes: dict[str, dict[str, Any]]) -> None:
    wanted = DAMAGES[damage][1]
    assert outcomes[damage].get("error") in wanted.split(" or "), outcomes[damage]


def test_a_file_cut_anywhere_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    content = saved("small").read_bytes()
    size = len(content)
    ends = {*range(0, size, size // 24), 1, 2, 21, 22, 30, size - 1, size - 22, size - 60}
    paths = []
    for end in sorted(ends):
        path = tmp_path / f"{end}.refit"
        path.write_bytes(content[:end])
        paths.append(str(path))
    told = answer_of(start_child("open_files.py", *paths))
    assert {path: told[path].get("error") for path in paths} == dict.fromkeys(paths, UNSUPPORTED)


def test_a_changed_byte_in_any_member_is_noticed(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(saved("small")) as archive:
        members = archive.infolist()
    paths = []
    for number, info in enumerate(members):
        content = bytearray(saved("small").read_bytes())
        content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 0x20
        path = tmp_path / f"{number}.refit"
        path.write_bytes(content)
        paths.append(str(path))
    told = answer_of(start_child("open_files.py", *paths))
    assert {path: told[path].get("error") for path in paths} == dict.fromkeys(paths, UNSUPPORTED)


def test_torchs_package_cut_anywhere_is_refused(
    torch_package: Callable[[bool], Path], tmp_path: Path
) -> None:
    content = torch_package(True).read_bytes()
    paths = []
    for end in range(0, len(content), len(content) // 16):
        path = tmp_path / f"{end}.pt2"
        path.write_bytes(content[:end])
        paths.append(str(path))
    told = answer_of(start_child("open_files.py", *paths))
    assert {path: told[path].get("error") for path in paths} == dict.fromkeys(paths, UNSUPPORTED)


def test_a_compressed_archive_is_refused_and_says_so(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    path = write_members(tmp_path / "x.refit", members_of(saved("small")), zipfile.ZIP_DEFLATED)
    with pytest.raises(refitkit.UnsupportedTargetError, match="is compressed"):
        refitkit.load(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + b"\0" * 60, b"hello\n" * 99])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.refit"
    path.write_bytes(content)
    with pytest.raises(refitkit.UnsupportedTargetError):
        refitkit.load(path)


def test_folders_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.refit"):
        with pytest.raises(refitkit.UnsupportedTargetError):
            refitkit.load(path)


def test_the_undamaged_file_opens(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The tests above would all pass if nothing could be opened at all."""
    path = write_members(tmp_path / "same.refit", members_of(saved("small")))
    case = CASES["small"]
    compiled = refitkit.load(path)
    assert digest(compiled(*case.args())) == digest(refitkit.load(saved("small"))(*case.args()))
