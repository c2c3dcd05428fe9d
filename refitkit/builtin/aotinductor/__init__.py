"""The backend ``aotinductor``: AOTInductor packages, on the CPU and on CUDA.

Importing this package imports no torch; the hooks below import what they need.

``backend`` implements the protocol. ``compiling`` makes a module from a program, and ``module``
calls, saves and opens it. ``engine`` writes weights. ``inputs`` checks calls, ``package`` is the
file format, and ``container`` loads the compiled library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor.names import NAME
from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import Backend, OpenedModule, Tools


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register the backend."""
    from refitkit.builtin.aotinductor.backend import AOTInductorBackend

    register(AOTInductorBackend())


@hookimpl
def refitkit_load_module(target: object, tools: Tools) -> OpenedModule | None:
    """Open a file that refitkit saved, or a package that torch wrote."""
    if not isinstance(target, Path) or not target.is_file():
        return None
    from refitkit.builtin.aotinductor.opening import open_file

    return open_file(target, tools.shared)


@hookimpl
def refitkit_partition(program: ExportedProgram, backend: str) -> Mapping[str, Any] | None:
    """Return the whole program as the part of the only engine."""
    if backend != NAME:
        return None
    from refitkit.builtin.aotinductor.engine import ENGINE

    return {ENGINE: program}
