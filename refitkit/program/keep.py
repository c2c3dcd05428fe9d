"""A program kept without its weights, to be bound to other weights later.

Stored as the JSON text that ``torch.export.save`` writes for the graph
(``torch/_export/serde/schema.py``), and nothing else: no weights, no constants, no example inputs,
and so no pickle.
"""

from __future__ import annotations

import importlib
import inspect
import json
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from refitkit.errors import PlanMismatchError, SourceError, raised_as
from refitkit.model import LeafKind
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import facts_of
from refitkit.program.vet import check_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Leaf
    from refitkit.protocols import WeightSource

_DESERIALIZING = threading.Lock()
"""One at a time: torch's deserializer is one for the process (``_CURRENT_DESERIALIZER``, 2.14)."""


class KeptProgram:
    """A program without weights."""

    def __init__(
        self, graph: bytes, leaves: tuple[Leaf, ...], ties: tuple[tuple[str, ...], ...]
    ) -> None:
        """Use ``of`` or, for what ``to_bytes`` gave, this."""
        self._graph = graph
        self._leaves = leaves
        self._twins = {name: tie for tie in ties for name in tie}
        self._empty: torch.nn.Module | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, program: ExportedProgram) -> KeptProgram | None:
        """Keep a program.

        Returns:
            None where torch cannot write it, or not without a pickle (custom objects), or where it
            names what is refused when a program is read.
        """
        if any(not isinstance(v, torch.Tensor) for v in program.constants.values()):
            return None
        serde = _serde()
        serializer = serde.ExportedProgramSerializer()
        flags = [n for n in inspect.signature(serializer.serialize).parameters if "serialize_" in n]
        try:
            # torch 2.14 can leave the tensors out; older ones pickle them, which is dropped here
            parts = serializer.serialize(program, **dict.fromkeys(flags, False))
        except Exception:  # noqa: BLE001 - whatever torch cannot write can still be compiled
            return None
        text = json.dumps(
            serde._dataclass_to_dict(parts.exported_program),  # noqa: SLF001
            cls=serde.EnumEncoder,
            allow_nan=False,
        )
        try:
            check_graph(json.loads(text))
        except ValueError:
            return None  # nobody would read it back
        facts = facts_of(program)
        return cls(text.encode(), facts.leaves, facts.ties)

    def to_bytes(self) -> bytes:
        """JSON text of the graph."""
        return self._graph

    def bind(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> Callable[..., Any]:
        """The program as an eager callable on the source's weights.

        The source's tensors are used as they are, not copied, unless the program changes them or
        keeps them on another device. Leaves that the program does not read are zeros.

        Args:
            source: The weights.
            pinned: Gives a tensor that the plan keeps, for what the source does not have.

        Returns:
            A callable; its results have no gradient history.

        Raises:
            SourceError: Neither has something that the program needs.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        state = self._values(source, pinned)
        module = self._module()

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock, torch.no_grad():  # it puts the tensors into the one module
                return functional_call(module, state, args, kwargs)

        return call

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> ExportedProgram:
        """The program again, with the source's weights.

        Tensors are shared with the source, except those that the program changes or keeps on
        another device. It has no example inputs.

        Args:
            source: The weights.
            pinned: Gives a tensor that the plan keeps, for what the source does not have.

        Raises:
            SourceError: Neither has something that the program needs.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        values = self._values(source, pinned)
        shared: dict[str, torch.Tensor] = {}
        for tie in self._twins.values():
            shared.update({name: values[tie[0]] for name in tie if tie[0] in values})
        values.update(shared)
        with _DESERIALIZING, raised_as(PlanMismatchError, "The kept program cannot be read"):
            return self._deserialized(values)

    def _values(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        have = set(source.names())
        state: dict[str, torch.Tensor] = {}
        for leaf in self._leaves:
            value = self._value(leaf, source, have, pinned)
            state[leaf.fqn] = value.clone() if leaf.mutated else value
        return state

    def _value(
        self,
        leaf: Leaf,
        source: WeightSource,
        have: set[str],
        pinned: Callable[[str], torch.Tensor],
    ) -> torch.Tensor:
        for name in (leaf.fqn, *self._twins.get(leaf.fqn, ())):
            if name in have:
                return source.get(name).detach().to(leaf.device)
        if not leaf.used:
            return torch.zeros(leaf.shape, dtype=dtype_of(leaf.dtype), device=leaf.device)
        if not leaf.persistent:
            try:
                return pinned(leaf.fqn).to(leaf.device)
            except KeyError:
                message = f"The plan does not keep {leaf.fqn!r}, which the program reads."
                raise SourceError(message) from None
        raise SourceError(f"{source.description} has no {leaf.fqn!r}, which the program reads.")

    def _module(self) -> torch.nn.Module:
        """The program as a module without data, made once; calls bring their tensors."""
        hint = "Pass reference= to verify outputs, or use verify='weights'."
        with _DESERIALIZING:
            if self._empty is None:
                with raised_as(PlanMismatchError, "The kept program cannot be read", hint=hint):
                    blanks = {leaf.fqn: _blank(leaf) for leaf in self._leaves}
                    program = self._deserialized(blanks)
                    empty: torch.nn.Module = program.module(check_guards=False)
                    self._empty = empty
            return self._empty

    def _deserialized(self, values: Mapping[str, torch.Tensor]) -> ExportedProgram:
        """The program with these values; parameters need no gradients."""
        state: dict[str, torch.Tensor] = {}
        constants: dict[str, torch.Tensor] = {}
        for leaf in self._leaves:
            value = values[leaf.fqn]
            if leaf.kind is LeafKind.PARAMETER:
                value = torch.nn.Parameter(value, requires_grad=False)
            (state if leaf.persistent else constants)[leaf.fqn] = value
        serde = _serde()
        graph = json.loads(self._graph)
        check_graph(graph)
        schema = serde._dict_to_dataclass(serde.ExportedProgram, graph)  # noqa: SLF001
        program: ExportedProgram = serde.ExportedProgramDeserializer().deserialize(
            schema, state, constants
        )
        return program


def _blank(leaf: Leaf) -> torch.Tensor:
    return torch.empty(leaf.shape, dtype=dtype_of(leaf.dtype), device="meta")


def _serde() -> Any:
    """The serializer of torch itself: no public way leaves the weights out."""
    return importlib.import_module("torch._export.serde.serialize")
