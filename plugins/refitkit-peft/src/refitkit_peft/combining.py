"""Several adapters on one base: what each entry gets, and what cannot be combined."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from refitkit.errors import Problem, SourceError, WeightMismatchError
from refitkit.program.bits import same_bits

from refitkit_peft.edits import Product, Replaced, Scaled
from refitkit_peft.scales import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from refitkit_peft.adapter import Adapter
    from refitkit_peft.edits import Edit
    from refitkit_peft.fitting import Fitted
    from refitkit_peft.stores import Store


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter, how it fits, and the scale that the user gave it.

    Attributes:
        name: How the user calls it.
        adapter: It.
        fitted: What it does to the base.
        scale: Its scale.
    """

    name: str
    adapter: Adapter
    fitted: Fitted
    scale: float

    @property
    def order(self) -> tuple[str, float]:
        """Sums are made in this order, whatever adapters are called and whichever comes first."""
        return self.adapter.digest, self.scale


def require_usable(
    store: Store, used: Sequence[UsedAdapter], unreadable: Sequence[SourceError]
) -> None:
    """Stop if adapters cannot be read, do not fit, or cannot be combined.

    Raises:
        SourceError: Some cannot be read; lists everything that is wrong with all of them.
        WeightMismatchError: Some do not fit; likewise.
    """
    problems = [
        Problem(f"{one.name}: {p.subject}", p.kind, p.found, p.wanted, p.hint)
        for one in used
        for p in one.fitted.problems
    ]
    problems += _at_odds(one for one in used if one.scale or _is_dora(one))
    if unreadable:
        first = unreadable[0]
        if len(unreadable) == 1 and not problems:
            raise first
        told = [p for exc in unreadable for p in _of_error(exc)]
        message = f"{len(unreadable)} adapters cannot be read."
        raise SourceError(message, problems=[*told, *problems], hint=first.hint)
    if problems:
        unknown = [one.name for one in used if _has_unknown(one)]
        message = f"Adapters do not fit the base {store.description}."
        if all(problem.kind == UNKNOWN for problem in problems):
            message = f"Nothing says the alpha of {', '.join(map(repr, unknown))}."
        hint = _how_to_give(unknown[0]) if unknown else ""
        raise WeightMismatchError(message, problems=problems, hint=hint)


def _has_unknown(one: UsedAdapter) -> bool:
    return any(problem.kind == UNKNOWN for problem in one.fitted.problems)


def _how_to_give(name: str) -> str:
    return (
        "A product counts alpha / rank times, and its tensors, config and header do not say alpha. "
        f"Give the one that it was trained with: Lora(base, {{...}}, alphas={{{name!r}: 16}}), or "
        f"base.add(name, adapter, alpha=16), or --alpha {shlex.quote(name)}=16 on the command "
        'line. "rank" instead of 16 is a scale of 1, for factors that are scaled already.'
    )


def without_own(fitted: Fitted, store: Store) -> Fitted:
    """Without weights that were saved beside factors, where they are what the base has anyway.

    peft saves embeddings so, whether they were trained or not (``save_embedding_layers`` in
    ``utils/save_and_load.py``, 0.21.2). This reads those of the base.
    """
    edits = {
        name: tuple(edit for edit in some if not _is_own(edit, name, store))
        for name, some in fitted.edits.items()
    }
    return replace(fitted, edits={name: some for name, some in edits.items() if some})


def _is_own(edit: Edit, name: str, store: Store) -> bool:
    if not isinstance(edit, Replaced) or not edit.beside:
        return False
    base = store.get(name)
    return same_bits(base, edit.value.to(base.device, base.dtype))


def _of_error(exc: SourceError) -> list[Problem]:
    return [Problem(exc.message.rstrip("."), "unreadable", hint=exc.hint), *exc.problems]


def combined(used: Iterable[UsedAdapter]) -> dict[str, tuple[Scaled, ...]]:
    """What is done to each entry, in the order of the adapters."""
    found: dict[str, list[Scaled]] = {}
    for one in used:
        for name, edits in one.fitted.edits.items():
            some = [Scaled(edit, one.scale, one.adapter.digest) for edit in edits]
            found.setdefault(name, []).extend(some)
    return {name: tuple(some) for name, some in found.items()}


def _is_dora(one: UsedAdapter) -> bool:
    return any(map(_has_magnitude, (e for some in one.fitted.edits.values() for e in some)))


def _has_magnitude(edit: Edit) -> bool:
    return isinstance(edit, Product) and edit.magnitude is not None


def _at_odds(used: Iterable[UsedAdapter]) -> Iterator[Problem]:
    by_name: dict[str, list[tuple[UsedAdapter, tuple[Edit, ...]]]] = {}
    for one in used:
        for name, edits in one.fitted.edits.items():
            by_name.setdefault(name, []).append((one, edits))
    for name, some in by_name.items():
        yield from _odd_scales(name, some)
        yield from _several(name, some)


def _odd_scales(
    name: str, some: Iterable[tuple[UsedAdapter, tuple[Edit, ...]]]
) -> Iterator[Problem]:
    """Scales that mean nothing: of whole weights, and 0 of a magnitude."""
    for one, edits in some:
        if one.scale != 1 and any(isinstance(edit, Replaced) for edit in edits):
            hint = f"{one.name!r} holds it whole"
            yield Problem(name, "scale", f"{one.scale:g}", "1", hint)
        if one.scale == 0 and any(map(_has_magnitude, edits)):
            hint = f"the magnitudes of {one.name!r} would stay: leave the adapter out"
            yield Problem(name, "scale", "0", "another one", hint)


def _several(name: str, some: Sequence[tuple[UsedAdapter, tuple[Edit, ...]]]) -> Iterator[Problem]:
    """Adapters that cannot be on one entry together."""
    if len(some) < 2:  # noqa: PLR2004
        return
    names = ", ".join(repr(one.name) for one, _ in some)
    edits = [edit for _, edits in some for edit in edits]
    if any(isinstance(edit, Replaced) for edit in edits):
        hint = "one holds it whole, and there is no sum of whole weights"
        yield Problem(name, "several adapters", names, "one", hint)
    elif any(map(_has_magnitude, edits)):
        hint = "DoRA brings the sum to norms of its own: it can be on a weight only by itself"
        yield Problem(name, "several adapters", names, "one", hint)
