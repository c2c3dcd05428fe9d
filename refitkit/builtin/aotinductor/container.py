"""Opening a shared library as a container with weights in it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

import torch

from refitkit.errors import CompileError, UnsupportedTargetError, raise_if_resource, refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TRIAL_SECONDS = 300
_ZEROS = "/dev/zero"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
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
        raise_if_resource(exc, f"The shared library {str(library)!r} cannot be loaded")
        message = f"The shared library {library.name!r} cannot be loaded: {exc}."
        raise UnsupportedTargetError(message) from exc


def can_fill() -> bool:
    """Whether this torch can give a container weights from a file."""
    from torch._C import _aoti  # noqa: PLC0415 - not there in every build of torch

    return hasattr(_aoti.AOTIModelContainerRunnerCpu, "update_constant_buffer_from_blob")


def fill_from_blob(runner: Any, copy: Callable[[IO[bytes]], object]) -> None:
    """Give a container the weights of a blob: those of its compilation, or of a package.

    The container maps the file that it is given, reads as far as its weights go, and copies them.
    A page that is not there would end the process with SIGBUS (``mmap(2)``): in a file that is too
    short, in one that is cut meanwhile, and on a file system without room. So the blob is copied
    into memory that is no file of a disk, is extended by zeros there, and is sealed against changes
    (``memfd_create(2)``). The number of bytes that were needed is compared afterwards.

    Args:
        runner: The container.
        copy: Writes the blob to the file that it is given.

    Raises:
        UnsupportedTargetError: The blob is too short, so the file was damaged.
        ResourceError: The file that it is copied to cannot be made.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with os.fdopen(os.memfd_create("refitkit-weights", flags), "r+b") as blob:
        copy(blob)
        blob.flush()
        size = blob.tell()
        try:
            os.ftruncate(blob.fileno(), size + _BEYOND)
        except OSError as exc:
            message = f"A sparse file of {_BEYOND >> 30} GiB cannot be made in memory"
            raise refused(exc, message) from exc
        fcntl.fcntl(blob.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        runner.update_constant_buffer_from_blob(f"/proc/self/fd/{blob.fileno()}")
    needed = sum(t.nbytes for t in runner.extract_constants_map(False).values())  # noqa: FBT003
    if needed > size:
        message = f"The package's weights have {size} bytes, and its library reads {needed}."
        raise UnsupportedTargetError(message, hint="Copy or write the package again.")


def fill_with_zeros(runner: Any) -> None:
    """Have a container allocate and lay out its weights itself, as zeros.

    It maps the file that it is given, privately. Such a mapping of ``/dev/zero`` is memory without
    a file, and as long as it is only read it takes no memory either (``mem(4)``, ``mmap_zero`` in
    ``drivers/char/mem.c`` of Linux): nothing can be cut, and no file system can fill.

    Raises:
        UnsupportedTargetError: The device cannot be mapped, or there is no memory for the weights.
    """
    try:
        runner.update_constant_buffer_from_blob(_ZEROS)
    except RuntimeError as exc:
        raise_if_resource(exc, "A container cannot lay out its weights")
        first = str(exc).strip().partition("\n")[0]
        message = f"A container cannot lay out its weights from {_ZEROS}: {first}"
        raise UnsupportedTargetError(message) from exc


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
