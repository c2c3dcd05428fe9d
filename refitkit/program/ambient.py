"""What a caller has set torch to, and how refitkit keeps out of it.

Modes of torch change what tensors are: one that is made under inference mode can never be written
outside of it, one that is made under ``FakeTensorMode`` or on the device ``meta`` has no data. A
refit keeps tensors for later ones, so a mode of today would spoil the refits of tomorrow. Every
verb therefore runs as in a thread that has just started (:func:`plain`), where modes end.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from refitkit.errors import InputMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")

_SKIPPED = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
_FAKE = torch._C._TorchDispatchModeKey.FAKE  # noqa: SLF001 - there is no public name


class WatchingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A mode that stays on in verbs, for tests: it counts ops, or raises, and changes no result."""


def plain(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that runs as in a new thread of torch's, whatever modes its caller is in.

    Modes are back when it ends. Those are inference mode and ``no_grad``, autocast, default
    devices, ``FakeTensorMode`` and other modes of ops and functions, transforms of ``torch.func``,
    and tracing. Settings of the whole process, as the default dtype, are left alone: other threads
    have them, too.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return in_plain_state(partial(verb, *args, **kwargs))

    return untraced(run)


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which ``torch.compile`` runs as it is, with all that it calls.

    As ``torch.compiler.disable``, which imports its compiler at once; that takes seconds.
    """
    vars(function)["_torchdynamo_disable"] = True  # whoever calls it is compiled without it
    vars(function)["_torchdynamo_disable_msg"] = "refitkit works on real tensors"
    set_code_exec_strategy(function.__code__, _SKIPPED)  # and so is it, when it is called then
    return function


def in_plain_state(do: Callable[[], T]) -> T:
    """Do something as in a new thread of torch's; see ``plain``."""
    # objects of C, which an interrupt cannot keep from being left
    with torch._C._InferenceMode(False), torch._C._DisableAutocast():  # noqa: SLF001, FBT003
        if not _has_modes():
            return do()
        with ExitStack() as stack:
            for off in (_no_tracing, _no_transforms, _no_function_modes, _no_dispatch_modes):
                stack.enter_context(off())
            return do()


def require_data(what: str) -> None:
    """Refuse to compute where torch's ops give tensors without data.

    Args:
        what: What was to be computed.

    Raises:
        InputMismatchError: ``FakeTensorMode`` is on.
    """
    if torch._C._get_dispatch_mode(_FAKE) is not None:  # noqa: SLF001 - there is no public way
        raise InputMismatchError(
            f"{what} cannot compute under FakeTensorMode, where tensors have no data.",
            hint="Call it outside of the mode; torch.export and make_fx switch it on as well.",
        )


def why_not_real(value: torch.Tensor) -> str:
    """Why a tensor has no data of its own outside of the mode that made it; empty if it has."""
    if isinstance(value, FakeTensor):
        return "a fake tensor without data; make it outside of FakeTensorMode"
    if is_transformed(value):
        return "a tensor of a transform; pass the one from outside of torch.func's vmap, grad, ..."
    return ""


def is_transformed(value: torch.Tensor) -> bool:
    """Whether a tensor stands for another one inside of a transform of ``torch.func``."""
    found: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)  # noqa: SLF001
    return found


def _has_modes() -> bool:
    c = torch._C  # noqa: SLF001 - there are no public ways
    return bool(
        c._len_torch_function_stack()  # noqa: SLF001
        or c._len_torch_dispatch_stack()  # noqa: SLF001
        or torch._ops.mode_stack_state_for_pre_dispatch().count()  # type: ignore[no-untyped-call]  # noqa: SLF001
        or c._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or c._get_tracing_state() is not None  # noqa: SLF001
    )


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Default devices are such modes, too."""
    c = torch._C  # noqa: SLF001 - there is no public way
    modes = [c._get_function_stack_at(i) for i in range(c._len_torch_function_stack())]  # noqa: SLF001
    try:
        for _ in modes:
            c._pop_torch_function_stack()  # noqa: SLF001
        yield
    finally:
        for mode in modes[c._len_torch_function_stack() :]:  # noqa: SLF001
            c._push_on_torch_function_stack(mode)  # noqa: SLF001


@contextmanager
def _no_dispatch_modes() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch._C._DisablePythonDispatcher())  # noqa: SLF001
        for mode in reversed(stack.enter_context(_disable_current_modes())):
            if isinstance(mode, WatchingMode):
                stack.enter_context(mode)
        yield


@contextmanager
def _no_transforms() -> Iterator[None]:
    from torch._functorch.pyfunctorch import (  # noqa: PLC0415 - few need it
        temporarily_clear_interpreter_stack,
    )

    with temporarily_clear_interpreter_stack():
        yield


@contextmanager
def _no_tracing() -> Iterator[None]:
    """Without ``torch.jit.trace``, where sizes are tensors."""
    c: Any = torch._C  # noqa: SLF001 - there is no public way, and no stub of this one
    state = c._get_tracing_state()  # noqa: SLF001
    c._set_tracing_state(None)  # noqa: SLF001
    try:
        yield
    finally:
        c._set_tracing_state(state)  # noqa: SLF001
