"""Which inputs of a graph are live (can change its results), and which ones the graph writes to.

``torch.export`` keeps ops whose results are unused, such as the pooler of a model that
returns only ``last_hidden_state``. Compilers drop those ops, and the weights that only they read.

An op is live if its result reaches an output, if it writes to memory that the caller or a live op
reads, or if it has another side effect. Side effects are those of ``Node.is_impure`` in
``torch.fx``, with two differences. An op that writes in place is live only if the written memory
is, because ``ReLU(inplace=True)`` in dead code is dead. A random op has no side effect, because
weights do not change the state of the generator.

:func:`live_inputs` and :func:`mutated_placeholders` are the entry points. Both work with schemas
alone. If an exact answer needs more, they err towards "live" and towards "written": an error in the
other direction would drop a weight or change a caller's tensor.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram


Node = torch.fx.Node
_NONE: frozenset[int] = frozenset()

_ONLY_METADATA = {
    **{
        f"aten::{name}": "self"
        for name in (
            "copy",
            "empty_like",
            "fill",
            "full_like",
            "is_same_size",
            "new_empty",
            "new_empty_strided",
            "new_full",
            "new_ones",
            "new_zeros",
            "numel",
            "ones_like",
            "rand_like",
            "randint_like",
            "randn_like",
            "size",
            "stride",
            "sym_numel",
            "sym_size",
            "sym_storage_offset",
            "sym_stride",
            "zeros_like",
        )
    },
    **{f"aten::{name}": "other" for name in ("expand_as", "reshape_as", "type_as", "view_as")},
    "aten::_assert_tensor_metadata": "a",
}
"""Ops that read only shape, dtype and device of this argument, and none of its elements."""

_OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
"""Ops that write to all elements of ``self`` and read none."""

_ELEMENTWISE_LISTS = frozenset({"aten::broadcast_tensors", "aten::meshgrid"})
"""Ops with a list as argument and as result: each result has the elements of one tensor."""

_PURE = frozenset(
    {
        "auto_functionalized",
        "auto_functionalized_v2",
        "flex_attention",
        "foreach_map",
        "out_dtype",
        "triton_kernel_wrapper_functional",
    }
)
"""Higher-order ops without side effects; their operands are not followed into their graphs."""


def live_inputs(module: torch.fx.GraphModule) -> frozenset[Node]:
    """Return the placeholders of a graph that can change its outputs or its side effects.

    Args:
        module: Graph with the metadata (``meta["val"]``) that ``torch.export`` sets.
    """
    graph = _Graph(module, {})
    found = graph.flow(graph.every_result)
    return frozenset(graph.inputs[position] for position in found)


_OUTSIDE = frozenset({"placeholder", "get_attr"})
"""Kinds of nodes whose memory outlives a call."""

_OPTIONS = frozenset({"mutated_arg_indices"})
"""Keyword arguments of higher-order ops that contain no tensors."""


# -- which argument of a higher-order op goes to which graph ----------------------------------

# Each function takes the arguments of the op and returns ``(regions, selector)``. A region is
# ``(body, operands, results, decides)``; see _Region. The selector is the argument that decides
# which region runs, or None.


def _once(body: Any, operands: Sequence[Any]) -> Any:
    return [(body, operands, [None] * len(operands), False)], None


def _branches(selects: Any, branches: Sequence[Any], operands: Sequence[Any]) -> Any:
    return [(one, operands, [None] * len(operands), False) for one in branches], selects


def _while(condition: Any, body: Any, carried: Sequence[Any], fixed: Sequence[Any]) -> Any:
    operands = [*carried, *fixed]
    results = [*range(len(carried)), *[None] * len(fixed)]
    return [(condition, operands, results, True), (body, operands, results, False)], None


def _scan(body: Any, carried: Sequence[Any], each: Sequence[Any], fixed: Sequence[Any]) -> Any:
    results = [*range(len(carried)), *[None] * (len(each) + len(fixed))]
    return [(body, [*carried, *each, *fixed], results, False)], None


def _associative(body: Any, each: Sequence[Any], fixed: Sequence[Any]) -> Any:
    results = [*range(len(each)), *range(len(each)), *[None] * len(fixed)]
    return [(body, [*each, *each, *fixed], results, False)], None


_LAYOUTS: dict[str, Callable[..., Any]] = {
    "associative_scan": _associative,
    "cond": lambda selects, yes, no, operands: _branches(selects, [yes, no], operands),
    "invoke_subgraph": lambda body, _, *operands: _once(body, operands),
    "map_impl": lambda body, each, fixed: _once(body, [*each, *fixed]),
    "run_const_graph": _once,
    "scan": _scan,
    "strict_mode": _once,
    "switch": _branches,
    "tag_activation_checkpoint": lambda body, *operands: _once(body, operands),
    "while_loop": _while,
    "wrap": lambda body, *operands: _once(body, operands),
    "wrap_with_autocast": lambda _device, _dtype, _on, _cache, body, *operands: _once(
        body, operands
    ),
    "wrap_with_set_grad_enabled": lambda _, body, *operands: _once(body, operands),
}
"""Layouts by op, from the ``__call__`` methods in ``torch/_higher_order_ops`` (2.14)."""


@dataclass(frozen=True)
class _Region:
    """One graph that a higher-order op runs, once or in a loop.

    Attributes:
        graph: Analysis of the graph.
        operands: Argument of the call that each input of the graph gets in the first iteration.
        results: Index of the result that each input gets in later iterations; None if it gets
            the same argument again.
        decides: Whether the results of the graph decide how many iterations run.
    """

    graph: _Graph
    operands: tuple[Any, ...]
    results: tuple[int | None, ...]
    decides: bool = False

    def operands_of(self, bases: Iterable[Node]) -> Iterator[Node]:
        """Yield the arguments of the call that inputs of the graph stand for."""
        for base in bases:
            if base in self.graph.inputs:
                yield from _nodes(self.operands[self.graph.inputs.index(base)])


@dataclass(frozen=True)
class _Call:
    """A call of a higher-order op with a known layout of arguments.

    Attributes:
        node: The call.
        regions: Graphs that the call runs.
        selector: Argument that decides which graph runs; None if all run.
    """

    node: Node
    regions: tuple[_Region, ...]
    selector: Any = None

    @property
    def has_effects(self) -> bool:
        """Whether one of the graphs has side effects other than writes to its inputs."""
        return any(region.graph.effects for region in self.regions)

    def needed(self, results: frozenset[int]) -> Iterator[Node]:
        """Yield the arguments that these results, all writes and side effects depend on."""
        wanted, reached = set(results), set[tuple[int, int]]()
        # a live input of a loop makes the result live that it gets from the iteration before, so
        # results are added until nothing changes
        before = -1
        while len(wanted) != before:
            before = len(wanted)
            for number, region in enumerate(self.regions):
                every = region.graph.every_result
                for position in region.graph.flow(every if region.decides else every & wanted):
                    reached.add((number, position))
                    result = region.results[position]
                    wanted |= set() if result is None else {result}
        yield from _nodes(self.selector)
        for number, position in reached:
            yield from _nodes(self.regions[number].operands[position])

    def written(self) -> Iterator[Node]:
        """Yield the arguments that the call writes to."""
        for region in self.regions:
            yield from region.operands_of(region.graph.writers)

    def memory(self, result: int | None, known: Mapping[Node, frozenset[Node]]) -> set[Node]:
        """Return the pieces of memory that a result may share.

        Args:
            result: Index of the result; None for all results.
            known: Pieces of memory by argument.
        """
        found: set[Node] = set()
        for region in self.regions:
            if any(one is not None for one in region.results):  # iterations may swap buffers
                shared = self.node.all_input_nodes
                found.add(self.node)
            else:
                results = region.graph.results
                chosen = results if result is None else results[result : result + 1]
                bases = {base for one in chosen for base in region.graph.memory_of(one)}
                found |= bases - set(region.graph.inputs)
                shared = list(region.operands_of(bases))
            found.update(base for node in shared for base in known[node])
        return found


class _Graph:
    """Analysis of one graph: memory, side effects and the flow of values.

    A piece of memory is identified by the node that allocated it.

    Attributes:
        inputs: Placeholders in order.
        results: Returned values in order.
        every_result: All indices of ``results``.
        effects: Nodes with a side effect other than a write.
        writers: Nodes that write to a piece of memory, by piece.
    """

    def __init__(self, module: torch.fx.GraphModule, graphs: dict[int, _Graph]) -> None:
        """Analyze all nodes, in order.

        Args:
            module: Graph to analyze.
            graphs: Analyses of other graphs, by ``id`` of their module. Graphs that this one calls
                are added.
        """
        nodes = list(module.graph.nodes)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        (given,) = next(node.args for node in reversed(nodes) if node.op == "output")
        self.results: tuple[Any, ...] = tuple(given) if _is_list(given) else (given,)
        self.every_result = frozenset(range(len(self.results)))
        self.effects: list[Node] = []
        self.writers: defaultdict[Node, list[Node]] = defaultdict(list)
        self._memory: dict[Node, frozenset[Node]] = {}
        self._calls: dict[Node, _Call] = {}
        self._flows: dict[frozenset[int], frozenset[int]] = {}
        for node in nodes:
            self._analyze(node, graphs)

    def flow(self, results: frozenset[int]) -> frozenset[int]:
        """Return the positions of inputs that results, writes to inputs and effects depend on.

        Args:
            results: Indices of the results that count.
        """
        if results not in self._flows:
            live = self._live(results)
            self._flows[results] = frozenset(
                position for position, node in enumerate(self.inputs) if node in live
            )
        return self._flows[results]

    def memory_of(self, value: Any) -> frozenset[Node]:
        """Return the pieces of memory of all nodes in a value."""
        return frozenset(base for node in _nodes(value) for base in self._memory[node])

    def _analyze(self, node: Node, graphs: dict[int, _Graph]) -> None:
        call = _call(node, graphs)
        if call is not None:
            self._calls[node] = call
        if call.has_effects if call else _has_effect(node):
            self.effects.append(node)
        self._memory[node] = self._shared_by(node)
        written = call.written() if call else written_arguments(node)
        for base in {base for argument in written for base in self._memory[argument]}:
            self.writers[base].append(node)

    def _shared_by(self, node: Node) -> frozenset[Node]:
        """Return the pieces of memory that the value of a node may share; its own if none."""
        whole, result = _item(node)
        call = self._calls.get(node) or self._calls.get(whole or node)
        if call is not None:
            found = call.memory(result, self._memory)
        else:
            found = {base for one in aliased_inputs(node) for base in self._memory[one]}
        return frozenset(found) or frozenset({node})

    def _live(self, results: frozenset[int]) -> Mapping[Node, frozenset[int]]:
        """Return the live nodes, each with the live results if the node is a call of graphs."""
        live: dict[Node, frozenset[int]] = {}
        seen = set[Node]()
        waiting = [
            *(
                self._with_all_results(n)
                for position in results
                for n in _nodes(self.results[position])
            ),
            *((node, _NONE) for node in self.effects),
            *self._writers_of(base for base in self.writers if base.op in _OUTSIDE),
        ]
        while waiting:
            node, wanted = waiting.pop()
            if node in live and wanted <= live[node]:
                continue
            live[node] = live.get(node, _NONE) | wanted
            waiting += self._needed(node, live[node])
            # a live value makes every write to its memory live
            new = self._memory_of_results(node, live[node]) - seen
            seen |= new
            waiting += self._writers_of(new)
        return live

    def _memory_of_results(self, node: Node, results: frozenset[int]) -> frozenset[Node]:
        """Return the pieces of memory of these results of a call, or of the value of a node."""
        call = self._calls.get(node)
        if call is None:
            return self._memory[node]
        pieces = (call.memory(result, self._memory) for result in results)
        return frozenset(base for piece in pieces for base in piece)

    def _writers_of(self, bases: Iterable[Node]) -> list[tuple[Node, frozenset[int]]]:
        return [(node, _NONE) for base in bases for node in self.writers.get(base, ())]

    def _with_all_results(self, node: Node) -> tuple[Node, frozenset[int]]:
        """Return a node with the indices of all its results."""
        call = self._calls.get(node)
        return node, call.regions[-1].graph.every_result if call else _NONE

    def _needed(self, node: Node, results: frozenset[int]) -> list[tuple[Node, frozenset[int]]]:
        """Return the nodes whose values a live node uses, each with the results that it uses."""
        whole, result = _item(node)
        if whole in self._calls and whole is not None and result is not None:
            return [(whole, frozenset({result}))]
        if whole is not None and result is not None and _schema_name(whole) in _ELEMENTWISE_LISTS:
            tensors: Any = whole.args[0]
            return [self._with_all_results(one) for one in _nodes(tensors[result])]
        call = self._calls.get(node)
        needed = call.needed(results) if call else self._read(node)
        return [self._with_all_results(one) for one in needed]

    def _read(self, node: Node) -> list[Node]:
        """Return the arguments whose elements affect the value of a node or its writes."""
        over = _overwritten(node)
        # memory of the caller counts as read even if it is overwritten, because it is state
        if over is None or any(base.op in _OUTSIDE for base in self._memory[over]):
            return _read(node)
        return [one for one in _read(node) if one is not over]


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _schema_name(node: Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _item(node: Node) -> tuple[Node | None, int | None]:
    """Return the list and the index, if a node takes an item of a list; else None for both."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return node.args[0], node.args[1] if isinstance(node.args[1], int) else None
    return None, None


def _has_effect(node: Node) -> bool:
    """Return whether a node has a side effect other than writes that its schema declares."""
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target) not in _PURE
    if isinstance(node.target, OpOverload):
        # custom ops that write are impure: they may do more than their schemas declare
        declared = node.target.namespace in {"aten", "prims"}
        if declared and (node.target._schema.is_mutable or _reads_only_metadata(node)):  # noqa: SLF001
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
    return bool(node.is_impure())


def _read(node: Node) -> list[Node]:
    """Return the arguments whose elements affect the value of a node."""
    if _is_empty(node):
        return []
    skipped = _only_metadata(node)
    return [one for one in node.all_input_nodes if one is not skipped]


def _overwritten(node: Node) -> Node | None:
    """Return the argument that a call overwrites without reading it, if there is one."""
    # a shape that depends on elements carries values, so such a tensor counts as read
    over = node.args[0] if _schema_name(node) in _OVERWRITES else None
    if not isinstance(over, Node) or over in _nodes(node.args[1:]) or _has_shape_of_data(over):
        return None
    return over


def _has_shape_of_data(node: Node) -> bool:
    """Return whether the shape of a value may depend on elements, as that of ``nonzero`` does."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or bool(free_unbacked_symbols(value))


def _reads_only_metadata(node: Node) -> bool:
    return _only_metadata(node) is not None


def _only_metadata(node: Node) -> Node | None:
    """Return the argument of a call whose elements do not matter, if there is one.

    An argument whose shape depends on elements does matter.
    """
    name = _ONLY_METADATA.get(_schema_name(node))
    for argument, value in arguments_of(node) if name else ():
        if argument.name == name and isinstance(value, Node):
            once = _nodes([*node.args, *node.kwargs.values()]).count(value) == 1
            return value if once and not _has_shape_of_data(value) else None
    return None


def _is_empty(node: Node) -> bool:
    """Return whether a value has no elements, for all inputs."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(
        isinstance(size, int) and not size for size in value.shape
    )


def _call(node: Node, graphs: dict[int, _Graph]) -> _Call | None:
    """Return a node as a call of a higher-order op; None if the layout of its arguments is unknown.

    Args:
        node: Node to analyze.
        graphs: Analyses by ``id`` of their module. Graphs that the node calls are added.
    """
    if not isinstance(node.target, HigherOrderOperator) or node.kwargs.keys() - _OPTIONS:
        return None
    layout = _LAYOUTS.get(str(node.target))
    if layout is None:
        return None
    try:
        regions, selector = layout(*node.args)
    except (TypeError, ValueError):
        return None  # this version of torch passes other arguments
    found = []
    for body, operands, results, decides in regions:
        module = getattr(node.graph.owning_module, str(getattr(body, "target", "")), None)
        if not isinstance(module, torch.fx.GraphModule):
            return None
        if id(module) not in graphs:
            graphs[id(module)] = _Graph(module, graphs)
        graph = graphs[id(module)]
        # this version of torch lifts or passes other operands
        if not len(operands) == len(results) == len(graph.inputs):
            return None
        found.append(_Region(graph, tuple(operands), tuple(results), decides))
    return _Call(node, tuple(found), selector)


# -- which inputs are written -----------------------------------------------------------------

_IN_TRAINING = {
    "aten::batch_norm": "training",
    "aten::native_batch_norm": "training",
    "aten::cudnn_batch_norm": "training",
    "aten::miopen_batch_norm": "training",
    "aten::instance_norm": "use_input_stats",
}
"""Ops that write ``running_mean`` and ``running_var`` unless this argument is False.

Their schemas in ``aten/src/ATen/native/native_functions.yaml`` do not declare these writes.
"""


_UNDECLARED_ALIASES = frozenset(
    f"aten::{name}"
    for name in (
        "alpha_dropout",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "dropout",
        "einsum",
        "feature_dropout",
        "meshgrid",
        "sum_to_size",
        "type_as",
    )
)
"""Ops that may return an input or a view of it, which their schemas do not declare."""


def mutated_placeholders(program: ExportedProgram) -> set[str]:
    """Return the names of the placeholders that a program writes to.

    It may write directly, through views or in submodules. An exported program has in-place ops in
    its graph, and regions such as ``torch.no_grad()`` in submodules. A decomposed program lists
    its writes in its signature.
    """
    signature = program.graph_signature
    by_target = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target}
    listed = [
        *signature.buffers_to_mutate.values(),
        *getattr(signature, "parameters_to_mutate", {}).values(),
    ]
    return {by_target[fqn] for fqn in listed} | _written(program.graph_module)


def submodules_of(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """Return the graphs that a node calls: the branches of a condition, the body of a region."""
    owner = node.graph.owning_module
    found = (
        getattr(owner, str(argument.target), None)
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    )
    return [module for module in found if isinstance(module, torch.fx.GraphModule)]


def _written(module: torch.fx.GraphModule) -> set[str]:
    """Return the names of the placeholders of a graph that it writes to."""
    found: set[str] = set()
    for node in module.graph.nodes:
        for argument in written_arguments(node):
            found |= _roots(argument)
    return found


def written_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the arguments that a call writes to.

    If a graph that it calls writes to an input, all arguments count.
    """
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, torch.fx.Node))
    yield from _running_statistics(node)
    # the layout of arguments may be unknown here, so this errs towards "written"
    if any(_written(module) for module in submodules_of(node)):
        yield from node.all_input_nodes


def _running_statistics(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the running statistics that a normalization writes to."""
    flag = _IN_TRAINING.get(_schema_name(node))
    if flag is None:
        return
    given = {argument.name: value for argument, value in arguments_of(node)}
    if given.get(flag) is not False:
        names = ("running_mean", "running_var")
        yield from (given[n] for n in names if isinstance(given.get(n), torch.fx.Node))


def arguments_of(node: torch.fx.Node) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of schema argument and value for a call of an op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def aliased_inputs(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the arguments whose memory the result of a node may share."""
    undeclared = _schema_name(node) in _UNDECLARED_ALIASES
    if undeclared or node.target is operator.getitem or submodules_of(node):
        yield from node.all_input_nodes
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and isinstance(value, torch.fx.Node):
            yield value


def _roots(node: torch.fx.Node) -> set[str]:
    """Return the names of the placeholders whose memory a node may share."""
    found: set[str] = set()
    stack, seen = [node], set[torch.fx.Node]()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found.add(current.name)
        stack += aliased_inputs(current)
    return found
