"""A program kept without its weights, to be bound to other weights later.

Stored as the JSON text that ``torch.export.save`` writes for the graph
(``torch/_export/serde/schema.py``), and nothing else: no weights, no constants, no example inputs,
and so no pickle.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._sympy import functions

from refitkit.errors import PlanMismatchError, SourceError, raise_if_resource, raised_as
from refitkit.model import LeafKind
from refitkit.processes import ForkedLock
from refitkit.program.ambient import keep_default_dtype
from refitkit.program.dtypes import dtype_of
from refitkit.program.facts import facts_of
from refitkit.program.views import derived_value, on_shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

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


# MERGED vet: What a kept program may name, before torch turns its text into a graph.
#
# Torch's deserializer (``torch/_export/serde/serialize.py``, 2.11 to 2.14) looks up the target of
# a node as attributes of ``torch``, by which ``os.system`` can be reached; it has sympy evaluate
# sizes as Python; and ``ExportedProgram.module`` compiles guards that are code. A graph comes
# from a file.

_OPERATORS = frozenset(
    {
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "inv", "invert"),
        *("lshift", "rshift", "getitem", "index", "truth"),
    }
)
_OF_TORCH = frozenset(
    {
        *("_C._set_grad_enabled", "_sym_sqrt"),
        *("amp.autocast_mode._enter_autocast", "amp.autocast_mode._exit_autocast"),
    }
)
_SYM = re.compile(r"sym_[a-z_]+")
_SYMBOL_NAME = re.compile(r"'[A-Za-z_]*\d+'|\"[A-Za-z_]*\d+\"")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_OTHERS = re.compile(r"[\d\s+\-*/%(),<>=!&|~^]*(?:\.\d+[\d\s+\-*/%(),<>=!&|~^]*)*")
_SYMBOL = re.compile(r"[a-z]+\d+")
_SYMPY = frozenset(
    {
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Abs", "Piecewise", "ITE"),
        *("Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan"),
        *("StrictGreaterThan", "floor", "ceiling", "sqrt", "oo", "int_oo", "true", "false"),
        *("True", "False", "None", "positive", "nonnegative", "negative", "integer", "real"),
        *("zero", "finite", "nonzero", "evaluate"),
    }
)


def check_graph(graph: Any) -> None:
    """Check what a serialized program names, and take its guards away.

    Args:
        graph: What JSON gave. Its ``guards_code`` is emptied: the guards of the example inputs,
            which nothing here asks for.

    Raises:
        ValueError: It names something that no exported program does.
    """
    if isinstance(graph, dict) and graph.get("guards_code"):
        graph["guards_code"] = []
    odd = sorted(set(_odd(graph)))
    if odd:
        raise ValueError(f"it names what no program does: {', '.join(odd)[:200]}")


def _odd(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _odd(one)
    elif isinstance(value, dict):
        if {"target", "inputs", "outputs"} <= value.keys() and not _is_op(str(value["target"])):
            yield str(value["target"])
        if "expr_str" in value and not _is_expression(str(value["expr_str"])):
            yield str(value["expr_str"])
        for one in value.values():
            yield from _odd(one)


def _is_op(target: str) -> bool:
    """Whether the deserializer would find an op, or nothing; the prefixes are those it looks at."""
    names = target.split(".")[1:]
    if target.startswith("_operator"):
        return len(names) == 1 and names[0] in _OPERATORS
    if target.startswith("torch"):
        return _is_op_of_torch(names)
    if target.startswith("math"):
        return len(names) == 1 and hasattr(math, names[0])
    return True  # stays a text, which is no op


def _is_op_of_torch(names: list[str]) -> bool:
    if ".".join(names) in _OF_TORCH or (len(names) == 1 and _SYM.fullmatch(names[0])):
        return True
    found: Any = torch
    for name in names:
        if not hasattr(found, name):
            return True
        found = getattr(found, name)
    return isinstance(found, OpOverload | OpOverloadPacket | HigherOrderOperator)


def _is_expression(text: str) -> bool:
    rest = _SYMBOL_NAME.sub("", text)
    names = _IDENTIFIER.findall(rest)
    return all(map(_is_known, names)) and bool(_OTHERS.fullmatch(_IDENTIFIER.sub("", rest)))


def _is_known(name: str) -> bool:
    return name in _SYMPY or name in functions.__all__ or bool(_SYMBOL.fullmatch(name))


# MERGED on_demand: A program that asks for each of its tensors when it needs it, and lets go of
# it after that.
#
# The module of an ``ExportedProgram`` fetches all its parameters and buffers before it computes
# anything (``torch/export/_unlift.py``, 2.11 to 2.14), so a whole set of weights is in memory
# while it runs. The code that ``torch.fx`` writes for a graph forgets each value after its last
# use; so all it takes is to fetch a tensor where it is used first.

_ASKED = "_asked_for_tensors"
_REGIONS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Ops that run a graph once, on the operands behind it (``torch/_higher_order_ops/wrap.py``)."""


class OnDemand:
    """A program's module without data; each call says where tensors come from.

    Nothing of a call is kept, so several threads may call it.

    Attributes:
        asked_for: Names of the tensors that calls ask for: those that the graph itself reads.
    """

    def __init__(self, module: torch.fx.GraphModule, names: Collection[str]) -> None:
        """Rewrite a module.

        Args:
            module: What ``ExportedProgram.module()`` gave; becomes this object's.
            names: What calls will bring.
        """
        self._module, self._asked = module, _Asked()
        early = [node for node in module.graph.nodes if node.op == "get_attr"]
        waiting = {node: str(node.target) for node in early if node.target in names}
        self.asked_for = frozenset(name for node, name in waiting.items() if node.users)
        keep_default_dtype(module)
        _put_off(module, waiting, self._asked)

    def run(
        self, give: Callable[[str], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call it, without gradients.

        Args:
            give: Gives a tensor by its name. Asked for what the program reads, once, and once more
                for each region (of autocast, without gradients) that reads it, too.
            args: Positional inputs.
            kwargs: Keyword inputs.
        """
        with self._asked.answered_by(give), torch.no_grad():
            return self._module(*args, **kwargs)


class _Asked(torch.nn.Module):
    """What the graph calls where it needs a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    @contextmanager
    def answered_by(self, give: Callable[[str], torch.Tensor]) -> Iterator[None]:
        """Ask this one, in this thread."""
        self._of_thread.give = give
        try:
            yield
        finally:
            del self._of_thread.give  # it knows all the weights

    def forward(self, name: str) -> torch.Tensor:
        """A tensor, as it is outside of all regions: to read it may mean to compute it."""
        with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 - of all devices at once
            found: torch.Tensor = self._of_thread.give(name)
        return found


def _put_off(
    module: torch.fx.GraphModule, waiting: dict[torch.fx.Node, str], asked: _Asked
) -> None:
    """Let a graph ask for tensors where it uses them first, and not for those that it does not.

    Args:
        module: Whose graph it is.
        waiting: Nodes that stand for tensors, with their names. They are removed.
        asked: What to ask.
    """
    module.add_submodule(_ASKED, asked)
    graph, left = module.graph, dict(waiting)
    for node in list(graph.nodes):
        _put_off_in_region(module, node, waiting, asked)
    for user in list(graph.nodes):
        for node in user.all_input_nodes:
            name = left.pop(node, None)
            if name is not None:
                with graph.inserting_before(user):
                    node.replace_all_uses_with(graph.call_module(_ASKED, (name,)))
    for node in waiting:
        graph.erase_node(node)
    module.recompile()


def _put_off_in_region(
    module: torch.fx.GraphModule,
    call: torch.fx.Node,
    waiting: Mapping[torch.fx.Node, str],
    asked: _Asked,
) -> None:
    """Let a region ask for tensors itself: who calls it holds its operands as long as it runs."""
    if not isinstance(call.target, HigherOrderOperator) or str(call.target) not in _REGIONS:
        return
    place, body = _body(module, call)
    if body is None:
        return
    operands = call.args[place + 1 :]
    names = [waiting.get(one) if isinstance(one, torch.fx.Node) else None for one in operands]
    parameters = [node for node in body.graph.nodes if node.op == "placeholder"]
    inner = {node: name for node, name in zip(parameters, names, strict=True) if name is not None}
    left = [one for one, name in zip(operands, names, strict=True) if name is None]
    call.args = (*call.args[: place + 1], *left)
    _put_off(body, inner, asked)


def _body(
    module: torch.fx.GraphModule, call: torch.fx.Node
) -> tuple[int, torch.fx.GraphModule | None]:
    """The graph that a region runs, and its place among the arguments; None if others run it."""
    for place, one in enumerate(call.args):
        if isinstance(one, torch.fx.Node) and one.op == "get_attr":
            body = getattr(module, str(one.target), None)
            if isinstance(body, torch.fx.GraphModule):
                named = [n for n in module.graph.nodes if (n.op, n.target) == (one.op, one.target)]
                return place, body if named == [one] and len(one.users) == 1 else None
    return 0, None
