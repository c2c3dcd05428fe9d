"""A program that asks for each of its tensors when it needs it, and lets go of it after that.

The module of an ``ExportedProgram`` fetches all its parameters and buffers before it computes
anything (``torch/export/_unlift.py``, 2.11 to 2.14), so a whole set of weights is in memory while
it runs. The code that ``torch.fx`` writes for a graph forgets each value after its last use; so all
it takes is to fetch a tensor where it is used first.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator

from refitkit.program.default_dtype import keep_default_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    

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

    def run(self, give: Callable[[str], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
