"""Calls of torch, Triton and TensorRT that fail, at a place that is chosen beforehand.

A run without a fault counts the calls; then each of them can fail in turn. All work on a device is
launched by such a call: copies, kernels, events, waits and memory. A call fails before it did
anything, or after it did all.
"""

from __future__ import annotations

import sys
from typing import Any, Self

import torch

_PACKAGES = ("torch", "triton", "tensorrt")
_REFUSED = "CUDA error: refused by a test"


class DeviceFaults:
    """Counts calls into C of this thread, and lets one of them fail.

    Attributes:
        at: Number of the call to fail; None: none.
        after: Whether it does its work, and fails then.
        calls: Number of calls so far.
        failed: Name of the call that failed; empty: none.
    """

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.at, self.after = at, after
        self.calls, self.failed = 0, ""

    def __enter__(self) -> Self:
        self._with_gradients = torch.is_grad_enabled()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        # the call that restores this may be the one that failed
        torch.set_grad_enabled(self._with_gradients)

    def _profile(self, _frame: Any, event: str, call: Any) -> None:
        if event != ("c_return" if self.after else "c_call") or not _is_of_device(call):
            return
        self.calls += 1
        if self.calls - 1 == self.at:
            self.failed = getattr(call, "__qualname__", str(call))
            raise RuntimeError(_REFUSED)  # and Python ends the profile


def _is_of_device(call: Any) -> bool:
    owner = getattr(call, "__self__", None)
    named = getattr(call, "__module__", None) or ""
    home = getattr(owner, "__name__", "") if isinstance(owner, type(sys)) else ""
    kind = type(owner).__module__ or ""
    return any(one.partition(".")[0] in _PACKAGES for one in (named, home, kind))
