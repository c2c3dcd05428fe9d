"""``refitkit doctor``: show which backends work on this machine, and what to install.

The first half turns findings about the machine into abilities of the backends. The second half has
one function for each thing that is looked for, such as ``compiler``. None of them raises: a broken
installation is a finding.
"""

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

    from refitkit.cli.known import KnownPlugin


_AOTINDUCTOR, _TORCH_TENSORRT, _NETWORK = "aotinductor", "torch_tensorrt", "tensorrt_network"
_ABILITIES = ("compile", "load", "refit")
_EXTRAS = "pip install 'refitkit[rtx]' (TensorRT-RTX) or 'refitkit[tensorrt]' (TensorRT)"


@dataclass(frozen=True)
class _Backend:
    """Abilities of one backend on this machine; None for a backend of an unknown plugin.

    Attributes:
        name: Name of the backend.
        compile: Whether it can compile.
        load: Whether it can open modules that were compiled elsewhere.
        refit: Whether it can refit those modules.
        hint: Steps that add missing abilities.
    """

    name: str
    compile: bool | None = None
    load: bool | None = None
    refit: bool | None = None
    hint: str = "not known for backends of other plugins"


@click.command("doctor", short_help="Show which backends work on this machine.")
@common_options
@click.pass_context
def doctor_command(ctx: click.Context) -> None:
    """Show which backends work on this machine, and what to install for the others.

    Exits with 0 if at least one backend can refit, else with 1.
    """
    session = ctx.ensure_object(Session)
    session.progress.show("examining the machine")
    findings = _findings()
    backends = _backends(session, {one.name: one for one in findings})
    # None means unknown, and a backend of another plugin may well refit.
    possible = any(backend.refit is not False for backend in backends)
    plugins = all_plugins(session)
    data = {
        "ok": possible,
        "machine": [asdict(one) for one in findings],
        "backends": [asdict(one) for one in backends],
        "plugins": [
            {"name": one.name, "origin": one.origin, "state": one.state, "problem": one.problem}
            for one in plugins
        ],
    }
    names = [f"{one.name} ({_state_of(one)})" for one in plugins]
    session.result(data, lambda console: _print(console, findings, backends, names))
    # Not an error: the result is complete, and stderr stays empty.
    ctx.exit(0 if possible else 1)


def _state_of(plugin: KnownPlugin) -> str:
    state = plugin.origin if plugin.state == IN_USE else plugin.state
    return f"{state}, {plugin.problem}" if plugin.problem else state


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
        calls(),
        package("TensorRT", "tensorrt"),
        package("TensorRT-RTX", "tensorrt_rtx"),
        package("Torch-TensorRT", "torch_tensorrt"),
        runtime_flavour(),
    ]


def _backends(session: Session, found: dict[str, Finding]) -> list[_Backend]:
    # A pipeline, which lists the backends, imports torch.
    if not found["torch"].ok:
        return []
    try:
        names = list(session.pipeline().backends)
    except Exception as exc:  # noqa: BLE001 - a broken plugin must not hide the other findings
        return [_Backend("?", False, False, False, f"cannot be listed: {exc}")]  # noqa: FBT003
    known = {
        _AOTINDUCTOR: _aotinductor,
        _TORCH_TENSORRT: _torch_tensorrt,
        _NETWORK: _tensorrt_network,
    }
    return [known[name](found) if name in known else _Backend(name) for name in names]


def _aotinductor(found: dict[str, Finding]) -> _Backend:
    """AOTInductor compiles C++. Loading and refitting its modules needs only torch."""
    folder = found["temporary folder"]
    needed = [found["C++ compiler"], found["openssl"], folder]
    hints = [one.hint for one in needed if not one.ok]
    if not found["CUDA device"].ok:
        hints.append("CPU modules only: no CUDA device")
    return _Backend(
        _AOTINDUCTOR,
        compile=all(one.ok for one in needed),
        load=folder.ok,
        refit=folder.ok,
        hint="\n".join(hints),
    )


def _torch_tensorrt(found: dict[str, Finding]) -> _Backend:
    """The engines of Torch-TensorRT run and take new weights only on a GPU."""
    able = found["Torch-TensorRT"].ok and found["CUDA device"].ok
    hints = [] if found["Torch-TensorRT"].ok else [_EXTRAS]
    if not found["CUDA device"].ok:
        hints.append("needs a CUDA device; 'tensorrt_network' plans and builds without one")
    return _Backend(_TORCH_TENSORRT, able, able, able, "\n".join(hints))


def _tensorrt_network(found: dict[str, Finding]) -> _Backend:
    """This backend builds without a GPU, and only TensorRT-RTX can do that."""
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


# -- the machine -------------------------------------------------------------------------------

_COMPILERS = ("g++", "c++", "clang++")
_TRIAL = "#include <omp.h>\n#include <vector>\nstd::vector<int> trial(1);\n"
"""A program with the headers that inductor's code includes (torch/_inductor/codegen/cpp_prefix.h of
torch)."""
_TRIAL_FLAGS = ("-x", "c++", "-shared", "-fPIC", "-fopenmp", "-")
_CPP_LIBRARIES = (b"libstdc++.so", b"libc++.so")
_SECONDS = 30  # nvidia-smi can hang if the driver is broken


@dataclass(frozen=True)
class Finding:
    """The result of looking for one thing on the machine.

    Attributes:
        name: Name of the thing, such as ``C++ compiler``.
        found: Description of what was found.
        ok: Whether it can be used.
        hint: Way to make it usable.
    """

    name: str
    found: str
    ok: bool = True
    hint: str = ""


def torch_here() -> Finding:
    """The version of torch. It is imported, because only that shows a broken installation."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as exc:
        found = f"cannot be imported: {exc}"
        return Finding("torch", found, ok=False, hint="Install it again: see pytorch.org.")
    return Finding("torch", str(torch.__version__))


def gpu() -> Finding:
    """CUDA devices that torch can use. Only modules that are compiled for CUDA need one."""
    try:
        # inside the try, because a broken torch is a finding, too
        import torch

        # torch warns with the reason, such as a driver that is too old, and returns False.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            usable = torch.cuda.is_available()
            count = torch.cuda.device_count() if usable else 0
            devices = [_device(index) for index in range(count)]
    except Exception as exc:  # noqa: BLE001 - drivers fail in many ways, and each is a finding
        return Finding("CUDA device", f"cannot be queried: {exc}", ok=False)
    if devices:
        return Finding("CUDA device", "; ".join(devices))
    why = f": {caught[0].message}" if caught else ""
    if torch.version.cuda is None:
        why = ": this torch is built without CUDA"
    return Finding("CUDA device", f"none{why}", ok=False, hint="Only CUDA modules need one.")


def _device(index: int) -> str:
    import torch

    device = torch.cuda.get_device_properties(index)
    capability = f"compute capability {device.major}.{device.minor}"
    return f"{device.name}, {size(device.total_memory)}, {capability}"


def driver() -> Finding:
    """The version of NVIDIA's driver, as ``nvidia-smi`` reports it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("NVIDIA driver", "none", ok=False, hint="Only CUDA modules need one.")
    output = _run([tool, "--query-gpu=driver_version", "--format=csv,noheader"])
    first = output.text.splitlines()[0] if output.text else _NO_OUTPUT
    return Finding("NVIDIA driver", first, ok=output.ok)


def compiler() -> Finding:
    """The C++ compiler that inductor would use, after it has compiled a small program."""
    name, chosen = "C++ compiler", os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    path = next(filter(None, map(shutil.which, candidates)), None)
    if path is None:
        hint = "Correct or unset CXX." if chosen else "Debian, Ubuntu: apt-get install g++"
        return Finding(name, f"none ({', '.join(candidates)} not found)", ok=False, hint=hint)
    try:
        failure = _compiler_failure(path)
    except (OSError, RefitError) as exc:
        failure = (f"cannot be tried: {exc}", "See the temporary folder.")
    if failure is not None:
        return Finding(name, f"{path} {failure[0]}", ok=False, hint=failure[1])
    return Finding(name, f"{path}: {_first_line([path, '--version'])}")


def _compiler_failure(compiler: str) -> tuple[str, str] | None:
    """The reason why a compiler cannot be used, with a hint; None if it can."""
    with TemporaryFolder() as folder:
        library = folder.path / "trial.so"
        # linked, too: a missing library shows only then
        output = _run([compiler, *_TRIAL_FLAGS, "-o", str(library)], _TRIAL)
        if not output.ok or not library.is_file():
            hint = "Install its standard library and OpenMP, or choose another with CXX."
            return f"fails: {output.text}", hint
        # a library contains the names of the libraries that it needs as text
        if not any(needed in library.read_bytes() for needed in _CPP_LIBRARIES):
            # With torch 2.11, a second C++ library in the process crashes it.
            hint = "Choose one with a shared C++ library, such as CXX=/usr/bin/g++."
            return "links the C++ library statically; such modules crash when loaded", hint
    return None


def openssl() -> Finding:
    """The ``openssl`` command, which inductor's packaging calls."""
    path = shutil.which("openssl")
    if path is None:
        hint = "Debian, Ubuntu: apt-get install openssl"
        return Finding("openssl", "none", ok=False, hint=hint)
    return Finding("openssl", f"{path}: {_first_line([path, 'version'])}")


def temporary_folder() -> Finding:
    """The folder in which modules are unpacked. Their code runs from there."""
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


def calls() -> Finding:
    """Whether modules that AOTInductor compiles here are called without the GIL."""
    try:
        from refitkit.builtin.aotinductor.native import lacking_here

        why = lacking_here()
    except (ImportError, OSError, RuntimeError) as exc:
        return Finding("AOTInductor calls", f"unknown: {exc}", ok=False)
    if not why:
        return Finding("AOTInductor calls", "without the GIL, through the C interface")
    hint = "Works, but calls hold the GIL, and refits wait for them."
    return Finding("AOTInductor calls", f"through torch's binding: {why}", ok=False, hint=hint)


def package(name: str, module: str) -> Finding:
    """The version and folder of a package, found without importing it.

    Args:
        name: Name of the package, for people.
        module: Name of its top-level module.
    """
    folder = _folder_of(module)
    if folder is None:
        return Finding(name, "not installed", ok=False)
    # A distribution can have another name than its module.
    versions = {_version(one) for one in packages_distributions().get(module, ())} - {""}
    return Finding(name, f"{', '.join(sorted(versions)) or 'installed'} in {folder}")


def runtime_flavour() -> Finding:
    """The runtime of Torch-TensorRT that would run engines: C++ or Python."""
    name, folder = "Torch-TensorRT runtime", _folder_of("torch_tensorrt")
    if folder is None:
        return Finding(name, "none", ok=False)
    # torch_tensorrt/_features.py looks for these libraries, too
    libraries = [folder / "lib" / one for one in ("libtorchtrt.so", "libtorchtrt_runtime.so")]
    found = "C++" if any(library.is_file() for library in libraries) else "Python"
    return Finding(name, found)


def _folder_of(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    # ImportError: a parent package is missing. ValueError: the module has no __spec__.
    except (ImportError, ValueError):
        spec = None
    return None if spec is None else Path(spec.origin or "").parent


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def system() -> Finding:
    """Versions of the interpreter and the operating system."""
    return Finding("Python", f"{platform.python_version()}, {platform.platform()}")


_NO_OUTPUT = "printed nothing"


@dataclass(frozen=True)
class _ToolOutput:
    """Output of a tool, and whether the tool succeeded."""

    text: str
    ok: bool


def _run(command: list[str], text: str = "") -> _ToolOutput:
    try:
        done = subprocess.run(  # noqa: S603 - tools found on the path, with fixed arguments
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeError) as exc:
        return _ToolOutput(str(exc), ok=False)
    # tools print versions on stdout, and compilers their errors on stderr
    return _ToolOutput((done.stdout or done.stderr).strip(), ok=done.returncode == 0)


def _first_line(command: list[str]) -> str:
    lines = _run(command).text.splitlines()
    return lines[0] if lines else _NO_OUTPUT
