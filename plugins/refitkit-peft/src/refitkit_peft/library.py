"""The adapters of one base: read and kept, fitted to the base, and checked against each other.

:class:`AdapterLibrary` hides which adapter files stay in memory, and when they are read again. A
refit asks it for the adapters of a :class:`~refitkit_peft.lora.Lora` as :class:`UsedAdapter`
objects. :func:`combined` then lists the edits of each entry of the base. The second half of the
module checks which adapters can be used together.
"""

from __future__ import annotations

import shlex
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refitkit.errors import ConfigError, Problem, SourceError, WeightMismatchError
from refitkit.program.bits import same_bits

from refitkit_peft import reading
from refitkit_peft.adapter import UNKNOWN, adapter_of
from refitkit_peft.edits import Product, Replaced, Scaled
from refitkit_peft.files import FileSnapshot, path_of
from refitkit_peft.fitting import Fitting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from refitkit.protocols import WeightSource

    from refitkit_peft.adapter import Adapter
    from refitkit_peft.edits import Edit
    from refitkit_peft.fitting import BaseNames, Fitted
    from refitkit_peft.lora import Alpha, Lora
    from refitkit_peft.reading import Contents
    from refitkit_peft.stores import Store


_OPENED = 8
"""Number of adapters given by path that stay in memory; others are read again when needed."""


@dataclass
class _ReadAdapter:
    """An adapter in memory.

    Attributes:
        contents: Contents of its files.
        files: State of its files before they were read; None for an adapter that was added.
        fitted: The adapter and its fit to the base, by component and alpha.
        alpha: Alpha that it was added with, if any.
    """

    contents: Contents
    files: FileSnapshot | None
    fitted: dict[tuple[str, Alpha | None], tuple[Adapter, Fitted]]
    alpha: Alpha | None = None


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter with its fit to the base and the user's scale.

    Attributes:
        name: Name or path that the user gave.
        adapter: The adapter.
        fitted: Its edits of the base.
        scale: Scale that the user gave.
    """

    name: str
    adapter: Adapter
    fitted: Fitted
    scale: float

    @property
    def order(self) -> tuple[str, float]:
        """Sort key of sums: independent of names and of the order in which a user lists adapters.

        Float sums depend on their order, so a fixed order gives the same bits each time.
        """
        return self.adapter.digest, self.scale


class AdapterLibrary:
    """The adapters that were read for one base: added by name, or opened by path."""

    def __init__(self, opener: Callable[[object], WeightSource], *, reread: bool) -> None:
        """Start without adapters.

        Args:
            opener: Opens files as weight sources.
            reread: Whether files are read a second time and compared.
        """
        self._open, self._reread = opener, reread
        self._added: dict[str, _ReadAdapter] = {}
        self._opened: OrderedDict[str, _ReadAdapter] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the added adapters."""
        return tuple(self._added)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all adapters in memory."""
        kept = [*self._added.values(), *self._opened.values()]
        return sum(tensor.nbytes for one in kept for tensor in one.contents.tensors.values())

    def read(self, adapter: object, config: Mapping[str, Any] | None = None) -> Contents:
        """Read an adapter; see :func:`refitkit_peft.reading.read`."""
        return reading.read(adapter, self._open, config, reread=self._reread)

    def add(self, name: str, contents: Contents, alpha: Alpha | None = None) -> None:
        """Keep an adapter under a name.

        Args:
            name: Name for ``Lora``; replaces another adapter of this name.
            contents: The adapter, as ``read`` returned it.
            alpha: Alpha in place of the one in its files.
        """
        # A path may be equal to the name. From now on the name wins.
        self._opened.pop(name, None)
        self._added[name] = _ReadAdapter(contents, None, {}, alpha)

    def remove(self, name: str) -> Iterator[str]:
        """Drop an added adapter.

        Returns:
            Digests of the adapter, one for each component and alpha that was used.

        Raises:
            ConfigError: No adapter of this name was added.
        """
        if name not in self._added:
            problem = Problem(name, "unknown", wanted=", ".join(self._added))
            raise ConfigError("There is no such adapter.", problems=[problem])
        removed = self._added.pop(name)
        return (adapter.digest for adapter, _ in removed.fitted.values())

    def fitted(self, lora: Lora, store: Store, names: BaseNames) -> list[UsedAdapter]:
        """The adapters of a ``Lora`` whose scale is not 0, in the order of their sums.

        Raises:
            SourceError: Some adapters cannot be read; lists every problem of all adapters.
            WeightMismatchError: Some adapters do not fit the base or each other; lists every
                problem.
        """
        used: list[UsedAdapter] = []
        unreadable: list[SourceError] = []
        # Collect all errors, so that one message lists the problems of all adapters.
        for name, scale in lora.adapters.items():
            try:
                adapter, fitted = self._fit(name, lora, store, names)
            except SourceError as exc:
                unreadable.append(exc)
            else:
                used.append(UsedAdapter(name, adapter, fitted, scale))
        _require_usable(store, used, unreadable)
        return sorted((one for one in used if one.scale), key=lambda one: one.order)

    def _fit(self, name: str, lora: Lora, store: Store, names: BaseNames) -> tuple[Adapter, Fitted]:
        read = self._added.get(name) or self._by_path(name)
        alpha = lora.alphas.get(name, read.alpha)
        # The same files give another adapter for another component or alpha.
        key = lora.component, alpha
        if key not in read.fitted:
            adapter = adapter_of(read.contents, lora.component, alpha)
            fitted = Fitting(adapter, names, store.infos).run()
            read.fitted[key] = adapter, _without_base_copies(fitted, store)
        return read.fitted[key]

    def _by_path(self, name: str) -> _ReadAdapter:
        known = self._opened.pop(name, None)
        if known is None or known.files is None or any(known.files.changed()):
            path = path_of(name)
            # Before the files are read: a write in between then shows as a change later.
            files = None if path is None else FileSnapshot.at(path)
            known = _ReadAdapter(self.read(name), files, {})
        self._opened[name] = known
        # Move the adapter to the end first: the least recently used is dropped.
        while len(self._opened) > _OPENED:
            self._opened.popitem(last=False)
        return known


def _without_base_copies(fitted: Fitted, store: Store) -> Fitted:
    """Drop whole weights that were saved beside factors, if they equal those of the base.

    peft saves embeddings, trained or not (``save_embedding_layers`` in
    ``utils/save_and_load.py``, 0.21.2). This reads the base's entries of these names.
    """
    edits = {
        name: tuple(edit for edit in some if not _is_base_copy(edit, name, store))
        for name, some in fitted.edits.items()
    }
    return replace(fitted, edits={name: some for name, some in edits.items() if some})


def _is_base_copy(edit: Edit, name: str, store: Store) -> bool:
    if not isinstance(edit, Replaced) or not edit.of_base:
        return False
    base = store.get(name)
    return same_bits(base, edit.value.to(base.device, base.dtype))


def combined(used: Iterable[UsedAdapter]) -> dict[str, tuple[Scaled, ...]]:
    """The edits of each entry of the base by name, in the order of the adapters."""
    found: dict[str, list[Scaled]] = {}
    for one in used:
        for name, edits in one.fitted.edits.items():
            some = [Scaled(edit, one.scale, one.adapter.digest) for edit in edits]
            found.setdefault(name, []).extend(some)
    return {name: tuple(some) for name, some in found.items()}


# -- which adapters can be used together ------------------------------------------------------


def _require_usable(
    store: Store, used: Sequence[UsedAdapter], unreadable: Sequence[SourceError]
) -> None:
    """Check that all adapters can be read, fit the base, and can be combined.

    Raises:
        SourceError: Some adapters cannot be read; lists every problem of all adapters.
        WeightMismatchError: Some adapters do not fit; lists every problem.
    """
    problems = [
        Problem(f"{one.name}: {p.subject}", p.kind, p.found, p.wanted, p.hint)
        for one in used
        for p in one.fitted.problems
    ]
    # An adapter with scale 0 is left out, so it conflicts with none. A DoRA adapter with scale 0
    # is a mistake of its own: see _meaningless_scales.
    problems += _conflicts(one for one in used if one.scale or _is_dora(one))
    if unreadable:
        first = unreadable[0]
        if len(unreadable) == 1 and not problems:
            raise first
        unread = [p for exc in unreadable for p in _problems_of_error(exc)]
        message = f"{len(unreadable)} adapters cannot be read."
        raise SourceError(message, problems=[*unread, *problems], hint=first.hint)
    if problems:
        unknown = [one.name for one in used if _has_unknown_alpha(one)]
        message = f"Adapters do not fit the base {store.description}."
        if all(problem.kind == UNKNOWN for problem in problems):
            message = f"The alpha of {', '.join(map(repr, unknown))} is unknown."
        hint = _how_to_pass_alpha(unknown[0]) if unknown else ""
        raise WeightMismatchError(message, problems=problems, hint=hint)


def _problems_of_error(exc: SourceError) -> list[Problem]:
    return [Problem(exc.message.rstrip("."), "unreadable", hint=exc.hint), *exc.problems]


def _has_unknown_alpha(one: UsedAdapter) -> bool:
    return any(problem.kind == UNKNOWN for problem in one.fitted.problems)


def _how_to_pass_alpha(name: str) -> str:
    return (
        "The adapter adds alpha / rank times its product, but no tensor, config or header of it "
        f"gives alpha. Pass the alpha of its training: Lora(base, {{...}}, alphas={{{name!r}: 16}})"
        f", or base.add(name, adapter, alpha=16), or --alpha {shlex.quote(name)}=16 on the command "
        'line. "rank" instead of 16 sets the scale to 1, for factors that are already scaled.'
    )


def _is_dora(one: UsedAdapter) -> bool:
    return any(map(_has_magnitude, (e for some in one.fitted.edits.values() for e in some)))


def _has_magnitude(edit: Edit) -> bool:
    return isinstance(edit, Product) and edit.magnitude is not None


def _conflicts(used: Iterable[UsedAdapter]) -> Iterator[Problem]:
    by_name: dict[str, list[tuple[UsedAdapter, tuple[Edit, ...]]]] = {}
    for one in used:
        for name, edits in one.fitted.edits.items():
            by_name.setdefault(name, []).append((one, edits))
    for name, some in by_name.items():
        yield from _meaningless_scales(name, some)
        yield from _conflicts_of_entry(name, some)


def _meaningless_scales(
    name: str, some: Iterable[tuple[UsedAdapter, tuple[Edit, ...]]]
) -> Iterator[Problem]:
    """Scales other than 1 of whole weights, and the scale 0 of DoRA."""
    for one, edits in some:
        if one.scale != 1 and any(isinstance(edit, Replaced) for edit in edits):
            hint = f"{one.name!r} contains this weight whole, and replaces it"
            yield Problem(name, "scale", f"{one.scale:g}", "1", hint)
        if one.scale == 0 and any(map(_has_magnitude, edits)):
            hint = f"the magnitudes of {one.name!r} would still apply: leave the adapter out"
            yield Problem(name, "scale", "0", "another one", hint)


def _conflicts_of_entry(
    name: str, some: Sequence[tuple[UsedAdapter, tuple[Edit, ...]]]
) -> Iterator[Problem]:
    """Adapters that cannot edit one entry together."""
    if len(some) < 2:  # noqa: PLR2004
        return
    names = ", ".join(repr(one.name) for one, _ in some)
    edits = [edit for _, edits in some for edit in edits]
    if any(isinstance(edit, Replaced) for edit in edits):
        hint = "one of them replaces the whole weight"
        yield Problem(name, "several adapters", names, "one", hint)
    elif any(map(_has_magnitude, edits)):
        hint = "DoRA rescales the sum to its own norms, so it must be the only adapter of a weight"
        yield Problem(name, "several adapters", names, "one", hint)
