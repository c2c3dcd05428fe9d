"""What a target holds: its engines and its parts that torch executes, by type and by structure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from refitkit.builtin.torch_tensorrt.children import (
    AttributeEngine,
    EngineLocation,
    ModuleEngine,
    PythonModuleEngine,
    is_engine,
    is_packed_engine,
    is_runtime_instance,
)
from refitkit.builtin.torch_tensorrt.settings import check_refittable, is_stripped, shared_settings
from refitkit.errors import Problem, UnsupportedTargetError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

Handle = ModuleEngine | PythonModuleEngine | AttributeEngine

REST = "_rest"
"""Name of the part with the state that lies in the target itself, in none of its children."""

_SUFFIX = "_engine"
_WRAPPERS = {
    "MutableTorchTensorRTModule": "gm",
    "CudaGraphsTorchTensorRTModule": "compiled_module",
}


@dataclass(frozen=True)
class Target:
    """A target that was understood. Understanding it changed nothing of it.

    Attributes:
        module: What is called.
        engines: All engines by name.
        torch_parts: What torch executes, by name of the child; ``REST`` for state of the target's
            own: all of it, where the program is inlined.
        settings: The ``CompilationSettings`` that all engines share.
        inlined: Whether the parts that torch executes are inlined, so that ``REST`` has their
            state.
        stripped: Whether the engines hold zeros until they are refitted in full.
        program: The program that the module was made from, where that is the target.
    """

    module: torch.nn.Module
    engines: Mapping[str, Handle]
    torch_parts: Mapping[str, torch.fx.GraphModule]
    settings: Any
    inlined: bool = False
    stripped: bool = False
    program: ExportedProgram | None = field(default=None, repr=False)


def inspect_target(target: object) -> Target | None:
    """Find out what a target is; None where there is no engine of Torch-TensorRT in it.

    Args:
        target: Anything. A program is unlifted; its engines and tensors stay the same objects.

    Raises:
        UnsupportedTargetError: Its engines cannot be used as they are, or do not agree.
        NotRefittableError: Its engines cannot take other weights.
    """
    _refuse_wrappers(target)
    if isinstance(target, ExportedProgram):
        return _understand_program(target)
    if isinstance(target, torch.nn.Module):
        return _understood(target, _find(target, {}), None)
    return None


def _understand_program(program: ExportedProgram) -> Target | None:
    packed = sorted(name for name, one in program.constants.items() if is_packed_engine(one))
    if packed:
        raise UnsupportedTargetError(
            "The program was saved with torch_tensorrt.save, which packs its engines away.",
            problems=[Problem(name, "packed") for name in packed],
            hint="Load the file that was saved.",
        )
    if not any(is_engine(one) for one in program.constants.values()):
        return None
    module = program.module()
    return _understood(module, _find(module, program.constants), program)


def inspect_module(module: torch.nn.Module, program: ExportedProgram | None) -> Target:
    """As ``inspect_target``, of what is known to hold engines.

    Args:
        module: What is called.
        program: The program whose engines and tensors it shares; None where there is none.

    Raises:
        UnsupportedTargetError: There are none.
    """
    constants = {} if program is None else program.constants
    target = _understood(module, _find(module, constants), program)
    if target is None:
        raise UnsupportedTargetError("There is no engine of Torch-TensorRT in the module.")
    return target


def _understood(
    module: torch.nn.Module, engines: dict[str, Handle], program: ExportedProgram | None
) -> Target | None:
    if not engines:
        return None
    settings = shared_settings({name: engine.settings for name, engine in engines.items()})
    for name in engines:
        check_refittable(settings, name)
    return Target(
        module=module,
        engines=engines,
        torch_parts=_torch_parts(module, engines),
        settings=settings,
        inlined=_is_inlined(module, engines),
        stripped=is_stripped(settings),
        program=program,
    )


def _refuse_wrappers(target: object) -> None:
    for name, attribute in _WRAPPERS.items():
        if is_runtime_instance(target, name):
            raise UnsupportedTargetError(
                f"A {name} keeps a state of its own beside its engines.",
                hint=f"Open the compiled module in it: its attribute {attribute!r}.",
            )
    if _is_child(target):
        raise UnsupportedTargetError(
            "This is one engine, not a compiled model.", hint="Open the module that it is part of."
        )


def _is_child(value: object) -> bool:
    return is_runtime_instance(value, "TorchTensorRTModule") or is_runtime_instance(
        value, "PythonTorchTensorRTModule"
    )


def _find(root: torch.nn.Module, constants: MutableMapping[str, Any]) -> dict[str, Handle]:
    """All engines, in the order of the module tree."""
    found: dict[str, Handle] = {}
    deep = []
    for path, module in root.named_modules():
        handles = _of_module(path, module, constants)
        deep += [handle.name for handle in handles if "." in handle.name]
        for handle in handles:
            if handle.name in found:
                raise UnsupportedTargetError(f"Two engines are called {handle.name!r}.")
            found[handle.name] = handle
    if deep:
        raise UnsupportedTargetError(
            "Engines lie deeper in the module than torch_tensorrt.compile puts them.",
            problems=[Problem(name, "nested") for name in deep],
            hint="Open the compiled module itself, not one that holds it.",
        )
    return found


def _of_module(
    path: str, module: torch.nn.Module, constants: MutableMapping[str, Any]
) -> list[Handle]:
    if is_runtime_instance(module, "TorchTensorRTModule"):
        return [ModuleEngine(path, _with_bytes(path, module))]
    if is_runtime_instance(module, "PythonTorchTensorRTModule"):
        return [PythonModuleEngine(path, _with_bytes(path, module))]
    attributes = {key: one for key, one in vars(module).items() if is_engine(one)}
    return [
        AttributeEngine(
            _name(path, key), [EngineLocation(vars(module), key), *_same(engine, constants)]
        )
        for key, engine in attributes.items()
    ]


def _with_bytes(name: str, child: torch.nn.Module) -> Any:
    if not getattr(child, "serialized_engine", None):
        raise UnsupportedTargetError(
            f"The child {name!r} holds no engine.",
            hint="Was a state_dict loaded into it? Load the whole module instead.",
        )
    return child


def _name(path: str, attribute: str) -> str:
    """``_run_on_acc_0`` for ``_run_on_acc_0_engine`` of the target and ``engine`` of a child."""
    if path and attribute == "engine":
        return path
    name = attribute.removesuffix(_SUFFIX)
    return f"{path}.{name}" if path else name


def _same(engine: Any, constants: MutableMapping[str, Any]) -> list[EngineLocation]:
    return [EngineLocation(constants, key) for key, one in constants.items() if one is engine]


def _torch_parts(
    root: torch.nn.Module, engines: Mapping[str, Handle]
) -> dict[str, torch.fx.GraphModule]:
    if _is_inlined(root, engines):  # the parts' state lies side by side
        names = _names(root)
        return {REST: _holder(root, names)} if names else {}
    parts = {
        name: _graph(child)
        for name, child in root.named_children()
        if name not in engines and _is_part(child)
    }
    own = [name for name in _names(root) if "." not in name]
    return {**parts, REST: _holder(root, own)} if own else parts


def _is_inlined(root: torch.nn.Module, engines: Mapping[str, Handle]) -> bool:
    return not engines.keys() & dict(root.named_children()).keys()


def _is_part(child: torch.nn.Module) -> bool:
    """Not so the ``GuardsFn`` that an export leaves: it has no graph and no state."""
    return isinstance(child, torch.fx.GraphModule) or bool(_names(child))


def _names(module: torch.nn.Module) -> list[str]:
    # a tied tensor has several names
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [*parameters, *dict(module.named_buffers(remove_duplicate=False))]


def _graph(child: torch.nn.Module) -> torch.fx.GraphModule:
    return child if isinstance(child, torch.fx.GraphModule) else _holder(child, _names(child))


def _holder(module: torch.nn.Module, names: Sequence[str]) -> torch.fx.GraphModule:
    """A module of the very tensors that another has under these names, and of nothing else."""
    graph = torch.fx.Graph()
    graph.output(tuple(graph.get_attr(name) for name in names))
    return torch.fx.GraphModule(module, graph)
