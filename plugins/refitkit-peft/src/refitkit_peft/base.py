"""``Base``: weights that adapters are added to, opened once, with a cache of sums.

It joins the store of the base's entries, the library of its adapters and the cache of ready sets,
and guards them with one lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from refitkit.errors import ConfigError, Problem
from refitkit.processes import ForkedLock
from refitkit.program.ambient import verb

from refitkit_peft.files import FileSnapshot, path_of
from refitkit_peft.fitting import BaseNames
from refitkit_peft.library import AdapterLibrary, combined
from refitkit_peft.lora import Lora, checked_alpha
from refitkit_peft.source import LoraSource, ReadySets
from refitkit_peft.stores import MEMORY_KINDS, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from refitkit import Pipeline
    from refitkit.protocols import WeightSource

    from refitkit_peft.lora import Alpha
    from refitkit_peft.stores import MemoryKind


@dataclass(frozen=True)
class BaseMemory:
    """The memory of a base, in bytes.

    Attributes:
        kind: Memory that the base is in.
        base: Bytes of copies of the base; 0 if it is used as given, or mapped from its file.
        adapters: Bytes of the adapters.
        ready: Bytes of each ready set by its description; the most recently used comes last.
    """

    kind: MemoryKind
    base: int
    adapters: int
    ready: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return self.base + self.adapters + sum(self.ready.values())


class Base:
    """Weights that adapters are added to.

    All sums are computed from these weights, never from those in an engine. Several threads and
    several modules may use one base.
    """

    @verb("The base cannot be opened")
    def __init__(
        self,
        weights: Any,
        memory: MemoryKind = "given",
        *,
        device: str | torch.device = "cuda",
        keep: int = 2,
        pipeline: Pipeline | None = None,
    ) -> None:
        """Open the base, and copy it unless ``memory`` is ``given``.

        Args:
            weights: Any weights that refitkit can open: a state_dict, a module, a file, a folder.
            memory: ``given``: used as given; files are mapped. Other code may write to tensors in
                memory, so every refit reads all of them. ``host``, ``pinned``, ``mapped`` and
                ``device`` make a private copy: in host memory, in page-locked memory for a GPU, in
                a temporary file, or on ``device``. With ``mapped``, files are mapped where they
                are, without a copy.
            device: Device for the kind ``device``. Sums are computed on the device of the base.
            keep: Number of ready sets to keep: the sums of the entries that adapters change. The
                least recently used set is dropped first. With 0 each read computes its sum, which
                takes no memory but happens twice in a refit.
            pipeline: Pipeline that opens weights; None: one with all installed plugins. Its setting
                ``reread`` applies to adapters and to copies of the base.

        Raises:
            SourceError: The base cannot be read, or has adapters merged into it.
            ConfigError: A setting is invalid, or the machine has no memory of this kind.
        """
        from refitkit import Pipeline

        pipeline = pipeline or Pipeline()
        kind_and_device, reread = _checked(memory, device, keep), pipeline.config.reread
        self._set_up(weights, pipeline.open_weights, kind_and_device, keep, reread=reread)

    @classmethod
    @verb("The base cannot be opened")
    def with_opener(
        cls,
        weights: object,
        opener: Callable[[object], WeightSource],
        memory: MemoryKind = "given",
        *,
        keep: int = 1,
        reread: bool = False,
        subtree: str = "",
    ) -> Base:
        """A base that a given function opens, instead of a pipeline.

        The defaults suit a base for one refit: sums are kept as long as its source.

        Args:
            weights: Weights that ``opener`` can open.
            opener: Opens weights and adapters as weight sources.
            memory: As for ``Base``.
            keep: As for ``Base``.
            reread: Whether files are read a second time and compared.
            subtree: Prefix of the names that adapters are for, as in ``Config.rules``.

        Raises:
            SourceError: The base cannot be read, or has adapters merged into it.
            ConfigError: A setting is invalid.
        """
        self = cls.__new__(cls)
        self._set_up(weights, opener, _checked(memory, "cpu", keep), keep, reread=reread)
        self._names = BaseNames([name for name in self._store.names() if name.startswith(subtree)])
        return self

    def _set_up(
        self,
        weights: object,
        opener: Callable[[object], WeightSource],
        kind_and_device: tuple[MemoryKind, torch.device],
        keep: int,
        *,
        reread: bool,
    ) -> None:
        path = path_of(weights)
        # Take the snapshot before opening, so that any later write shows.
        files = None if path is None else FileSnapshot.at(path)
        self._store = Store(weights, opener(weights), files, *kind_and_device, reread=reread)
        self._names = BaseNames(self._store.names())
        self._adapters = AdapterLibrary(opener, reread=reread)
        self._ready = ReadySets(keep)
        self._lock = ForkedLock()

    def __repr__(self) -> str:
        """The description of the weights, and the memory of the base."""
        memory = self.memory
        kept = f"{memory.base} bytes of it, {len(memory.ready)} ready sets"
        return f"Base({self._store.description}, {memory.kind}: {kept})"

    @property
    def description(self) -> str:
        """Description of the weights, for messages."""
        return self._store.description

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the added adapters."""
        return self._adapters.names

    @property
    def memory(self) -> BaseMemory:
        """The memory of the base, its adapters and its ready sets."""
        with self._lock.held:
            ready = self._ready.nbytes()
            return BaseMemory(self._store.kind, self._store.nbytes, self._adapters.nbytes, ready)

    @verb("The adapter cannot be read")
    def add(
        self,
        name: str,
        adapter: str | Path | Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        alpha: Alpha | None = None,
    ) -> None:
        """Read an adapter and keep it under a name, which replaces any adapter of that name.

        Args:
            name: Name for ``Lora``.
            adapter: A folder of PEFT or diffusers, a file, or a mapping from their keys to tensors.
            config: Fields of ``peft.LoraConfig`` in place of those in the files.
            alpha: Alpha of the training in place of the one in tensors and files; ``"rank"`` for
                a factor of 1. An adapter without any alpha needs it.

        Raises:
            ConfigError: Alpha is neither a positive number nor ``"rank"``.
            SourceError: The adapter cannot be read, or cannot be merged into weights.
        """
        checked = None if alpha is None else checked_alpha(alpha)
        # Reading takes long, so it happens outside the lock.
        contents = self._adapters.read(adapter, config)
        with self._lock.held:
            self._adapters.add(name, contents, checked)

    def remove(self, name: str) -> None:
        """Drop an added adapter, and the ready sets that contain it.

        Raises:
            ConfigError: No adapter of this name was added.
        """
        with self._lock.held:
            for digest in self._adapters.remove(name):
                self._ready.forget(digest)

    @verb("The adapters cannot be prepared")
    def prepare(
        self,
        adapters: Mapping[str, float],
        component: str = "",
        alphas: Mapping[str, Alpha] | None = None,
    ) -> None:
        """Compute a ready set now, so that a later refit need not.

        Args:
            adapters: Scales by name or path, as for ``Lora``.
            component: As for ``Lora``.
            alphas: As for ``Lora``.

        Raises:
            RefitError: The adapters cannot be read or do not fit, as in a refit.
        """
        # Reading an entry computes its sum and puts it into the ready set.
        source = self.source(Lora(self, adapters, component, alphas or {}))
        for name in source.touched:
            source.get(name)

    def source(self, lora: Lora) -> LoraSource:
        """The sum of this base and the adapters of a ``Lora``, as a weight source.

        Args:
            lora: Adapters, scales, component and alphas. Its ``base`` is ignored.

        Raises:
            SourceError: The files of the base changed, or adapters cannot be read.
            WeightMismatchError: Adapters do not fit; lists every problem.
        """
        self._store.require_unchanged()
        with self._lock.held:
            fitted = self._adapters.fitted(lora, self._store, self._names)
            edits = combined(fitted)
            key = tuple(one.order for one in fitted)
            text = _described(self._store.description, lora)
            ready = self._ready.of(key, text, across_refits=self._store.constant)
        return LoraSource(self._store, edits, ready, text)


def _checked(
    memory: MemoryKind, device: str | torch.device, keep: int
) -> tuple[MemoryKind, torch.device]:
    """The settings of a base, if they are valid.

    Raises:
        ConfigError: Some settings are invalid; lists all of them.
    """
    problems = []
    if memory not in MEMORY_KINDS:
        problems.append(Problem("memory", "unknown", repr(memory), ", ".join(MEMORY_KINDS)))
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        problems.append(Problem("keep", "number", repr(keep), "0, 1, 2, ..."))
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        target = torch.device("meta")
        problems.append(Problem("device", "unknown", repr(device), hint=str(exc).split("\n")[0]))
    else:
        if target.type == "meta":
            problems.append(Problem("device", "without data", "meta"))
    if problems:
        raise ConfigError("The settings of the base are invalid.", problems=problems)
    return memory, target


def _described(base: str, lora: Lora) -> str:
    """Description for reports, such as "base 'x' + 0.7 of 'a' - 0.2 of 'b' with alpha 16"."""
    text = f"base {base}"
    for name, scale in lora.adapters.items():
        text += f" {'-' if scale < 0 else '+'} {abs(scale):g} of {name!r}"
        alpha = lora.alphas.get(name)
        if alpha is not None:
            text += f" with alpha {alpha if alpha == 'rank' else format(alpha, 'g')}"
    return text
