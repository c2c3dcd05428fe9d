"""Programs stored without their weights, to run or restore with other weights later.

:class:`KeptProgram` is the entry point. Its stored form is the JSON text of the graph that
``torch.export.save`` writes (``torch/_export/serde/schema.py``), and nothing else. It has no
weights, constants or example inputs, so it contains no pickle.

The text may come from an untrusted file, so :func:`check_graph` vets it before torch reads it. A
call of a bound program must not load all weights at once, so :class:`OnDemandModule` fetches each
tensor right before its first use.
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


def _reset_deserializer() -> None:
    setattr(_serde(), "_CURRENT_DESERIALIZER", None)  # noqa: B010 - torch does not export it


_DESERIALIZING = ForkedLock(_reset_deserializer)
"""Lock around torch's deserializer, which is a global (``_CURRENT_DESERIALIZER``, torch 2.14)."""


class KeptProgram:
    """A program without weights. Threads may share it."""

    def __init__(
        self, graph: bytes, leaves: tuple[Leaf, ...], ties: tuple[tuple[str, ...], ...]
    ) -> None:
        """Use the result of ``to_bytes`` again. For a program, call ``of``.

        Args:
            graph: JSON text of the graph. It is vetted when it is first used.
            leaves: Leaves of the program.
            ties: Classes of FQNs that are one tensor.
        """
        self._graph = graph
        self._leaves = leaves
        self._by_fqn = {leaf.fqn: leaf for leaf in leaves}
        self._tied = {name: tie for tie in ties for name in tie}
        self._empty: OnDemandModule | None = None

    @classmethod
    def of(cls, program: ExportedProgram) -> KeptProgram | None:
        """Return a stored form of a program.

        Returns:
            None if torch cannot write the program, if that would need a pickle (custom objects), or
            if ``check_graph`` would refuse the result.
        """
        if any(not isinstance(v, torch.Tensor) for v in program.constants.values()):
            return None
        serde = _serde()
        serializer = serde.ExportedProgramSerializer()
        flags = [n for n in inspect.signature(serializer.serialize).parameters if "serialize_" in n]
        try:
            # torch 2.14 can leave the tensors out; older versions pickle them, and the pickle is
            # dropped here
            parts = serializer.serialize(program, **dict.fromkeys(flags, False))
        except Exception as exc:  # noqa: BLE001 - a program that torch cannot write can be compiled
            raise_if_resource(exc, "The program cannot be kept")
            return None
        described = serde._dataclass_to_dict(parts.exported_program)  # noqa: SLF001
        _drop_empty_regions(described)
        text = json.dumps(described, cls=serde.EnumEncoder, allow_nan=False)
        try:
            check_graph(json.loads(text))
        except ValueError:
            return None
        facts = facts_of(program)
        return cls(text.encode(), facts.leaves, facts.ties)

    def to_bytes(self) -> bytes:
        """Return the JSON text of the graph."""
        return self._graph

    def bind(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> Callable[..., Any]:
        """Return the program as an eager callable that reads the weights of a source.

        Each call reads a tensor right before its first use and releases it after the last one, so
        weights from files are never all in memory. The program uses the source's tensors without
        a copy, unless it changes them or keeps them on another device. Tensors that it changes are
        copied now.

        Args:
            source: Weights by FQN.
            pinned: Returns a tensor that the plan stores, for leaves that the source lacks.

        Returns:
            A callable with the signature of the model. Its results have no gradient history. It
            raises SourceError if the source cannot be read.

        Raises:
            SourceError: Neither the source nor the plan has a tensor that the program needs.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        program = self._module()
        read = self._readers(source, pinned, program.reads)
        changed = {leaf.fqn: read[leaf.fqn]().clone() for leaf in self._leaves if leaf.mutated}

        def fetch(fqn: str) -> torch.Tensor:
            return changed[fqn] if fqn in changed else read[fqn]()

        return lambda *args, **kwargs: program.run(fetch, args, kwargs)

    def restore(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> ExportedProgram:
        """Return the program with the weights of a source, without example inputs.

        The program shares tensors with the source, except for those that it changes or keeps on
        another device. Leaves that shared memory in the original program share it again.

        Args:
            source: Weights by FQN.
            pinned: Returns a tensor that the plan stores, for leaves that the source lacks.

        Raises:
            SourceError: Neither the source nor the plan has a tensor that the program needs, or
                the source cannot be read.
            PlanMismatchError: The kept program is damaged, or another torch wrote it.
        """
        values = self._values(source, pinned)
        # ties come last: all names of a tied weight must be the tensor that views point into
        values.update(on_shared_memory(self._by_fqn, values))
        shared: dict[str, torch.Tensor] = {}
        for tie in self._tied.values():
            shared.update({name: values[tie[0]] for name in tie if tie[0] in values})
        values.update(shared)
        with _DESERIALIZING.held, raised_as(PlanMismatchError, "The kept program cannot be read"):
            return self._deserialized(values)

    def _values(
        self, source: WeightSource, pinned: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of all leaves by FQN."""
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
        """Return a function by FQN that reads the tensor. No data of the source is read now."""
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
        """Return a function that reads one leaf.

        Raises:
            SourceError: Neither the source nor the plan has the leaf.
        """
        names = (leaf.fqn, *self._tied.get(leaf.fqn, ()))
        found = next((name for name in names if name in have), None)
        # a view follows its weight even if the source lists the view too, as the model's view does
        if leaf.derived and (found is None or self._has_bases(leaf, have)):
            return self._derived_reader(leaf, source, have, pinned)
        if found is not None and (leaf.used or _fits(leaf, source, found)):
            return partial(_read, source, found, leaf.device)
        if not leaf.used:  # dead code runs on any values, but not on other dtypes and shapes
            return partial(_zeros, leaf)
        if not leaf.persistent:
            return _pinned_reader(leaf, pinned)
        raise SourceError(f"{source.description} has no {leaf.fqn!r}, which the program reads.")

    def _has_bases(self, leaf: Leaf, have: set[str]) -> bool:
        """Return whether a source has all leaves that a derived leaf follows from."""
        return all(
            not have.isdisjoint((base, *self._tied.get(base, ())))
            or (self._by_fqn[base].derived and self._has_bases(self._by_fqn[base], have))
            for base in leaf.bases
        )

    def _derived_reader(
        self,
        leaf: Leaf,
        source: WeightSource,
        have: set[str],
        pinned: Callable[[str], torch.Tensor],
    ) -> Callable[[], torch.Tensor]:
        """Return a function that computes a leaf from the leaves that it follows from."""
        bases = {fqn: self._reader(self._by_fqn[fqn], source, have, pinned) for fqn in leaf.bases}
        if leaf.parts:  # elements that no part covers come from the leaf's own value
            names = (leaf.fqn, *self._tied.get(leaf.fqn, ()))
            given = next((name for name in names if name in have), None)
            own = (
                partial(_read, source, given, leaf.device)
                if given
                else _pinned_reader(leaf, pinned)
            )
            bases[leaf.fqn] = own

        def value_of(fqn: str) -> torch.Tensor:
            return bases[fqn]()

        return partial(derived_value, leaf, self._by_fqn, value_of, value_of)

    def _module(self) -> OnDemandModule:
        """Return the program as a module without data. It is built once; calls bring tensors."""
        hint = "Pass reference= to verify outputs, or use verify='weights'."
        with _DESERIALIZING.held:
            if self._empty is None:
                with raised_as(PlanMismatchError, "The kept program cannot be read", hint=hint):
                    # tensors without data: the graph then fetches each one from the source
                    blanks = {leaf.fqn: _blank(leaf) for leaf in self._leaves}
                    program = self._deserialized(blanks)
                    module = program.module(check_guards=False)
                    self._empty = OnDemandModule(module, blanks.keys())
            return self._empty

    def _deserialized(self, values: Mapping[str, torch.Tensor]) -> ExportedProgram:
        """Return the program with these values; its parameters require no gradients."""
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


def _pinned_reader(leaf: Leaf, pinned: Callable[[str], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that reads the value of a leaf that the plan stores.

    Raises:
        SourceError: The plan stores no value of the leaf.
    """
    try:
        return partial(pinned(leaf.fqn).to, leaf.device)
    except KeyError:
        message = f"The plan does not keep {leaf.fqn!r}, which the program reads."
        raise SourceError(message) from None


def _drop_empty_regions(value: Any) -> None:
    """Remove calls of graphs that have neither nodes nor results, from JSON data in place.

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
    """Return torch's own serializer: the public functions always write the weights too."""
    return importlib.import_module("torch._export.serde.serialize")


# -- vetting a graph from a file --------------------------------------------------------------

# Torch's deserializer (torch/_export/serde/serialize.py, 2.11 to 2.14) can run code of a file:
# - it looks up the target of a node as attributes of torch, and os.system can be reached that way;
# - it lets sympy evaluate sizes as Python;
# - ExportedProgram.module compiles guards, which are code.

_OPERATORS = frozenset(
    {
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "inv", "invert"),
        *("lshift", "rshift", "getitem", "index", "truth"),
    }
)
_FUNCTIONS_OF_TORCH = frozenset(
    {
        *("_C._set_grad_enabled", "_sym_sqrt"),
        *("amp.autocast_mode._enter_autocast", "amp.autocast_mode._exit_autocast"),
    }
)
_SYM = re.compile(r"sym_[a-z_]+")
_SYMBOL_NAME = re.compile(r"'[A-Za-z_]*\d+'|\"[A-Za-z_]*\d+\"")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
# a point must be followed by a digit, so an expression cannot read attributes
_ARITHMETIC = re.compile(r"[\d\s+\-*/%(),<>=!&|~^]*(?:\.\d+[\d\s+\-*/%(),<>=!&|~^]*)*")
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
    """Check that a serialized program cannot run code while torch reads it.

    Args:
        graph: Parsed JSON of the program. Its ``guards_code`` is emptied in place: these guards
            check example inputs, and refitkit does not use them.

    Raises:
        ValueError: The graph names a function or uses a size expression that no exported program
            contains.
    """
    if isinstance(graph, dict) and graph.get("guards_code"):
        graph["guards_code"] = []
    refused = sorted(set(_refused_names(graph)))
    if refused:
        names = ", ".join(refused)[:200]
        raise ValueError(f"it uses names that no exported program contains: {names}")


def _refused_names(value: Any) -> Iterator[str]:
    """Yield all targets and size expressions that are not allowed."""
    if isinstance(value, list):
        for one in value:
            yield from _refused_names(one)
    elif isinstance(value, dict):
        if {"target", "inputs", "outputs"} <= value.keys() and not _is_op(str(value["target"])):
            yield str(value["target"])
        if "expr_str" in value and not _is_expression(str(value["expr_str"])):
            yield str(value["expr_str"])
        for one in value.values():
            yield from _refused_names(one)


def _is_op(target: str) -> bool:
    """Return whether torch's deserializer would find an op for a target, or nothing at all.

    The prefixes are those that the deserializer checks.
    """
    names = target.split(".")[1:]
    if target.startswith("_operator"):
        return len(names) == 1 and names[0] in _OPERATORS
    if target.startswith("torch"):
        return _is_op_of_torch(names)
    if target.startswith("math"):
        return len(names) == 1 and hasattr(math, names[0])
    return True  # the deserializer leaves it as text, which nothing can call


def _is_op_of_torch(names: list[str]) -> bool:
    if ".".join(names) in _FUNCTIONS_OF_TORCH or (len(names) == 1 and _SYM.fullmatch(names[0])):
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
    return all(map(_is_known, names)) and bool(_ARITHMETIC.fullmatch(_IDENTIFIER.sub("", rest)))


def _is_known(name: str) -> bool:
    return name in _SYMPY or name in functions.__all__ or bool(_SYMBOL.fullmatch(name))


# -- fetching tensors when they are used ------------------------------------------------------

_FETCHER = "_tensor_fetcher"
_REGIONS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Ops that run a graph once, on the operands after it (``torch/_higher_order_ops/wrap.py``)."""


class OnDemandModule:
    """A program's module without data. Each call of ``run`` brings a function that reads tensors.

    The module of an ``ExportedProgram`` fetches all parameters and buffers before it computes
    anything (``torch/export/_unlift.py``, 2.11 to 2.14), so all weights are in memory at once. The
    code that ``torch.fx`` generates drops each value after its last use. So it is enough to fetch
    each tensor right before its first use.

    Several threads may call ``run``; nothing of a call is kept.

    Attributes:
        reads: Names of the tensors that the graph reads and ``run`` therefore fetches.
    """

    def __init__(self, module: torch.fx.GraphModule, names: Collection[str]) -> None:
        """Rewrite a module.

        Args:
            module: Result of ``ExportedProgram.module()``. It is changed and kept.
            names: Names of the tensors that calls will bring.
        """
        self._module, self._fetcher = module, _Fetcher()
        loads = [node for node in module.graph.nodes if node.op == "get_attr"]
        tensors = {node: str(node.target) for node in loads if node.target in names}
        self.reads = frozenset(name for node, name in tensors.items() if node.users)
        keep_default_dtype(module)
        _fetch_at_first_use(module, tensors, self._fetcher)

    def run(
        self, fetch: Callable[[str], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the outputs of the program, computed without gradients.

        Args:
            fetch: Returns a tensor by its name. Called once for each name in ``reads``, and once
                more for each region (of autocast, without gradients) that reads the tensor too.
            args: Positional inputs.
            kwargs: Keyword inputs.
        """
        with self._fetcher.using(fetch), torch.no_grad():
            return self._module(*args, **kwargs)


class _Fetcher(torch.nn.Module):
    """The submodule that a rewritten graph calls to get a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    @contextmanager
    def using(self, fetch: Callable[[str], torch.Tensor]) -> Iterator[None]:
        """Fetch with this function, in this thread."""
        self._of_thread.fetch = fetch
        try:
            yield
        finally:
            del self._of_thread.fetch  # else it would keep all weights alive

    def forward(self, name: str) -> torch.Tensor:
        """Return a tensor by its name."""
        # to fetch may mean to compute, and that must not depend on the region around the call
        with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 - of all devices at once
            found: torch.Tensor = self._of_thread.fetch(name)
        return found


def _fetch_at_first_use(
    module: torch.fx.GraphModule, tensors: dict[torch.fx.Node, str], fetcher: _Fetcher
) -> None:
    """Change a graph so that it fetches each tensor before its first use, and no unused tensors.

    Args:
        module: Module of the graph.
        tensors: Names by the nodes that stand for tensors. The nodes are removed.
        fetcher: Submodule to call.
    """
    module.add_submodule(_FETCHER, fetcher)
    graph, remaining = module.graph, dict(tensors)
    # regions first: a tensor that only a region reads is then no operand any more
    for node in list(graph.nodes):
        _fetch_in_region(module, node, tensors, fetcher)
    for user in list(graph.nodes):
        for node in user.all_input_nodes:
            name = remaining.pop(node, None)
            if name is not None:
                with graph.inserting_before(user):
                    node.replace_all_uses_with(graph.call_module(_FETCHER, (name,)))
    for node in tensors:
        graph.erase_node(node)
    module.recompile()


def _fetch_in_region(
    module: torch.fx.GraphModule,
    call: torch.fx.Node,
    tensors: Mapping[torch.fx.Node, str],
    fetcher: _Fetcher,
) -> None:
    """Change a region so that it fetches tensors itself, instead of getting them as operands.

    The caller of a region keeps all operands alive while the region runs.
    """
    if not isinstance(call.target, HigherOrderOperator) or str(call.target) not in _REGIONS:
        return
    position, body = _body(module, call)
    if body is None:
        return
    operands = call.args[position + 1 :]
    names = [tensors.get(one) if isinstance(one, torch.fx.Node) else None for one in operands]
    parameters = [node for node in body.graph.nodes if node.op == "placeholder"]
    inner = {node: name for node, name in zip(parameters, names, strict=True) if name is not None}
    others = [one for one, name in zip(operands, names, strict=True) if name is None]
    call.args = (*call.args[: position + 1], *others)
    _fetch_at_first_use(body, inner, fetcher)


def _body(
    module: torch.fx.GraphModule, call: torch.fx.Node
) -> tuple[int, torch.fx.GraphModule | None]:
    """Return the position of a region's graph among the arguments, and the graph.

    Returns:
        None as the graph if other calls run it too: they may pass other tensors.
    """
    for position, one in enumerate(call.args):
        if isinstance(one, torch.fx.Node) and one.op == "get_attr":
            body = getattr(module, str(one.target), None)
            if isinstance(body, torch.fx.GraphModule):
                named = [n for n in module.graph.nodes if (n.op, n.target) == (one.op, one.target)]
                return position, body if named == [one] and len(one.users) == 1 else None
    return 0, None
