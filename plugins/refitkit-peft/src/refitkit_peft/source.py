"""A base with adapters as a weight source, and the cache of its sums.

:class:`LoraSource` computes a sum when it is read. :class:`ReadySets` keeps the sums of the last
few combinations of adapters, so that switching back to one of them computes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

import torch
from refitkit.program.ambient import plain

from refitkit_peft.edits import FORMULA, summed

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

    from refitkit.model import TensorInfo

    from refitkit_peft.edits import Scaled
    from refitkit_peft.stores import Store

SetKey: TypeAlias = tuple[tuple[str, float], ...]
"""Digests and scales of adapters: equal keys mean equal sums on one base."""


class LoraSource:
    """The entries of a base, with adapters added to some of them.

    Attributes:
        description: Text for reports, such as "base 'x' + 0.7 of 'a'".
    """

    def __init__(
        self,
        store: Store,
        edits: Mapping[str, tuple[Scaled, ...]],
        ready: ReadySet | None,
        description: str,
    ) -> None:
        """Describe the sums; nothing is computed yet.

        Args:
            store: The base.
            edits: Edits of each entry by name, in the order of the sum.
            ready: Cache of sums; None: each read computes its sum.
            description: Text for reports.
        """
        self.description = description
        self._store, self._edits, self._ready = store, edits, ready
        self._keys = {name: tuple(one.key for one in some) for name, some in edits.items()}

    @property
    def touched(self) -> Collection[str]:
        """Names of the entries that adapters change."""
        return self._edits.keys()

    def names(self) -> Collection[str]:
        """All names of the base."""
        return self._store.names()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape of the base's entry; adapters do not change them."""
        return self._store.infos[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """The entry of the base, or its sum with the adapters, in the base's dtype."""
        if fqn not in self._edits:
            return self._store.get(fqn)
        found = None if self._ready is None else self._ready.get(fqn)
        return self._sum(fqn) if found is None else found

    @plain  # later refits reuse the sum, so it must not depend on the caller's torch modes
    def _sum(self, fqn: str) -> torch.Tensor:
        found = summed(self._store.get(fqn), self._edits[fqn])
        if self._ready is not None:
            found = found.pin_memory() if self._store.kind == "pinned" else found
            self._ready.put(fqn, found)
        return found

    def require_unchanged(self) -> None:
        """Check the base; see ``refitkit.protocols.MayChange``. Adapters are copies in memory."""
        self._store.require_one_version()

    def reread(self) -> None:
        """Read the base again; see ``refitkit.protocols.SupportsReread``."""
        self._store.reread()

    def revision(self, fqn: str) -> Hashable | None:
        """The revision of the base and the added edits; see ``KnowsRevisions``."""
        # Equal revisions let refits with delta=True skip the entry.
        base = self._store.revision(fqn)
        if fqn not in self._edits or base is None:
            return base
        return FORMULA, base, self._keys[fqn]


class ReadySet:
    """Computed sums of one base with one combination of adapters, by name.

    ``Base.prepare`` may compute them in another thread, on another CUDA stream, and streams do not
    wait for one another. So each sum has an event, and a reader's stream waits for it.
    """

    def __init__(self) -> None:
        """Start without sums."""
        self._sums: dict[str, tuple[torch.Tensor, torch.Event | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        # A copy of the values: another thread may add sums meanwhile.
        return sum(value.nbytes for value, _ in list(self._sums.values()))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Keep a sum that the current stream computes."""
        computed = None
        if value.device.type != "cpu":
            computed = torch.Event(value.device)
            computed.record()
        self._sums[name] = value, computed

    def get(self, name: str) -> torch.Tensor | None:
        """A sum that later work on the current stream can read; None if there is none."""
        value, computed = self._sums.get(name, (None, None))
        if computed is not None:
            computed.wait()
        return value


class ReadySets:
    """A cache of ready sets that drops the least recently used one."""

    def __init__(self, keep: int) -> None:
        """Start without sets.

        Args:
            keep: Largest number of sets.
        """
        self._keep = keep
        self._sets: OrderedDict[SetKey, tuple[str, ReadySet]] = OrderedDict()

    def of(self, key: SetKey, text: str, *, across_refits: bool) -> ReadySet | None:
        """The set for some adapters and scales; None if their sums are not kept.

        Args:
            key: Adapters and scales; empty: nothing is added.
            text: Description of the set.
            across_refits: Whether the base cannot change between refits. If it can, the set is
                new, and only this source uses it.
        """
        if not self._keep or not key:
            return None
        if not across_refits:
            return ReadySet()
        _, ready = self._sets.pop(key, ("", ReadySet()))
        self._sets[key] = text, ready
        while len(self._sets) > self._keep:
            self._sets.popitem(last=False)
        return ready

    def forget(self, digest: str) -> None:
        """Drop the sets that contain an adapter."""
        for key in [key for key in self._sets if any(one == digest for one, _ in key)]:
            del self._sets[key]

    def nbytes(self) -> dict[str, int]:
        """Bytes of each set by its description."""
        return {text: ready.nbytes for text, ready in self._sets.values()}
