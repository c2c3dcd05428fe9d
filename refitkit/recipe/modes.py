"""A dispatch mode of torch below all others, which stays on where libraries switch all modes off.

What torch offers for its stack of modes has private names; they stand here.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def lowest(mode: TorchDispatchMode) -> Iterator[None]:
    """Put a mode below all others, and keep it on, until the end of the block."""
    with _python_dispatch._disable_current_modes():  # noqa: SLF001 - there is no other way below
        TorchDispatchMode.__enter__(mode)  # type: ignore[no-untyped-call]  # torch's
        try:
            with _staying(mode):
                yield
        finally:
            TorchDispatchMode.__exit__(mode, None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def within(mode: TorchDispatchMode) -> Iterator[None]:
    """See the ops that an op calls, too: while one is handled, its mode is off."""
    torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001


@contextmanager
def without(mode: TorchDispatchMode) -> Iterator[None]:
    """Take a mode away that is the uppermost, until the end of the block."""
    torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001 - as TorchDispatchMode does
    try:
        yield
    finally:
        torch._C._push_on_torch_dispatch_stack(mode)  # noqa: SLF001


@contextmanager
def _staying(mode: TorchDispatchMode) -> Iterator[None]:
    """Leave the lowest mode on where all modes are switched off.

    ``_disable_current_modes`` (``torch/utils/_python_dispatch.py``, 2.11 to 2.14) pops as many
    modes as there are and pushes them again afterwards. This one is popped last, and put back.
    """
    pop, push = _python_dispatch._pop_mode, _python_dispatch._push_mode  # noqa: SLF001

    def popped(*args: Any) -> Any:
        found = pop(*args)
        if found is not mode:
            return found
        below = pop() if torch._C._len_torch_dispatch_stack() else mode  # noqa: SLF001
        push(mode)
        return below

    def pushed(other: Any) -> None:
        if other is not mode:
            push(other)

    with (
        mock.patch.object(_python_dispatch, "_pop_mode", popped),
        mock.patch.object(_python_dispatch, "_push_mode", pushed),
    ):
        yield
