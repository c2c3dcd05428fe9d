"""Read pickles as plain data. No global that a pickle names is imported or called.

``pickle.Unpickler`` with a restricted ``find_class`` still calls the classes that it finds, with
arguments that the file chooses, and hashes all keys that the file nests. This reader interprets the
opcodes itself. A global becomes a :class:`Global`, a call of it becomes an :class:`Instance`, and
only scalars can be keys. So a hostile pickle is refused at worst.

``read_pickle`` is the entry point. ``_Machine`` has a method for each kind of opcode, and the
tables at the end map opcodes to them.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


# these keep a small hostile pickle from taking much time or memory
_OPCODE_LIMIT = 1 << 20
_DEPTH_LIMIT = 64
_NODE_LIMIT = 1 << 20
_MARK = object()


class PickleRefusedError(Exception):
    """The pickle is damaged, or contains something forbidden. Callers raise a typed error."""


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names.

    Attributes:
        module: Name of the module.
        name: Qualified name in the module.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Instance:
    """A call that a pickle contains. It is never run.

    Attributes:
        of: The global to call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        state: State that the pickle sets on the result. None if it sets none.
    """

    of: Global
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None


def read_pickle(data: bytes, admitted: Collection[tuple[str, str]]) -> Any:
    """The content of a pickle of protocol 2 to 5, as plain data, ``Global`` and ``Instance``.

    Args:
        data: The whole pickle.
        admitted: Globals that it may name, as ``(module, qualified name)``.

    Raises:
        PickleRefusedError: The pickle is truncated or has data after its end, names another
            global, contains a forbidden opcode, is nested too deeply, or is too large.
    """
    machine = _Machine(admitted)
    end = -1
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count > _OPCODE_LIMIT:
                raise PickleRefusedError("it has too many opcodes")
            end = position or 0
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        text = str(exc).partition("\n")[0][:200]
        raise PickleRefusedError(f"it is damaged: {type(exc).__name__}: {text}") from exc
    # genops stops at the STOP opcode and ignores data after it
    if end != len(data) - 1:
        raise PickleRefusedError("it has data after its end")
    if len(machine.stack) != 1:
        raise PickleRefusedError("it is damaged: it does not end with one value")
    _check_size(machine.stack[0])
    return machine.stack[0]


def _check_size(value: Any) -> None:
    """Refuse values that are small in the file, but vast when callers walk them."""
    # counts shared parts each time, and so also finds cycles
    count = 0
    pending = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        count += 1
        if depth > _DEPTH_LIMIT or count > _NODE_LIMIT:
            raise PickleRefusedError("it is nested too deeply, or too large when unfolded")
        pending += [(part, depth + 1) for part in _parts(one)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [*value]
    if isinstance(value, Instance):
        return [value.args, value.kwargs, value.state]
    return []


class _Machine:
    """The part of the pickle machine that plain data needs. See ``pickletools`` for the opcodes."""

    def __init__(self, admitted: Collection[tuple[str, str]]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.admitted = admitted

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in _IGNORED:
            raise PickleRefusedError(f"it has the opcode {opcode}")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefusedError("it is damaged: a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise PickleRefusedError(f"it is damaged: no {kind.__name__} where one should be")
        return self.stack[-1]

    def pop_tuple(self, length: int) -> None:
        values = [self.pop() for _ in range(length)][::-1]
        self.stack.append(tuple(values))

    def pop_mark_into(self, kind: Callable[[list[Any]], Any]) -> None:
        self.stack.append(kind(self.pop_to_mark()))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def push_global(self, module: Any, name: Any) -> None:
        if (module, name) not in self.admitted:
            raise PickleRefusedError(f"it names {module!s:.100}.{name!s:.100}")
        self.stack.append(Global(module, name))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleRefusedError("it is damaged: a global without a name")
        self.push_global(module, name)

    def call(self, *, keywords: bool = False) -> None:
        kwargs = self.pop() if keywords else {}
        args, of = self.pop(), self.pop()
        if not (isinstance(of, Global) and isinstance(args, tuple) and isinstance(kwargs, dict)):
            raise PickleRefusedError("it calls a value that is not a global")
        self.stack.append(Instance(of, args, kwargs))

    def build(self) -> None:
        state = self.pop()
        instance = self.top(Instance)
        # a memo can refer to one object twice, so a pickle could set its state twice
        if instance.state is not None:
            raise PickleRefusedError("it is damaged: one object with two states")
        instance.state = state

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def add(self, values: list[Any]) -> None:
        self.top(set).update(_keys(values))

    def set_items(self, items: list[Any]) -> None:
        keys = _keys(items[::2])
        self.top(dict).update(zip(keys, items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])


def _keys(values: list[Any]) -> list[Any]:
    """The given keys or set members, if all are scalars."""
    # a nested tuple can take exponential time to hash, because its parts may be shared
    for value in values:
        if value is not None and not isinstance(value, _KEY_TYPES):
            raise PickleRefusedError(f"it has a key or set member of type {type(value).__name__}")
    return values


_KEY_TYPES = (str, bytes, int, float, Global, Instance)
_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    }
)
# functions, because lists, dictionaries and sets are filled later
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": lambda m, _: m.pop_mark_into(tuple),
    "TUPLE1": lambda m, _: m.pop_tuple(1),
    "TUPLE2": lambda m, _: m.pop_tuple(2),
    "TUPLE3": lambda m, _: m.pop_tuple(3),
    "FROZENSET": lambda m, _: m.pop_mark_into(lambda values: frozenset(_keys(values))),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.add(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_item(),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, names: m.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "NEWOBJ": lambda m, _: m.call(),
    "NEWOBJ_EX": lambda m, _: m.call(keywords=True),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}
