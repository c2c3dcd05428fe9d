"""Leaves that share memory with other leaves, and how their values follow from those.

``load_state_dict`` writes into the memory of parameters and buffers. A tensor that is a view of
that memory (``self.q = self.qkv.data[:4]``) changes with it in the eager model, although no
state_dict contains it. ``torch.export`` makes it a separate leaf. This module recognizes it by its
address.

:func:`with_overlaps` finds these leaves in a program; :func:`lost_views` finds constants that may
have been views before a program was saved. :func:`derive` computes the value of a leaf from other
leaves, or records that computation. Leaves of equal address, shape and strides are ties
(:mod:`refitkit.program.facts`), not views.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from refitkit.errors import Problem
from refitkit.model import ITEM_BYTES, LeafKind, Overlap
from refitkit.program.bits import dense_strides, same_bits
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram

    from refitkit.model import Leaf

T = TypeVar("T")
_MAX_DEPTH = 3  # a view of a leaf with parts, which may be views: no program nests deeper
_MIN_ELEMENTS = 4  # the bits of fewer elements can be equal by chance


# -- finding shared memory --------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """The memory of a leaf.

    Attributes:
        leaf: The leaf.
        tensor: Tensor of the leaf.
        space: Address space: the memory of a device, or one storage without data.
        start: Address of the first byte.
        end: Address after the last byte.
    """

    leaf: Leaf
    tensor: torch.Tensor
    space: object
    start: int
    end: int

    @property
    def same(self) -> object:
        """A key that is equal for all names of one tensor."""
        return self.space, self.start, self.tensor.dtype, self.tensor.shape, self.tensor.stride()

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions in memory order, slowest first."""
        strides, shape = self.tensor.stride(), self.tensor.shape
        return tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], -shape[d], d)))

    @property
    def dense(self) -> bool:
        """Whether the elements have neither gaps nor overlaps."""
        dense = dense_strides(self.tensor.shape, self.order)
        sizes = zip(self.tensor.stride(), dense, self.tensor.shape, strict=True)
        # the stride of a dimension of size 1 means nothing
        return all(found == right for found, right, size in sizes if size > 1)

    @property
    def lazy(self) -> bool:
        """Whether torch has deferred the negation or conjugation of the elements."""
        return self.tensor.is_conj() or self.tensor.is_neg()

    def intersects(self, other: _Region) -> bool:
        """Return whether both regions have a byte in common."""
        if self.space != other.space or self.end <= other.start or other.end <= self.start:
            return False
        if self.dense or other.dense:
            return True  # a region with gaps still has an element at its start and at its end
        return _have_common_elements(self, other)

    def contains(self, other: _Region) -> bool:
        """Return whether this region has no gaps and contains all elements of another one."""
        width = other.tensor.dtype.itemsize
        return (
            self.space == other.space
            and self.start <= other.start
            and other.end <= self.end
            and self.dense
            and not self.lazy
            and not other.lazy
            and not (other.start - self.start) % width
            and not self.tensor.nbytes % width
        )

    def overlap(self, fqn: str, part: _Region) -> Overlap:
        """Return the position of a part in this region.

        Args:
            fqn: FQN of the other leaf, which the result names.
            part: Region that this one contains.
        """
        width = part.tensor.dtype.itemsize
        strides = zip(part.tensor.stride(), part.tensor.shape, strict=True)
        return Overlap(
            fqn=fqn,
            order=self.order,
            stride=tuple(step if size > 1 else 1 for step, size in strides),
            offset=(part.start - self.start) // width,
        )


def with_overlaps(
    leaves: Sequence[Leaf], tensors: Mapping[str, torch.Tensor]
) -> tuple[tuple[Leaf, ...], tuple[Problem, ...]]:
    """Return the leaves with their overlaps, and problems of those that no recipe can follow.

    Args:
        leaves: All leaves of a program.
        tensors: Tensors of the leaves, by FQN.

    Returns:
        The leaves in their order, with ``view`` and ``parts`` set. A leaf is ``used`` if one of its
        views is. A problem names both leaves.
    """
    regions = {leaf.fqn: region for leaf in leaves if (region := _region(leaf, tensors[leaf.fqn]))}
    found, problems = _derived_leaves(_neighbours(list(regions.values())))
    read = {leaf.fqn for leaf in found.values() if leaf.used}
    for _ in range(_MAX_DEPTH):
        read |= {base for fqn in read if fqn in found for base in found[fqn].bases}
    shared = (found.get(leaf.fqn, leaf) for leaf in leaves)
    return tuple(
        leaf.model_copy(update={"used": True}) if leaf.fqn in read and not leaf.used else leaf
        for leaf in shared
    ), tuple(problems)


def _region(leaf: Leaf, tensor: torch.Tensor) -> _Region | None:
    """Return the memory of a leaf; None if the tensor is empty or has no strides."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.numel():
        return None
    try:
        no_data = tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.data_ptr()
    except RuntimeError:  # a tensor subclass that wraps other tensors has no address
        return None
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    nbytes = (1 + sum((n - 1) * int(step) for n, step in sizes)) * tensor.dtype.itemsize
    space: object
    if no_data:
        storage = tensor.untyped_storage()._cdata  # noqa: SLF001 - it has no other name
        space, start = ("storage", storage), int(tensor.storage_offset()) * tensor.dtype.itemsize
    else:
        space, start = ("memory", str(tensor.device)), tensor.data_ptr()
    return _Region(leaf, tensor, space, start, start + nbytes)


def _neighbours(regions: list[_Region]) -> dict[str, tuple[_Region, list[_Region]]]:
    """Return, by FQN, leaves that share memory with others, and these others.

    Other names of the same tensor do not count.
    """
    regions = sorted(regions, key=lambda one: (str(one.space), one.start))
    found: dict[str, tuple[_Region, list[_Region]]] = {}
    # a sweep over start addresses: ``active`` has the regions that end after the present start
    active: list[_Region] = []
    for region in regions:
        active = [one for one in active if one.space == region.space and one.end > region.start]
        for one in active:
            if one.same != region.same and one.intersects(region):
                found.setdefault(one.leaf.fqn, (one, []))[1].append(region)
                found.setdefault(region.leaf.fqn, (region, []))[1].append(one)
        active.append(region)
    return found


def _derived_leaves(
    neighbours: Mapping[str, tuple[_Region, list[_Region]]],
) -> tuple[dict[str, Leaf], list[Problem]]:
    """Return the leaves that follow from others, by FQN, and problems of those that cannot."""
    found: dict[str, Leaf] = {}
    problems: list[Problem] = []
    for region, others in sorted(neighbours.values(), key=lambda one: _rank(one[0])):
        leaf = region.leaf
        faults = [
            Problem(leaf.fqn, "shares memory with a buffer that the program writes", other.leaf.fqn)
            for other in others
            if other.leaf.mutated and leaf.used
        ]
        weights = [
            other
            for other in others
            if other.leaf.persistent and (not leaf.persistent or _rank(other) < _rank(region))
        ]
        changes = None if faults else _overlaps_of(region, weights, others, found)
        if changes:
            found[leaf.fqn] = leaf.model_copy(update=changes)
        elif weights and leaf.used and not faults:
            names = ", ".join(sorted(other.leaf.fqn for other in weights))
            faults = [Problem(leaf.fqn, "shares memory in a way that no recipe can follow", names)]
        problems += faults
    return found, problems


def _overlaps_of(
    region: _Region, weights: list[_Region], others: list[_Region], found: Mapping[str, Leaf]
) -> dict[str, Any] | None:
    """Return ``view`` or ``parts`` of a leaf; None if it does not follow from the weights.

    Args:
        region: Memory of the leaf.
        weights: Overlapping regions of persistent leaves that rank before it.
        others: All overlapping regions.
        found: Derived leaves that were found so far, by FQN.
    """
    if not weights:
        return None
    # a view of a weight, or of a constant that consists of weights
    wholes = [other for other in weights if other.contains(region)] or [
        other
        for other in others
        if other.leaf.fqn in found and found[other.leaf.fqn].parts and other.contains(region)
    ]
    if wholes:
        whole = min(wholes, key=_rank)
        return {"view": whole.overlap(whole.leaf.fqn, region)}
    if not region.leaf.persistent and all(_is_part(region, other) for other in weights):
        return {"parts": tuple(region.overlap(one.leaf.fqn, one) for one in weights)}
    return None


def _rank(region: _Region) -> tuple[int, bool, int, str]:
    """Return a sort key that puts wholes before parts: larger, then parameters, then dense ones."""
    is_parameter = region.leaf.kind is LeafKind.PARAMETER
    return -(region.end - region.start), not is_parameter, not region.dense, region.leaf.fqn


def _is_part(whole: _Region, part: _Region) -> bool:
    return whole.contains(part) and whole.tensor.dtype == part.tensor.dtype


def _have_common_elements(a: _Region, b: _Region) -> bool:
    """Return whether two tensors with gaps share an element."""
    # mark the bytes of the first one and look for marks under the second one
    start = min(a.start, b.start)
    marks = torch.zeros(max(a.end, b.end) - start, dtype=torch.uint8)
    for region, seen in ((a, False), (b, True)):
        width = region.tensor.dtype.itemsize
        shape = (*region.tensor.shape, width)
        stride = (*(step * width for step in region.tensor.stride()), 1)
        place = marks.as_strided(shape, stride, region.start - start)
        if seen:
            return bool(place.any())
        place.fill_(1)
    return False


def overlap_problems(leaves: Sequence[Leaf]) -> Iterator[Problem]:
    """Yield overlaps that no program can have. Check leaves of a file before their use."""
    by_fqn = {leaf.fqn: leaf for leaf in leaves}
    for leaf in leaves:
        for overlap in (*([leaf.view] if leaf.view else []), *leaf.parts):
            other = by_fqn.get(overlap.fqn)
            if other is None:
                yield Problem(leaf.fqn, "shares memory with an unknown leaf", overlap.fqn)
                continue
            whole, part = (other, leaf) if overlap is leaf.view else (leaf, other)
            if not _fits(overlap, whole, part):
                yield Problem(leaf.fqn, "lies outside the memory that it shares", overlap.fqn)
        if leaf.view and leaf.parts:
            yield Problem(leaf.fqn, "is a view and has parts")
    if any(_is_deep(leaf, by_fqn) for leaf in leaves):
        yield Problem("leaves", "follow from one another in a circle")


def _fits(overlap: Overlap, whole: Leaf, part: Leaf) -> bool:
    if sorted(overlap.order) != list(range(len(whole.shape))):
        return False
    if len(overlap.stride) != len(part.shape):
        return False
    steps = zip(part.shape, overlap.stride, strict=True)
    last = overlap.offset + sum((size - 1) * step for size, step in steps)
    room = prod(whole.shape) * ITEM_BYTES[whole.dtype]
    return min(part.shape, default=1) > 0 and (last + 1) * ITEM_BYTES[part.dtype] <= room


def _is_deep(leaf: Leaf, leaves: Mapping[str, Leaf], depth: int = 0) -> bool:
    """Return whether a chain of bases is longer than in any program, or endless."""
    bases = (leaves[base] for base in leaf.bases if base in leaves)
    return depth > _MAX_DEPTH or any(_is_deep(base, leaves, depth + 1) for base in bases)


# -- views that a file has lost ---------------------------------------------------------------


def lost_views(
    program: ExportedProgram,
    leaves: Sequence[Leaf],
    ties: Sequence[Sequence[str]],
    tensors: Mapping[str, torch.Tensor],
) -> Iterator[Problem]:
    """Yield a problem for each constant of a loaded program that may have been a view of a weight.

    ``torch.export.save`` (2.11 to 2.14) writes the storage of each constant separately, so a view
    is loaded as a copy. The storage of the copy still has the same bits as that of the weight.

    Args:
        program: Program. Nothing is yielded if it was not loaded from a file.
        leaves: Leaves of the program.
        ties: Classes of FQNs that are one tensor.
        tensors: Tensors of the program, by FQN.
    """
    if not _is_loaded(program):
        return
    weights = {leaf.fqn for leaf in leaves if leaf.persistent}
    tied = {name for tie in ties if not weights.isdisjoint(tie) for name in tie}
    for leaf in leaves:
        tensor = tensors[leaf.fqn]
        if not leaf.kept or leaf.derived or leaf.fqn in tied or not leaf.used:
            continue
        region = _region(leaf, tensor)
        if region is None:
            continue
        memory = _memory(tensor)
        # a tensor that uses only some of its storage is certainly a view of something
        is_view = not region.dense or region.end - region.start < memory.numel()
        found = [
            name
            for name in weights
            if same_bits(memory, _memory(tensors[name]))
            and (is_view or _is_distinctive(tensors[name]))
        ]
        if found and memory.numel() >= _MIN_ELEMENTS * tensor.dtype.itemsize:
            names = ", ".join(sorted(found))
            yield Problem(leaf.fqn, "has the same bits as the memory of a weight", names)


def _is_loaded(program: ExportedProgram) -> bool:
    """Return whether a program was loaded from a file."""
    # only torch's deserializer sets a value at the output node
    return any(node.op == "output" and "val" in node.meta for node in program.graph.nodes)


def _is_distinctive(tensor: torch.Tensor) -> bool:
    """Return whether equal bits prove a relation, unlike those of zeros, ones and indices."""
    varied = tensor.is_floating_point() and tensor.numel() > 0
    return varied and bool((tensor != tensor.reshape(-1)[0]).any())


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return all bytes of a tensor's storage as flat uint8."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


# -- computing derived leaves -----------------------------------------------------------------


Emit: TypeAlias = "Callable[[str, tuple[Any, ...], str, tuple[int, ...]], T]"
"""A function that runs or records one call of an aten op, and returns its result.

Its arguments are the name of the overload, the arguments of the call, and dtype and shape of the
result.
"""


def derive(
    leaf: Leaf,
    leaves: Mapping[str, Leaf],
    value_of: Callable[[str], T],
    kept: Callable[[str], T],
    emit: Emit[T],
) -> T:
    """Return the value of a leaf that follows from others, in the dtype and shape of the leaf.

    Args:
        leaf: Leaf with ``view`` or ``parts``.
        leaves: All leaves, by FQN.
        value_of: Returns the value of another leaf.
        kept: Returns the stored value of a leaf with parts, for elements that no part covers.
        emit: Runs or records calls.
    """
    if leaf.view is not None:
        base = leaves[leaf.view.fqn]
        flat = _flat(value_of(base.fqn), base, leaf.view.order, emit)
        if base.dtype != leaf.dtype:
            count = prod(base.shape) * ITEM_BYTES[base.dtype] // ITEM_BYTES[leaf.dtype]
            flat = emit("aten.view.dtype", (flat, dtype_of(leaf.dtype)), leaf.dtype, (count,))
        where = (leaf.shape, leaf.view.stride, leaf.view.offset)
        return emit("aten.as_strided.default", (flat, *where), leaf.dtype, leaf.shape)
    order = leaf.parts[0].order
    flat = _flat(kept(leaf.fqn), leaf, order, emit)
    for part in leaf.parts:
        where = (leaves[part.fqn].shape, part.stride, part.offset)
        scattered = (flat, value_of(part.fqn), *where)
        shape = (prod(leaf.shape),)
        flat = emit("aten.as_strided_scatter.default", scattered, leaf.dtype, shape)
    where = (leaf.shape, dense_strides(torch.Size(leaf.shape), order), 0)
    return emit("aten.as_strided.default", (flat, *where), leaf.dtype, leaf.shape)


def _flat(value: T, leaf: Leaf, order: tuple[int, ...], emit: Emit[T]) -> T:
    """Return all elements in one dimension, in the memory order of the program."""
    if order != tuple(range(len(order))):
        shape = tuple(leaf.shape[dim] for dim in order)
        value = emit("aten.permute.default", (value, order), leaf.dtype, shape)
    else:
        shape = leaf.shape
    value = emit("aten.contiguous.default", (value,), leaf.dtype, shape)
    return emit("aten.reshape.default", (value, (prod(shape),)), leaf.dtype, (prod(shape),))


def on_shared_memory(
    leaves: Mapping[str, Leaf], values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return values of leaves that share memory in the same way as in the program.

    Args:
        leaves: All leaves, by FQN.
        values: Values of all leaves, by FQN; those of derived leaves must be up to date.

    Returns:
        New values by FQN, only for leaves that share memory.
    """
    found: dict[str, torch.Tensor] = {}
    # the order matters: wholes that consist of parts, then bases of views, then the views
    for leaf in leaves.values():
        if leaf.parts:
            order = leaf.parts[0].order
            found[leaf.fqn] = whole = _laid_out(values[leaf.fqn], order, copy=True)
            flat = whole.permute(order).reshape(-1)
            for part in leaf.parts:
                found[part.fqn] = flat.as_strided(
                    leaves[part.fqn].shape, part.stride, part.offset + flat.storage_offset()
                )
    for leaf in leaves.values():
        if leaf.view is not None and leaf.view.fqn not in found:
            found[leaf.view.fqn] = _laid_out(values[leaf.view.fqn], leaf.view.order)
    for leaf in sorted(leaves.values(), key=lambda one: not one.persistent):
        if leaf.view is not None and leaf.fqn not in found:
            found[leaf.fqn] = derived_value(leaf, leaves, found.__getitem__, found.__getitem__)
    return found


def _laid_out(value: torch.Tensor, order: tuple[int, ...], *, copy: bool = False) -> torch.Tensor:
    """Return the same values without gaps in memory, with dimensions in this memory order."""
    moved = value.detach().permute(order)
    moved = moved.clone(memory_format=torch.contiguous_format) if copy else moved.contiguous()
    return moved.permute([order.index(dim) for dim in range(len(order))])


def derived_value(
    leaf: Leaf,
    leaves: Mapping[str, Leaf],
    value_of: Callable[[str], torch.Tensor],
    kept: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    """Return the value of a leaf that follows from others; see :func:`derive`.

    The result is a view of the other leaf's value if that has the memory order of the program.
    """
    return derive(leaf, leaves, value_of, kept, _run)


def _run(
    op: str,
    args: tuple[Any, ...],
    dtype: str,  # noqa: ARG001 - part of Emit
    shape: tuple[int, ...],  # noqa: ARG001 - part of Emit
) -> torch.Tensor:
    """Run one call of an aten op; see ``Emit``."""
    _, name, overload = op.split(".")
    first, *others = args
    first = first.resolve_conj().resolve_neg()
    if name == "as_strided":  # torch counts its offset from the start of the storage
        others[-1] += first.storage_offset()
    found: torch.Tensor = getattr(getattr(torch.ops.aten, name), overload)(first, *others)
    return found
