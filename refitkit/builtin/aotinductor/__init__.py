"""The backend ``aotinductor``: AOTInductor packages, on the CPU and on CUDA.

Importing this package imports no torch; the hooks below import what they need.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.aotinductor.names import NAME
from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import Backend, OpenedModule


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register ``aotinductor``."""
    from refitkit.builtin.aotinductor.backend import AOTInductorBackend

    register(AOTInductorBackend())


@hookimpl
def refitkit_load_module(target: object) -> OpenedModule | None:
    """Open a file that ``save`` wrote, or a package that torch wrote."""
    if not isinstance(target, Path) or not target.is_file():
        return None
    from refitkit.builtin.aotinductor import module as opening

    return opening.open_file(target)


@hookimpl
def refitkit_partition(program: ExportedProgram, backend: str) -> Mapping[str, Any] | None:
    """The whole program is the one part of the one engine."""
    if backend != NAME:
        return None
    from refitkit.builtin.aotinductor.engine import ENGINE

    return {ENGINE: program}
