"""A replacement for ``torch_tensorrt.dynamo.refit_module_weights``, with refitkit's checks.

Change one import::

    from refitkit.compat import refit_module_weights

docs/explanation/differences.md lists all differences from upstream's function. The most important
ones: weights are never matched by guessing, and a failure raises and leaves the module unchanged. A
module keeps its plan, so later refits do not lower the program again. A module that is refitted in
place also keeps its refitter, so later refits do not build anything either.

The function has no handle to return, so the handle is stored on the module: see ``_compiled_of``.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, ToolchainError, UnsupportedTargetError, raised_as
from refitkit.pipeline import Pipeline
from refitkit.program.ambient import verb

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from refitkit.pipeline import CompiledModule

_HANDLE = "_refitkit_handle"
_NO_CACHE = (2, 13)  # first version of torch_tensorrt without the weight map cache
_NOT_IMPORTABLE = "torch_tensorrt cannot be imported"
_GPU_HINT = "It needs a GPU; the backend 'tensorrt_network' plans and builds without one."
# The strategy name-map reads the weight map that upstream caches in the module.
_WITH_CACHE = ("recipe", "name-map", "rebuild")
_WITHOUT_CACHE = ("recipe", "rebuild")


@verb("The module cannot be refitted")
def refit_module_weights(*args: Any, **kwargs: Any) -> Any:
    """Put the weights of a program into a compiled module.

    The arguments are those of the installed version of ``torch_tensorrt``, in the same order:

    * ``compiled_module``: result of ``torch_tensorrt.dynamo.compile``, or a program with engines;
    * ``new_weight_module``: ``ExportedProgram`` with the new weights;
    * ``arg_inputs``, ``kwarg_inputs``: inputs for the verification;
    * ``verify_output``: whether to compare all outputs with the program's;
    * ``use_weight_map_cache`` (2.11 and 2.12): whether the cached weight map may provide values;
    * ``in_place``: whether to refit this module instead of a copy.

    Returns:
        The refitted module: ``compiled_module`` itself if ``in_place``, else a copy.

    Raises:
        ToolchainError: torch_tensorrt cannot be imported.
        TypeError: The arguments are not those of the installed version.
        UnsupportedTargetError: The module holds no engine, or the new weights are not a program.
        PlanMismatchError: The program belongs to another model.
        VerificationError: Outputs differ; a module that was refitted in place has its old weights.
        RefitError: Any other reason; the module answers as before.
    """
    with raised_as(ToolchainError, _NOT_IMPORTABLE, hint=_GPU_HINT):
        signature = _signature()
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return _refit(**bound.arguments)


def _signature() -> inspect.Signature:
    """The signature of the installed version: 2.13 removed the cache and its argument."""
    import torch_tensorrt  # noqa: PLC0415 - a caller with a compiled module has imported it

    ours = inspect.signature(_refit)
    major, minor = map(int, torch_tensorrt.__version__.split(".")[:2])
    if (major, minor) < _NO_CACHE:
        return ours
    left = [one for name, one in ours.parameters.items() if name != "use_weight_map_cache"]
    return ours.replace(parameters=left)


# Names, order and defaults are those of upstream's function, because callers pass some arguments
# by position. ``_signature`` removes the one that later versions lack.
def _refit(
    compiled_module: Any,
    new_weight_module: ExportedProgram,
    arg_inputs: Any = None,
    kwarg_inputs: Any = None,
    verify_output: bool = False,  # noqa: FBT001, FBT002 - the reference's
    use_weight_map_cache: bool = True,  # noqa: FBT001, FBT002
    in_place: bool = False,  # noqa: FBT001, FBT002
) -> Any:
    _check_program(new_weight_module)
    strategies = _WITH_CACHE if use_weight_map_cache else _WITHOUT_CACHE
    # The caller gets no handle with ``undo`` or ``restore``, so copies of old weights are useless.
    pipeline = Pipeline({"strategies": strategies, "keep_base": False, "keep_versions": 0})
    compiled = _compiled_of(pipeline, compiled_module)
    plan = _plan(pipeline, compiled, new_weight_module)
    if not in_place:
        compiled = pipeline.copy(compiled)
    inputs = _inputs(arg_inputs, kwarg_inputs) if verify_output else None
    pipeline.refit(
        compiled,
        new_weight_module,
        plan=plan,
        inputs=inputs,
        reference=None if inputs is None else new_weight_module.module(check_guards=False),
        verify="none" if inputs is None else "outputs",
    )
    opened: Any = compiled.opened
    return opened.module


def _check_program(program: object) -> None:
    from torch.export import ExportedProgram  # noqa: PLC0415 - imports torch

    if not isinstance(program, ExportedProgram):
        raise UnsupportedTargetError(
            f"The new weights are a {type(program).__name__}, not an ExportedProgram.",
            hint="Pass torch.export.export(model, inputs), or use refitkit.refit, which takes "
            "state_dicts, modules and files.",
        )


class _ModuleHandle:
    """The ``CompiledModule`` of a module, stored on it.

    Copying or pickling the module leaves the handle empty, because it belongs to the original.
    """

    def __init__(self, compiled: CompiledModule | None = None) -> None:
        self.compiled = compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModuleHandle:
        return _ModuleHandle()

    def __reduce__(self) -> tuple[type[_ModuleHandle], tuple[()]]:
        return _ModuleHandle, ()


def _compiled_of(pipeline: Pipeline, module: Any) -> CompiledModule:
    """The module's ``CompiledModule``, the same for each refit, because it keeps the refitter."""
    handle = vars(module).get(_HANDLE) if hasattr(module, "__dict__") else None
    if isinstance(handle, _ModuleHandle) and handle.compiled is not None:
        return handle.compiled
    compiled = pipeline.load(module)
    vars(module)[_HANDLE] = _ModuleHandle(compiled)
    return compiled


def _plan(pipeline: Pipeline, compiled: CompiledModule, program: ExportedProgram) -> Any:
    """The plan that the module keeps, or a new one if it has none for this graph.

    If ``REFITKIT_PLAN_CACHE`` is set, other modules and processes can use the new plan.
    """
    from refitkit.program import facts_of  # noqa: PLC0415 - imports torch

    known = compiled.plan
    if known is not None and known.data.fingerprint.graph == facts_of(program).graph:
        return known
    # A proof would refit a copy of the module, which upstream's callers do not expect to pay for.
    return pipeline.plan(program, compiled, prove=False)


def _inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs as tensors on the GPU; None, with a warning, if there are no ``arg_inputs``.

    Upstream skips the verification in this case, too.
    """
    if args is None or (isinstance(args, list | tuple) and not args):
        # The stack level is that of the caller of refit_module_weights.
        warnings.warn(
            "verify_output without arg_inputs: nothing is verified.", UserWarning, stacklevel=6
        )
        return None
    from torch.utils import _pytree as pytree  # noqa: PLC0415 - imports torch

    given = tuple(args) if isinstance(args, list | tuple) else (args,)
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        _on_gpu, (given, dict(kwargs or {}))
    )
    return moved


def _on_gpu(value: Any) -> Any:
    import torch  # noqa: PLC0415

    # Callers may pass tensors on the CPU.
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if type(value).__module__.partition(".")[0] == "torch_tensorrt":
        raise ConfigError(
            "Outputs can be verified with tensors, but not with torch_tensorrt.Input.",
            hint="Pass the tensors that the model was exported with.",
        )
    return value


def to_python_runtime(module: Any) -> Any:
    """Move a compiled module's engines to the Python runtime, which refits them in place.

    Use it if you refit often. For each refit, the C++ runtime serializes and deserializes the
    engine, which takes hundreds of milliseconds; the Python runtime takes milliseconds. Only
    torch_tensorrt 2.11 and 2.12 have both runtimes. Later versions choose one at import.

    Args:
        module: Result of ``torch_tensorrt.dynamo.compile``; changed in place. If it was opened with
            ``refitkit.load`` before, open it again.

    Returns:
        The same module.

    Raises:
        ToolchainError: torch_tensorrt cannot be imported.
        UnsupportedTargetError: This version has only one runtime, or the module has no engine in
            the C++ runtime.
    """
    with raised_as(ToolchainError, _NOT_IMPORTABLE, hint=_GPU_HINT):
        from torch_tensorrt.dynamo import runtime  # noqa: PLC0415 - imported with the module

    kind = getattr(runtime, "PythonTorchTensorRTModule", None)
    if kind is None:
        raise UnsupportedTargetError(
            "This version of torch_tensorrt has only one runtime, chosen at import.",
            hint="torch_tensorrt uses the Python runtime if its C++ library is not installed.",
        )
    children = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, runtime.TorchTensorRTModule)
    }
    if not children:
        raise UnsupportedTargetError("The module has no engine in the C++ runtime.")
    # Convert all children first, so that a failure leaves the module unchanged.
    converted = {name: _in_python_runtime(child, kind) for name, child in children.items()}
    for name, child in converted.items():
        setattr(module, name, child)
    return module


def _in_python_runtime(child: Any, kind: Any) -> Any:
    names = ("name", "settings", "weight_name_map", "requires_output_allocator")
    optional = ("symbolic_shape_expressions",)
    given = {name: getattr(child, name) for name in (*names, *optional) if hasattr(child, name)}
    converted = kind(
        child.serialized_engine, child.input_binding_names, child.output_binding_names, **given
    )
    if child.engine is not None:
        converted.set_output_tensors_as_unowned(child.are_output_tensors_unowned())
    return converted
