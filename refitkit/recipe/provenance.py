"""Where the present value of every tensor comes from, as far as anybody saw it.

Who records tells what ops gave and wrote; who watches arrays and storages tells what became of
them. Tensors are known by their memory (:mod:`refitkit.recipe.memories`).
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch

from refitkit.program.bits import same_bits
from refitkit.recipe import memories
from refitkit.recipe.memories import (
    Geometry,
    Memories,
    Memory,
    address_of,
    geometry_of,
    is_followed,
    storage_address,
)
from refitkit.recipe.origins import Call, LeafOrigin, Literal, Origin, Unknown, leaves_below

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import FrameType

    import numpy as np

    from refitkit.recipe.memories import Loans
    from refitkit.recipe.origins import Escape


Place: TypeAlias = tuple[Memory, Geometry]
"""A memory, and how a tensor lies in it."""


class Provenance:
    """Of all tensors of one recording.

    Attributes:
        unwatched: What was given to code that cannot be watched.
    """

    def __init__(
        self, leaves: Mapping[str, torch.Tensor], attention: Attention, loans: Loans
    ) -> None:
        """Know the leaves.

        Args:
            leaves: Everything that the program reads, by FQN.
            attention: The recording's: it must not see how values are kept and compared.
            loans: Arrays of NumPy that were given out.
        """
        self._memories = Memories()
        self._attention = attention
        self._loans = loans
        self._exported: dict[int, Origin] = {}
        self.unwatched = Unwatched()
        for fqn, tensor in leaves.items():
            if is_followed(tensor):
                memory, geometry = self.place(tensor)
                memory.leaves.append(fqn)
                memory.values.setdefault(geometry, memories.lying(LeafOrigin(fqn), 0, geometry))

    # -- asking -----------------------------------------------------------------------------

    def of(self, tensor: torch.Tensor) -> Origin:
        """Where the present value of a tensor comes from."""
        memory, geometry = self.place(tensor)
        if memory.foreign and self._changed(memory, tensor):
            memory.values.clear()
            self._loans.found()
            self.literal(tensor)
        found: Origin | None = memory.values.get(geometry)
        if found is None:
            found = memories.seen_otherwise(memory, geometry)
            memory.values[geometry] = found
        return found

    def at(self, flat: torch.Tensor) -> Origin:
        """Where the values in a stretch of memory come from that somebody found by its address.

        Args:
            flat: One-dimensional and contiguous, on that memory.
        """
        address = address_of(flat)
        memory = self._memories.at(address, flat.nbytes)
        if memory is not None:
            self._loans.back(memory)
            return self.of(flat)
        if address in self._exported:
            reason = "its memory was freed before it was read"
            return Origin(Unknown(reason), 0, contiguous=True)
        literal = self.copy(flat)
        with self._attention.pause():
            known = self._loans.at(address, literal.view(torch.uint8).numpy())
        return Origin(self._made_of_numbers(literal, known=known), 0, contiguous=True)

    def place(self, tensor: torch.Tensor) -> Place:
        """Where a tensor lies."""
        memory = self._memories.find(tensor) or self._memories.add(tensor)
        return memory, geometry_of(tensor, memory)

    def offset(self, tensor: torch.Tensor) -> int:
        """Bytes to a tensor from where the leaf that it lies in starts, or else its memory."""
        memory, geometry = self.place(tensor)
        starts = (
            at.start
            for at, value in memory.values.items()
            if isinstance(value.node, LeafOrigin) and at.start <= geometry.start
        )
        return geometry.start - max(starts, default=0)

    def knows_memory(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor was seen before."""
        return self._memories.find(tensor) is not None

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was seen before, as it lies, since its memory was last written to."""
        memory = self._memories.find(tensor)
        return memory is not None and geometry_of(tensor, memory) in memory.values

    def leaves_in(self, tensor: torch.Tensor) -> list[str]:
        """The leaves that lie in the memory of a tensor."""
        memory = self._memories.find(tensor)
        return [] if memory is None else memory.leaves

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The present value of a tensor, to be kept."""
        with self._attention.pause():
            return tensor.detach().clone()

    # -- what ops did -----------------------------------------------------------------------

    def made(self, tensor: torch.Tensor, node: Call | Literal | Unknown, output: int) -> None:
        """Note that a tensor was made, and which result of what it is."""
        memory, geometry = self.place(tensor)
        memory.values[geometry] = memories.lying(node, output, geometry)

    def wrote(self, place: Place, node: Call | Literal | Unknown, output: int) -> None:
        """Note that a place was written to; what the memory around that is now, follows."""
        memory, geometry = place
        memories.write(memory, geometry, memories.lying(node, output, geometry))

    def lost(self, place: Place) -> None:
        """Note that nobody knows what a place holds now."""
        memories.forget(*place)

    # -- what others did --------------------------------------------------------------------

    def literal(self, tensor: torch.Tensor, *, foreign: bool = False, known: bool = False) -> None:
        """Note that a tensor was made of what is no tensor.

        Args:
            tensor: It.
            foreign: Whether its memory is that of an array, so that NumPy can change it.
            known: Whether it was seen which numbers it was made of.
        """
        memory, geometry = self.place(tensor)
        node = self._made_of_numbers(self.copy(tensor), known=known)
        memory.values.setdefault(geometry, memories.lying(node, 0, geometry))
        memory.foreign |= foreign

    def _made_of_numbers(self, value: torch.Tensor, *, known: bool) -> Literal | Unknown:
        if known or not value.numel():
            return Literal(value)
        if self.unwatched.doubt:
            return Unknown(self.unwatched.doubt)
        with self._attention.pause():
            floats = value.is_floating_point() and value.dtype.itemsize > 1
            numbers = value.double().cpu().numpy() if floats else None
        return Literal(value, () if numbers is None else self._loans.among(numbers))

    def gave_memory(self, tensor: torch.Tensor, how: str) -> None:
        """Note that code that cannot be watched may read a tensor."""
        if tensor.numel():
            self.unwatched.gave([self.of(tensor)], how)

    def gave_storage(self, storage: torch.UntypedStorage, how: str) -> None:
        """Note the same of a storage: of all values that are known to lie in it."""
        with self._attention.pause():
            memory = self._memories.find(_bytes_of(storage)) if storage.nbytes() else None
        if memory is not None:
            self.unwatched.gave(memory.values.values(), how)

    def lent(self, tensor: torch.Tensor, escape: Escape, array: np.ndarray | None = None) -> None:
        """Note that an array of NumPy on the memory of a tensor was given out.

        Args:
            tensor: The tensor.
            escape: What it holds.
            array: It, where somebody got it who may do more than pass it on.
        """
        self._loans.lend(self.place(tensor)[0], escape, array)

    def came_back(self, tensor: torch.Tensor) -> None:
        """Note that such an array, or a view of it, became a tensor again."""
        self._loans.back(self.place(tensor)[0])

    def copied(self, old: torch.UntypedStorage, new: torch.UntypedStorage) -> None:
        """Note that a storage was copied as a whole."""
        with self._attention.pause():
            before, after = _bytes_of(old), _bytes_of(new)
        memory = self._memories.find(before)
        if memory is not None and self._memories.find(after) is None:
            shift = storage_address(old) - memory.address if old.nbytes() else 0
            self._memories.add(after).values = {
                geometry._replace(start=geometry.start - shift): value
                for geometry, value in memory.values.items()
                if geometry.start >= shift
            }

    def exported(self, tensor: torch.Tensor, address: int) -> None:
        """Note that somebody asked for the address of a tensor."""
        if is_followed(tensor) and tensor.numel():
            self._exported[address] = self.of(tensor)

    def _changed(self, memory: Memory, tensor: torch.Tensor) -> bool:
        """Whether an array of NumPy has another value than when a tensor was made of it."""
        storage = tensor.untyped_storage()
        shift = storage_address(storage) - memory.address
        with self._attention.pause():
            for geometry, origin in memory.values.items():
                first, off = divmod(geometry.start - shift, geometry.dtype.itemsize)
                inside = first >= 0 and not off and geometry.end - shift <= storage.nbytes()
                if isinstance(origin.node, Literal) and inside:
                    now = torch.empty(0, dtype=geometry.dtype)
                    now.set_(storage, first, geometry.shape, geometry.stride)
                    if not same_bits(now, origin.node.value):
                        return True
        return False


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# MERGED attention: When a recording looks at what happens: in its own thread, and not while it is
# paused.


class Attention:
    """Of one recording.

    Attributes:
        paused: Whether nothing is to be seen, whoever does it.
    """

    def __init__(self) -> None:
        """Look, in this thread."""
        self.paused = False
        self._thread = threading.get_ident()

    def turn_here(self) -> None:
        """Look in this thread from now on."""
        self._thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether what happens now, in this thread, is to be seen."""
        return threading.get_ident() == self._thread and not self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See nothing until the end of the block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


# MERGED unwatched: Weights whose memory was given to code that no recording can watch.
#
# An address, a storage or a pickle can be read by a library in C, and its numbers come back as
# literals of a converter. So once code of a third party has asked for one, a number that appears
# afterwards may hold a weight. It is not taken for a literal of the graph: its origin is unknown.

_TRUSTED = frozenset({"refitkit", "torch_tensorrt"})
"""Packages that ask for addresses and arrays only to hand them to TensorRT, or to compare them."""
_COPYING = "copy"
"""A package that asks to make another tensor, which is known by its memory."""
_TRANSPARENT = frozenset({"torch", *sys.stdlib_module_names})
"""Packages that ask on behalf of their caller."""
_SHOWN = 3


def is_trusted() -> bool:
    """Whether the code that asks for a tensor's memory is torch's, Torch-TensorRT's or refitkit's.

    To be called by the function that replaces the one that was asked.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - inspect.stack reads source files
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == _COPYING:
            return True
        if package not in _TRANSPARENT:
            return package in _TRUSTED
        frame = frame.f_back
    return True


class Unwatched:
    """What was given to code that cannot be watched, in one recording.

    Attributes:
        doubt: Why a number that appears now may hold a weight; empty if it cannot.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.doubt = ""

    def gave(self, origins: Iterable[Origin], how: str) -> None:
        """Note that somebody can read these values without being seen.

        Args:
            origins: The values.
            how: What was given of them: an address, a pickle.
        """
        self.doubt = self.doubt or _reason(origins, how)


def _reason(origins: Iterable[Origin], how: str) -> str:
    """Empty where no value follows from a leaf: then nothing was given that a refit changes."""
    names = sorted({name for origin in origins for name in leaves_below(origin) if name})
    if not names:
        return ""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"it is made of numbers that appeared after {how} of {shown}{more} was given to code that "
        "cannot be watched, and may hold its value"
    )
