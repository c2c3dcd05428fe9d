"""Compile a program with AOTInductor into an opened module.

Inductor folds, inlines and renames weights unless options and the graph module prevent it. The
module hides both: ``compile_program`` runs inductor on a prepared copy of the program's module, and
``merged_options`` adds the options that refits rely on. Loading and refitting need none of this.
"""

from __future__ import annotations

import os
import platform
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor as inductor

from refitkit.builtin.aotinductor import container
from refitkit.builtin.aotinductor.container import can_fill
from refitkit.builtin.aotinductor.inputs import spec_of
from refitkit.builtin.aotinductor.module import AOTInductorModule, EngineFiles, engine_on
from refitkit.errors import (
    CompileError,
    ConfigError,
    NotRefittableError,
    Problem,
    RefitError,
    ToolchainError,
    raise_if_resource,
)
from refitkit.files.temporary import TemporaryFolder
from refitkit.model import LeafKind
from refitkit.program import facts_of
from refitkit.program.ambient import keep_default_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.export import ExportedProgram

    from refitkit.program import ProgramFacts


_NOT_NEEDED = {".cpp", ".blob", ".o"}


def compile_program(program: ExportedProgram, chosen: Mapping[str, Any]) -> AOTInductorModule:
    """Compile a program; see ``AOTInductorBackend.compile``.

    Args:
        program: Program to compile. It is not changed.
        chosen: Options of the user.
    """
    # Everything that can be refused is checked before inductor runs for minutes.
    configured = merged_options(chosen)
    require_toolchain()
    call = spec_of(program)
    written = [Path(file) for file in _run_inductor(program, configured)]
    folder = TemporaryFolder()
    for file in written:
        if file.suffix not in _NOT_NEEDED:
            shutil.copyfile(file, folder.path / file.name)
    library = _library_in(written)
    device = _device_of(program)
    if device != "cpu":  # see the hint of ``try_in_child`` for what makes a library crash
        container.try_in_child(folder.path / library.name, device)
    runner = container.open_container(folder.path / library.name, device)
    blob = next((file for file in written if file.suffix == ".blob"), None)
    if blob is not None:
        with blob.open("rb") as written_weights:
            container.fill_from_blob(runner, partial(shutil.copyfileobj, written_weights))
    mutable = frozenset(leaf.fqn for leaf in facts_of(program).leaves if leaf.mutated)
    files = EngineFiles(
        folder=folder,
        library=library.name,
        device=device,
        weights_beside=blob is not None,
        call=call,
        mutable=mutable,
        versions=versions(),
        settings={name: repr(value) for name, value in sorted(configured.items())},
    )
    engine = engine_on(runner, folder.path / library.name, device, mutable)
    return AOTInductorModule(files, engine, {})


def versions() -> dict[str, str]:
    """Return the versions of the software that compiles an engine here, by package."""
    return {"torch": str(torch.__version__), "python": platform.python_version()}


def _run_inductor(program: ExportedProgram, configured: Mapping[str, Any]) -> Sequence[str]:
    """Return the paths of the files that inductor wrote.

    Raises:
        CompileError: The program has no example inputs, or inductor failed.
    """
    if program.example_inputs is None:
        raise CompileError(
            "The program has no example inputs, which AOTInductor needs.",
            hint="Export it again: torch.export.export(model, inputs).",
        )
    args, kwargs = program.example_inputs
    # A module of its own: the changes below do not reach the program.
    module = program.module(check_guards=False)
    if not isinstance(module, torch.fx.GraphModule):
        raise CompileError("The program has no graph that AOTInductor can compile.")
    keep_default_dtype(module)
    facts = facts_of(program)
    _turn_views_into_buffers(module, facts)
    _allow_state_writes(module, facts)
    _copy_views(module, facts)
    patches = {**configured, "aot_inductor.package": True}
    try:
        files = inductor.aot_compile(module, args, kwargs, options=patches)
    except RefitError:
        raise
    except Exception as exc:
        raise_if_resource(exc, "AOTInductor cannot compile the program")
        raise CompileError(f"AOTInductor cannot compile the program: {exc}") from exc
    return [file for file in files if isinstance(file, str)] if isinstance(files, list) else []


# -- preparing the module ---------------------------------------------------------------------


def _turn_views_into_buffers(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Turn constants that are views or other names of weights into buffers.

    Inductor gives buffers the names of the program. It numbers other constants, and may put small
    ones into the code.
    """
    weights = {leaf.fqn for leaf in facts.leaves if leaf.persistent}
    tied = {name for tie in facts.ties if not weights.isdisjoint(tie) for name in tie}
    for leaf in facts.leaves:
        if leaf.kind is LeafKind.CONSTANT and (leaf.derived or leaf.fqn in tied):
            _as_buffer(module, leaf.fqn)


def _allow_state_writes(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Change the module so that calls of the engine write state in place.

    Inductor returns a parameter that calls write (``nn.Embedding(max_norm=1.0)``) as an output, so
    it becomes a buffer. Inductor refuses a tensor that calls write if the module has another name
    for it, so names that the graph does not read are removed.
    """
    written = {leaf.fqn for leaf in facts.leaves if leaf.mutated}
    for leaf in facts.leaves:
        if leaf.mutated and leaf.kind is LeafKind.PARAMETER:
            _as_buffer(module, leaf.fqn)
    names = {name for tie in facts.ties if not written.isdisjoint(tie) for name in tie}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node.target in names and not node.users:
            module.graph.erase_node(node)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in names - read:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    module.recompile()


def _as_buffer(module: torch.fx.GraphModule, fqn: str) -> None:
    path, _, attribute = fqn.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, attribute)
    delattr(owner, attribute)
    owner.register_buffer(attribute, tensor.detach(), persistent=False)


def _copy_views(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Replace every tensor that has an offset, gaps or overlaps with a copy.

    Inductor would store the whole storage of a view, and the container would copy the view wrongly.
    Tied names stay tied: they get the same copy.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    known = {name for name, _ in named}
    constants = (leaf.fqn for leaf in facts.leaves if leaf.kind is LeafKind.CONSTANT)
    named += [(name, _attribute(module, name)) for name in constants if name not in known]
    for name, tensor in named:
        if not _is_view(tensor):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = _dense_copy(tensor)
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, copies[key])


def _attribute(module: torch.nn.Module, fqn: str) -> torch.Tensor:
    owner, _, name = fqn.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), name)
    return found


def _is_view(tensor: torch.Tensor) -> bool:
    """Return whether a tensor does not fill its storage exactly."""
    memory = tensor.untyped_storage().nbytes()
    return bool(tensor.numel() and (tensor.storage_offset() or memory != tensor.nbytes))


def _dense_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy without gaps, in the same order of dimensions if possible."""
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    if _is_view(copy):  # an overlapping tensor keeps its strides
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


# -- what inductor wrote ----------------------------------------------------------------------


def _library_in(files: Sequence[Path]) -> Path:
    """Return the shared library among the files that inductor wrote.

    Raises:
        CompileError: There is none, or more than one.
    """
    libraries = [file for file in files if file.suffix == ".so"]
    wrappers = [file for file in libraries if ".wrapper" in file.name] or libraries
    if len(wrappers) != 1:
        raise CompileError(f"AOTInductor wrote {len(wrappers)} shared libraries instead of one.")
    return wrappers[0]


def _device_of(program: ExportedProgram) -> str:
    """Return the kind of device of a program; inputs and constants may be on the CPU, too."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    kinds = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    values = (node.meta.get("val") for node in program.graph.nodes)
    kinds |= {value.device.type for value in values if isinstance(value, torch.Tensor)}
    others = kinds - {"cpu"}
    return others.pop() if others else "cpu"


# -- options ----------------------------------------------------------------------------------

REQUIRED: dict[str, Any] = {
    # If False, small constants are inlined, and a refit of them is silently lost.
    "always_keep_tensor_constants": True,
    # If True, weights lose their names.
    "freezing": False,
    # If True, expressions of weights with one element become the value at compile time.
    "joint_graph_constant_folding": False,
    # If True, values folded from weights become stale in the buffer that refits write.
    "aot_inductor.use_runtime_constant_folding": False,
}
"""Values that a refittable engine needs. Other values are refused."""

RESERVED = frozenset({"aot_inductor.package", "aot_inductor.output_path"})
"""Options that this backend sets."""

WEIGHTS_BESIDE: dict[str, Any] = {"aot_inductor.package_constants_on_disk_format": "binary_blob"}
"""Keeps weights out of the shared library, so that a saved file holds them once.

If torch cannot do that, the library keeps the weights of its compilation, which are never read.
"""


def merged_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's options together with those that refits rely on.

    Args:
        options: Names and values of ``torch._inductor.config``.

    Raises:
        ConfigError: Options do not exist, or this backend sets them. The error lists all of them.
        NotRefittableError: Options make the engine unfit for refits. The error lists all of them.
    """
    known = _known_options()
    unknown = [
        Problem(name, "no such option of torch._inductor.config")
        for name in options
        if name not in known
    ]
    unknown += [Problem(name, "set by refitkit") for name in sorted(RESERVED & options.keys())]
    if unknown:
        raise ConfigError("AOTInductor cannot be given these options.", problems=unknown)
    # Options that this version of torch lacks cannot be set.
    known_required = {name: value for name, value in REQUIRED.items() if name in known}
    unfit = [
        Problem(name, "makes the engine unfit for refits", repr(options[name]), repr(value))
        for name, value in known_required.items()
        if name in options and options[name] != value
    ]
    if unfit:
        raise NotRefittableError("These options make an engine unfit for refits.", problems=unfit)
    beside = WEIGHTS_BESIDE if can_fill() and WEIGHTS_BESIDE.keys() <= known else {}
    return {**beside, **options, **known_required}


def _known_options() -> frozenset[str]:
    from torch._inductor import config  # noqa: PLC0415 - slow to import

    return frozenset(config.get_config_copy())


# -- toolchain --------------------------------------------------------------------------------

_COMPILERS = ("g++", "c++", "clang++")


def require_toolchain() -> None:
    """Check that the machine has a C++ compiler and openssl.

    ``CXX`` chooses the compiler, as for inductor (``torch/_inductor/cpp_builder.py``). Inductor's
    packaging calls openssl.

    Raises:
        ToolchainError: Something is missing. The error lists all of it and what to install.
    """
    problems = []
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    if not any(shutil.which(name) for name in candidates):
        hint = "correct or unset CXX" if chosen else "Debian, Ubuntu: apt-get install g++"
        problems.append(Problem(chosen or "g++", "C++ compiler not found", hint=hint))
    if not shutil.which("openssl"):
        hint = "Debian, Ubuntu: apt-get install openssl"
        problems.append(Problem("openssl", "command not found", hint=hint))
    if problems:
        raise ToolchainError(
            "This machine cannot compile with AOTInductor.",
            problems=problems,
            hint="A module compiled elsewhere can be loaded and refitted here without them.",
        )
