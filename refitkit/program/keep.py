"""A program kept without its weights, to be bound to other weights later.

Stored as the JSON text that ``torch.export.save`` writes for the graph
(``torch/_export/serde/schema.py``), and nothing else: no weights, no constants, no example inputs,
and so no pickle.
"""

from __future__ import annotations

import importlib
import inspect
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import PlanMismatchError, SourceError, raise_if_resource, raised_as
from refitkit.model import LeafKind
from refitkit.processes import ForkedLock
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import facts_of
from refitkit.program.on_demand import OnDemand
from refitkit.program.vet import check_graph
from refitkit.program.views import derived_value, on_shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch.export import ExportedProgram

    from refitkit.model import Leaf
    from refitkit.protocols import WeightSource


def _abandon_deserializing() -> None:
    setattr(_serde(), "_CURRENT_DESERIALIZER", None)  # noqa: B010 - torch does not export it


_DESERIALIZING = ForkedLock(_abandon_deserializing)
"""One at a time: torch's deserializer is one for the process (``_CURRENT_DESERIALIZER``, 2.14)."""


class KeptProgram:
    """A program without weights."""

    def __init__(
        self, graph: bytes, leaves: tuple[Leaf, ...], ties: tuple[tuple[str, ...], ...]
    ) -> None:
        """Use ``of`` or, for what ``to_bytes`` gave, this."""
        self._graph = graph
        self._leaves = leaves
        self._by_fqn = {leaf.fqn: leaf for leaf in leaves}
        self._twins = {name: tie for tie in ties for name in tie}
        self._empty: OnDemand | None = None

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
        except Exception as exc:  # noqa: BLE001 - whatever torch cannot write can still be compiled
            raise_if_resource(exc, "The program cannot be kept")
            return None
        described = serde._dataclass_to_dict(parts.exported_program)  # noqa: SLF001
        _drop_empty_regions(described)
        text = json.dumps(described, cls=serde.EnumEncoder, allow_nan=False)
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

        Each call reads a tensor when the program needs it and lets go of it after its last use, so
        weights that are read from files are never in memory all at once. The source's tensors are
        used as they are, not copied, unless the program changes them or keeps them on another
        device; those that it changes are copied now.

        Args:
            source: The weights.
            pinned: Gives a tensor that the plan keeps, for what the source does not have.

        Returns:
            A callable; its results have no gradient history. It raises SourceError where the source
            cannot be read.

        Raises:
            SourceError: Neither has something that the program needs.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        program = self._module()
        read = self._readers(source, pinned, program.asked_for)
        changed = {leaf.fqn: read[leaf.fqn]().clone() for leaf in self._leaves if leaf.mutated}

        def give(fqn: str) -> torch.Tensor:
            return changed[fqn] if fqn in changed else read[fqn]()

        return lambda *args, **kwargs: program.run(give, args, kwargs)

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> ExportedProgram:
        """The program again, with the source's weights.

        Tensors are shared with the source, except those that the program changes or keeps on
        another device. Leaves that share memory in the program do so again. It has no example
        inputs.

        Args:
            source: The weights.
            pinned: Gives a tensor that the plan keeps, for what the source does not have.

        Raises:
            SourceError: Neither has something that the program needs.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        values = self._values(source, pinned)
        values.update(on_shared_memory(self._by_fqn, values))
        shared: dict[str, torch.Tensor] = {}
        for tie in self._twins.values():
            shared.update({name: values[tie[0]] for name in tie if tie[0] in values})
        values.update(shared)
        with _DESERIALIZING.held, raised_as(PlanMismatchError, "The kept program cannot be read"):
            return self._deserialized(values)

    def _values(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """All tensors at once, for who keeps them."""
        read = self._readers(source, pinned, self._by_fqn)
        return {
            leaf.fqn: read[leaf.fqn]().clone() if leaf.mutated else read[leaf.fqn]()
            for leaf in self._leaves
        }

    def _readers(
        self,
        source: WeightSource,
        pinned: Callable[[str], torch.Tensor],
        wanted: Collection[str],
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads each tensor, by FQN. The source is asked only for its names."""
        have = set(source.names())
        leaves = (leaf for leaf in self._leaves if leaf.fqn in wanted)
        return {leaf.fqn: self._reader(leaf, source, have, pinned) for leaf in leaves}

    def _reader(
        self,
        leaf: Leaf,
        source: WeightSource,
        have: set[str],
        pinned: Callable[[str], torch.Tensor],
    ) -> Callable[[], torch.Tensor]:
        names = (leaf.fqn, *self._twins.get(leaf.fqn, ()))
        found = next((name for name in names if name in have), None)
        if leaf.derived and (found is None or self._has_bases(leaf, have)):
            return self._deriver(leaf, source, have, pinned)
        if found is not None and (leaf.used or _fits(leaf, source, found)):
            return partial(_read, source, found, leaf.device)
        if not leaf.used:  # dead code runs on any values, but not on other dtypes and shapes
            return partial(_zeros, leaf)
        if not leaf.persistent:
            return _kept(leaf, pinned)
        raise SourceError(f"{source.description} has no {leaf.fqn!r}, which the program reads.")

    def _has_bases(self, leaf: Leaf, have: set[str]) -> bool:
        """Whether a source has all leaves that one follows from."""
        return all(
            not have.isdisjoint((base, *self._twins.get(base, ())))
            or (self._by_fqn[base].derived and self._has_bases(self._by_fqn[base], have))
            for base in leaf.bases
        )

    def _deriver(
        self,
        leaf: Leaf,
        source: WeightSource,
        have: set[str],
        pinned: Callable[[str], torch.Tensor],
    ) -> Callable[[], torch.Tensor]:
        """What computes a leaf that follows from others."""
        bases = {fqn: self._reader(self._by_fqn[fqn], source, have, pinned) for fqn in leaf.bases}
        if leaf.parts:  # what no part covers
            names = (leaf.fqn, *self._twins.get(leaf.fqn, ()))
            given = next((name for name in names if name in have), None)
            own = partial(_read, source, given, leaf.device) if given else _kept(leaf, pinned)
            bases[leaf.fqn] = own

        def value_of(fqn: str) -> torch.Tensor:
            return bases[fqn]()

        return partial(derived_value, leaf, self._by_fqn, value_of, value_of)

    def _module(self) -> OnDemand:
        """The program as a module without data, made once; calls bring their tensors."""
        hint = "Pass reference= to verify outputs, or use verify='weights'."
        with _DESERIALIZING.held:
            if self._empty is None:
                with raised_as(PlanMismatchError, "The kept program cannot be read", hint=hint):
                    blanks = {leaf.fqn: _blank(leaf) for leaf in self._leaves}
                    program = self._deserialized(blanks)
                    self._empty = OnDemand(program.module(check_guards=False), blanks.keys())
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


def _kept(leaf: Leaf, pinned: Callable[[str], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What gives the value that the plan keeps of a leaf.

    Raises:
        SourceError: It keeps none.
    """
    try:
        return partial(pinned(leaf.fqn).to, leaf.device)
    except KeyError:
        message = f"The plan does not keep {leaf.fqn!r}, which the program reads."
        raise SourceError(message) from None


def _drop_empty_regions(value: Any) -> None:
    """Take out calls of graphs without nodes and results.

    ``torch.export`` writes them after a region inside another one, and its deserializer refuses
    them ("missing val field", ``torch/_export/verifier.py``, 2.14).
    """
    if isinstance(value, list):
        for one in value:
            _drop_empty_regions(one)
    elif isinstance(value, dict):
        if isinstance(nodes := value.get("nodes"), list):
            value["nodes"] = [node for node in nodes if not _is_empty_region(node)]
        for one in value.values():
            _drop_empty_regions(one)


def _is_empty_region(node: dict[str, Any]) -> bool:
    graphs = [(one["arg"].get("as_graph") or {}).get("graph") for one in node["inputs"]]
    called = [graph for graph in graphs if graph is not None]
    return bool(called) and not node["outputs"] and not any(one["nodes"] for one in called)


def _fits(leaf: Leaf, source: WeightSource, name: str) -> bool:
    info = source.info(name)
    return not info.unusable and (info.dtype, info.shape) == (leaf.dtype, leaf.shape)


def _read(source: WeightSource, name: str, device: str) -> torch.Tensor:
    with raised_as(SourceError, f"{source.description} cannot be read"):
        return source.get(name).detach().to(device)


def _zeros(leaf: Leaf) -> torch.Tensor:
    return torch.zeros(leaf.shape, dtype=dtype_of(leaf.dtype), device=leaf.device)


def _blank(leaf: Leaf) -> torch.Tensor:
    return torch.empty(leaf.shape, dtype=dtype_of(leaf.dtype), device="meta")


def _serde() -> Any:
    """The serializer of torch itself: no public way leaves the weights out."""
    return importlib.import_module("torch._export.serde.serialize")
