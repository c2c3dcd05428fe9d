"""Which inputs of a graph can change its results: all others feed dead code.

``torch.export`` keeps ops whose results nobody uses, such as the pooler of a model of which only
``last_hidden_state`` is taken. Compilers drop those ops, and with them the weights that only they
read.

An op is live if its result reaches an output, if it writes to memory that the caller or a live op
sees, or if it has another side effect. ``torch.fx`` knows side effects (``Node.is_impure``), with
two differences here. An op that writes in place is judged by the memory that it writes to, because
``ReLU(inplace=True)`` in dead code is dead. A random op is no side effect, because weights do not
change the generator's state. Where an exact answer would need more than schemas, the answer errs
towards "live".
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
"""Ops that read no element of this argument, only its shape, dtype and device."""

_OVERWRITES = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
"""Ops that write to all elements of ``self`` and read none."""

_EACH_OF_ITS_OWN = frozenset({"aten::broadcast_tensors", "aten::meshgrid"})
"""Ops that take a list, and of which each result has the elements of one tensor of it."""

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
"""Higher-order ops without side effects whose operands are not followed into their graphs."""


def live_inputs(module: torch.fx.GraphModule) -> frozenset[Node]:
    """Placeholders of a graph whose values can change its outputs or have a side effect.

    Args:
        module: The graph, with the metadata of its nodes as ``torch.export`` gives it.
    """
    graph = _Graph(module, {})
    found = graph.flow(graph.every_result)
    return frozenset(graph.inputs[position] for position in found)


_OUTSIDE = frozenset({"placeholder", "get_attr"})
"""Nodes whose memory outlives a call."""

_OPTIONS = frozenset({"mutated_arg_indices"})
"""Keyword arguments of higher-order ops that hold no values."""


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
"""Which argument goes to which graph: (body, operands, results, decides) of each, and what selects
one of them. By the ``__call__`` methods in ``torch/_higher_order_ops`` (2.14)."""


@dataclass(frozen=True)
class _Region:
    """One graph that a higher-order op runs.

    Attributes:
        graph: The graph.
        operands: The argument of the call that each of its inputs gets at first.
        results: The result that each of its inputs gets in later iterations; None where it gets
            the same argument again.
        decides: Whether its own results decide how many iterations run.
    """

    graph: _Graph
    operands: tuple[Any, ...]
    results: tuple[int | None, ...]
    decides: bool = False

    def operands_of(self, bases: Iterable[Node]) -> Iterator[Node]:
        """Arguments of the call that some inputs of its graph stand for."""
        for base in bases:
            if base in self.graph.inputs:
                yield from _nodes(self.operands[self.graph.inputs.index(base)])


@dataclass(frozen=True)
class _Call:
    """A call of a higher-order op whose operands can be followed into its graphs.

    Attributes:
        node: The call.
        regions: The graphs that it runs.
        selects: The argument that decides which of them runs, if there is one.
    """

    node: Node
    regions: tuple[_Region, ...]
    selects: Any = None

    @property
    def has_effects(self) -> bool:
        """Whether a graph has side effects other than writes to its inputs."""
        return any(region.graph.effects for region in self.regions)

    def needed(self, results: frozenset[int]) -> Iterator[Node]:
        """Arguments that these results, writes and side effects follow from."""
        wanted, reached = set(results), set[tuple[int, int]]()
        before = -1
        while len(wanted) != before:
            before = len(wanted)
            for number, region in enumerate(self.regions):
                every = region.graph.every_result
                for position in region.graph.flow(every if region.decides else every & wanted):
                    reached.add((number, position))
                    result = region.results[position]
                    wanted |= set() if result is None else {result}
        yield from _nodes(self.selects)
        for number, position in reached:
            yield from _nodes(self.regions[number].operands[position])

    def written(self) -> Iterator[Node]:
        """Arguments that it writes to."""
        for region in self.regions:
            yield from region.operands_of(region.graph.writers)

    def memory(self, result: int | None, known: Mapping[Node, frozenset[Node]]) -> set[Node]:
        """The memory that a result, or any result, may share.

        Args:
            result: Which one; None for any.
            known: The memory of the arguments.
        """
        found: set[Node] = set()
        for region in self.regions:
            if any(one is not None for one in region.results):  # iterations may exchange memory
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
    """Memory, side effects and the flow of values in one graph.

    Attributes:
        inputs: Its placeholders.
        results: What it returns, one by one.
        every_result: All positions in ``results``.
        effects: Nodes with a side effect other than a write.
        writers: Nodes that write to a piece of memory. A piece is known by the node that made it.
    """

    def __init__(self, module: torch.fx.GraphModule, graphs: dict[int, _Graph]) -> None:
        """Look at every node once.

        Args:
            module: The graph.
            graphs: Graphs that were looked at before, by the identity of their module.
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
            self._look_at(node, graphs)

    def flow(self, results: frozenset[int]) -> frozenset[int]:
        """Positions of inputs that these results, writes to inputs and side effects follow from."""
        if results not in self._flows:
            live = self._live(results)
            self._flows[results] = frozenset(
                position for position, node in enumerate(self.inputs) if node in live
            )
        return self._flows[results]

    def memory_of(self, value: Any) -> frozenset[Node]:
        """The pieces of memory that a result lies in."""
        return frozenset(base for node in _nodes(value) for base in self._memory[node])

    def _look_at(self, node: Node, graphs: dict[int, _Graph]) -> None:
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
        """The pieces of memory that the value of a node may lie in."""
        whole, result = _item(node)
        call = self._calls.get(node) or self._calls.get(whole or node)
        if call is not None:
            found = call.memory(result, self._memory)
        else:
            found = {base for one in aliased_inputs(node) for base in self._memory[one]}
        return frozenset(found) or frozenset({node})

    def _live(self, results: frozenset[int]) -> Mapping[Node, frozenset[int]]:
        """Live nodes; of calls of graphs, which of their results are."""
        live: dict[Node, frozenset[int]] = {}
        seen = set[Node]()
        waiting = [
            *(self._asked(n) for position in results for n in _nodes(self.results[position])),
            *((node, _NONE) for node in self.effects),
            *self._writers_of(base for base in self.writers if base.op in _OUTSIDE),
        ]
        while waiting:
            node, asked = waiting.pop()
            if node in live and asked <= live[node]:
                continue
            live[node] = live.get(node, _NONE) | asked
            waiting += self._needed(node, live[node])
            new = self._seen_by(node, live[node]) - seen
            seen |= new
            waiting += self._writers_of(new)
        return live

    def _seen_by(self, node: Node, results: frozenset[int]) -> frozenset[Node]:
        """The pieces of memory that these results of a live node lie in; all, if it is no call."""
        call = self._calls.get(node)
        if call is None:
            return self._memory[node]
        pieces = (call.memory(result, self._memory) for result in results)
        return frozenset(base for piece in pieces for base in piece)

    def _writers_of(self, bases: Iterable[Node]) -> list[tuple[Node, frozenset[int]]]:
        return [(node, _NONE) for base in bases for node in self.writers.get(base, ())]

    def _asked(self, node: Node) -> tuple[Node, frozenset[int]]:
        """A node whose whole value is needed."""
        call = self._calls.get(node)
        return node, call.regions[-1].graph.every_result if call else _NONE

    def _needed(self, node: Node, results: frozenset[int]) -> list[tuple[Node, frozenset[int]]]:
        """Nodes whose values a live node uses."""
        whole, result = _item(node)
        if whole in self._calls and whole is not None and result is not None:
            return [(whole, frozenset({result}))]
        if whole is not None and result is not None and _schema_name(whole) in _EACH_OF_ITS_OWN:
            tensors: Any = whole.args[0]
            return [self._asked(one) for one in _nodes(tensors[result])]
        call = self._calls.get(node)
        needed = call.needed(results) if call else self._read(node)
        return [self._asked(one) for one in needed]

    def _read(self, node: Node) -> list[Node]:
        """Arguments whose elements the value of a node, or what it leaves in memory, follows from.

        What a call leaves in memory of the caller counts as read: it is state.
        """
        over = _overwritten(node)
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
    """The list and the position of which a node takes an item."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return node.args[0], node.args[1] if isinstance(node.args[1], int) else None
    return None, None


def _has_effect(node: Node) -> bool:
    """Whether a call has a side effect other than writes to memory that its schema names."""
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target) not in _PURE
    if isinstance(node.target, OpOverload):
        ours = node.target.namespace in {"aten", "prims"}
        if ours and (node.target._schema.is_mutable or _reads_only_metadata(node)):  # noqa: SLF001
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
    return bool(node.is_impure())


def _read(node: Node) -> list[Node]:
    """Arguments whose elements the value of a node follows from."""
    if _is_empty(node):
        return []
    skipped = _only_metadata(node)
    return [one for one in node.all_input_nodes if one is not skipped]


def _overwritten(node: Node) -> Node | None:
    """The argument that a call overwrites without reading it."""
    over = node.args[0] if _schema_name(node) in _OVERWRITES else None
    if not isinstance(over, Node) or over in _nodes(node.args[1:]) or _has_shape_of_data(over):
        return None
    return over


def _has_shape_of_data(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or bool(free_unbacked_symbols(value))


def _reads_only_metadata(node: Node) -> bool:
    return _only_metadata(node) is not None


def _only_metadata(node: Node) -> Node | None:
    """The argument of a call that counts only by its shape, dtype and device.

    A shape that follows from data (of ``nonzero``, or after ``item``) carries values.
    """
    name = _ONLY_METADATA.get(_schema_name(node))
    for argument, value in arguments_of(node) if name else ():
        if argument.name == name and isinstance(value, Node):
            once = _nodes([*node.args, *node.kwargs.values()]).count(value) == 1
            return value if once and not _has_shape_of_data(value) else None
    return None


def _is_empty(node: Node) -> bool:
    """Whether a value has no elements, whatever the inputs are."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(
        isinstance(size, int) and not size for size in value.shape
    )


def _call(node: Node, graphs: dict[int, _Graph]) -> _Call | None:
    """A call of a higher-order op, if it is known which argument goes where."""
    if not isinstance(node.target, HigherOrderOperator) or node.kwargs.keys() - _OPTIONS:
        return None
    layout = _LAYOUTS.get(str(node.target))
    if layout is None:
        return None
    try:
        regions, selects = layout(*node.args)
    except (TypeError, ValueError):
        return None  # this torch passes other arguments
    found = []
    for body, operands, results, decides in regions:
        module = getattr(node.graph.owning_module, str(getattr(body, "target", "")), None)
        if not isinstance(module, torch.fx.GraphModule):
            return None
        if id(module) not in graphs:
            graphs[id(module)] = _Graph(module, graphs)
        graph = graphs[id(module)]
        if not len(operands) == len(results) == len(graph.inputs):
            return None
        found.append(_Region(graph, tuple(operands), tuple(results), decides))
    return _Call(node, tuple(found), selects)


# MERGED mutation: Which inputs of a graph its ops write to, directly, through views, or inside
# submodules.
#
# ``torch.export`` leaves in-place ops as they were written, and puts regions such as
# ``torch.no_grad()`` into submodules; a decomposed program lists what it writes back in its
# signature. Where an exact answer would need more than schemas, the answer errs towards
# "written": that costs a copy, the other error would change a caller's tensors.

_IN_TRAINING = {
    "aten::batch_norm": "training",
    "aten::native_batch_norm": "training",
    "aten::cudnn_batch_norm": "training",
    "aten::miopen_batch_norm": "training",
    "aten::instance_norm": "use_input_stats",
}
"""Ops that update ``running_mean`` and ``running_var`` unless this flag is False.

Their schemas in ``aten/src/ATen/native/native_functions.yaml`` do not say so.
"""


_QUIET_ALIASES = frozenset(
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
"""Ops that may give back their input itself, or a view of it, which their schemas do not say."""


def mutated_placeholders(program: ExportedProgram) -> set[str]:
    """Names of the placeholders of a program that it changes in place."""
    signature = program.graph_signature
    by_target = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target}
    listed = [
        *signature.buffers_to_mutate.values(),
        *getattr(signature, "parameters_to_mutate", {}).values(),
    ]
    return {by_target[fqn] for fqn in listed} | _written(program.graph_module)


def submodules_of(node: torch.fx.Node) -> list[torch.fx.GraphModule]:
    """Graphs that a node calls: the branches of a condition, the body of a region."""
    owner = node.graph.owning_module
    found = (
        getattr(owner, str(argument.target), None)
        for argument in node.all_input_nodes
        if argument.op == "get_attr"
    )
    return [module for module in found if isinstance(module, torch.fx.GraphModule)]


def _written(module: torch.fx.GraphModule) -> set[str]:
    found: set[str] = set()
    for node in module.graph.nodes:
        for argument in written_arguments(node):
            found |= _roots(argument)
    return found


def written_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Arguments that a call writes to."""
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if isinstance(v, torch.fx.Node))
    yield from _running_statistics(node)
    if any(_written(module) for module in submodules_of(node)):
        yield from node.all_input_nodes


def _running_statistics(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    flag = _IN_TRAINING.get(getattr(getattr(node.target, "_schema", None), "name", ""))
    if flag is None:
        return
    given = {argument.name: value for argument, value in arguments_of(node)}
    if given.get(flag) is not False:
        names = ("running_mean", "running_var")
        yield from (given[n] for n in names if isinstance(given.get(n), torch.fx.Node))


def arguments_of(node: torch.fx.Node) -> Iterator[tuple[Any, Any]]:
    """(schema argument, value) of a call of an op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def aliased_inputs(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Nodes whose memory the result of a node may share."""
    quiet = getattr(getattr(node.target, "_schema", None), "name", "") in _QUIET_ALIASES
    if quiet or node.target is operator.getitem or submodules_of(node):
        yield from node.all_input_nodes
    for argument, value in arguments_of(node):
        if argument.alias_info is not None and isinstance(value, torch.fx.Node):
            yield value


def _roots(node: torch.fx.Node) -> set[str]:
    """Placeholders whose memory a node may share."""
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
