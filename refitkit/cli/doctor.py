"""``refitkit doctor``: what is possible on this machine, and what to install otherwise."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refitkit import __version__
from refitkit.cli.known import IN_USE, all_plugins
from refitkit.cli.options import common_options
from refitkit.cli.session import Session
from refitkit.cli.tables import size, table
from refitkit.errors import RefitError
from refitkit.files.temporary import TemporaryFolder

if TYPE_CHECKING:
    from rich.console import Console


_AOTINDUCTOR, _TORCH_TENSORRT, _NETWORK = "aotinductor", "torch_tensorrt", "tensorrt_network"
_ABILITIES = ("compile", "load", "refit")
_EXTRAS = "pip install 'refitkit[rtx]' (TensorRT-RTX) or 'refitkit[tensorrt]' (TensorRT)"


@dataclass(frozen=True)
class _Backend:
    """What one backend can do here; None where its plugin alone could tell.

    Attributes:
        name: Its name.
        compile: Whether it can compile.
        load: Whether it can open what was compiled elsewhere.
        refit: Whether it can refit that.
        hint: What to do about what it cannot.
    """

    name: str
    compile: bool | None = None
    load: bool | None = None
    refit: bool | None = None
    hint: str = "its plugin does not tell"


@click.command("doctor", short_help="Tell what is possible on this machine.")
@common_options
@click.pass_context
def doctor_command(ctx: click.Context) -> None:
    """Tell what is possible on this machine, and what to install for the rest.

    Exits with 0 if refitting is possible with any backend.
    """
    session = ctx.ensure_object(Session)
    session.progress.say("looking around")
    findings = _findings()
    backends = _backends(session, {one.name: one for one in findings})
    possible = any(backend.refit is not False for backend in backends)
    plugins = all_plugins(session)
    data = {
        "ok": possible,
        "machine": [asdict(one) for one in findings],
        "backends": [asdict(one) for one in backends],
        "plugins": [
            {"name": one.name, "origin": one.origin, "state": one.state} for one in plugins
        ],
    }
    names = [f"{one.name} ({one.origin if one.state == IN_USE else one.state})" for one in plugins]
    session.result(data, lambda console: _print(console, findings, backends, names))
    ctx.exit(0 if possible else 1)


def _findings() -> list[Finding]:
    return [
        Finding("refitkit", __version__),
        system(),
        torch_here(),
        gpu(),
        driver(),
        compiler(),
        openssl(),
        temporary_folder(),
        package("TensorRT", "tensorrt"),
        package("TensorRT-RTX", "tensorrt_rtx"),
        package("Torch-TensorRT", "torch_tensorrt"),
        runtime_flavour(),
    ]


def _backends(session: Session, found: dict[str, Finding]) -> list[_Backend]:
    if not found["torch"].ok:
        return []
    try:
        names = list(session.pipeline().backends)
    except Exception as exc:  # noqa: BLE001 - whatever a plugin does, the rest is still told
        return [_Backend("?", False, False, False, f"cannot be listed: {exc}")]  # noqa: FBT003
    known = {
        _AOTINDUCTOR: _aotinductor,
        _TORCH_TENSORRT: _torch_tensorrt,
        _NETWORK: _tensorrt_network,
    }
    return [known[name](found) if name in known else _Backend(name) for name in names]


def _aotinductor(found: dict[str, Finding]) -> _Backend:
    """AOTInductor compiles C++; to load and refit what it made takes torch alone."""
    runs = found["temporary folder"]
    needed = [found["C++ compiler"], found["openssl"], runs]
    hints = [one.hint for one in needed if not one.ok]
    if not found["CUDA device"].ok:
        hints.append("CPU modules only: no CUDA device")
    return _Backend(
        _AOTINDUCTOR,
        compile=all(one.ok for one in needed),
        load=runs.ok,
        refit=runs.ok,
        hint="\n".join(hints),
    )


def _torch_tensorrt(found: dict[str, Finding]) -> _Backend:
    """Its engines run, and take weights, on a GPU only."""
    able = found["Torch-TensorRT"].ok and found["CUDA device"].ok
    hints = [] if found["Torch-TensorRT"].ok else [_EXTRAS]
    if not found["CUDA device"].ok:
        hints.append("needs a CUDA device; 'tensorrt_network' plans and builds without one")
    return _Backend(_TORCH_TENSORRT, able, able, able, "\n".join(hints))


def _tensorrt_network(found: dict[str, Finding]) -> _Backend:
    """It builds without a GPU, which TensorRT-RTX alone can do."""
    able = found["Torch-TensorRT"].ok and found["TensorRT-RTX"].ok
    return _Backend(_NETWORK, able, able, able, "" if able else _EXTRAS)


def _print(
    console: Console, findings: list[Finding], backends: list[_Backend], plugins: list[str]
) -> None:
    rows = [(one.name, one.found, "" if one.ok else one.hint) for one in findings]
    console.print(table(("what", "found", "to do"), rows, "machine"))
    can = {True: "yes", False: "no", None: "?"}
    abilities = [
        (one.name, *(can[getattr(one, ability)] for ability in _ABILITIES), one.hint)
        for one in backends
    ]
    console.print(table(("backend", *_ABILITIES, "to do"), abilities, "backends"))
    console.print(f"plugins: {', '.join(plugins)}")


# MERGED machine: What this machine has of all that compiling and refitting need. Nothing here
# raises.

_COMPILERS = ("g++", "c++", "clang++")
_TRIAL = "#include <omp.h>\n#include <vector>\nstd::vector<int> trial(1);\n"
"""What inductor's code includes (torch/_inductor/codegen/cpp_prefix.h)."""
_TRIAL_FLAGS = ("-x", "c++", "-shared", "-fPIC", "-fopenmp", "-")
_CPP_LIBRARIES = (b"libstdc++.so", b"libc++.so")
_SECONDS = 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What it is.
        found: What was found, in words.
        ok: Whether it can be used.
        hint: What to do if it is wanted and cannot.
    """

    name: str
    found: str
    ok: bool = True
    hint: str = ""


def torch_here() -> Finding:
    """torch, imported: a broken installation shows only then."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as exc:
        found = f"cannot be imported: {exc}"
        return Finding("torch", found, ok=False, hint="Install it again: see pytorch.org.")
    return Finding("torch", str(torch.__version__))


def gpu() -> Finding:
    """CUDA devices that torch can use. Only modules that are compiled for CUDA need one."""
    try:
        import torch

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            there = torch.cuda.is_available()
            devices = [_device(index) for index in range(torch.cuda.device_count() if there else 0)]
    except Exception as exc:  # noqa: BLE001 - drivers fail in many ways, and all are worth telling
        return Finding("CUDA device", f"cannot be asked: {exc}", ok=False)
    if devices:
        return Finding("CUDA device", "; ".join(devices))
    why = f": {said[0].message}" if said else ""
    if torch.version.cuda is None:
        why = ": this torch is built without CUDA"
    return Finding("CUDA device", f"none{why}", ok=False, hint="Only CUDA modules need one.")


def _device(index: int) -> str:
    import torch

    has = torch.cuda.get_device_properties(index)
    return f"{has.name}, {size(has.total_memory)}, compute capability {has.major}.{has.minor}"


def driver() -> Finding:
    """NVIDIA's driver, by its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("NVIDIA driver", "none", ok=False, hint="Only CUDA modules need one.")
    said = _output([tool, "--query-gpu=driver_version", "--format=csv,noheader"])
    first = said.text.splitlines()[0] if said.text else "says nothing"
    return Finding("NVIDIA driver", first, ok=said.ok)


def compiler() -> Finding:
    """The C++ compiler that inductor would use, tried on what inductor's code includes."""
    name, chosen = "C++ compiler", os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    path = next(filter(None, map(shutil.which, candidates)), None)
    if path is None:
        hint = "Correct or unset CXX." if chosen else "Debian, Ubuntu: apt-get install g++"
        return Finding(name, f"none ({', '.join(candidates)} not found)", ok=False, hint=hint)
    try:
        wrong = _trial(path)
    except (OSError, RefitError) as exc:
        wrong = (f"cannot be tried: {exc}", "See the temporary folder.")
    if wrong is not None:
        return Finding(name, f"{path} {wrong[0]}", ok=False, hint=wrong[1])
    return Finding(name, f"{path}: {_first_line([path, '--version'])}")


def _trial(compiler: str) -> tuple[str, str] | None:
    """What is wrong with a compiler, and what to do about it; None if it can be used."""
    with TemporaryFolder() as folder:
        library = folder.path / "trial.so"
        said = _output([compiler, *_TRIAL_FLAGS, "-o", str(library)], _TRIAL)
        if not said.ok or not library.is_file():
            hint = "Install its standard library and OpenMP, or choose another with CXX."
            return f"fails: {said.text}", hint
        if not any(needed in library.read_bytes() for needed in _CPP_LIBRARIES):
            # found with torch 2.11: two C++ libraries in one process, and it dies
            hint = "Choose one with a shared C++ library, such as CXX=/usr/bin/g++."
            return "makes libraries with a C++ library of their own, which crash when loaded", hint
    return None


def openssl() -> Finding:
    """The openssl command, which inductor's packaging calls."""
    path = shutil.which("openssl")
    if path is None:
        hint = "Debian, Ubuntu: apt-get install openssl"
        return Finding("openssl", "none", ok=False, hint=hint)
    return Finding("openssl", f"{path}: {_first_line([path, 'version'])}")


def temporary_folder() -> Finding:
    """Where modules are unpacked: their code is run from there."""
    name, hint = "temporary folder", "Set TMPDIR to a folder on a disk that programs may run from."
    try:
        folder = tempfile.gettempdir()
        disk = os.statvfs(folder)
    except OSError as exc:
        return Finding(name, f"none: {exc}", ok=False, hint=hint)
    found = f"{folder}, {size(disk.f_bavail * disk.f_frsize)} free"
    if disk.f_flag & os.ST_NOEXEC:
        return Finding(name, f"{found}, but mounted noexec", ok=False, hint=hint)
    return Finding(name, found)


def package(name: str, module: str) -> Finding:
    """A package that is looked for and not imported."""
    folder = _folder_of(module)
    if folder is None:
        return Finding(name, "not installed", ok=False)
    versions = {_version(one) for one in packages_distributions().get(module, ())} - {""}
    return Finding(name, f"{', '.join(sorted(versions)) or 'installed'} in {folder}")


def runtime_flavour() -> Finding:
    """Which runtime of Torch-TensorRT would hold engines: see ``torch_tensorrt/_features.py``."""
    name, folder = "Torch-TensorRT runtime", _folder_of("torch_tensorrt")
    if folder is None:
        return Finding(name, "none", ok=False)
    libraries = [folder / "lib" / one for one in ("libtorchtrt.so", "libtorchtrt_runtime.so")]
    found = "C++" if any(library.is_file() for library in libraries) else "Python"
    return Finding(name, found)


def _folder_of(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    return None if spec is None else Path(spec.origin or "").parent


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def system() -> Finding:
    """Operating system and interpreter."""
    return Finding("Python", f"{platform.python_version()}, {platform.platform()}")


@dataclass(frozen=True)
class _Said:
    """What a command said."""

    text: str
    ok: bool


def _output(command: list[str], text: str = "") -> _Said:
    try:
        done = subprocess.run(  # noqa: S603 - tools found on the path, with fixed arguments
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeError) as exc:
        return _Said(str(exc), ok=False)
    return _Said((done.stdout or done.stderr).strip(), ok=done.returncode == 0)


def _first_line(command: list[str]) -> str:
    lines = _output(command).text.splitlines()
    return lines[0] if lines else "says nothing"
