"""A program on its way to a session: its graph as JSON, its tensors as safetensors."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from refitkit.errors import CompileError, Problem, raised_as
from refitkit.model import Leaf
from refitkit.program import KeptProgram, facts_of
from refitkit.program.facts import tensors_of
from refitkit.recipe import TensorMap
from refitkit.recipe.safetensors_format import unwritable

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch.export import ExportedProgram

_GRAPH, _FACTS, _WEIGHTS = "program.json", "facts.json", "weights.safetensors"


def write_program(program: ExportedProgram, folder: Path) -> None:
    """Write a program.

    Raises:
        CompileError: torch cannot write it without a pickle, or it is not on the CPU.
    """
    facts = facts_of(program)
    elsewhere = [leaf for leaf in facts.leaves if leaf.device != "cpu"]
    if elsewhere:
        raise CompileError(
            "Networks are made on the CPU, and the program has tensors elsewhere.",
            problems=[Problem(leaf.fqn, "device", leaf.device, "cpu") for leaf in elsewhere],
            hint="Export the model on the CPU.",
        )
    kept = KeptProgram.of(program)
    if kept is None:
        raise CompileError(
            "torch cannot write this program without a pickle (it holds custom objects), so it "
            "cannot be handed to the process that plans.",
        )
    (folder / _GRAPH).write_bytes(kept.to_bytes())
    described = {"leaves": [leaf.model_dump() for leaf in facts.leaves], "ties": facts.ties}
    (folder / _FACTS).write_text(json.dumps(described))
    problems = unwritable(tensors_of(program))
    if problems:
        message = "The program has tensors of dtypes that TensorRT and the planning process lack."
        raise CompileError(message, problems=problems)
    with raised_as(CompileError, "The tensors of the program cannot be written"):
        save_file(_once_each(program, facts.ties), folder / _WEIGHTS)


def _once_each(
    program: ExportedProgram, ties: tuple[tuple[str, ...], ...]
) -> dict[str, torch.Tensor]:
    """The program's tensors, contiguous, tied ones under their first name only."""
    others = {name for tie in ties for name in tie[1:]}
    tensors = {n: t.detach() for n, t in tensors_of(program).items() if n not in others}
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {name: _alone(tensor, users) for name, tensor in tensors.items()}


def _alone(tensor: torch.Tensor, users: Counter[int]) -> torch.Tensor:
    """Memory of its own: safetensors refuses tensors that share theirs."""
    storage = tensor.untyped_storage()
    own = storage.nbytes() == tensor.nbytes and users[storage.data_ptr()] == 1
    return tensor if tensor.is_contiguous() and own else tensor.clone().contiguous()


def read_program(folder: Path) -> ExportedProgram:
    """The program that was written, with tensors of its own.

    Raises:
        CompileError: The files are damaged.
    """
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    leaves = tuple(map(Leaf.model_validate, facts["leaves"]))
    ties = tuple(map(tuple, facts["ties"]))
    kept = KeptProgram((folder / _GRAPH).read_bytes(), leaves, ties)
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as exc:
        raise CompileError(f"The tensors of the program cannot be read: {exc}.") from exc
    return kept.restore(TensorMap(tensors), tensors.__getitem__)
