"""What a kept program may name, before torch turns its text into a graph.

Torch's deserializer (``torch/_export/serde/serialize.py``, 2.11 to 2.14) looks up the target of a
node as attributes of ``torch``, by which ``os.system`` can be reached; it has sympy evaluate sizes
as Python; and ``ExportedProgram.module`` compiles guards that are code. A graph comes from a file.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._sympy import functions

if TYPE_CHECKING:
    from collections.abc import Iterator

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
