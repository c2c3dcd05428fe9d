"""``refitkit doctor`` on machines that lack things. It never fails with a traceback."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.cli import doctor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome


def machine_in(outcome: Outcome) -> dict[str, dict[str, Any]]:
    assert "Traceback" not in outcome.err
    return {one["name"]: one for one in outcome.data["machine"]}


def aotinductor_in(outcome: Outcome) -> dict[str, Any]:
    backends = {one["name"]: one for one in outcome.data["backends"]}
    return backends["aotinductor"]


def test_a_machine_that_can_all(run: Callable[..., Outcome]) -> None:
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    assert outcome.data["ok"] is True
    found = machine_in(outcome)
    assert found["torch"]["found"].startswith("2.")
    assert found["refitkit"]["found"] == refitkit.__version__
    backend = aotinductor_in(outcome)
    assert (backend["load"], backend["refit"]) == (True, True)
    expected = {"name": "checks", "origin": "built-in", "state": "in use", "problem": ""}
    assert expected in outcome.data["plugins"]


def test_the_table_has_the_same(run: Callable[..., Outcome]) -> None:
    table = run("doctor").out
    for one in machine_in(run("doctor", "--json")).values():
        assert one["name"] in table
        assert one["found"].split(",")[0] in table
    assert "aotinductor" in table


def test_without_a_compiler_refits_are_still_possible(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    found = machine_in(outcome)
    for tool, what in (("C++ compiler", "g++"), ("openssl", "openssl")):
        assert found[tool]["ok"] is False
        assert f"apt-get install {what}" in found[tool]["hint"]
    backend = aotinductor_in(outcome)
    assert (backend["compile"], backend["load"], backend["refit"]) == (False, True, True)
    assert "apt-get install g++" in backend["hint"]


def test_a_compiler_that_was_chosen_and_is_not_there(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler = machine_in(run("doctor", "--json"))["C++ compiler"]
    assert "no-such-compiler" in compiler["found"]
    assert "CXX" in compiler["hint"]


def test_a_compiler_that_does_not_work(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "c++fake"
    fake.write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    outcome = run("doctor", "--json")
    assert "omp.h: No such file" in machine_in(outcome)["C++ compiler"]["found"]
    assert aotinductor_in(outcome)["compile"] is False


def test_a_compiler_whose_libraries_would_crash(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "c++fake"
    script = '#!/bin/sh\n[ "$1" = --version ] && echo 13 && exit\nfor last; do :; done\n'
    fake.write_text(f'{script}echo "libc.so.6" > "$last"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    outcome = run("doctor", "--json")
    assert "crash when loaded" in machine_in(outcome)["C++ compiler"]["found"]
    assert "CXX=" in aotinductor_in(outcome)["hint"]
    assert aotinductor_in(outcome)["compile"] is False
    fake.write_text(f'{script}echo "libstdc++.so.6" > "$last"\n')
    assert aotinductor_in(run("doctor", "--json"))["compile"] is True


def test_a_compiler_that_cannot_be_started(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "c++fake"
    fake.write_bytes(b"\x7fELF but not really")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert machine_in(run("doctor", "--json"))["C++ compiler"]["ok"] is False


@pytest.mark.parametrize("what", ["torch", "json"])
def test_without_torch_nothing_is_possible(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = run("doctor", *(["--json"] if what == "json" else []))
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "cannot be imported" in outcome.out


def test_a_folder_that_programs_may_not_run_from(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    class Flags:
        f_flag, f_bavail, f_frsize = os.ST_NOEXEC, 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Flags)
    outcome = run("--no-plugin", "torch_tensorrt", "doctor", "--json")
    assert outcome.code == 1
    assert outcome.data["ok"] is False
    assert "noexec" in machine_in(outcome)["temporary folder"]["found"]
    assert aotinductor_in(outcome)["refit"] is False
    assert "TMPDIR" in aotinductor_in(outcome)["hint"]


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", broken)
    assert doctor.temporary_folder().ok is False
    assert doctor.compiler().ok is False


def test_packages_are_found_without_importing_them(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor.package("TensorRT", "no_such_package").found == "not installed"
    assert doctor.package("TensorRT", "no_such_package.inside").found == "not installed"
    package = tmp_path / "tensorrt_rtx"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)  # another test's
    monkeypatch.syspath_prepend(tmp_path)
    found = machine_in(run("doctor", "--json"))["TensorRT-RTX"]
    assert found["found"].endswith(f" in {package}")


class Device:
    name, total_memory, major, minor = "NVIDIA Test", 80 * 2**30, 9, 0


def test_devices_and_their_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    found = doctor.gpu()
    one = "NVIDIA Test, 80.0 GiB, compute capability 9.0"
    assert (found.ok, found.found) == (True, f"{one}; {one}")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 555.42\necho 555.42\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (doctor.driver().ok, doctor.driver().found) == (True, "555.42")


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import torch

    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert doctor.gpu().ok is False
    assert "too old" in doctor.gpu().found


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def is_available() -> bool:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert doctor.gpu().ok is False
    assert "cudaGetDeviceCount" in doctor.gpu().found


def test_a_backend_that_cannot_be_registered(run: Callable[..., Outcome]) -> None:
    class Broken:
        name = "broken"

        @refitkit.hookimpl
        def refitkit_register_backends(self, register: object) -> None:
            raise LookupError("no such thing")

    outcome = run("doctor", "--json", plugins=[Broken()])
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "no such thing" in outcome.data["backends"][0]["hint"]


def test_of_other_backends_only_their_plugins_know(run: Callable[..., Outcome]) -> None:
    from tests.fakes import FakePlugin

    outcome = run(
        "--no-plugin",
        "aotinductor",
        "--no-plugin",
        "torch_tensorrt",
        "doctor",
        "--json",
        plugins=[FakePlugin()],
    )
    assert outcome.code == 0
    (backend,) = outcome.data["backends"]
    assert (backend["name"], backend["refit"]) == ("fake", None)


def test_a_tool_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> object:
        raise subprocess.TimeoutExpired("openssl", 30)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert doctor.compiler().ok is False
    assert doctor.driver().ok is False
