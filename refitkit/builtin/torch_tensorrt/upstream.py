"""Imports of ``torch_tensorrt`` and ``tensorrt``, with or without a GPU.

There are builds of ``torch_tensorrt`` for TensorRT and for TensorRT-RTX. The latter registers
``tensorrt_rtx`` under the name ``tensorrt`` (``torch_tensorrt/_TensorRTProxyModule.py``). So
refitkit uses that one name for both.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import torch

from refitkit.errors import ToolchainError, raise_if_resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_INSTALL = "Install it: pip install 'refitkit[rtx]' (TensorRT-RTX) or 'refitkit[tensorrt]'."
_ASSUMED_CAPABILITY = (8, 6)
"""Compute capability that torch reports without a GPU while torch_tensorrt is imported."""


def is_installed() -> bool:
    """Whether ``torch_tensorrt`` can be found, without importing it."""
    return importlib.util.find_spec("torch_tensorrt") is not None


def is_imported() -> bool:
    """Whether ``torch_tensorrt`` was imported. Before that, none of its objects can exist."""
    return sys.modules.get("torch_tensorrt") is not None


def has_gpu() -> bool:
    """Whether the machine has a GPU that engines can run on."""
    return torch.cuda.is_available()


def torch_tensorrt() -> Any:
    """Import the package ``torch_tensorrt``.

    Raises:
        ToolchainError: It is not installed or cannot be imported, or the machine has no GPU.
    """
    # first: a worker process has it without a GPU, by ``import_headless``
    if is_imported():
        return sys.modules["torch_tensorrt"]
    if is_installed() and not has_gpu():
        raise ToolchainError(
            "torch_tensorrt cannot be imported into this process: it needs a GPU.",
            hint="The backend 'tensorrt_network' needs no GPU: it uses processes of its own.",
        )
    return _import()


def tensorrt() -> Any:
    """Import the package ``tensorrt``, which is ``tensorrt_rtx`` in a build for TensorRT-RTX.

    Raises:
        ToolchainError: See ``torch_tensorrt``.
    """
    torch_tensorrt()
    return importlib.import_module("tensorrt")


def import_headless() -> Any:
    """Import ``torch_tensorrt`` into a process that has no GPU or must not use it.

    Such a process can plan and build, but not run engines.

    Raises:
        ToolchainError: It is not installed or cannot be imported.
    """
    if is_imported():
        return sys.modules["torch_tensorrt"]
    with ExitStack() as stack:
        # the import calls these two functions, which raise without a GPU
        if not has_gpu():
            for name, answer in (
                ("get_device_capability", _ASSUMED_CAPABILITY),
                ("current_device", 0),
            ):
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer: a))
        return _import()


def import_for_ops(names: Iterable[str]) -> dict[str, str]:
    """Import modules into this process, because the programs that it reads may have their ops.

    A module of converters may need ``torch_tensorrt``. It can still be imported where refitkit
    plans, so an error is no failure here.

    Args:
        names: Names of modules that may be imported.

    Returns:
        Errors of modules that cannot be imported, as text, by name.
    """
    failures: dict[str, str] = {}
    for name in names:
        try:
            with _failing_import_avoided():
                importlib.import_module(name)
        except Exception as exc:  # noqa: BLE001 - modules raise any error
            raise_if_resource(exc, f"{name!r} cannot be imported")
            failures[name] = f"{type(exc).__name__}: {exc}"
    return failures


@contextmanager
def _failing_import_avoided() -> Iterator[None]:
    """Make imports of ``torch_tensorrt`` fail at once where they would fail after seconds."""
    if is_imported() or not is_installed() or has_gpu():
        yield
        return
    sys.modules["torch_tensorrt"] = None  # type: ignore[assignment]  # as importlib documents
    try:
        yield
    finally:
        sys.modules.pop("torch_tensorrt", None)


Converter = TypeVar("Converter", bound="Callable[..., Any]")


def tensorrt_converter(
    op: Any, *, priority: str = "STANDARD", **options: Any
) -> Callable[[Converter], Converter]:
    """Register a converter with Torch-TensorRT, in each process that can convert.

    This is ``torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter`` for modules that have to
    be importable everywhere. Without a GPU, ``torch_tensorrt`` can be imported only into the
    processes in which refitkit plans and builds. In any other process the decorator returns the
    function and registers nothing. Import ``tensorrt`` inside the converter.

    Args:
        op: The op, such as ``torch.ops.aten.add.Tensor``.
        priority: Name of a ``ConverterPriority``: ``STANDARD`` or ``HIGH``.
        options: Further options of ``dynamo_tensorrt_converter``, such as
            ``supports_dynamic_shapes=True``.

    Raises:
        ToolchainError: The machine has a GPU, and ``torch_tensorrt`` cannot be imported.
    """

    def register(converter: Converter) -> Converter:
        if is_imported() or (is_installed() and has_gpu()):
            torch_tensorrt()
            conversion = importlib.import_module("torch_tensorrt.dynamo.conversion")
            chosen = conversion.ConverterPriority[priority]
            conversion.dynamo_tensorrt_converter(op, priority=chosen, **options)(converter)
        return converter

    return register


def _import() -> Any:
    if not is_installed():
        raise ToolchainError("torch_tensorrt is not installed.", hint=_INSTALL)
    with warnings.catch_warnings(), _plugin_module_hidden(), _logging_limited():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torch_tensorrt")
        except Exception as exc:
            # otherwise `is_imported` reports a package that failed half-way
            sys.modules.pop("torch_tensorrt", None)
            raise_if_resource(exc, "torch_tensorrt cannot be imported")
            raise ToolchainError(
                f"torch_tensorrt cannot be imported: {type(exc).__name__}: {exc}", hint=_INSTALL
            ) from exc


@contextmanager
def _plugin_module_hidden() -> Iterator[None]:
    """With TensorRT-RTX, have ``find_spec`` report that ``tensorrt.plugin`` does not exist.

    torch_tensorrt 2.11 looks it up by this name (``torch_tensorrt/_features.py``), and its proxy
    module for TensorRT-RTX cannot answer.
    """
    real = importlib.util.find_spec  # the patched one below must not call itself

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name.startswith("tensorrt.plugin") else real(name, package)

    if real("tensorrt_rtx") is None:
        yield
        return
    with mock.patch.object(importlib.util, "find_spec", find_spec):
        yield


@contextmanager
def _logging_limited() -> Iterator[None]:
    """Suppress the warnings that the import logs on machines without a GPU."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
