"""Transforms: given weights become what a program reads, by the transforms of all plugins.

The module hides which transform makes which entry. ``transformed`` asks the transforms, rank by
rank, for the groups of entries that they take and give, and returns a ``Transformed`` source. It
computes a group when one of its entries is first read. ``require_accurate`` checks the result.
``with_attached_data`` and ``explained`` ask transforms for what they keep in a plan and for hints.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import JsonValue, TypeAdapter

from refitkit.errors import (
    PluginError,
    Problem,
    SourceError,
    VerificationError,
    WeightMismatchError,
    raised_as,
)
from refitkit.model import OutputMeasure, TensorInfo, TransformRow
from refitkit.offered import owned, received, shown
from refitkit.pipeline.needs import transform_needs, with_needs
from refitkit.protocols import (
    AttachesData,
    ExplainsMissing,
    GivesAway,
    HasNamings,
    KnowsRevisions,
    Made,
    MadeOf,
    TransformRequest,
    WeightGroup,
)
from refitkit.recipe import bits_known, pieces_of
from refitkit.recipe.name_suggestions import ALL_NAMES, WHOLE_SUBTREE
from refitkit.recipe.reads import reads_of
from refitkit.recipe.sources import describe_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch
    from torch.export import ExportedProgram

    from refitkit.pipeline.context import Context
    from refitkit.protocols import OpenedModule, Plan, WeightSource, WeightTransform
    from refitkit.recipe import RefitPlan

_HOOK = "refitkit_weight_transforms"
_Ordered: TypeAlias = "Sequence[tuple[str, WeightTransform]]"
_MISSING = "missing"
_MAX_ATTACHED = 1 << 24
"""Largest size of the data of one transform, as JSON, in bytes."""


@dataclass(frozen=True, eq=False)  # a dictionary key by identity: groups hold functions
class TransformOffer:
    """One group of entries, with its owner.

    Attributes:
        plugin: Name of the plugin.
        transform: Name of the transform.
        group: The entries that it takes and gives.
    """

    plugin: str
    transform: str
    group: WeightGroup

    def __str__(self) -> str:
        return f"{self.transform!r} of the plugin {self.plugin!r} ({_HOOK})"


class Transformed:
    """A source in which groups replaced some entries. It keeps the result of the last group only.

    Attributes:
        offers: The groups with their owners.
        given: The source before these transforms.
        made_by: The group that makes an entry, by FQN.
    """

    def __init__(self, source: WeightSource, offers: Iterable[TransformOffer]) -> None:
        """Compute nothing yet.

        Args:
            source: The source before these transforms.
            offers: Groups that make different entries.
        """
        self.offers = tuple(offers)
        self.given = source
        self.made_by = {name: offer for offer in self.offers for name in offer.group.gives}
        taken = _consumed(self.offers)
        kept = [name for name in source.names() if name not in taken]
        self._names = dict.fromkeys([*kept, *self.made_by])
        self._last: tuple[TransformOffer, Made] | None = None
        self._measured: dict[TransformOffer, Made] = {}

    @property
    def description(self) -> str:
        """Description of the given source, with the names of the transforms."""
        through = dict.fromkeys(offer.transform for offer in self.offers)
        return f"{self.given.description} through {', '.join(through)}"

    def names(self) -> Collection[str]:
        """FQNs of the entries that no group takes, and of those that groups make."""
        return self._names.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Metadata, as the group announces it or the given source has it.

        Raises:
            KeyError: There is no such entry.
        """
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return self.given.info(fqn) if offer is None else offer.group.gives[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of the given source, or one that its group computes now.

        Raises:
            KeyError: There is no such entry.
            PluginError: The transform failed, or made other entries than announced.
            SourceError: An entry cannot be read.
        """
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return self.given.get(fqn) if offer is None else self._made(offer).values[fqn]

    def pieces(self, fqn: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor] | None:
        """Pieces of an entry that no group makes, else None; see ``GivesPieces``."""
        return pieces_of(self.given, fqn, into) if self.made_by.get(fqn) is None else None

    def has_bits(self, fqn: str, tensor: torch.Tensor) -> bool | None:
        """Whether a tensor has the bits of an entry that no group makes; see ``KnowsBits``."""
        return bits_known(self.given, fqn, tensor) if self.made_by.get(fqn) is None else None

    def gives_away(self, fqn: str) -> bool:
        """Whether an engine may keep an entry that no group makes; see ``GivesAway``."""
        given = self.given
        return (
            self.made_by.get(fqn) is None
            and isinstance(given, GivesAway)
            and (given.gives_away(fqn))
        )

    def made_from(self, fqn: str) -> tuple[str, ...]:
        """FQNs that its group takes, or the FQN itself; see ``MadeOf``."""
        if fqn not in self._names:
            raise KeyError(fqn)
        offer = self.made_by.get(fqn)
        return (fqn,) if offer is None else offer.group.takes

    def revision(self, fqn: str) -> Hashable | None:
        """Revision of an entry; see ``KnowsRevisions``.

        An entry that a group makes has the revision of its formula and of all entries that it
        takes. Without a formula, only reading shows whether it changed.
        """
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
        # A formula does not contain names, so the position identifies the entry.
        number = list(offer.group.gives).index(fqn)
        return offer.plugin, offer.group.formula, number, taken

    def _made(self, offer: TransformOffer) -> Made:
        if self._last is None or self._last[0] is not offer:
            self._last = None  # frees the last group first, so that memory holds one at a time
            doing = f"Weights cannot be transformed by {offer}"
            with raised_as(PluginError, f"The transform {offer} failed", doing=doing):
                made = received(offer.group.make(), Made, f"The transform {offer}")
                _check_results(offer, made)
            self._last = offer, made
            self._measured[offer] = Made({}, made.measures)  # without values, to free their memory
        return self._last[1]

    def rows(self) -> tuple[TransformRow, ...]:
        """One row of the report for each group, in the order of the transforms.

        A group that was computed has the measures of its last computation.
        """
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
        """Notes of all groups in the order of the transforms, each text once."""
        before = self.given.notes() if isinstance(self.given, Transformed) else ()
        here = (offer.group.note for offer in self.offers)
        return tuple(dict.fromkeys(note for note in (*before, *here) if note))


# -- applying transforms --------------------------------------------------------------------------


def transformed(
    context: Context,
    plan: Plan,
    source: WeightSource,
    module: OpenedModule | None = None,
    *,
    partial: bool = False,
) -> WeightSource:
    """A source with the entries that the program reads; the source itself if no transform applies.

    If a source has several sets of names (``HasNamings``), the set is used with which most weights
    fit the program.

    Args:
        context: Plugins and settings. Transforms read theirs in ``plugin_settings``.
        plan: The plan, whose leaves are the tensors that the program reads.
        source: The weights as the user gave them.
        module: The opened target; None if there is none.
        partial: Whether slots without a new value keep their values.

    Raises:
        WeightMismatchError: Transforms cannot use some entries; lists those of all transforms.
        PluginError: Two transforms make the same entry, or a transform is broken; names the
            plugins.
        SourceError: The source's names or metadata cannot be read.
    """
    ordered = _transforms(context)
    with raised_as(SourceError, f"{source.description} cannot be read"):
        namings = source.namings() if isinstance(source, HasNamings) else ()
        if not namings:
            return _apply_all(ordered, TransformRequest(plan, source, partial, module))
        requests = [TransformRequest(plan, one, partial, module) for one in namings]
        return _best_match(plan, ordered, requests)


def _transforms(context: Context) -> list[tuple[str, WeightTransform]]:
    """All transforms with their plugins, those of lower priority first."""
    # sorted is stable, so transforms of one priority stay in the order of their plugins.
    return sorted(context.host.named_items(_HOOK, config=context.config), key=_priority)


def _best_match(
    plan: Plan, ordered: _Ordered, requests: Iterable[TransformRequest]
) -> WeightSource:
    """The transformed source with which most weights fit the program; the first of equal ones.

    Raises:
        WeightMismatchError: Transforms refuse all sources; the error of the first one. Or the first
            source contains several models that fit.
    """
    found: list[WeightSource] = []
    refused: list[WeightMismatchError] = []
    for request in requests:
        try:
            found.append(_apply_all(ordered, request))
        except WeightMismatchError as exc:
            refused.append(exc)
            # Under another set of names only one of these models might fit, by chance.
            if not found and {ALL_NAMES, WHOLE_SUBTREE}.intersection(p.kind for p in exc.problems):
                raise
    if not found:
        raise refused[0]
    # max returns the first of equal ones, so the order of the namings decides
    return max(found, key=reads_of(plan).fitting)


def _apply_all(ordered: _Ordered, request: TransformRequest) -> WeightSource:
    """A source after all transforms, from the lowest priority to the highest."""
    source = request.source
    for _, alike in groupby(ordered, key=_priority):
        source = _apply_rank(list(alike), replace(request, source=source))
    return source


def _priority(offered: tuple[str, WeightTransform]) -> int:
    return offered[1].priority


def _apply_rank(
    transforms: Iterable[tuple[str, WeightTransform]], request: TransformRequest
) -> WeightSource:
    """A source after the transforms of one priority, which all see the same source.

    Raises:
        PluginError: A transform is broken, or two make the same entry.
        WeightMismatchError: Transforms refuse entries, or the source already has an entry that a
            transform would make; lists all of them.
    """
    offers: list[TransformOffer] = []
    problems: list[Problem] = []
    for plugin, transform in transforms:
        try:
            offers += _offers(plugin, transform, request)
        except WeightMismatchError as exc:  # the others are asked too, to list all problems
            problems += exc.problems or [Problem(transform.name, "refused", hint=exc.message)]
    if offers:  # most sources need no transform, and then none of their names is looked at
        names, taken = request.source.names(), _consumed(offers)
        _check_offers(offers, request.source, names, taken)
        problems += _duplicates(offers, names, taken)
    if problems:
        message = f"{request.source.description} cannot be transformed for the program."
        raise WeightMismatchError(message, problems=problems)
    return Transformed(request.source, offers) if offers else request.source


def _offers(
    plugin: str, transform: WeightTransform, request: TransformRequest
) -> list[TransformOffer]:
    who = owned(_HOOK, transform.name, plugin)
    doing = f"Weights cannot be transformed by {transform.name!r}"
    with raised_as(PluginError, f"{who} failed", doing=doing):
        request = _own(transform, request)
        groups = [received(group, WeightGroup, who) for group in transform.groups(request)]
    for group in groups:
        _check_group(who, group)
    return [TransformOffer(plugin, transform.name, group) for group in groups]


def _own(transform: WeightTransform, request: TransformRequest) -> TransformRequest:
    """The request with what the transform attached to the plan."""
    return replace(request, attached=request.plan.data.attached.get(transform.name))


def _check_group(who: str, group: Any) -> None:
    """Raise PluginError if a field of a ``WeightGroup`` has another type than it should."""
    takes, gives, wrong = group.takes, group.gives, ""
    if not isinstance(takes, Collection) or not all(isinstance(name, str) for name in takes):
        wrong = "takes must be a tuple of names"
    elif isinstance(takes, str):
        wrong = "takes is one name, and must be a tuple of names"
    elif not isinstance(gives, Mapping) or not all(
        isinstance(name, str) and isinstance(info, TensorInfo) for name, info in gives.items()
    ):
        wrong = "gives must have a TensorInfo for each name"
    elif not callable(group.make):
        wrong = "make must be a function"
    elif not isinstance(group.formula, Hashable):
        wrong = "formula must be hashable"
    if wrong:
        raise PluginError(f"{who} gave a WeightGroup that is wrong: {wrong}.")


def _consumed(offers: Iterable[TransformOffer]) -> set[str]:
    """Entries that groups take, so that the transformed source no longer has them."""
    return {name for offer in offers for name in offer.group.takes}


def _check_offers(
    offers: Iterable[TransformOffer],
    source: WeightSource,
    names: Collection[str],
    taken: Collection[str],
) -> None:
    """Raise PluginError if a group takes an entry that is not there, or two make the same entry."""
    # Entries that transforms of an earlier rank made, and that are still there, have an owner too.
    owners: dict[str, TransformOffer] = {}
    if isinstance(source, Transformed):
        owners = {name: offer for name, offer in source.made_by.items() if name not in taken}
    for offer in offers:
        missing = [repr(name) for name in offer.group.takes if name not in names]
        if missing:
            what = f"The transform {offer} takes entries that the source does not have"
            raise PluginError(f"{what}: {', '.join(missing)}.")
        for name in offer.group.gives:
            other = owners.setdefault(name, offer)
            if other is not offer:
                raise PluginError(
                    f"The transforms {other} and {offer} both make {name!r}.",
                    hint=f"Switch one of them off, as with no_plugins={{{offer.plugin!r}}}, or "
                    "change their settings.",
                )


def _duplicates(
    offers: Iterable[TransformOffer], names: Collection[str], taken: Collection[str]
) -> Iterator[Problem]:
    """A problem for each entry that a group makes and that the source already has."""
    for offer in offers:
        for name in offer.group.gives:
            if name in names and name not in taken:
                others = ", ".join(map(repr, offer.group.takes))
                hint = f"{offer.transform!r} makes it from {others}: leave out one of them"
                yield Problem(name, "given twice", hint=hint)


def _check_results(offer: TransformOffer, made: Made) -> None:
    """Raise PluginError unless a group made the announced entries with these dtypes and shapes."""
    wrong = sorted(made.values.keys() ^ offer.group.gives.keys())
    wrong += [
        name
        for name, info in offer.group.gives.items()
        if name in made.values
        and _signature(describe_tensor(made.values[name])) != _signature(info)
    ]
    if wrong:
        shown = ", ".join(map(repr, wrong))
        raise PluginError(f"The transform {offer} did not make the announced entries: {shown}.")
    measures: Any = made.measures
    with raised_as(PluginError, f"The transform {offer} returned unusable measures"):
        for measure in measures:
            received(measure, OutputMeasure, f"The transform {offer}")


def _signature(info: TensorInfo) -> tuple[str, tuple[int, ...], str]:
    return info.dtype, info.shape, info.unusable


# -- data that travels with the plan --------------------------------------------------------------


def with_attached_data(context: Context, plan: RefitPlan, program: ExportedProgram) -> RefitPlan:
    """A plan with the data that transforms attach to it, and with the need for these transforms.

    Args:
        context: Plugins and settings.
        plan: The plan, without data.
        program: The program that the plan was made from.

    Raises:
        PluginError: A transform failed, or returned something else than JSON; names it.
        RefitError: A transform refused the program.
    """
    attached: dict[str, JsonValue] = {}
    plugins: dict[str, str] = {}
    for plugin, transform in _transforms(context):
        if not isinstance(transform, AttachesData):
            continue
        who = f"{owned(_HOOK, transform.name, plugin)}: attach()"
        with raised_as(PluginError, f"{who} failed", doing="The program cannot be planned"):
            value = _as_json(transform.attach(program, plan), who)
        if value is not None:
            attached[transform.name], plugins[transform.name] = value, plugin
    if not attached:
        return plan
    return with_needs(plan.noting(attached=attached), transform_needs(context.host, plugins))


def _as_json(value: object, who: str) -> JsonValue:
    """A copy of the value, as a plan file gives it back."""
    try:
        checked = TypeAdapter(JsonValue).validate_python(value)
        text = json.dumps(checked, allow_nan=False)
    except (ValueError, RecursionError) as exc:
        hint = "Return dicts with text as keys, lists, text, finite numbers, booleans or None."
        raise PluginError(f"{who} returned {shown(value)}, which is no JSON.", hint=hint) from exc
    if len(text) > _MAX_ATTACHED:
        raise PluginError(
            f"{who} returned {len(text)} bytes of JSON; a plan keeps at most {_MAX_ATTACHED}.",
            hint="Keep tensors in buffers of the program.",
        )
    found: JsonValue = json.loads(text)
    return found


# -- hints for missing entries --------------------------------------------------------------------


def explained(
    context: Context,
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    problems: Iterable[Problem],
    *,
    partial: bool,
) -> list[Problem]:
    """Problems in which transforms say what to pass instead of missing entries.

    Args:
        context: Plugins and settings.
        plan: The plan.
        module: The opened target.
        source: The weights after all transforms.
        problems: Problems of the checks.
        partial: Whether slots without a new value keep their values.

    Raises:
        PluginError: A transform failed, or returned something else than texts; names it.
    """
    problems = list(problems)
    leaves = {leaf.fqn for leaf in plan.data.leaves}
    missing = [one.subject for one in problems if one.kind == _MISSING and one.subject in leaves]
    if not missing:
        return problems
    while isinstance(source, MadeOf):
        source = source.given
    texts: dict[str, list[str]] = {}
    for plugin, transform in _transforms(context):
        if isinstance(transform, ExplainsMissing):
            who = f"{owned(_HOOK, transform.name, plugin)}: explain_missing()"
            request = _own(transform, TransformRequest(plan, source, partial, module))
            with raised_as(PluginError, f"{who} failed", doing="Weights are missing"):
                answer: object = transform.explain_missing(request, missing)
                found = received(answer, dict, who)
                given = {name: found[name] for name in missing if name in found}
            for name, text in given.items():
                texts.setdefault(name, []).append(received(text, str, f"{who}: the entry {name!r}"))
    return [
        replace(one, hint="; or ".join([*texts[one.subject], one.hint]))
        if one.kind == _MISSING and one.subject in texts
        else one
        for one in problems
    ]


# -- accuracy of the result -----------------------------------------------------------------------


def require_accurate(rows: Iterable[TransformRow]) -> None:
    """Raise unless the measured errors of all transformed weights are within their limits.

    Args:
        rows: Rows of the report, with the measures of computed groups.

    Raises:
        VerificationError: Entries are too inexact; lists them with error and limit.
    """
    problems = [
        Problem(
            measure.name,
            "too far from the given weights",
            *_findings(measure),
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
            hint="Use other weights, or raise the limit in the settings of the plugin.",
        )


def _findings(measure: OutputMeasure) -> tuple[str, str]:
    """What a measure found, and what passes."""
    if measure.failed:
        return "; ".join(map(str, measure.failed)), ""
    return f"an error of {measure.max_abs_error:.4g}", f"at most {measure.limit:.4g}"
