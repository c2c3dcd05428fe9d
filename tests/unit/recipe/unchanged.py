"""What must be as it was when a recording is over: tensors, programs, modules, and torch itself."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Facts = dict[str, Any]


@contextmanager
def nothing_changes(
    tensors: Mapping[str, torch.Tensor],
    program: torch.export.ExportedProgram | None = None,
    module: torch.nn.Module | None = None,
) -> Iterator[None]:
    """Fail if tensors, a program, a module, or what torch is set to are others after the block."""
    before = _all(tensors, program, module)
    yield
    after = _all(tensors, program, module)
    assert {k: v for k, v in after.items() if before[k] != v} == {}
    assert before.keys() == after.keys()


def _all(
    tensors: Mapping[str, torch.Tensor],
    program: torch.export.ExportedProgram | None,
    module: torch.nn.Module | None,
) -> Facts:
    return {
        **{f"tensor {name}": of_tensor(one) for name, one in tensors.items()},
        **(of_program(program) if program is not None else {}),
        **(of_module(module) if module is not None else {}),
        **of_torch(),
    }


def of_tensor(tensor: torch.Tensor) -> Facts:
    """Bits, version, place in memory, and what autograd knows."""
    storage = tensor.untyped_storage()
    return {
        "bits": _raw(tensor),
        "version": tensor._version,
        "requires_grad": tensor.requires_grad,
        "grad": tensor.grad is not None,
        "storage": (storage._cdata, storage.data_ptr(), storage.nbytes()),
        "layout": (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()),
        "class": type(tensor),
    }


def of_program(program: torch.export.ExportedProgram) -> Facts:
    """Its graph, signature and state; not what it keeps of a run."""
    held = {**program.state_dict, **program.constants}
    tensors = {name: one for name, one in held.items() if isinstance(one, torch.Tensor)}
    return {
        "program's graph": str(program.graph),
        "program's code": program.graph_module.code,
        "program's nodes": [
            (node.name, sorted(node.meta), str(node.meta.get("val")))
            for node in program.graph.nodes
        ],
        "program's signature": str(program.graph_signature),
        "program's names": list(held),
        **{f"program's {name}": of_tensor(one) for name, one in tensors.items()},
    }


def of_module(module: torch.nn.Module) -> Facts:
    """Its tensors, by all their names and by object, and its modes."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {
        "module's modes": [(name, one.training) for name, one in module.named_modules()],
        "module's objects": {name: id(one) for name, one in tensors.items()},
        "module's names": list(module.state_dict()),
        **{f"module's {name}": of_tensor(one) for name, one in tensors.items()},
    }


def of_torch() -> Facts:
    """What torch and NumPy are set to, in this thread and in all."""
    devices = ("cpu", "cuda")
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices],
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        "dispatch modes": list(map(id, _get_current_dispatch_mode_stack())),
        "function modes": list(map(id, _get_current_function_mode_stack())),
        "threads": torch.get_num_threads(),
        "NumPy's errors": np.geterr(),
    }


def _raw(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor, found without the package under test."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
