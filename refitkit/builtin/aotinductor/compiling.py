"""Compiling a program with AOTInductor into an opened module."""

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
from refitkit.builtin.aotinductor.engine import AOTInductorEngine
from refitkit.builtin.aotinductor.inputs import spec_of
from refitkit.builtin.aotinductor.module import AOTInductorModule, Files
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


_NOT_KEPT = {".cpp", ".blob", ".o"}


def compile_program(program: ExportedProgram, chosen: Mapping[str, Any]) -> AOTInductorModule:
    """Compile; see ``refitkit.protocols.Backend.compile``."""
    configured = merged(chosen)
    check()
    call = spec_of(program)
    written = [Path(file) for file in _inductor(program, configured)]
    folder = TemporaryFolder()
    for file in written:
        if file.suffix not in _NOT_KEPT:
            shutil.copyfile(file, folder.path / file.name)
    library = _the_library(written)
    device = _device_of(program)
    if device != "cpu":
        container.try_in_child(folder.path / library.name, device)
    runner = container.open_container(folder.path / library.name, device)
    blob = next((file for file in written if file.suffix == ".blob"), None)
    if blob is not None:
        with blob.open("rb") as written_weights:
            container.fill_from_blob(runner, partial(shutil.copyfileobj, written_weights))
    facts = facts_of(program)
    files = Files(
        folder=folder,
        library=library.name,
        device=device,
        weights_beside=blob is not None,
        call=call,
        mutable=frozenset(leaf.fqn for leaf in facts.leaves if leaf.mutated),
        versions=versions(),
        settings={name: repr(value) for name, value in sorted(configured.items())},
    )
    return AOTInductorModule(files, AOTInductorEngine(runner, files.mutable), {})


def versions() -> dict[str, str]:
    """Versions of what makes an engine here."""
    return {"torch": str(torch.__version__), "python": platform.python_version()}


def _inductor(program: ExportedProgram, configured: Mapping[str, Any]) -> Sequence[str]:
    if program.example_inputs is None:
        raise CompileError(
            "The program has no example inputs, which AOTInductor needs.",
            hint="Export it again: torch.export.export(model, inputs).",
        )
    args, kwargs = program.example_inputs
    module = program.module(check_guards=False)
    if not isinstance(module, torch.fx.GraphModule):
        raise CompileError("The program has no graph that AOTInductor can compile.")
    keep_default_dtype(module)
    facts = facts_of(program)
    _name_views(module, facts)
    _free_state(module, facts)
    _own_memory(module, facts)
    patches = {**configured, "aot_inductor.package": True}
    try:
        files = inductor.aot_compile(module, args, kwargs, options=patches)
    except RefitError:
        raise
    except Exception as exc:
        raise_if_resource(exc, "AOTInductor cannot compile the program")
        raise CompileError(f"AOTInductor cannot compile the program: {exc}") from exc
    return [file for file in files if isinstance(file, str)] if isinstance(files, list) else []


def _name_views(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Turn constants that follow from weights into buffers.

    Inductor names buffers as the program does. Other constants it numbers, and it may put small
    ones into the code. Only this module is changed.
    """
    weights = {leaf.fqn for leaf in facts.leaves if leaf.persistent}
    twins = {name for tie in facts.ties if not weights.isdisjoint(tie) for name in tie}
    for leaf in facts.leaves:
        if leaf.kind is LeafKind.CONSTANT and (leaf.derived or leaf.fqn in twins):
            _as_buffer(module, leaf.fqn)


def _free_state(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Let calls write state in place.

    Inductor returns parameters that calls write (``nn.Embedding(max_norm=1.0)``) as outputs, and
    refuses a tensor that calls write if the module has another name for it. Only this module is
    changed: written parameters become buffers, and names that the graph does not read vanish.
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
    owner, _, attribute = fqn.rpartition(".")
    holder = module.get_submodule(owner)
    tensor = getattr(holder, attribute)
    delattr(holder, attribute)
    holder.register_buffer(attribute, tensor.detach(), persistent=False)


def _own_memory(module: torch.fx.GraphModule, facts: ProgramFacts) -> None:
    """Give every tensor that is a view with an offset, gaps or overlaps memory of its own.

    Inductor would store such a tensor with the whole memory that it looks into. Only this module
    is changed, which was made for compiling and is thrown away; the program's tensors are not.
    Names of one tensor stay names of one tensor.
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
            copies[key] = _packed(tensor)
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, copies[key])


def _attribute(module: torch.nn.Module, fqn: str) -> torch.Tensor:
    owner, _, name = fqn.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(owner), name)
    return found


def _is_view(tensor: torch.Tensor) -> bool:
    memory = tensor.untyped_storage().nbytes()
    return bool(tensor.numel() and (tensor.storage_offset() or memory != tensor.nbytes))


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    if _is_view(copy):
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


def _the_library(files: Sequence[Path]) -> Path:
    libraries = [file for file in files if file.suffix == ".so"]
    wrappers = [file for file in libraries if ".wrapper" in file.name] or libraries
    if len(wrappers) != 1:
        raise CompileError(f"AOTInductor wrote {len(wrappers)} shared libraries instead of one.")
    return wrappers[0]


def _device_of(program: ExportedProgram) -> str:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    kinds = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    values = (node.meta.get("val") for node in program.graph.nodes)
    kinds |= {value.device.type for value in values if isinstance(value, torch.Tensor)}
    others = kinds - {"cpu"}
    return others.pop() if others else "cpu"


# MERGED options: Which inductor options users may set, and which refits rely on.

REQUIRED: dict[str, Any] = {
    # without it small constants are inlined, and a refit of them is silently lost
    "always_keep_tensor_constants": True,
    # names of weights are lost with it
    "freezing": False,
    # every expression of weights with one element is replaced by its value of compile time
    "joint_graph_constant_folding": False,
    # values folded from weights would go stale in the buffer that refits write to
    "aot_inductor.use_runtime_constant_folding": False,
}
"""Values that a refittable engine needs. Setting them otherwise is refused."""

OURS = frozenset({"aot_inductor.package", "aot_inductor.output_path"})
"""Options that this backend sets for itself."""

WEIGHTS_BESIDE: dict[str, Any] = {"aot_inductor.package_constants_on_disk_format": "binary_blob"}
"""Keeps the weights out of the shared library: a saved file then holds them once.

Where torch cannot do that, the library keeps those of its compilation as dead freight.
"""


def merged(options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options together with those that refits rely on.

    Args:
        options: Names and values of ``torch._inductor.config``.

    Raises:
        ConfigError: Options that do not exist, or that this backend sets; names all of them.
        NotRefittableError: Options that would make the engine unfit for refits; names all of them.
    """
    known = _known()
    unknown = [
        Problem(name, "no such option of torch._inductor.config")
        for name in options
        if name not in known
    ]
    unknown += [Problem(name, "set by refitkit") for name in sorted(OURS & options.keys())]
    if unknown:
        raise ConfigError("AOTInductor cannot be given these options.", problems=unknown)
    known_required = {name: value for name, value in REQUIRED.items() if name in known}
    unfit = [
        Problem(name, "makes the engine unfit for refits", repr(options[name]), repr(value))
        for name, value in known_required.items()
        if name in options and options[name] != value
    ]
    if unfit:
        raise NotRefittableError("An engine compiled so could not be refitted.", problems=unfit)
    beside = WEIGHTS_BESIDE if can_fill() and WEIGHTS_BESIDE.keys() <= known else {}
    return {**beside, **options, **known_required}


def _known() -> frozenset[str]:
    from torch._inductor import config  # noqa: PLC0415 - slow to import

    return frozenset(config.get_config_copy())


# MERGED toolchain: What compiling needs of the machine. Loading and refitting need none of it.

_COMPILERS = ("g++", "c++", "clang++")


def check() -> None:
    """Check that a C++ compiler and openssl are there.

    ``CXX`` chooses the compiler, as for inductor (``torch/_inductor/cpp_builder.py``). openssl is
    what inductor's packaging calls.

    Raises:
        ToolchainError: Names everything that is missing and what to install.
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
