"""A base with adapters as a weight source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.program.ambient import plain

from refitkit_peft.edits import FORMULA, summed

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

    import torch
    from refitkit.model import TensorInfo

    from refitkit_peft.edits import Scaled
    from refitkit_peft.keeping import ReadySet
    from refitkit_peft.stores import Store


class LoraSource:
    """The entries of a base, some of them with adapters added.

    Attributes:
        description: What it is: "base 'x' + 0.7 of 'a'".
        touched: Names of entries that adapters change.
    """

    def __init__(
        self,
        store: Store,
        edits: Mapping[str, tuple[Scaled, ...]],
        made: ReadySet | None,
        description: str,
    ) -> None:
        """Nothing is computed yet.

        Args:
            store: The base.
            edits: What is done, by name, in the order in which it is summed.
            made: Where what was computed is kept; None: it is computed whenever it is read.
            description: What it is.
        """
        self.description = description
        self._store, self._edits, self._made = store, edits, made
        self._keys = {name: tuple(one.key for one in some) for name, some in edits.items()}

    @property
    def touched(self) -> Collection[str]:
        """Names of entries that adapters change."""
        return self._edits.keys()

    def names(self) -> Collection[str]:
        """All names of the base."""
        return self._store.names()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, which are those of the base whatever is added."""
        return self._store.infos[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """The entry of the base, or the sum."""
        if fqn not in self._edits:
            return self._store.get(fqn)
        found = None if self._made is None else self._made.get(fqn)
        return self._sum(fqn) if found is None else found

    @plain  # what is kept serves later refits
    def _sum(self, fqn: str) -> torch.Tensor:
        found = summed(self._store.get(fqn), self._edits[fqn])
        if self._made is not None:
            found = found.pin_memory() if self._store.kind == "pinned" else found
            self._made.put(fqn, found)
        return found

    def require_unchanged(self) -> None:
        """Check the base; see ``refitkit.protocols.MayChange``. Adapters were read whole."""
        self._store.require_one_version()

    def reread(self) -> None:
        """Read the base again; see ``refitkit.protocols.SupportsReread``."""
        self._store.reread()

    def revision(self, fqn: str) -> Hashable | None:
        """That of the base, and what is added to it; see ``KnowsRevisions``."""
        base = self._store.revision(fqn)
        if fqn not in self._edits or base is None:
            return base
        return FORMULA, base, self._keys[fqn]
