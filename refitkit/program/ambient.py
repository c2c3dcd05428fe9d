"""Isolation from settings of torch that the caller has made: modes and the default dtype.

Modes change the tensors that torch creates. A tensor that was created under inference mode cannot
be written outside of it. One that was created under ``FakeTensorMode`` or on the device ``meta``
has no data. A refit keeps tensors for later refits, so a mode of one refit would break the next.
Therefore every verb runs without the caller's modes, as in a new thread: see :func:`verb` and
:func:`plain`.

The default dtype belongs to the whole process, so a verb cannot change it for itself.
:func:`keep_default_dtype` makes a graph independent of it instead.
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
_FAKE = torch._C._TorchDispatchModeKey.FAKE  # noqa: SLF001 - no public name


class WatchingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A dispatch mode that verbs keep on, for tests: it observes ops or raises errors."""


def plain(verb: Callable[P, T]) -> Callable[P, T]:
    """Return the function, wrapped to run without the modes of its caller.

    The modes are inference mode and ``no_grad``, autocast, default devices, ``FakeTensorMode`` and
    other dispatch and function modes, transforms of ``torch.func``, and ``torch.jit.trace``. They
    are restored when the function ends. ``torch.compile`` does not trace it. Settings of the whole
    process, such as the default dtype, stay: other threads use them too.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return in_plain_state(partial(verb, *args, **kwargs))

    return untraced(run)


def verb(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return the decorator of functions that users call: ``plain``, with ``ResourceError``.

    Args:
        what: Description of the failure, if the system refuses a resource; see
            ``refitkit.errors.resources``.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        # resources() is outermost, because restoring the modes can run out of memory too
        return resources(what)(plain(function))

    return decorate


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Return the same function, marked so that ``torch.compile`` never traces it or its callees."""
    # torch.compiler.disable does the same, but imports the compiler at once, which takes seconds.
    # The attributes break the graph in a compiled caller; the strategy skips the function itself.
    vars(function)["_torchdynamo_disable"] = True
    vars(function)["_torchdynamo_disable_msg"] = "refitkit works on real tensors"
    set_code_exec_strategy(function.__code__, _SKIPPED)
    return function


def in_plain_state(do: Callable[[], T]) -> T:
    """Call a function without the modes of the caller, and return its result; see ``plain``."""
    c = torch._C  # noqa: SLF001 - no public API
    with c._InferenceMode(False), c._DisableAutocast():  # noqa: SLF001, FBT003
        if not _has_modes():
            return do()
        with c._DisablePythonDispatcher():  # noqa: SLF001
            for off in (_no_dispatch_modes, _no_function_modes, _no_transforms, _no_tracing):
                do = partial(off, do)
            return do()


def require_data(what: str) -> None:
    """Check that ops of torch return tensors with data.

    Args:
        what: Name of the object that would compute, for the message.

    Raises:
        InputMismatchError: ``FakeTensorMode`` is on.
    """
    if torch._C._get_dispatch_mode(_FAKE) is not None:  # noqa: SLF001 - no public API
        raise InputMismatchError(
            f"{what} cannot compute under FakeTensorMode, because fake tensors have no data.",
            hint="Call it outside of the mode. torch.export and make_fx switch the mode on too.",
        )


def why_not_real(value: torch.Tensor) -> str:
    """Return why a tensor has no data outside of the mode that created it; empty if it has."""
    if isinstance(value, FakeTensor):
        return "a fake tensor without data; create it outside of FakeTensorMode"
    if is_transformed(value):
        return "a tensor inside vmap, grad or another transform of torch.func; pass the outer one"
    return ""


def is_transformed(value: torch.Tensor) -> bool:
    """Return whether a tensor is a wrapper inside a transform of ``torch.func``."""
    found: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)  # noqa: SLF001
    return found


# -- switching modes off ----------------------------------------------------------------------

# Each function below pops a mode with one C call inside ``try`` and pushes it with another one in
# ``finally``. Ctrl-C arrives before or after a C call, never within it. A context manager would run
# Python code in between, where Ctrl-C could lose the mode. So the functions call each other.


def _has_modes() -> bool:
    c = torch._C  # noqa: SLF001 - no public API
    return bool(
        c._len_torch_function_stack()  # noqa: SLF001
        or c._len_torch_dispatch_stack()  # noqa: SLF001
        or _has_early_modes()
        or c._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or c._get_tracing_state() is not None  # noqa: SLF001
    )


def _has_early_modes() -> bool:
    """Return whether there are pre-dispatch modes, which ``torch.export`` uses."""
    state: Any = torch._ops.mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]  # noqa: SLF001
    return bool(state.count())


def _no_function_modes(do: Callable[[], T]) -> T:
    """Call without function modes; a default device is one of them."""
    c = torch._C  # noqa: SLF001 - no public API
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
    """Call without dispatch modes, except for those that watch."""
    if _has_early_modes():
        with _disable_current_modes():
            return do()
    return _pop_dispatch_modes(do, ())


def _pop_dispatch_modes(do: Callable[[], T], watching: tuple[TorchDispatchMode, ...]) -> T:
    """Pop one mode, recurse, and push the mode again.

    Args:
        do: Function to call once all modes are popped.
        watching: Modes of type :class:`WatchingMode` that were popped so far, the outermost first.
    """
    c: Any = torch._C  # noqa: SLF001 - no public API
    depth = c._len_torch_dispatch_stack()  # noqa: SLF001
    if not depth:
        return _push_dispatch_modes(watching, do)
    # modes of torch itself are not on the stack: each has a slot, and is popped by its key
    key = next((key for key in _KEYS if c._get_dispatch_mode(key) is not None), None)  # noqa: SLF001
    mode = c._get_dispatch_stack_at(depth - 1) if key is None else c._get_dispatch_mode(key)  # noqa: SLF001
    if isinstance(mode, WatchingMode):
        watching = (mode, *watching)
    try:
        c._pop_torch_dispatch_stack(key)  # noqa: SLF001
        found = _pop_dispatch_modes(do, watching)
    finally:
        c._push_on_torch_dispatch_stack(mode)  # noqa: SLF001
    return found


def _push_dispatch_modes(modes: tuple[TorchDispatchMode, ...], do: Callable[[], T]) -> T:
    """Push these modes, call, and pop them again."""
    if not modes:
        return do()
    try:
        torch._C._push_on_torch_dispatch_stack(modes[0])  # noqa: SLF001
        found = _push_dispatch_modes(modes[1:], do)
    finally:
        torch._C._pop_torch_dispatch_stack(None)  # noqa: SLF001
    return found


def _no_transforms(do: Callable[[], T]) -> T:
    """Call without transforms of ``torch.func``."""
    if torch._C._functorch.peek_interpreter_stack() is None:  # noqa: SLF001
        return do()
    from torch._functorch import pyfunctorch  # noqa: PLC0415 - its import is slow, and few need it

    with pyfunctorch.temporarily_clear_interpreter_stack():
        return do()


def _no_tracing(do: Callable[[], T]) -> T:
    """Call without ``torch.jit.trace``, under which sizes are tensors."""
    c: Any = torch._C  # noqa: SLF001 - no public API
    state = c._get_tracing_state()  # noqa: SLF001
    try:
        c._set_tracing_state(None)  # noqa: SLF001
        found = do()
    finally:
        c._set_tracing_state(state)  # noqa: SLF001
    return found


# -- the default dtype ------------------------------------------------------------------------

_WHERE = torch.ops.aten.where


def keep_default_dtype(module: torch.fx.GraphModule) -> None:
    """Change a graph so that all results have the dtypes of the export with any default dtype.

    The results of ``torch.ones(3)`` and of the quotient of two integers have the default dtype. An
    exported graph does not contain it, so it would compute in the default of the running process.

    Args:
        module: Graph of an exported program, with ``meta["val"]`` at its nodes. It is changed in
            place, submodules included.
    """
    for one in module.modules():
        if isinstance(one, torch.fx.GraphModule):
            nodes = [node for node in one.graph.nodes if _has_default_dtype(node)]
            for node in nodes:
                _fix_dtype(node)
            if nodes:
                one.recompile()


def _has_default_dtype(node: torch.fx.Node) -> bool:
    """Return whether a node has a floating result whose dtype no operand or argument decides."""
    if not isinstance(node.target, OpOverload) or not _is_fractional(node):
        return False
    if any(map(_is_fractional, node.all_input_nodes)):
        return False
    return _argument(node, "dtype") is None


def _is_fractional(node: torch.fx.Node) -> bool:
    """Return whether a node has a result of a floating point or complex dtype."""
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    tensors = [one for one in several if isinstance(one, torch.Tensor)]
    return any(one.is_floating_point() or one.is_complex() for one in tensors)


def _argument(node: torch.fx.Node, name: str) -> Any:
    """Return the value of a schema argument, passed by position or by name; else None."""
    places = {a.name: place for place, a in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]  # noqa: SLF001
    place = places.get(name, len(node.args))
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _fix_dtype(node: torch.fx.Node) -> None:
    """Write the dtype of the export into a node, or cast its operands to it."""
    dtype = node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else None
    op = node.target
    if dtype is None or not isinstance(op, OpOverload):
        return
    if any(argument.name == "dtype" for argument in op._schema.arguments):  # noqa: SLF001
        node.kwargs = {**node.kwargs, "dtype": dtype}
    elif op is _WHERE.Scalar:
        condition, *numbers = node.args
        # where.Scalar has no dtype argument, so where.self gets tensors in place of the numbers
        tensors = [_inserted(node, torch.ops.aten.scalar_tensor.default, n, dtype) for n in numbers]
        node.target, node.args = _WHERE.self, (condition, *tensors)
    elif torch.Tag.pointwise in op.tags:  # pointwise ops compute in the dtype of their operands
        for operand in node.all_input_nodes:
            if isinstance(operand.meta.get("val"), torch.Tensor):
                cast = _inserted(node, torch.ops.aten._to_copy.default, operand, dtype)  # noqa: SLF001
                node.replace_input_with(operand, cast)


def _inserted(before: torch.fx.Node, op: OpOverload, value: Any, dtype: torch.dtype) -> Any:
    """Insert a call ``op(value, dtype=dtype)`` before a node, and return the new node."""
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, (value,), {"dtype": dtype})
