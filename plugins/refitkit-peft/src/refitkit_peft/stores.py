"""The base: entries by the model's names, and what their bits are known by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem, SourceError
from refitkit.protocols import KnowsRevisions, MayChange
from refitkit.recipe.sources import ModuleWeights, require_reread

from refitkit_peft.keys import names_of_base
from refitkit_peft.memory import copied, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping

    from refitkit.model import TensorInfo
    from refitkit.protocols import WeightSource

    from refitkit_peft.files import Files
    from refitkit_peft.memory import Kind


class Store:
    """Entries of a base, where a user wants them to be.

    Attributes:
        description: What it is, for messages.
        infos: Dtypes and shapes by name. The model's names, whatever wrappers it was saved from.
        constant: Whether nobody can change what is in it.
        kind: Where it is.
        nbytes: Bytes of copies.
    """

    def __init__(
        self,
        weights: object,
        source: WeightSource,
        files: Files | None,
        kind: Kind,
        device: torch.device,
        *,
        reread: bool = False,
    ) -> None:
        """Open it, and make the copies.

        Args:
            weights: What the user gave.
            source: The same, opened.
            files: The files that it lies in, as they were before that; None: in none.
            kind: Where it is to be.
            device: The device of ``device``.
            reread: Whether files are read a second time once copies are made, and compared.

        Raises:
            SourceError: It cannot be read, or has adapters merged into it.
            ConfigError: There is no such memory here.
        """
        _require_unmerged(weights)
        if isinstance(source, ModuleWeights):
            source = source.without_plan  # adapters have the names of modules, not those of hooks
        self._source = source
        self._own, left_out = names_of_base(source.names())
        self.infos: Mapping[str, TensorInfo] = {
            name: source.info(own) for name, own in self._own.items()
        }
        self._files = files
        mapped = kind == "mapped" and self._files is not None
        self.kind: Kind = kind
        self._copies: Mapping[str, torch.Tensor] = {}
        if kind != "given" and not mapped:
            usable = [own for name, own in self._own.items() if not self.infos[name].unusable]
            self._copies = copied(source, usable, kind, device)
            if isinstance(source, MayChange):
                source.require_unchanged()
            if reread:
                require_reread(source)
            self._files = None
        # of copies: nothing else is this object; of files: whoever opens the same has the same
        self._mark: Hashable = tuple(self._files.states.items()) if self._files else object()
        self.nbytes = nbytes_of(self._copies)
        self.constant = bool(self._copies) or self._files is not None
        self.description = source.description
        if left_out:
            self.description += f" without {left_out} entries of adapters in it"

    def names(self) -> Collection[str]:
        """The model's names."""
        return self._own.keys()

    def get(self, name: str) -> torch.Tensor:
        """An entry; not to be written to."""
        own = self._own[name]
        copy = self._copies.get(own)
        return self._source.get(own) if copy is None else copy

    def revision(self, name: str) -> Hashable | None:
        """What the bits of an entry are known by; see ``refitkit.protocols.KnowsRevisions``."""
        own = self._own[name]
        if own in self._copies or self._files is not None:
            return self._mark, own
        return self._source.revision(own) if isinstance(self._source, KnowsRevisions) else None

    def require_one_version(self) -> None:
        """Check that all that was read is of one version, whatever lies at the path by now.

        Raises:
            SourceError: It is not.
        """
        if isinstance(self._source, MayChange) and not self._copies:
            self._source.require_unchanged()

    def reread(self) -> None:
        """Hold what was read of files against a second reading, unless there are copies."""
        if not self._copies:
            require_reread(self._source)

    def require_unchanged(self) -> None:
        """Check that files are those that were opened; asked before they are used again.

        Raises:
            SourceError: They are not; lists all of them.
        """
        # who reads them says whether a file with other links was written to as well
        problems = [] if self._files is None else list(self._files.changed(links=False))
        if problems:
            raise SourceError(
                f"{self.description} is not the base that was opened.",
                problems=problems,
                hint="Make a new Base of it, or keep a copy: Base(weights, memory='host').",
            )


def _require_unmerged(weights: object) -> None:
    """A live model whose adapters are merged is no base: they would be added twice."""
    if not isinstance(weights, torch.nn.Module):
        return
    problems = [
        Problem(name, "merged", ", ".join(map(str, merged)))
        for name, module in weights.named_modules()
        if (merged := getattr(module, "merged_adapters", None))
    ]
    if problems:
        message = f"This {type(weights).__name__} has adapters merged into its weights."
        hint = "Call unmerge_adapter() on it, or give the base that they were trained on."
        raise SourceError(message, problems=problems, hint=hint)
