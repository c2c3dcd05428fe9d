"""What a base keeps: adapters that were read, how they fit, and ready sets of sums."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from refitkit.errors import ConfigError, Problem, SourceError

from refitkit_peft import reading
from refitkit_peft.adapter import adapter_of
from refitkit_peft.combining import UsedAdapter, require_usable, without_own
from refitkit_peft.files import Files, path_of
from refitkit_peft.fitting import Fitting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.protocols import WeightSource

    from refitkit_peft.adapter import Adapter
    from refitkit_peft.fitting import Fitted
    from refitkit_peft.lora import Alpha, Lora
    from refitkit_peft.placing import Places
    from refitkit_peft.reading import Contents
    from refitkit_peft.stores import Store

Key: TypeAlias = tuple[tuple[str, float], ...]
"""Digests of adapters and their scales: equal keys, equal sums."""

_OPENED = 8
"""So many adapters that were given by path are kept; others are read again when they are needed."""


@dataclass
class _Read:
    """An adapter that was read.

    Attributes:
        contents: What it holds.
        files: The files that it was read from, as they were.
        fitted: For each component and alpha the adapter, and how it fits the base.
        alpha: The alpha that it was added with.
    """

    contents: Contents
    files: Files | None
    fitted: dict[tuple[str, Alpha | None], tuple[Adapter, Fitted]]
    alpha: Alpha | None = None


class Adapters:
    """Adapters that were read for one base: by name, or by path."""

    def __init__(self, opener: Callable[[object], WeightSource], *, reread: bool) -> None:
        """None yet.

        Args:
            opener: Opens files.
            reread: Whether they are read a second time, and compared.
        """
        self._open, self._reread = opener, reread
        self._added: dict[str, _Read] = {}
        self._opened: OrderedDict[str, _Read] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that were added."""
        return tuple(self._added)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        kept = [*self._added.values(), *self._opened.values()]
        return sum(tensor.nbytes for one in kept for tensor in one.contents.tensors.values())

    def read(self, adapter: object, config: Mapping[str, Any] | None = None) -> Contents:
        """Read one; see ``reading.read``."""
        return reading.read(adapter, self._open, config, reread=self._reread)

    def add(self, name: str, contents: Contents, alpha: Alpha | None = None) -> None:
        """Have one at hand; with an alpha in place of that of its files."""
        self._opened.pop(
            name, None
        )  # of a path that is called so: the name comes first from now on
        self._added[name] = _Read(contents, None, {}, alpha)

    def remove(self, name: str) -> Iterator[str]:
        """Forget one.

        Returns:
            Digests of what it was.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in self._added:
            problem = Problem(name, "unknown", wanted=", ".join(self._added))
            raise ConfigError("There is no such adapter.", problems=[problem])
        gone = self._added.pop(name)
        return (adapter.digest for adapter, _ in gone.fitted.values())

    def fitted(self, lora: Lora, store: Store, places: Places) -> list[UsedAdapter]:
        """The adapters that are meant, those with a scale of 0 left out, in an order of their own.

        Raises:
            SourceError: Some cannot be read; lists everything that is wrong with all of them.
            WeightMismatchError: Some do not fit; likewise.
        """
        used: list[UsedAdapter] = []
        unreadable: list[SourceError] = []
        for name, scale in lora.adapters.items():
            try:
                adapter, fitted = self._one(name, lora, store, places)
            except SourceError as exc:
                unreadable.append(exc)
            else:
                used.append(UsedAdapter(name, adapter, fitted, scale))
        require_usable(store, used, unreadable)
        return sorted((one for one in used if one.scale), key=lambda one: one.order)

    def _one(self, name: str, lora: Lora, store: Store, places: Places) -> tuple[Adapter, Fitted]:
        read = self._added.get(name) or self._by_path(name)
        alpha = lora.alphas.get(name, read.alpha)
        key = lora.component, alpha
        if key not in read.fitted:
            adapter = adapter_of(read.contents, lora.component, alpha)
            fitted = Fitting(adapter, places, store.infos).run()
            read.fitted[key] = adapter, without_own(fitted, store)
        return read.fitted[key]

    def _by_path(self, name: str) -> _Read:
        known = self._opened.pop(name, None)
        if known is None or known.files is None or any(known.files.changed()):
            path = path_of(name)
            files = None if path is None else Files.at(path)
            known = _Read(self.read(name), files, {})
        self._opened[name] = known
        while len(self._opened) > _OPENED:
            self._opened.popitem(last=False)
        return known


class ReadySet:
    """Sums of one base with the same adapters, by name.

    A device goes on with its work after the call that asked for it has returned, and its streams do
    not wait for one another. So who takes a sum has its own stream wait until that sum is made,
    whichever stream that is done on: by ``Base.prepare`` in a thread, say.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._made: dict[str, tuple[torch.Tensor, torch.Event | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(value.nbytes for value, _ in list(self._made.values()))

    def put(self, name: str, value: torch.Tensor) -> None:
        """Keep a sum that the current stream makes."""
        made = None
        if value.device.type != "cpu":
            made = torch.Event(value.device)
            made.record()
        self._made[name] = value, made

    def get(self, name: str) -> torch.Tensor | None:
        """A sum that work on the current stream can read from now on; None: it was never made."""
        value, made = self._made.get(name, (None, None))
        if made is not None:
            made.wait()
        return value


class ReadySets:
    """Sums that are kept, set by set: the one that was used longest ago goes first."""

    def __init__(self, keep: int) -> None:
        """None yet.

        Args:
            keep: So many at most.
        """
        self._keep = keep
        self._sets: OrderedDict[Key, tuple[str, ReadySet]] = OrderedDict()

    def of(self, key: Key, text: str, *, across_refits: bool) -> ReadySet | None:
        """Where sums of one kind are kept; None: nowhere.

        Args:
            key: Stands for adapters and scales; empty: nothing is added.
            text: What the set is, in words.
            across_refits: Whether the base is the same in the next refit, for sure.
        """
        if not self._keep or not key:
            return None
        if not across_refits:
            return ReadySet()
        _, made = self._sets.pop(key, ("", ReadySet()))
        self._sets[key] = text, made
        while len(self._sets) > self._keep:
            self._sets.popitem(last=False)
        return made

    def forget(self, digest: str) -> None:
        """Drop sets that an adapter is in."""
        for key in [key for key in self._sets if any(one == digest for one, _ in key)]:
            del self._sets[key]

    def nbytes(self) -> dict[str, int]:
        """Bytes by what each set is."""
        return {text: made.nbytes for text, made in self._sets.values()}
