"""Match the names of a source with the names of a program, beyond what explicit rules say.

A checkpoint rarely has exactly the names of the program. Wrappers add parts anywhere in a name, a
trainer stores the weights in a subtree of its file, or the program is a part of the model that was
saved. The module hides how such a match is found and when it is safe to use it.

Each way to interpret all names at once is a ``NameMatch``. A match other than the names as given is
used only if it is complete (every tensor that a source must have is there, with its shape) and
unambiguous (no other complete match gives a tensor other values). Finding it reads headers only.

Read ``NameMatch`` and ``NameMatcher.choose`` first. ``ProgramNames`` at the end handles wrapper
parts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from refitkit.builtin.rules.packs import PackConversion, PackIndex
from refitkit.errors import Problem, WeightMismatchError
from refitkit.recipe.foreign import info_of
from refitkit.recipe.name_suggestions import ALL_NAMES, WHOLE_SUBTREE, ignoring, names_under

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from refitkit.model import Rules, TensorInfo
    from refitkit.protocols import WeightSource
    from refitkit.recipe.reads import Reads

_MAX_SUBTREES = 1000
"""Limit of subtrees that may hold the model. Beyond it none is tried, to save time and memory."""
_MAX_HEADERS = 1000
"""Headers of more unmatched entries are not read: opening them would take long."""
_ANCHORS = 8
"""Most tensors by which subtrees are searched."""
_MAX_PATTERNS = 64
"""Most patterns in one ``--ignore`` flag."""


@dataclass(frozen=True)
class NameMatch:
    """One way to interpret all names of a source.

    Attributes:
        targets: Name in the program, by name in the source.
        unmatched: Names in the source that match nothing in the program.
        outside: Names outside the subtree, if the match reads a subtree.
        dropped: Prefix that the match removes: the subtree.
        added: Prefix that the match puts before every name.
        adds_wrappers: Whether the match may add wrapper parts that only the program's names have.
        exact: Number of names that the program has unchanged, after ``dropped`` was removed.
    """

    targets: Mapping[str, str]
    unmatched: Collection[str] = ()
    outside: Collection[str] = ()
    dropped: str = ""
    added: str = ""
    adds_wrappers: bool = False
    exact: int = 0

    @cached_property
    def sources(self) -> dict[str, str]:
        """Name in the source, by name in the program."""
        return {target: name for name, target in self.targets.items()}

    @property
    def has_duplicates(self) -> bool:
        """Whether two names match the same name of the program."""
        return len(self.sources) < len(self.targets)


@dataclass(frozen=True)
class NameMatcher:
    """Finds all matches between the names of one source and those of one program.

    Attributes:
        reads: Names, dtypes and shapes that the program reads.
        source: Source of the weights.
        rules: Rules of the user.
        names: Names of the source that explicit rules keep, with the names that these rules give.
    """

    reads: Reads
    source: WeightSource
    rules: Rules
    names: Mapping[str, str]
    _infos: dict[str, TensorInfo] = field(default_factory=dict)

    def choose(self, *, partial: bool) -> NameMatch:
        """Return the match to use: the names as given, or the only other complete match.

        Args:
            partial: Whether slots without a value keep theirs. Then no match can be complete, so
                names are used as given.

        Raises:
            WeightMismatchError: Several matches are complete; the error lists a rule for each. Or
                one has all names and wrong shapes; the error lists these.
        """
        plain = self._plain()
        has_all = self.has_all(plain)
        if partial or not self.reads.demands or (has_all and self._leaves_nothing(plain)):
            return plain
        # Explicit rules decide: other complete matches are ignored.
        if has_all and (self.rules.subtree or self.rules.rename) and not plain.has_duplicates:
            return plain
        others = [one for one in self._others() if self.has_all(one) and not one.has_duplicates]
        candidates = self._candidates(plain, others)
        if len(candidates) > 1:
            raise self._ambiguous(candidates)
        if candidates and not plain.has_duplicates:
            return candidates[0]
        if others and not has_all and not candidates:
            raise self._wrong_shapes(max(others, key=self._preference))
        return plain  # the checks report what is missing or unexpected

    def has_all(self, match: NameMatch) -> bool:
        """Return whether the source has every required tensor, or all parts to make it of."""
        sources = match.sources
        return all(
            not names.isdisjoint(sources)
            or any(self._packs.find_complete(name, sources) for name in names)
            for names in self.reads.demands.values()
        )

    def known_extras(self, match: NameMatch) -> list[str]:
        """Return unmatched names of entries that are known not to be weights of a model.

        Non-persistent entries are not among them: the checks never report these as unexpected.
        """
        dropped, names = match.dropped, self.names
        found = [
            name
            for name in match.unmatched
            if self._is_known_extra(name, names[name].removeprefix(dropped))
        ]
        if len(found) > _MAX_HEADERS:
            return found
        return [name for name in found if self._info(name).persistent]

    @property
    def can_be_complete(self) -> bool:
        """Whether at least one match is complete."""
        plain = self._plain()
        return any(map(self._is_complete, (plain, *self._candidates(plain, self._others()))))

    @property
    def has_packs(self) -> bool:
        """Whether a rule of ``pack`` or a family applies to a weight of the program."""
        return bool(self._packs.source_names)

    def with_families(self, *families: str) -> NameMatcher:
        """Return a matcher whose rules have more families."""
        rules = self.rules.model_copy(update={"families": (*self.rules.families, *families)})
        return replace(self, rules=rules)

    # -- making matches -----------------------------------------------------------------------

    @cached_property
    def _program_names(self) -> ProgramNames:
        # Names of parts count as names of the program: they are matched before they are packed.
        return ProgramNames(self.reads.known | self._packs.source_names, self.rules.wrappers)

    @cached_property
    def _packs(self) -> PackIndex:
        return PackIndex(self.rules.packing, self.reads.leaves)

    def _plain(self) -> NameMatch:
        """Return the match of names as given, after wrapper parts were removed."""
        return self._match(self.names, only_removes=True)

    def _unchanged(self) -> NameMatch:
        """Return the match of names as given, with all wrapper parts."""
        targets = {name: now for name, now in self.names.items() if now in self._program_names}
        unmatched = [name for name in self.names if name not in targets]
        return NameMatch(targets, unmatched, exact=len(targets))

    def _others(self) -> list[NameMatch]:
        """Return all matches that add a prefix, add wrapper parts, or read a subtree."""
        found = [self._match(self.names, added=prefix) for prefix in self._prefixes_to_add()]
        if self._program_names.has_wrappers:
            found.append(self._match(self.names))
        if not self.rules.subtree:
            subtrees = names_under(self._subtrees(), self.names)
            found += [self._match(inside, dropped=prefix) for prefix, inside in subtrees.items()]
        return found

    def _match(
        self,
        inside: Iterable[str],
        *,
        dropped: str = "",
        added: str = "",
        only_removes: bool = False,
    ) -> NameMatch:
        """Match each name.

        Args:
            inside: Names in the source that are in the subtree; all names if there is none.
            dropped: Prefix to remove.
            added: Prefix to add.
            only_removes: Whether wrapper parts may be removed from names, but not added.
        """
        targets, unmatched = dict[str, str](), list[str]()
        find = self._program_names.find if only_removes else self._program_names.find_nearest
        exact = 0
        for name in inside:
            now = self.names[name].removeprefix(dropped)
            target = find(added + now)
            if target is None:
                unmatched.append(name)
            else:
                targets[name] = target
                exact += target == now
        outside: Collection[str] = ()
        if dropped and len(targets) + len(unmatched) < len(self.names):
            outside = [name for name in self.names if not self.names[name].startswith(dropped)]
        return NameMatch(targets, unmatched, outside, dropped, added, not only_removes, exact)

    def _prefixes_to_add(self) -> list[str]:
        """Return prefixes that each required tensor has in one of its names."""
        demands = list(self.reads.demands.values())
        found = {prefix for name in demands[0] for prefix in _prefixes_of(name)}
        for names in demands[1:]:
            found = {one for one in found if any(name.startswith(one) for name in names)}
        return sorted(found)

    def _subtrees(self) -> set[str]:
        """Return prefixes under which the whole model may lie.

        One tensor is searched. Only if it occurs under too many prefixes, others narrow them down:
        a file with thousands of layers may have a ``weight`` under each.
        """
        found: set[str] | None = None
        for names in self._anchors():
            ends = {self._program_names.unwrapped(name) for name in names}
            last = tuple({end.rpartition(".")[2] for end in ends})
            prefixes = {
                prefix
                for now in self.names.values()
                if now.endswith(last) and not _is_of_training(now)
                for prefix in self._program_names.prefixes_before(ends, now)
                if prefix
            }
            found = prefixes if found is None else found & prefixes
            if len(found) <= _MAX_SUBTREES:
                return found
        return set()

    def _anchors(self) -> list[set[str]]:
        """Return names of a few required tensors and of their parts.

        Deep names come first: the deeper a name is, the fewer prefixes it occurs under.
        """
        demands = self.reads.demands
        deepest = sorted(demands, key=lambda name: (-name.count("."), name))
        return [
            demands[first] | self._packs.source_names_of(demands[first])
            for first in deepest[:_ANCHORS]
        ]

    # -- choice of a match --------------------------------------------------------------------

    def _leaves_nothing(self, match: NameMatch) -> bool:
        """Return whether no names are duplicates, and only non-persistent entries are unmatched.

        A live module has a few of these.
        """
        if match.has_duplicates or len(match.unmatched) > _MAX_HEADERS:
            return False
        return not any(self._info(name).persistent for name in self._unexplained(match))

    def _unexplained(self, match: NameMatch) -> list[str]:
        """Return unmatched names without the known extras."""
        extras = set(self.known_extras(match))
        return [name for name in match.unmatched if name not in extras]

    def _is_complete(self, match: NameMatch) -> bool:
        """Return whether the source has every required tensor, with its shape."""
        return self.has_all(match) and not any(self._shape_problems(match))

    def _shape_problems(self, match: NameMatch) -> Iterator[Problem]:
        """Yield entries that are unusable, or whose shape is not the program's.

        Dtypes do not count: casts come later.
        """
        leaves = self.reads.leaves
        for name, target in match.targets.items():
            info, leaf = self._info(name), leaves.get(target)
            # A rule that transposes a weight under its own name is checked below.
            if leaf is None or self._packs.find_complete(target, (target,)):
                continue
            if info.unusable:
                yield Problem(name, "unusable", info.unusable)
            elif info.shape != leaf.shape:
                yield Problem(name, "shape", str(info.shape), f"{leaf.shape} of {target!r}")
        headers, seen = _MatchedHeaders(self, match), set[PackConversion]()
        for name in leaves:
            conversion = self._packs.find_complete(name, match.sources)
            if conversion and conversion not in seen:
                seen.add(conversion)
                yield from conversion.problems(headers)

    def _info(self, name: str) -> TensorInfo:
        """Return the header of an entry; each is read once."""
        found = self._infos.get(name)
        if found is None:
            found = self._infos[name] = info_of(self.source, name)
        return found

    def _candidates(self, plain: NameMatch, others: Iterable[NameMatch]) -> list[NameMatch]:
        """Return complete matches that give at least one tensor different values.

        Args:
            plain: Match of the names as given, after wrapper parts were removed.
            others: Other matches.
        """
        complete = [one for one in others if not one.has_duplicates and self._is_complete(one)]
        is_exact = plain.exact == len(plain.targets)
        if plain.has_duplicates:
            # Two names become one if wrapper parts are removed: ``w`` and ``module.w``. The names
            # as they are written may still match.
            if self._is_complete(unchanged := self._unchanged()):
                complete.insert(0, unchanged)
        # Exact names count even if shapes are wrong: the checks report the shapes, and a subtree
        # that fits is an alternative that the user must choose.
        elif self.has_all(plain) and (is_exact or not any(self._shape_problems(plain))):
            complete.insert(0, plain)
        return self._distinct(complete)

    def _distinct(self, matches: Iterable[NameMatch]) -> list[NameMatch]:
        """Return the preferred match of those that give every tensor the same values.

        A match is left out if another one has the same entries and more: names of tied weights. The
        checks compare the values of these.
        """
        groups: dict[tuple[frozenset[str], ...], list[NameMatch]] = defaultdict(list)
        for match in matches:
            groups[tuple(self._entries_by_tensor(match))].append(match)
        return [
            max(group, key=self._preference)
            for entries, group in groups.items()
            if not any(entries != other and _are_subsets(entries, other) for other in groups)
        ]

    def _preference(self, match: NameMatch) -> tuple[bool, int, int]:
        """Return a sort key: the greatest match says most clearly which weights it takes."""
        return not self._unexplained(match), match.exact, len(match.dropped)

    def _entries_by_tensor(self, match: NameMatch) -> Iterator[frozenset[str]]:
        """Yield, for each required tensor, the names in the source that give its values."""
        sources = match.sources
        for names in self.reads.demands.values():
            present = [name for name in names if name in sources]
            packs = (self._packs.find_complete(name, sources) for name in names if not present)
            parts = next((conversion.takes for conversion in packs if conversion), ())
            yield frozenset(sources[name] for name in (*present, *parts))

    def _is_known_extra(self, name: str, now: str) -> bool:
        """Return whether an entry is known not to be a weight of a model.

        Args:
            name: Name in the source.
            now: Name after explicit rules, without the subtree.
        """
        if now in _RANDOM_STATES or _ends_with(now, _EXTRA_ENDS) or _is_of_training(now):
            return True
        if now in _COUNTERS:
            return self._info(name).count == 1
        if _ends_with(now, (_GPT2_MASK,)):
            shape = self._info(name).shape
            return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]  # noqa: PLR2004
        return False

    # -- errors -------------------------------------------------------------------------------

    def _ambiguous(self, candidates: Iterable[NameMatch]) -> WeightMismatchError:
        return WeightMismatchError(
            "The names match the program in several ways.",
            problems=[self._candidate_problem(match) for match in candidates],
        )

    def _candidate_problem(self, match: NameMatch) -> Problem:
        """Return a problem whose hint says how to choose this match."""
        rule, flag = self._rule_for(match)
        hint = f"to take it, set rules.{rule}, or pass {flag}"
        if match.dropped:
            return Problem(repr(match.dropped), WHOLE_SUBTREE, hint=hint)
        how = f"with the prefix {match.added!r}" if match.added else "as they are"
        return Problem(f"the names {how}", ALL_NAMES, hint=hint)

    def _rule_for(self, match: NameMatch) -> tuple[str, str]:
        """Return the rules, and the flags, with which this match is the only one."""
        rules, flags = list[str](), list[str]()
        if match.dropped:
            rules.append(f"subtree to {match.dropped!r}")
            flags.append(f"--subtree '{match.dropped}'")
        elif match.added:
            to = rf"{match.added}\1"
            rules.append(f"rename to [{{'pattern': '(.*)', 'to': {to!r}}}]")
            flags.append(f"--rename '(.*)={to}'")
        if unexplained := self._unexplained(match):
            # ``rules.ignore`` matches a name with or without the subtree. So the pattern must not
            # match a used name in either form.
            used = {name.removeprefix(match.dropped) for name in match.targets}
            pattern = ignoring(unexplained, used.union(match.targets), most=_MAX_PATTERNS)
            rules.append(f"ignore to {[pattern] if pattern else 'patterns of all others'}")
            flags.append(f"--ignore '{pattern}'" if pattern else "--ignore PATTERN")
        return " and rules.".join(rules), " ".join(flags)

    def _wrong_shapes(self, match: NameMatch) -> WeightMismatchError:
        where = f"under {match.dropped!r} " if match.dropped else ""
        hint = f"all names of the program are present {where}with other shapes: it is another model"
        problems = [
            Problem(one.subject, one.kind, one.found, one.wanted, hint)
            for one in self._shape_problems(match)
        ]
        return WeightMismatchError("These are weights of another model.", problems=problems)


@dataclass(frozen=True)
class _MatchedHeaders:
    """Headers of a source under the program's names; see ``packs.Headers``."""

    matcher: NameMatcher
    match: NameMatch

    def names(self) -> Collection[str]:
        return self.match.sources.keys()

    def info(self, fqn: str) -> TensorInfo:
        return self.matcher._info(self.match.sources[fqn])  # noqa: SLF001 - of one module


# -- entries that are not weights of a model --------------------------------------------------

_EXTRA_ENDS = (
    "n_averaged",  # the counter of torch.optim.swa_utils.AveragedModel
    # Buffers that older versions of transformers saved: its models list them in
    # _keys_to_ignore_on_load_unexpected.
    "position_ids",
    "rotary_emb.inv_freq",
    "attn.masked_bias",
    "_extra_state",  # torch.nn.Module.get_extra_state
)
_GPT2_MASK = "attn.bias"
"""GPT-2's causal mask in older files, of shape (1, 1, n, n). With another shape it is a weight."""
_COUNTERS = frozenset({"epoch", "global_step", "step", "iteration"})
"""Names of single numbers that trainers save beside weights."""
_RANDOM_STATES = frozenset({"rng_state", "cpu_rng_state", "cuda_rng_state", "torch_rng_state"})
_OPTIMIZERS = frozenset(
    {
        "optim",
        "optimizer",
        "optimizers",
        "optimizer_state",
        "optimizer_states",
        "optimizer_state_dict",
        "optimizer_state_dicts",
        "optimizers_state_dict",
    }
)
"""Keys under which trainers save optimizer states, at the top of a file or one level below."""
_TRAINING = _OPTIMIZERS | _RANDOM_STATES | {"lr_scheduler", "lr_schedulers", "loops", "callbacks"}
"""Keys at the top of a file under which nothing is a weight."""


def _is_of_training(name: str) -> bool:
    """Return whether trainers save state of the training under this name."""
    top, dot, below = name.partition(".")
    if top in _TRAINING:
        return bool(dot)
    second, dot, _ = below.partition(".")
    return second in _OPTIMIZERS and bool(dot)


def _ends_with(name: str, ends: tuple[str, ...]) -> bool:
    """Return whether a name ends with one of these as whole parts: ``a.b`` with ``b``."""
    if not name.endswith(ends):
        return False
    return any(name == end or name.endswith(f".{end}") for end in ends)


# -- wrapper parts ----------------------------------------------------------------------------


class ProgramNames:
    """Names of a program, found by names with more or fewer wrapper parts.

    A wrapper part is a part of a name that a wrapper module adds, such as ``_orig_mod``.
    """

    def __init__(self, known: Iterable[str], wrappers: Collection[str]) -> None:
        """Index the names.

        Args:
            known: Names of the program.
            wrappers: Parts that wrappers add to names.
        """
        self._known = frozenset(known)
        self._wrappers = frozenset(wrappers)
        self._last_parts = {name.rpartition(".")[2] for name in self._known}
        self._by_unwrapped: dict[str, list[str]] = defaultdict(list)
        for name in self._known:
            self._by_unwrapped[self.unwrapped(name)].append(name)
        self.has_wrappers = not self._known >= self._by_unwrapped.keys()

    def __contains__(self, name: str) -> bool:
        """Return whether the program has exactly this name."""
        return name in self._known

    def unwrapped(self, name: str) -> str:
        """Return a name without wrapper parts.

        The last part stays: it names the tensor, as ``model`` may.
        """
        *parts, last = name.split(".")
        if self._wrappers.isdisjoint(parts):
            return name
        return ".".join([*(part for part in parts if part not in self._wrappers), last])

    def find(self, name: str) -> str | None:
        """Return the program's name that results if some wrapper parts are removed.

        As few parts as possible are removed, and those at the beginning first. So words such as
        ``model`` stay if the program's own name has them.

        Returns:
            None if the program has no such name, or several that are equally near.
        """
        if name in self._known:
            return name
        if name.rpartition(".")[2] not in self._last_parts:
            return None
        similar = self._by_unwrapped.get(self.unwrapped(name))
        if similar is None:
            return None
        parts = name.split(".")
        found = [one for one in similar if _is_subsequence(one.split("."), parts)]
        if len(found) < 2:  # noqa: PLR2004 - mostly one
            return found[0] if found else None
        most = max(one.count(".") for one in found)
        nearest = [one for one in found if one.count(".") == most]
        ends = [one for one in nearest if name.endswith(f".{one}")]
        return (ends or nearest)[0] if len(nearest) == 1 or ends else None

    def find_nearest(self, name: str) -> str | None:
        """Return what ``find`` does, or the only name that differs in wrapper parts alone."""
        found = self.find(name)
        if found is not None or not self.has_wrappers:
            return found
        others = self._by_unwrapped.get(self.unwrapped(name), ())
        return others[0] if len(others) == 1 else None

    def prefixes_before(self, ends: Collection[str], name: str) -> Iterator[str]:
        """Yield prefixes of a name, each with a dot, after which one of some names is left.

        Wrapper parts between prefix and rest may belong to either, so each split is yielded:
        ``state.module.w`` with the end ``w`` gives ``state.module.`` and ``state.``.

        Args:
            ends: Names without wrapper parts.
            name: Name to split.
        """
        unwrapped = self.unwrapped(name)
        for end in ends:
            if unwrapped != end and not unwrapped.endswith(f".{end}"):
                continue
            parts = name.split(".")
            index = len(parts)
            for part in reversed(end.split(".")):
                index -= 1
                while parts[index] != part:
                    index -= 1
            yield _as_prefix(parts[:index])
            while index and parts[index - 1] in self._wrappers:
                index -= 1
                yield _as_prefix(parts[:index])


def _is_subsequence(some: Iterable[str], parts: Iterable[str]) -> bool:
    """Return whether some parts are among others, in the same order."""
    remaining = iter(parts)
    return all(part in remaining for part in some)


def _are_subsets(some: Iterable[frozenset[str]], others: Iterable[frozenset[str]]) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))


def _prefixes_of(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (_as_prefix(parts[:end]) for end in range(1, len(parts)))


def _as_prefix(parts: Iterable[str]) -> str:
    return "".join(f"{part}." for part in parts)
