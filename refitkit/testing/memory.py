"""Which memory torch has made on the CPU and still holds, counted storage by storage.

Nothing here asks the operating system, so the numbers are the same on every run.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from refitkit.program.ambient import WatchingMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Storage:
    """The memory of a tensor, watched without keeping it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Watch the memory of a tensor."""
        storage = tensor.untyped_storage()
        self.nbytes = storage.nbytes()
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def key(self) -> int:
        """What tells it from all others that are watched."""
        return int(self._reference.cdata)

    def expired(self) -> bool:
        """Whether nobody holds it any more."""
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]


class NewMemory(WatchingMode):
    """Watches all memory that torch makes while it is on, in this thread.

    Memory is new if it comes out of an op into which it did not go.
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, Storage] = {}
        self._old: dict[int, Storage] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the op and note what it made."""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, self._old)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, self._seen)
        return result

    def _note(self, tensor: torch.Tensor, where: dict[int, Storage]) -> None:
        storage = Storage(tensor)
        known = self._seen.get(storage.key) or self._old.get(storage.key)
        if known is None:
            where[storage.key] = storage

    def kept(self) -> int:
        """Bytes of new memory that somebody still holds."""
        gc.collect()
        return sum(storage.nbytes for storage in self._seen.values() if not storage.expired())


def _tensors(things: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(things) if _has_storage(leaf)]


def _has_storage(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
