"""The backend ``openvino``: OpenVINO on the CPU, with weights that a refit replaces.

This module is the plugin. Its hooks import torch and openvino on first use.

``compiling`` turns a program into an OpenVINO model whose weights are inputs. ``engine`` holds
the weights and runs the model. ``module`` calls, copies and saves it, and ``backend`` plans it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.protocols import Backend, OpenedModule, Tools
    from torch.export import ExportedProgram

NAME = "openvino"
"""Name of the backend, as users write it."""


@hookimpl
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register the backend."""
    from refitkit_openvino.backend import OpenVINOBackend

    register(OpenVINOBackend())


@hookimpl
def refitkit_load_module(target: object, tools: Tools) -> OpenedModule | None:
    """Open a file that this backend saved."""
    if not isinstance(target, Path) or not target.is_file():
        return None
    from refitkit_openvino.files import open_module

    return open_module(target, tools)


@hookimpl
def refitkit_partition(program: ExportedProgram, backend: str) -> Mapping[str, Any] | None:
    """Return the whole program as the part of the only engine."""
    if backend != NAME:
        return None
    from refitkit_openvino.engine import ENGINE

    return {ENGINE: program}
