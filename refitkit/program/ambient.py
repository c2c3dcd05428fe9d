"""What a caller has set torch to, and how refitkit keeps out of it.

Modes of torch change what tensors are: one that is made under inference mode can never be written
outside of it, one that is made under ``FakeTensorMode`` or on the device ``meta`` has no data. A
refit keeps tensors for later ones, so a mode of today would spoil the refits of tomorrow. Every
verb therefore runs as in a thread that has just started (:func:`plain`), where modes end.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from refitkit.errors import InputMismatchError, resources

if TYPE_CHECKING:
    from collections.abc import Callable


P = ParamSpec("P")
T = TypeVar("T")

_SKIPPED = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
_KEYS = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # noqa: SLF001
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


def verb(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A verb of users: in plain state, and what the system refuses is a ``ResourceError``.

    Args:
        what: What cannot be done then; see ``refitkit.errors.resources``.
    """

    def made(function: Callable[P, T]) -> Callable[P, T]:
        return resources(what)(plain(function))  # memory can also be short where modes are left

    return made


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
    c = torch._C  # noqa: SLF001 - there are no public ways
    with c._InferenceMode(False), c._DisableAutocast():  # noqa: SLF001, FBT003
        if not _has_modes():
            return do()
        with c._DisablePythonDispatcher():  # noqa: SLF001
            for off in (_no_dispatch_modes, _no_function_modes, _no_transforms, _no_tracing):
                do = partial(off, do)
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


# What follows takes modes off by one call of C each, behind ``try``, and puts them back by another:
# an interrupt comes before or after a call. So there are functions, and no context managers.


def _has_modes() -> bool:
    c = torch._C  # noqa: SLF001 - there are no public ways
    return bool(
        c._len_torch_function_stack()  # noqa: SLF001
        or c._len_torch_dispatch_stack()  # noqa: SLF001
        or _has_early_modes()
        or c._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or c._get_tracing_state() is not None  # noqa: SLF001
    )


def _has_early_modes() -> bool:
    """Whether there are modes before dispatch, as exports have."""
    state: Any = torch._ops.mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]  # noqa: SLF001
    return bool(state.count())


def _no_function_modes(do: Callable[[], T]) -> T:
    """Default devices are such modes, too."""
    c = torch._C  # noqa: SLF001 - there is no public way
    depth = c._len_torch_function_stack()  # noqa: SLF001
    if not depth:
        return do()
    mode = c._get_function_stack_at(depth - 1)  # noqa: SLF001
    try:
        c._pop_torch_function_stack()  # noqa: SLF001
        found = _no_function_modes(do)
    finally:
        c._push_on_torch_function_stack(mode)  # noqa: SLF001
    return found


def _no_dispatch_modes(do: Callable[[], T]) -> T:
    if _has_early_modes():
        with _disable_current_modes():
            return do()
    return _only(do, ())


def _only(do: Callable[[], T], watching: tuple[TorchDispatchMode, ...]) -> T:
    """Without the modes that are on, but with these, and those that watch."""
    c: Any = torch._C  # noqa: SLF001 - there is no public way
    depth = c._len_torch_dispatch_stack()  # noqa: SLF001
    if not depth:
        return _on(watching, do)
    # modes of torch's own have places of their own, and are popped by their keys
    key = next((key for key in _KEYS if c._get_dispatch_mode(key) is not None), None)  # noqa: SLF001
    mode = c._get_dispatch_stack_at(depth - 1) if key is None else c._get_dispatch_mode(key)  # noqa: SLF001
    if isinstance(mode, WatchingMode):
        watching = (mode, *watching)
    try:
        c._pop_torch_dispatch_stack(key)  # noqa: SLF001
        found = _only(do, watching)
    finally:
        c._push_on_torch_dispatch_stack(mode)  # noqa: SLF001
    return found


def _on(modes: tuple[TorchDispatchMode, ...], do: Callable[[], T]) -> T:
    if not modes:
        return do()
    try:
        torch._C._push_on_torch_dispatch_stack(modes[0])  # noqa: SLF001
        found = _on(modes[1:], do)
    finally:
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001
    return found


def _no_transforms(do: Callable[[], T]) -> T:
    if torch._C._functorch.peek_interpreter_stack() is None:  # noqa: SLF001
        return do()
    from torch._functorch import pyfunctorch  # noqa: PLC0415 - few need it

    with pyfunctorch.temporarily_clear_interpreter_stack():
        return do()


def _no_tracing(do: Callable[[], T]) -> T:
    """Without ``torch.jit.trace``, where sizes are tensors."""
    c: Any = torch._C  # noqa: SLF001 - there is no public way
    state = c._get_tracing_state()  # noqa: SLF001
    try:
        c._set_tracing_state(None)  # noqa: SLF001
        found = do()
    finally:
        c._set_tracing_state(state)  # noqa: SLF001
    return found


# MERGED default_dtype: Ops whose results have torch's default dtype, and how a graph keeps the
# one of its export.
#
# ``torch.ones(3)`` and the quotient of two integers have the default dtype. Exported graphs leave
# it out, so they would compute in whatever the process has set when they run. That cannot be
# changed for one thread: other threads would get it, too.

_WHERE = torch.ops.aten.where


def keep_default_dtype(module: torch.fx.GraphModule) -> None:
    """Have all ops of a graph give the dtypes that they had in the export, whatever is set.

    Args:
        module: From an exported program, with the values of its export (``meta["val"]``). Changed.
    """
    for one in module.modules():
        if isinstance(one, torch.fx.GraphModule):
            nodes = [node for node in one.graph.nodes if _has_default_dtype(node)]
            for node in nodes:
                _keep(node)
            if nodes:
                one.recompile()


def _has_default_dtype(node: torch.fx.Node) -> bool:
    """Whether a node gives fractions, and neither operands nor arguments say in which dtype."""
    if not isinstance(node.target, OpOverload) or not _is_fractional(node):
        return False
    if any(map(_is_fractional, node.all_input_nodes)):
        return False
    return _argument(node, "dtype") is None


def _is_fractional(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    tensors = [one for one in several if isinstance(one, torch.Tensor)]
    return any(one.is_floating_point() or one.is_complex() for one in tensors)


def _argument(node: torch.fx.Node, name: str) -> Any:
    places = {a.name: place for place, a in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]  # noqa: SLF001
    place = places.get(name, len(node.args))
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _keep(node: torch.fx.Node) -> None:
    dtype = node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else None
    op = node.target
    if dtype is None or not isinstance(op, OpOverload):
        return
    if any(argument.name == "dtype" for argument in op._schema.arguments):  # noqa: SLF001
        node.kwargs = {**node.kwargs, "dtype": dtype}
    elif op is _WHERE.Scalar:
        condition, *numbers = node.args
        made = [_inserted(node, torch.ops.aten.scalar_tensor.default, n, dtype) for n in numbers]
        node.target, node.args = _WHERE.self, (condition, *made)
    elif torch.Tag.pointwise in op.tags:  # which computes in the dtype of its operands
        for operand in node.all_input_nodes:
            if isinstance(operand.meta.get("val"), torch.Tensor):
                cast = _inserted(node, torch.ops.aten._to_copy.default, operand, dtype)  # noqa: SLF001
                node.replace_input_with(operand, cast)


def _inserted(before: torch.fx.Node, op: OpOverload, value: Any, dtype: torch.dtype) -> Any:
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, (value,), {"dtype": dtype})
