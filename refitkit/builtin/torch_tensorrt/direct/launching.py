"""Launch one kernel of Triton again and again, with little time of the host."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt.refitter import current_device

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("refitkit")
_WARPS = 4
_ALIGNED = 16
"""Triton compiles another kernel for addresses that are no multiples of this."""


class Launch:
    """A kernel with arguments that stay the same, except the first one.

    Triton looks for the compiled kernel in each launch: 55 us beside an H200. Only the first
    launch does that here, and later ones take the kernel that it found: 10 us.
    """

    def __init__(
        self, kernel: Any, programs: int, *arguments: torch.Tensor, **constants: int
    ) -> None:
        """Launch nothing yet.

        Args:
            kernel: The kernel.
            programs: How many programs run.
            arguments: All tensors but the first, in the order of the kernel.
            constants: Its constants, in the same order.
        """
        self._kernel, self._programs = kernel, programs
        self._arguments, self._constants = arguments, constants
        self._found: tuple[int, Callable[..., object]] | None = None

    def __call__(self, first: torch.Tensor) -> bool:
        """Launch it, on the current stream.

        Args:
            first: The first argument: always of the same dtype, on the same device.

        Returns:
            False if Triton cannot compile it, as without a C compiler.
        """
        if self._kernel is None:
            return False
        try:
            with current_device(first.device):
                self._launch(first)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever compilers raise
            _log.info("Triton cannot launch a kernel, and torch copies the weights: %s", exc)
            self._kernel = None
        return self._kernel is not None

    def _launch(self, first: torch.Tensor) -> None:
        offset = first.data_ptr() % _ALIGNED
        if self._found is not None and self._found[0] == offset:
            self._found[1](first, *self._arguments, *self._constants.values())
            return
        launch = self._kernel[self._programs,]
        compiled = launch(first, *self._arguments, **self._constants, num_warps=_WARPS)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._found = offset, compiled[self._programs, 1, 1]
