"""What a place in a memory holds, from what was seen in other places of it.

Values are seen as tensors of many shapes that have bytes in common: views, parts, wholes. When one
is written to, the whole around it is another value from then on; when one is read that was never
seen as such, it is a part of a whole that was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.model import Tensor
from refitkit.program.dtypes import dtype_name
from refitkit.recipe.origins import Call, Origin, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.recipe.memories import Geometry, Memory
    from refitkit.recipe.origins import LeafOrigin, Literal

_SEPARATE = "it was made where no op is seen"
_aten = torch.ops.aten


def lying(node: LeafOrigin | Literal | Unknown | Call, output: int, geometry: Geometry) -> Origin:
    """Where a tensor comes from that lies in memory like this."""
    return Origin(node, output, geometry.contiguous, geometry.turned)


def write(memory: Memory, geometry: Geometry, value: Origin) -> None:
    """Note that a place was written to."""
    whole = None if any(geometry.lazy) else max(_around(memory, geometry), default=None, key=_size)
    forget(memory, geometry)
    if whole is not None and whole[0].size > geometry.size:
        outer, base = whole
        offset = _offset(outer, geometry)
        arguments = (base, value, list(geometry.shape), list(geometry.stride), offset)
        op = _aten.as_strided_scatter.default
        memory.values[outer] = _made(memory, op, arguments, (base, value), outer)
    memory.values[geometry] = value


def forget(memory: Memory, geometry: Geometry) -> None:
    """Note that a place holds another value, which nobody knows."""
    memory.values = {at: value for at, value in memory.values.items() if not at.meets(geometry)}


def seen_otherwise(memory: Memory, geometry: Geometry) -> Origin:
    """A value that was not seen in this geometry: a part of one that was, or unknown."""
    found = None if any(geometry.lazy) else min(_around(memory, geometry), default=None, key=_size)
    if found is None:
        return lying(Unknown(_SEPARATE), 0, geometry)
    outer, base = found
    flat = geometry.permuted(geometry.order)
    if (outer.start, outer.size) != (geometry.start, geometry.size) or not flat.contiguous:
        place = list(geometry.shape), list(geometry.stride), _offset(outer, geometry)
        return _made(memory, _aten.as_strided.default, (base, *place), (base,), geometry)
    if outer.shape != flat.shape:
        base = _made(memory, _aten.view.default, (base, list(flat.shape)), (base,), flat)
    return _permuted(memory, base, flat, tuple(map(geometry.order.index, range(len(flat.shape)))))


def _around(memory: Memory, wanted: Geometry) -> Iterator[tuple[Geometry, Origin]]:
    """Values without gaps that contain a place, in the order of memory."""
    for geometry, value in memory.values.items():
        if geometry.contains(wanted) and not any(geometry.lazy) and geometry.size:
            order = geometry.order
            flat = geometry.permuted(order)
            if flat.contiguous:
                yield flat, _permuted(memory, value, geometry, order)


def _permuted(memory: Memory, value: Origin, geometry: Geometry, order: tuple[int, ...]) -> Origin:
    if order == tuple(range(len(order))):
        return value
    found = geometry.permuted(order)
    return _made(memory, _aten.permute.default, (value, list(order)), (value,), found)


def _made(
    memory: Memory, op: Any, args: tuple[Any, ...], inputs: tuple[Origin, ...], found: Geometry
) -> Origin:
    facts = (Tensor(dtype=dtype_name(found.dtype), shape=found.shape),)
    return lying(Call(op, args, {}, facts, memory.device, inputs), 0, found)


def _size(found: tuple[Geometry, Origin]) -> int:
    return found[0].size


def _offset(outer: Geometry, geometry: Geometry) -> int:
    return (geometry.start - outer.start) // geometry.dtype.itemsize
