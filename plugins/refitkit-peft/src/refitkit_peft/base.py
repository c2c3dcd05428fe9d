"""The base of adapters: opened once, kept where the user wants it, with a few ready sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from refitkit.errors import ConfigError, Problem
from refitkit.processes import ForkedLock
from refitkit.program.ambient import verb

from refitkit_peft.combining import combined
from refitkit_peft.files import Files, path_of
from refitkit_peft.keeping import Adapters, ReadySets
from refitkit_peft.lora import Lora, checked_alpha
from refitkit_peft.memory import KINDS
from refitkit_peft.placing import Places
from refitkit_peft.source import LoraSource
from refitkit_peft.stores import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from refitkit import Pipeline
    from refitkit.protocols import WeightSource

    from refitkit_peft.lora import Alpha
    from refitkit_peft.memory import Kind


@dataclass(frozen=True)
class BaseMemory:
    """What a base keeps, in bytes.

    Attributes:
        kind: Where the base is.
        base: Bytes of copies of it; 0 where it is used as it was given, or mapped from its file.
        adapters: Bytes of adapters.
        ready: Bytes of each ready set, by what it is; the one that was used last comes last.
    """

    kind: Kind
    base: int
    adapters: int
    ready: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapters + sum(self.ready.values())


class Base:
    """Weights that adapters are added to. What an engine holds is always computed from these.

    It may be used by several threads, and for several modules.
    """

    @verb("The base cannot be opened")
    def __init__(
        self,
        weights: Any,
        memory: Kind = "given",
        *,
        device: str | torch.device = "cuda",
        keep: int = 2,
        pipeline: Pipeline | None = None,
    ) -> None:
        """Open it, and copy it if that is wanted.

        Args:
            weights: Anything that a user calls weights: a state_dict, a module, a file, a folder.
            memory: Where it is kept. ``given``: as it was given, files are mapped. Then tensors in
                memory may be written to by others, so every refit reads all of them. ``host``,
                ``pinned``, ``mapped``, ``device``: a copy that nobody else has, in memory of the
                host, page-locked for a GPU, in a temporary file, or on ``device``. Files of which
                ``mapped`` is wanted are mapped where they are.
            device: Where ``device`` is. Sums are made where the base is.
            keep: So many ready sets are kept: of the entries that adapters touch, as they are with
                them. The one that was used longest ago goes first. With 0 every entry is computed
                whenever it is read, which is twice in a refit, and takes no memory.
            pipeline: What opens weights; None: one with all installed plugins. Its setting
                ``reread`` counts for adapters, and for copies of the base.

        Raises:
            SourceError: It cannot be read, or has adapters merged into it.
            ConfigError: These settings cannot be meant, or there is no such memory here.
        """
        from refitkit import Pipeline

        pipeline = pipeline or Pipeline()
        place, reread = _checked(memory, device, keep), pipeline.config.reread
        self._set_up(weights, pipeline.open_weights, place, keep, reread=reread)

    @classmethod
    @verb("The base cannot be opened")
    def with_opener(
        cls,
        weights: object,
        opener: Callable[[object], WeightSource],
        memory: Kind = "given",
        *,
        keep: int = 1,
        reread: bool = False,
        subtree: str = "",
    ) -> Base:
        """A base whose weights and adapters something else opens than a pipeline of its own.

        By default it is good for one refit: what is computed is kept as long as its source.
        Adapters are for weights whose names begin with ``subtree``, as ``Config.rules`` has it.
        """
        self = cls.__new__(cls)
        self._set_up(weights, opener, _checked(memory, "cpu", keep), keep, reread=reread)
        self._places = Places([name for name in self._store.names() if name.startswith(subtree)])
        return self

    def _set_up(
        self,
        weights: object,
        opener: Callable[[object], WeightSource],
        place: tuple[Kind, torch.device],
        keep: int,
        *,
        reread: bool,
    ) -> None:
        path = path_of(weights)
        files = None if path is None else Files.at(path)  # before it is read
        self._store = Store(weights, opener(weights), files, *place, reread=reread)
        self._places = Places(self._store.names())
        self._adapters = Adapters(opener, reread=reread)
        self._ready = ReadySets(keep)
        self._lock = ForkedLock()

    def __repr__(self) -> str:
        """What it is, and what it keeps."""
        memory = self.memory
        kept = f"{memory.base} bytes of it, {len(memory.ready)} ready sets"
        return f"Base({self._store.description}, {memory.kind}: {kept})"

    @property
    def description(self) -> str:
        """What it is, in words."""
        return self._store.description

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that adapters were added by."""
        return self._adapters.names

    @property
    def memory(self) -> BaseMemory:
        """What it keeps, in bytes."""
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
        """Read an adapter, and have it at hand under a name; another one of that name is replaced.

        Args:
            name: How ``Lora`` calls it.
            adapter: A PEFT folder, a file, or tensors by the keys of either.
            config: Fields of ``peft.LoraConfig``, in place of those of the files.
            alpha: The alpha that it was trained with, in place of the one that its tensors and
                files say; ``"rank"`` for a scale of 1. An adapter that says none needs it.

        Raises:
            ConfigError: Alpha is neither a positive number nor ``"rank"``.
            SourceError: It cannot be read, or is of a kind that weights cannot hold.
        """
        checked = None if alpha is None else checked_alpha(alpha)
        contents = self._adapters.read(adapter, config)
        with self._lock.held:
            self._adapters.add(name, contents, checked)

    def remove(self, name: str) -> None:
        """Forget an adapter that was added, and ready sets that it is in.

        Raises:
            ConfigError: There is none of that name.
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
        """Compute a ready set now, so that the refit that needs it finds it.

        Raises:
            RefitError: As a refit would.
        """
        source = self.source(Lora(self, adapters, component, alphas or {}))
        for name in source.touched:
            source.get(name)

    def source(self, lora: Lora) -> LoraSource:
        """The weights that are meant.

        Args:
            lora: Adapters, scales and component; its own base does not matter.

        Raises:
            SourceError: The base has changed, or adapters cannot be read.
            WeightMismatchError: Adapters do not fit; lists everything that does not.
        """
        self._store.require_unchanged()
        with self._lock.held:
            fitted = self._adapters.fitted(lora, self._store, self._places)
            edits = combined(fitted)
            key = tuple(one.order for one in fitted)
            text = _described(self._store.description, lora)
            made = self._ready.of(key, text, across_refits=self._store.constant)
        return LoraSource(self._store, edits, made, text)


def _checked(memory: Kind, device: str | torch.device, keep: int) -> tuple[Kind, torch.device]:
    problems = []
    if memory not in KINDS:
        problems.append(Problem("memory", "unknown", repr(memory), ", ".join(KINDS)))
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        problems.append(Problem("keep", "number", repr(keep), "0, 1, 2, ..."))
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        place = torch.device("meta")
        problems.append(Problem("device", "unknown", repr(device), hint=str(exc).split("\n")[0]))
    else:
        if place.type == "meta":
            problems.append(Problem("device", "holds no data", "meta"))
    if problems:
        raise ConfigError("This base cannot be meant.", problems=problems)
    return memory, place


def _described(base: str, lora: Lora) -> str:
    """The description in reports: "base 'x' + 0.7 of 'a' - 0.2 of 'b' with alpha 16"."""
    text = f"base {base}"
    for name, scale in lora.adapters.items():
        text += f" {'-' if scale < 0 else '+'} {abs(scale):g} of {name!r}"
        alpha = lora.alphas.get(name)
        if alpha is not None:
            text += f" with alpha {alpha if alpha == 'rank' else format(alpha, 'g')}"
    return text
