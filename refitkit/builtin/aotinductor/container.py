"""Opening a shared library as a container with weights in it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from refitkit.errors import CompileError, UnsupportedTargetError

_TRIAL_SECONDS = 300
_BEYOND = 1 << 40  # bytes: more than the weights of any engine


def open_container(library: Path, device: str) -> Any:
    """A container on a shared library. Runs code of the library.

    Raises:
        UnsupportedTargetError: The device is not there, or the library cannot be loaded.
    """
    from torch._C import _aoti  # noqa: PLC0415 - not there in every build of torch

    try:
        if device == "cpu":
            return _aoti.AOTIModelContainerRunnerCpu(str(library), 1)
        if not torch.cuda.is_available():
            raise UnsupportedTargetError(
                f"The module was compiled for {device!r}, and this machine has no CUDA device.",
                hint="Open it on a machine with an NVIDIA GPU, or compile the program for the CPU.",
            )
        return _aoti.AOTIModelContainerRunnerCuda(str(library), 1, device, str(library.parent))
    except (RuntimeError, OSError) as exc:
        message = f"The shared library {library.name!r} cannot be loaded: {exc}."
        raise UnsupportedTargetError(message) from exc


def can_fill() -> bool:
    """Whether this torch can give a container weights from a file."""
    from torch._C import _aoti  # noqa: PLC0415 - not there in every build of torch

    return hasattr(_aoti.AOTIModelContainerRunnerCpu, "update_constant_buffer_from_blob")


def fill_from_blob(runner: Any, blob: Path) -> None:
    """Give a container the weights that its compilation wrote."""
    runner.update_constant_buffer_from_blob(str(blob))


def fill_from_foreign_blob(runner: Any, blob: Path) -> None:
    """Give a container the weights of a blob that somebody else wrote.

    The container reads as far as its weights go, and past the end of the file that is a crash. So
    the file is extended by zeros without extent first, and what was needed is compared afterwards.

    Raises:
        UnsupportedTargetError: The blob is too short: the file was damaged.
    """
    size = blob.stat().st_size
    with blob.open("r+b") as file:
        file.truncate(size + _BEYOND)
    fill_from_blob(runner, blob)
    needed = sum(t.nbytes for t in runner.extract_constants_map(False).values())  # noqa: FBT003
    if needed > size:
        message = f"The package's weights have {size} bytes, and its library reads {needed}."
        raise UnsupportedTargetError(message, hint="Copy or write the package again.")


def fill_with_zeros(runner: Any) -> None:
    """Have a container allocate and lay out its weights itself, as zeros.

    It copies its layout from a file of zeros that takes no space, and is larger than any weights:
    reading past its end would be a crash.

    Raises:
        UnsupportedTargetError: The file system for temporary files has no room for such a file.
    """
    with tempfile.NamedTemporaryFile(prefix="refitkit-zeros-") as file:
        try:
            file.truncate(_BEYOND)
        except OSError as exc:
            message = f"A sparse file of {_BEYOND >> 30} GiB cannot be made: {exc}."
            hint = (
                "Set TMPDIR to a folder on a file system with sparse files, such as ext4 or tmpfs."
            )
            raise UnsupportedTargetError(message, hint=hint) from exc
        fill_from_blob(runner, Path(file.name))


def try_in_child(library: Path, device: str) -> None:
    """Load a library in a process of its own, so that one that crashes on loading harms nobody.

    Raises:
        CompileError: The child died; says what has helped.
    """
    code = (
        "import sys; from pathlib import Path;"
        "from refitkit.builtin.aotinductor.container import open_container;"
        "open_container(Path(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(library), device]
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False
    )
    if done.returncode:
        raise CompileError(
            f"The compiled library cannot be loaded: a trial ended with {done.returncode}.",
            hint="A compiler with a static libstdc++ makes such libraries: set CXX=/usr/bin/g++ "
            f"and compile again. The trial said: {done.stderr.strip()[-500:]}",
        )
