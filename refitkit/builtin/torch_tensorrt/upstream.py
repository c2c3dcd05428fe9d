"""Importing ``torch_tensorrt`` and ``tensorrt``: whole, or without a GPU.

``torch_tensorrt`` answers for TensorRT and for TensorRT-RTX: the latter's build of it puts
``tensorrt_rtx`` in the place of ``tensorrt`` (``torch_tensorrt/_TensorRTProxyModule.py``), so code
here is written to the one name.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from refitkit.errors import ToolchainError, raise_if_resource

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSTALL = "Install it: pip install 'refitkit[rtx]' (TensorRT-RTX) or 'refitkit[tensorrt]'."
_ASSUMED_CAPABILITY = (8, 6)
"""Compute capability that a machine without a GPU claims while torch_tensorrt is imported."""


def is_installed() -> bool:
    """Whether there is a ``torch_tensorrt``; nothing is imported."""
    return importlib.util.find_spec("torch_tensorrt") is not None


def is_imported() -> bool:
    """Whether somebody has imported ``torch_tensorrt``; objects of its own cannot exist before."""
    return "torch_tensorrt" in sys.modules


def has_gpu() -> bool:
    """Whether engines can run here."""
    return torch.cuda.is_available()


def torch_tensorrt() -> Any:
    """The package ``torch_tensorrt``.

    Raises:
        ToolchainError: It is not installed, cannot be imported, or needs a GPU to be imported.
    """
    if is_imported():
        return sys.modules["torch_tensorrt"]
    if is_installed() and not has_gpu():
        raise ToolchainError(
            "torch_tensorrt cannot be imported into this process: it needs a GPU.",
            hint="The backend 'tensorrt_network' works without one, in a process of its own.",
        )
    return _imported()


def tensorrt() -> Any:
    """The package ``tensorrt``, or ``tensorrt_rtx`` in its place.

    Raises:
        ToolchainError: As ``torch_tensorrt``.
    """
    torch_tensorrt()
    return importlib.import_module("tensorrt")


def import_headless() -> Any:
    """``torch_tensorrt`` in a process without a GPU, or one that must not touch it.

    Two look-ups of ``torch.cuda`` are answered while the import runs, and only then. For processes
    that plan and build: engines cannot run in them.

    Raises:
        ToolchainError: It is not installed or cannot be imported.
    """
    if is_imported():
        return sys.modules["torch_tensorrt"]
    with ExitStack() as stack:
        if not has_gpu():
            for name, answer in (
                ("get_device_capability", _ASSUMED_CAPABILITY),
                ("current_device", 0),
            ):
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer: a))
        return _imported()


def _imported() -> Any:
    if not is_installed():
        raise ToolchainError("torch_tensorrt is not installed.", hint=_INSTALL)
    with warnings.catch_warnings(), _without_plugins(), _quiet():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torch_tensorrt")
        except Exception as exc:
            sys.modules.pop("torch_tensorrt", None)
            raise_if_resource(exc, "torch_tensorrt cannot be imported")
            raise ToolchainError(
                f"torch_tensorrt cannot be imported: {type(exc).__name__}: {exc}", hint=_INSTALL
            ) from exc


@contextmanager
def _without_plugins() -> Iterator[None]:
    """Answer that ``tensorrt.plugin`` is not there where only TensorRT-RTX is.

    torch_tensorrt 2.11 looks for it under the name ``tensorrt``, which its proxy for TensorRT-RTX
    cannot answer (``torch_tensorrt/_features.py``).
    """
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.startswith("tensorrt.plugin") else real(name, package)

    if real("tensorrt_rtx") is None:
        yield
        return
    with mock.patch.object(importlib.util, "find_spec", find_spec):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that the import logs on machines without a GPU."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
