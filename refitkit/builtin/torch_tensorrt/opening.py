"""Opening targets: live objects of torch_tensorrt, and files of ``torch_tensorrt.save``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.making import default_makers
from refitkit.builtin.torch_tensorrt.module import TorchTensorRTOpened
from refitkit.builtin.torch_tensorrt.program_file import ProgramFile, read_program_file
from refitkit.builtin.torch_tensorrt.targets import understand
from refitkit.errors import UnsupportedTargetError, raised_as

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refitkit.builtin.torch_tensorrt.module import Makers


def open_target(target: object, makers: Makers | None = None) -> TorchTensorRTOpened | None:
    """Open a target; None where it is none of this backend's. The target is not changed.

    Opening a file loads it with torch, which runs code of whoever made it, in spite of the checks
    that :mod:`~refitkit.builtin.torch_tensorrt.program_file` makes.

    Args:
        target: A compiled module, a program with engines in it, a file, or anything else.
        makers: What makes refittable units; by default :func:`~.making.default_makers`.

    Raises:
        UnsupportedTargetError: It is damaged, hostile, or needs a GPU.
        NotRefittableError: It cannot take other weights; names the flag to set.
        ToolchainError: It is a file, and torch_tensorrt is not installed.
    """
    if makers is None:
        makers = default_makers()
    if isinstance(target, Path):
        return _open_file(target, makers) if target.is_file() else None
    if not upstream.is_imported():
        return None
    understood = understand(target)
    return None if understood is None else TorchTensorRTOpened(understood, makers)


def _open_file(path: Path, makers: Makers) -> TorchTensorRTOpened | None:
    attachments = read_program_file(path, _checked_attachments)
    if attachments is None:
        return None
    if not upstream.has_gpu():
        raise UnsupportedTargetError(
            f"{str(path)!r} holds TensorRT engines, which can be loaded only on a machine with an "
            "NVIDIA GPU.",
            hint="Without a GPU, plan and build with backend='tensorrt_network'.",
        )
    understood = understand(_loaded(path))
    if understood is None:
        raise UnsupportedTargetError(f"{str(path)!r} holds no engine that can run.")
    return TorchTensorRTOpened(understood, makers, attachments)


def _checked_attachments(file: ProgramFile) -> Mapping[str, bytes]:
    file.check()
    return file.attachments()


def _loaded(path: Path) -> Any:
    upstream.torch_tensorrt()  # registers its operators and engine classes
    refused = raised_as(UnsupportedTargetError, f"torch cannot load {str(path)!r}")
    with refused, path.open("rb") as file:
        return torch.export.load(file)


def describe_file(path: Path) -> Mapping[str, Any] | None:
    """What a saved file holds, as plain data, without running any of it; None: another's file.

    Raises:
        UnsupportedTargetError: It is damaged or hostile.
    """
    return read_program_file(path, _description)


def _description(file: ProgramFile) -> Mapping[str, Any]:
    engines = file.engines()
    return {
        "format": "program with TensorRT engines",
        "engines": {
            name: {
                "bytes": len(info.engine_bytes),
                "inputs": list(info.input_names),
                "outputs": list(info.output_names),
                "settings": {key: str(one) for key, one in metadata.settings.items()},
            }
            for name, (info, metadata) in engines.items()
        },
        "attachments": sorted(file.attachments()),
    }


def attachments_of(path: Path) -> Mapping[str, bytes]:
    """What a saved file keeps beside its engines, without running any of it.

    Raises:
        UnsupportedTargetError: It is damaged.
    """
    return read_program_file(path, ProgramFile.attachments) or {}
