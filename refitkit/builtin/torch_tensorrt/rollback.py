"""Two sets of an engine's weights: one that the refitter reads, and one to go back to.

TensorRT cannot be asked what weights an engine holds. So what was given to it is kept: the staging
set, whose addresses the refitter knows, holds the live values once a refit is over. The next refit
copies them aside before it overwrites them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from refitkit.builtin.torch_tensorrt.arena import Arena
from refitkit.program.bits import same_bits
from refitkit.program.finite import all_finite, finite
from refitkit.protocols import SideBySide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from refitkit.builtin.torch_tensorrt.arena import Layout

Keep = Literal["device", "pinned-host"]
"""Where the second set is: a copy on the device is fast, one on the host spares its memory."""


class Copies(Mapping[str, torch.Tensor]):
    """Values that are copied one by one, whenever they are asked for."""

    def __init__(self, names: Iterable[str], copy: Callable[[str], torch.Tensor]) -> None:
        """Copy nothing yet."""
        self._names, self._copy = dict.fromkeys(names), copy

    def __getitem__(self, name: str) -> torch.Tensor:
        self._names[name]
        return self._copy(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited one would copy


class WeightSets:
    """The staging set, the base set, and which of them holds what is live.

    Attributes:
        staging: What the refitter reads.
    """

    def __init__(self, layout: Layout, device: torch.device, keep: Keep) -> None:
        """Allocate the staging set only."""
        self._layout, self._device, self._keep = layout, device, keep
        self.staging = Arena(layout, device)
        self._live: Literal["staging", "base"] | None = None
        self._base: Arena | None = None
        self._has_previous = False  # whether it holds what was live before the last commit

    @property
    def live(self) -> Literal["staging", "base"] | None:
        """Which set holds the live values; None: neither, nobody knows them."""
        return self._live

    @live.setter
    def live(self, which: Literal["staging", "base"] | None) -> None:
        self._live, self._has_previous = which, False

    def settle(self) -> None:
        """What is staged is live from now on, and what was put aside is what was before."""
        previous = self._live == "base"
        self.live, self._has_previous = "staging", previous

    def previous(self) -> Mapping[str, torch.Tensor]:
        """What was live before the last commit, where that is still there."""
        return self._ready_base().tensors if self._has_previous else {}

    @property
    def known(self) -> bool:
        """Whether the live values are known."""
        return self.live is not None

    @property
    def nbytes(self) -> int:
        """Bytes of one set."""
        return self._layout.nbytes

    @property
    def spare(self) -> int:
        """Bytes of the base set; 0 while it is not allocated."""
        return self.nbytes if self._base is not None else 0

    def begin(self, *, partial: bool) -> None:
        """Have the live values aside, so that the staging set may be written.

        Args:
            partial: Whether the staging set must hold the live values, too.
        """
        self._has_previous = False
        if self.live == "staging":
            self._ready_base().copy_from(self.staging)
            self.live = "base"
        elif self.live == "base" and partial:
            self.restore()

    def restore(self) -> None:
        """Copy the values that were put aside back into the staging set."""
        self.staging.copy_from(self._ready_base())

    def changed(self) -> bool | None:
        """Whether any bit of the two sets differs; None where the live values are not known."""
        if self.live != "base":
            return None
        return not same_bits(self.staging.memory, self._ready_base().memory)

    def known_value(self, name: str) -> torch.Tensor | None:
        """The live value of a weight: an alias; None where it is not known."""
        if self._live is None:
            return None
        return (self.staging if self._live == "staging" else self._ready_base()).tensors[name]

    def side_by_side(self) -> SideBySide | None:
        """Both sets as they lie in memory; None where the live values are not put aside."""
        if self.live != "base":
            return None
        return SideBySide(self._ready_base().memory, self.staging.memory, self._layout.places)

    def spoilt(self) -> Iterator[tuple[str, int]]:
        """Weights with elements that are not finite where the live ones are: name and number."""
        if self.live != "base":
            return
        base = self._ready_base()
        for kind, run in self.staging.runs.items():
            if all_finite(run):
                continue
            for name, new in self.staging.views.items():
                if self._layout.facts[name].dtype != kind or all_finite(new):
                    continue
                bad = ~finite(new) & finite(base.views[name]).to(new.device)
                count = int(bad.sum())
                if count:
                    yield name, count

    def free_base(self) -> int:
        """Free the base set; returns its bytes."""
        if self.live == "base":
            self.restore()
            self.live = "staging"
        freed, self._base, self._has_previous = self.spare, None, False
        return freed

    def _ready_base(self) -> Arena:
        if self._base is None:
            on_host = self._keep == "pinned-host"
            device = torch.device("cpu") if on_host else self._device
            pinned = on_host and self._device.type == "cuda"
            self._base = Arena(self._layout, device, pinned=pinned)
        return self._base
