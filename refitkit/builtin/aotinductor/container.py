"""Load a compiled library as a container, and fill the container with weights.

The module hides torch's private binding (``torch._C._aoti``). The container maps each file of
weights that it is given, and a page of a mapped file that does not exist ends the process. So
refitkit passes it sealed memory or ``/dev/zero``, never a file on a disk.
"""

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
_PADDING = 1 << 40  # bytes: more than the weights of any engine


def open_container(library: Path, device: str) -> Any:
    """Load a shared library, and return a container. This runs code of the library.

    Args:
        library: Path of the shared library; its kernels are in the same folder.
        device: Device that it was compiled for: ``cpu``, ``cuda``.

    Raises:
        UnsupportedTargetError: The machine has no such device, or the library cannot be loaded.
        ResourceError: The system refused.
    """
    from torch._C import _aoti  # noqa: PLC0415 - not in every build of torch

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
    """Return whether this version of torch can fill a container with weights from a file."""
    from torch._C import _aoti  # noqa: PLC0415 - not in every build of torch

    return hasattr(_aoti.AOTIModelContainerRunnerCpu, "update_constant_buffer_from_blob")


def fill_from_blob(runner: Any, copy: Callable[[IO[bytes]], object]) -> None:
    """Fill a container with the weights of a blob, which inductor or a package holds.

    The container maps the file that it is given, reads as many bytes as its weights have, and
    copies them. Access to a page that does not exist would end the process with SIGBUS
    (``mmap(2)``): if the file is too short, is truncated meanwhile, or is on a full file system. So
    the blob is copied to anonymous memory, extended with zeros, and sealed against changes
    (``memfd_create(2)``). Afterwards its size is compared with the bytes that were needed.

    Args:
        runner: The container.
        copy: Writes the blob to the file that it is given.

    Raises:
        UnsupportedTargetError: The blob is too short, so the package is damaged.
        ResourceError: There is no memory for the copy.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with os.fdopen(os.memfd_create("refitkit-weights", flags), "r+b") as blob:
        copy(blob)
        blob.flush()
        size = blob.tell()
        try:
            # How much the container reads is known only afterwards. Zeros that are not read take
            # no memory.
            os.ftruncate(blob.fileno(), size + _PADDING)
        except OSError as exc:
            message = f"A sparse file of {_PADDING >> 30} GiB cannot be made in memory"
            raise refused(exc, message) from exc
        fcntl.fcntl(blob.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        runner.update_constant_buffer_from_blob(f"/proc/self/fd/{blob.fileno()}")
    # How many bytes the container has read is known only now.
    needed = sum(t.nbytes for t in runner.extract_constants_map(False).values())  # noqa: FBT003
    if needed > size:
        message = f"The package's weights have {size} bytes, and its library reads {needed}."
        raise UnsupportedTargetError(message, hint="Copy or write the package again.")


def fill_with_zeros(runner: Any) -> None:
    """Let a container allocate and lay out its weights, as zeros.

    The container maps the file that it is given, privately. Such a mapping of ``/dev/zero`` is
    memory without a file, and takes no memory as long as it is only read (``mem(4)``, ``mmap_zero``
    in ``drivers/char/mem.c`` of Linux). So nothing can be truncated, and no file system can run
    full.

    Raises:
        UnsupportedTargetError: The device cannot be mapped.
        ResourceError: There is no memory for the weights.
    """
    try:
        runner.update_constant_buffer_from_blob(_ZEROS)
    except RuntimeError as exc:
        raise_if_resource(exc, "A container cannot lay out its weights")
        first = str(exc).strip().partition("\n")[0]
        message = f"A container cannot lay out its weights from {_ZEROS}: {first}"
        raise UnsupportedTargetError(message) from exc


def try_in_child(library: Path, device: str) -> None:
    """Load a library in a child process, because a faulty one may crash the process.

    Raises:
        CompileError: The child process failed. The hint names a remedy that has helped.
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
            hint="A compiler with a static libstdc++ makes these libraries: set CXX=/usr/bin/g++ "
            f"and compile again. The trial reported: {done.stderr.strip()[-500:]}",
        )
