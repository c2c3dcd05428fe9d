"""``torch_tensorrt.dynamo.refit_module_weights`` with refitkit's checks: change one import.

::

    from refitkit.compat import refit_module_weights

What differs from the reference is listed in docs/explanation/differences.md: nothing is guessed,
a failure raises and leaves the module as it was, the plan of a module is kept, so that its later
refits lower nothing, and the refitter of one that is refitted in place, so that they do not compile
anything either.
"""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, ToolchainError, UnsupportedTargetError, raised_as
from refitkit.pipeline import Pipeline
from refitkit.program.ambient import plain

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from refitkit.pipeline import CompiledModule

_HANDLE = "_refitkit_handle"
_NO_CACHE = (2, 13)
_NEEDS = "torch_tensorrt cannot be imported"
_WITHOUT = "It needs a GPU; without one the backend 'tensorrt_network' plans and builds."
_WITH_CACHE = ("recipe", "name-map", "rebuild")
_WITHOUT_CACHE = ("recipe", "rebuild")


@plain
def refit_module_weights(*args: Any, **kwargs: Any) -> Any:
    """Put the weights of a program into a compiled module.

    Arguments are those of the installed version of ``torch_tensorrt``, and bind as there:

    * ``compiled_module``: what ``torch_tensorrt.dynamo.compile`` gave, or a program with engines;
    * ``new_weight_module``: an ``ExportedProgram`` with the new weights;
    * ``arg_inputs``, ``kwarg_inputs``: inputs for the verification;
    * ``verify_output``: whether to compare all outputs with the program's;
    * ``use_weight_map_cache`` (2.11 and 2.12): whether the cached map may serve slots;
    * ``in_place``: whether to refit this module, not a copy.

    Returns:
        The refitted module: a copy, unless ``in_place``.

    Raises:
        ToolchainError: torch_tensorrt cannot be imported.
        TypeError: The arguments are not those of the installed version.
        UnsupportedTargetError: The module holds no engine, or the weights are no program.
        PlanMismatchError: The program is of another model.
        VerificationError: Outputs differ; a module that was refitted in place has its old weights.
        RefitError: Any other reason; the module answers as before.
    """
    with raised_as(ToolchainError, _NEEDS, hint=_WITHOUT):
        signature = _signature()
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return _refit(**bound.arguments)


def _signature() -> inspect.Signature:
    """The installed version's: 2.13 dropped the cache, and its argument in the middle."""
    import torch_tensorrt  # noqa: PLC0415 - whoever has a compiled module has it

    ours = inspect.signature(_refit)
    major, minor = map(int, torch_tensorrt.__version__.split(".")[:2])
    if (major, minor) < _NO_CACHE:
        return ours
    left = [one for name, one in ours.parameters.items() if name != "use_weight_map_cache"]
    return ours.replace(parameters=left)


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
    # nobody has a handle to go back with
    pipeline = Pipeline({"strategies": strategies, "keep_base": False, "keep_versions": 0})
    compiled = _opened(pipeline, compiled_module)
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
            f"The new weights are a {type(program).__name__}, no ExportedProgram.",
            hint="Pass torch.export.export(model, inputs), or use refitkit.refit, which takes "
            "state_dicts, modules and files.",
        )


class _Handle:
    """What is known of a module that was refitted; copies of the module have none."""

    def __init__(self, compiled: CompiledModule | None = None) -> None:
        self.compiled = compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle()

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


def _opened(pipeline: Pipeline, module: Any) -> CompiledModule:
    """The module's handle, the same for every refit: it keeps the refitter."""
    handle = vars(module).get(_HANDLE) if hasattr(module, "__dict__") else None
    if isinstance(handle, _Handle) and handle.compiled is not None:
        return handle.compiled
    compiled = pipeline.load(module)
    vars(module)[_HANDLE] = _Handle(compiled)
    return compiled


def _plan(pipeline: Pipeline, compiled: CompiledModule, program: ExportedProgram) -> Any:
    """The plan of the module, which it keeps: its later refits plan nothing.

    With ``REFITKIT_PLAN_CACHE`` other modules and processes find it, too.
    """
    from refitkit.program import facts_of  # noqa: PLC0415 - imports torch

    known = compiled.plan
    if known is not None and known.data.fingerprint.graph == facts_of(program).graph:
        return known
    return pipeline.plan(program, compiled, prove=False)


def _inputs(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs as tensors on the GPU; None, with a warning, where the reference skips verifying."""
    if args is None or (isinstance(args, list | tuple) and not args):
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

    if isinstance(value, torch.Tensor):
        return value.cuda()
    if type(value).__module__.partition(".")[0] == "torch_tensorrt":
        raise ConfigError(
            "Outputs are verified on tensors, not on torch_tensorrt.Input.",
            hint="Pass the tensors that the model was exported with.",
        )
    return value


def to_python_runtime(module: Any) -> Any:
    """A compiled module's engines in the Python runtime, which refits them where they are.

    For those who refit often: the C++ runtime serializes and deserializes an engine at each refit,
    which takes hundreds of milliseconds, the Python runtime takes milliseconds. Only torch_tensorrt
    2.11 and 2.12 have both; later ones choose one when they are imported.

    Args:
        module: What ``torch_tensorrt.dynamo.compile`` gave; changed in place. A module that was
            opened with ``refitkit.load`` before has to be opened again.

    Returns:
        The same module.

    Raises:
        UnsupportedTargetError: This version has one runtime, or the module has no engine in the
            C++ runtime.
    """
    with raised_as(ToolchainError, _NEEDS, hint=_WITHOUT):
        from torch_tensorrt.dynamo import runtime  # noqa: PLC0415 - whoever has a module has it

    kind = getattr(runtime, "PythonTorchTensorRTModule", None)
    if kind is None:
        raise UnsupportedTargetError(
            "This version of torch_tensorrt has one runtime, chosen when it is imported.",
            hint="torch_tensorrt uses the Python runtime where its C++ library is not installed.",
        )
    children = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, runtime.TorchTensorRTModule)
    }
    if not children:
        raise UnsupportedTargetError("The module has no engine in the C++ runtime.")
    made = {name: _in_python(child, kind) for name, child in children.items()}
    for name, child in made.items():
        setattr(module, name, child)
    return module


def _in_python(child: Any, kind: Any) -> Any:
    names = ("name", "settings", "weight_name_map", "requires_output_allocator")
    optional = ("symbolic_shape_expressions",)
    given = {name: getattr(child, name) for name in (*names, *optional) if hasattr(child, name)}
    made = kind(
        child.serialized_engine, child.input_binding_names, child.output_binding_names, **given
    )
    if child.engine is not None:
        made.set_output_tensors_as_unowned(child.are_output_tensors_unowned())
    return made
