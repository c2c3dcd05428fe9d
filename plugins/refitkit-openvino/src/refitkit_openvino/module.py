"""An opened module: call it, copy it, save it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from refitkit import InputMismatchError, Problem
from torch.utils import _pytree as pytree

from refitkit_openvino import NAME, files
from refitkit_openvino.engine import ENGINE, OpenVINOEngine, Runner, WeightSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from refitkit_openvino.graph import Graph, TensorSpec


class OpenVINOModule:
    """A module; see ``refitkit.protocols.OpenedModule``.

    Attributes:
        graph: The model without its weights.
        attachments: Data that a saved file keeps beside the model.
    """

    backend = NAME

    def __init__(
        self, graph: Graph, engine: OpenVINOEngine, attachments: Mapping[str, bytes]
    ) -> None:
        """Make a module of its parts; ``compiled`` compiles a graph.

        Args:
            graph: The model without its weights.
            engine: The compiled model with weights.
            attachments: Data that a saved file keeps beside the model.
        """
        self.graph = graph
        self.attachments = attachments
        self.engines = {ENGINE: engine}
        self._in_spec = pytree.treespec_loads(graph.manifest.in_spec)
        self._out_spec = pytree.treespec_loads(graph.manifest.out_spec)

    @classmethod
    def compiled(
        cls, graph: Graph, weights: Mapping[str, torch.Tensor], attachments: Mapping[str, bytes]
    ) -> OpenVINOModule:
        """Compile a graph.

        Args:
            graph: The model without its weights.
            weights: One contiguous tensor for each slot, read-only.
            attachments: Data that a saved file keeps beside the model.

        Raises:
            EngineError: OpenVINO refused the model.
            UnsupportedTargetError: The model and its description are of different programs.
            ToolchainError: OpenVINO is not installed.
        """
        runner = Runner(graph)
        return cls(graph, OpenVINOEngine(runner, WeightSet(runner, weights)), attachments)

    # -- calls --------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the outputs, in the structure of the program's.

        Raises:
            InputMismatchError: The inputs are others than those of the program.
            EngineError: OpenVINO failed.
        """
        inputs = self._flat(args, kwargs)
        outputs = self.engines[ENGINE].state.live.run(inputs)
        return pytree.tree_unflatten(outputs, self._out_spec)

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the outputs like ``run``, which changes no weight."""
        return self.run(args, kwargs)

    def synchronize(self) -> None:
        """Do nothing: a call returns when its work is done."""

    def _flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        # torch 2.14 deprecates children_specs for children()
        spec: Any = self._in_spec
        names = (spec.children() if hasattr(spec, "children") else spec.children_specs)[1].context
        # torch compares the order of keywords, too
        ordered = {n: kwargs[n] for n in names} if kwargs.keys() == set(names) else dict(kwargs)
        flat, found = pytree.tree_flatten((args, ordered))
        if found != spec:
            problems = [Problem("inputs", "structure", str(found), str(spec))]
        else:
            pairs = zip(self.graph.manifest.inputs, flat, strict=True)
            problems = [problem for one, value in pairs for problem in _misfits(one, value)]
        if problems:
            message = "The module was compiled for other inputs."
            raise InputMismatchError(message, problems=problems)
        return [value.detach().resolve_neg().contiguous() for value in flat]

    # -- new weights --------------------------------------------------------------------------

    @property
    def publishes(self) -> bool:
        """Always: a commit is one assignment; see ``refitkit.protocols.OpensStaged``."""
        return True

    def with_staged(self, staged: Mapping[str, Any]) -> OpenVINOModule:
        """Return a module that has staged weights; see ``refitkit.protocols.OpensStaged``."""
        engine = self.engines[ENGINE]
        live = staged[ENGINE].weights if ENGINE in staged else engine.state.live
        return OpenVINOModule(self.graph, OpenVINOEngine(engine.runner, live), self.attachments)

    def reopen(self) -> OpenVINOModule:
        """Return a second module. It shares the model and the weights, which never change."""
        return self.with_staged({})

    @property
    def precision(self) -> Mapping[str, str]:
        """Dtypes that OpenVINO computes as others; see ``refitkit.protocols.LowersPrecision``."""
        if self.graph.manifest.options.precision == "bf16":
            return {"float64": "bfloat16", "float32": "bfloat16"}
        return {"float64": "float32"}

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write the module with its present weights to a file."""
        files.write(path, self.graph, self.engines[ENGINE].state.live.tensors, attachments)


def _misfits(spec: TensorSpec, value: Any) -> Iterator[Problem]:
    """Yield what keeps a value from being an input."""
    if type(value) not in {torch.Tensor, torch.nn.Parameter} or value.layout is not torch.strided:
        yield Problem(spec.name, "input", type(value).__name__, "a plain tensor")
        return
    found = str(value.dtype).removeprefix("torch."), tuple(value.shape), value.device.type
    if found != (spec.dtype, spec.shape, "cpu"):
        wanted = f"{spec.dtype} {spec.shape} cpu"
        yield Problem(spec.name, "input", " ".join(map(str, found)), wanted)
    elif value.untyped_storage().nbytes() < value.nbytes and value.is_contiguous():
        yield Problem(spec.name, "input", "freed memory", "a tensor with data")
