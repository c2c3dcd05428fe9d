"""Weights through the transforms of all plugins: what a program reads, made when it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from refitkit.errors import (
    PluginError,
    Problem,
    SourceError,
    VerificationError,
    WeightMismatchError,
    raised_as,
)
from refitkit.model import TransformRow
from refitkit.protocols import HasNamings, KnowsRevisions, Made, TransformRequest
from refitkit.recipe import pieces_of
from refitkit.recipe.name_suggestions import ALL_NAMES, WHOLE_SUBTREE
from refitkit.recipe.reads import reads_of
from refitkit.recipe.sources import describe_tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

    import torch

    from refitkit.model import TensorInfo
    from refitkit.pipeline.context import Context
    from refitkit.protocols import Plan, WeightGroup, WeightSource, WeightTransform

_HOOK = "refitkit_weight_transforms"
_Ordered: TypeAlias = "Sequence[tuple[str, WeightTransform]]"


@dataclass(frozen=True, eq=False)  # known by identity
class TransformOffer:
    """A group, and whose it is."""

    plugin: str
    transform: str
    group: WeightGroup

    def __str__(self) -> str:
        return f"{self.transform!r} of the plugin {self.plugin!r}"


class Transformed:
    """A source some of whose entries became others. It keeps what the last group has made.

    Attributes:
        offers: Groups, and whose they are.
        given: The weights before that.
        made_by: Which of them makes an entry, by name.
    """

    def __init__(self, source: WeightSource, offers: Iterable[TransformOffer]) -> None:
        """Nothing is made yet.

        Args:
            source: The weights as they were given.
            offers: Groups none of which makes what another one makes.
        """
        self.offers = tuple(offers)
        self.given = source
        self.made_by = {name: offer for offer in self.offers for name in offer.group.gives}
        taken = _taken(self.offers)
        kept = [name for name in source.names() if name not in taken]
        self._names = dict.fromkeys([*kept, *self.made_by])
        self._last: tuple[TransformOffer, Made] | None = None
        self._measured: dict[TransformOffer, Made] = {}

    @property
    def description(self) -> str:
        """What was given, and what it went through."""
        through = dict.fromkeys(offer.transform for offer in self.offers)
        return f"{self.given.description} through {', '.join(through)}"

    def names(self) -> Collection[str]:
        """What was given and not used up, and what is made."""
        return self._names.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Dtype and shape, as a group announces it or the source has it."""
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return self.given.info(fqn) if offer is None else offer.group.gives[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """The source's tensor, or one that is made now."""
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return self.given.get(fqn) if offer is None else self._made(offer).values[fqn]

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """What the source gives in pieces and no group has made; see ``GivesPieces``."""
        return pieces_of(self.given, fqn) if self.made_by.get(fqn) is None else None

    def made_from(self, fqn: str) -> tuple[str, ...]:
        """What a group takes for it, or the name itself; see ``MadeOf``."""
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return (fqn,) if offer is None else offer.group.takes

    def revision(self, fqn: str) -> Hashable | None:
        """That of the source, or what was made how of which; see ``KnowsRevisions``."""
        if fqn not in self._names:
            raise KeyError(fqn)
        if not isinstance(self.given, KnowsRevisions):
            return None
        offer = self.made_by.get(fqn)
        if offer is None:
            return self.given.revision(fqn)
        taken = tuple(map(self.given.revision, offer.group.takes))
        if offer.group.formula is None or None in taken:
            return None
        number = list(offer.group.gives).index(fqn)
        return offer.plugin, offer.group.formula, number, taken

    def _made(self, offer: TransformOffer) -> Made:
        if self._last is None or self._last[0] is not offer:
            self._last = None  # two groups at once would be one too many in memory
            doing = f"Weights cannot be transformed by {offer}"
            with raised_as(PluginError, f"The transform {offer} failed", doing=doing):
                made = offer.group.make()
            _check_made(offer, made)
            self._last = offer, made
            self._measured[offer] = Made({}, made.measures)
        return self._last[1]

    def rows(self) -> tuple[TransformRow, ...]:
        """What the report says of each group, those before it first; measures of what was made."""
        before = self.given.rows() if isinstance(self.given, Transformed) else ()
        return before + tuple(
            TransformRow(
                transform=offer.transform,
                plugin=offer.plugin,
                takes=offer.group.takes,
                gives=tuple(offer.group.gives),
                measures=self._measured[offer].measures if offer in self._measured else (),
                note=offer.group.note,
            )
            for offer in self.offers
        )

    def notes(self) -> tuple[str, ...]:
        """What transforms say of their groups, each text once, those before it first."""
        before = self.given.notes() if isinstance(self.given, Transformed) else ()
        here = (offer.group.note for offer in self.offers)
        return tuple(dict.fromkeys(note for note in (*before, *here) if note))


def transformed(
    context: Context, plan: Plan, source: WeightSource, *, partial: bool = False
) -> WeightSource:
    """A source as the program reads it: the source itself where no transform has a part in it.

    A source that has several sets of names is taken by the one with which most weights fit.

    Args:
        context: Plugins, and settings; transforms find their own in ``plugin_settings``.
        plan: What the program reads.
        source: The weights as they were given.
        partial: Whether slots without a new value keep what they hold.

    Raises:
        WeightMismatchError: Entries cannot be used; lists those of all transforms.
        PluginError: Two transforms make the same, or one is broken; names the plugins.
        SourceError: The source does not tell what it has.
    """
    ordered = sorted(_transforms(context), key=_priority)
    with raised_as(SourceError, f"{source.description} cannot be read"):
        namings = source.namings() if isinstance(source, HasNamings) else ()
        if not namings:
            return _through_all(ordered, TransformRequest(plan, source, partial))
        requests = [TransformRequest(plan, one, partial) for one in namings]
        return _fitting_best(plan, ordered, requests)


def _fitting_best(
    plan: Plan, ordered: _Ordered, requests: Iterable[TransformRequest]
) -> WeightSource:
    """Of several sources the one with which most weights fit, the first of equal ones.

    Raises:
        WeightMismatchError: All are refused; as the first one was. Or several models fit in the
            first one, which another set of names may hide.
    """
    found: list[WeightSource] = []
    refused: list[WeightMismatchError] = []
    for request in requests:
        try:
            found.append(_through_all(ordered, request))
        except WeightMismatchError as exc:
            refused.append(exc)
            if not found and {ALL_NAMES, WHOLE_SUBTREE}.intersection(p.kind for p in exc.problems):
                raise
    if not found:
        raise refused[0]
    return max(found, key=reads_of(plan).fitting)


def _through_all(ordered: _Ordered, request: TransformRequest) -> WeightSource:
    """A source through all transforms."""
    source = request.source
    for _, alike in groupby(ordered, key=_priority):
        source = _through(list(alike), replace(request, source=source))
    return source


def _priority(offered: tuple[str, WeightTransform]) -> int:
    return offered[1].priority


def _through(
    transforms: Iterable[tuple[str, WeightTransform]], request: TransformRequest
) -> WeightSource:
    """What transforms of one priority make of a source."""
    offers: list[TransformOffer] = []
    problems: list[Problem] = []
    for plugin, transform in transforms:
        try:
            offers += _offers(plugin, transform, request)
        except WeightMismatchError as exc:
            problems += exc.problems or [Problem(transform.name, "refused", hint=exc.message)]
    if offers:  # mostly there are none, and nothing has to be looked at
        names, taken = request.source.names(), _taken(offers)
        _check_offers(offers, request.source, names, taken)
        problems += _given_twice(offers, names, taken)
    if problems:
        message = f"{request.source.description} cannot become what the program reads."
        raise WeightMismatchError(message, problems=problems)
    return Transformed(request.source, offers) if offers else request.source


def require_measured(rows: Iterable[TransformRow]) -> None:
    """Stop where what was made is too far from what it was made from.

    Raises:
        VerificationError: Lists the entries.
    """
    problems = [
        Problem(
            measure.name,
            "too far from what it was made from",
            f"an error of {measure.max_abs_error:.4g}",
            f"at most {measure.limit:.4g}",
            measure.note,
        )
        for row in rows
        for measure in row.measures
        if not measure.ok
    ]
    if problems:
        raise VerificationError(
            "Transformed weights are not close enough to the given ones; nothing was changed.",
            problems=problems,
            hint="Use other weights, or allow more in the settings of the plugin.",
        )


def _transforms(context: Context) -> Iterator[tuple[str, WeightTransform]]:
    owners: dict[str, str] = {}
    for plugin, transform in context.host.items(_HOOK, config=context.config):
        context.host.claim(owners, transform, plugin, _HOOK)
        if not isinstance(getattr(transform, "priority", None), int):
            what = (
                f"The plugin {plugin!r} offers the transform {transform.name!r} without a priority"
            )
            raise PluginError(f"{what}, a whole number: see refitkit.protocols.WeightTransform.")
        yield plugin, transform


def _offers(
    plugin: str, transform: WeightTransform, request: TransformRequest
) -> list[TransformOffer]:
    what = f"The transform {transform.name!r} of the plugin {plugin!r} failed"
    with raised_as(PluginError, what, doing=f"Weights cannot be transformed by {transform.name!r}"):
        return [
            TransformOffer(plugin, transform.name, group) for group in transform.groups(request)
        ]


def _taken(offers: Iterable[TransformOffer]) -> set[str]:
    """Entries that are used up."""
    return {name for offer in offers for name in offer.group.takes}


def _check_offers(
    offers: Iterable[TransformOffer],
    source: WeightSource,
    names: Collection[str],
    taken: Collection[str],
) -> None:
    owners: dict[str, TransformOffer] = {}
    if isinstance(source, Transformed):
        owners = {name: offer for name, offer in source.made_by.items() if name not in taken}
    for offer in offers:
        strange = [repr(name) for name in offer.group.takes if name not in names]
        if strange:
            what = f"The transform {offer} takes what the source does not have"
            raise PluginError(f"{what}: {', '.join(strange)}.")
        for name in offer.group.gives:
            other = owners.setdefault(name, offer)
            if other is not offer:
                raise PluginError(
                    f"The transforms {other} and {offer} both make {name!r}.",
                    hint=f"Switch one off: no_plugins={{{offer.plugin!r}}}, or change settings.",
                )


def _given_twice(
    offers: Iterable[TransformOffer], names: Collection[str], taken: Collection[str]
) -> Iterator[Problem]:
    """What a transform would make, and the source has as well."""
    for offer in offers:
        for name in offer.group.gives:
            if name in names and name not in taken:
                others = ", ".join(map(repr, offer.group.takes))
                hint = f"{offer.transform!r} makes it from {others}: leave out one of them"
                yield Problem(name, "given twice", hint=hint)


def _check_made(offer: TransformOffer, made: Made) -> None:
    wrong = sorted(made.values.keys() ^ offer.group.gives.keys())
    wrong += [
        name
        for name, info in offer.group.gives.items()
        if name in made.values and _facts(describe_tensor(made.values[name])) != _facts(info)
    ]
    if wrong:
        shown = ", ".join(map(repr, wrong))
        raise PluginError(f"The transform {offer} made other than it announced: {shown}.")


def _facts(info: TensorInfo) -> tuple[str, tuple[int, ...], str]:
    return info.dtype, info.shape, info.unusable
