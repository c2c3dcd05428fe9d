"""Which names of a program the names of a source stand for.

A checkpoint rarely has just the names of the program: wrappers add parts anywhere in a name, a
trainer puts the weights in one subtree of its file, the model was exported as a part of another
one. Each way to read all names at once is a ``Reading``. One that differs from the names as given
is taken only if it is complete (every tensor that a source must have is there, with its shape) and
unique (no other reading gives a tensor other values). Only headers are read to find that out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from refitkit.builtin.rules.packs import Packing, Packings
from refitkit.errors import Problem, WeightMismatchError
from refitkit.recipe.name_suggestions import ALL_NAMES, WHOLE_SUBTREE, ignoring, names_under

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from refitkit.model import Rules, TensorInfo
    from refitkit.protocols import WeightSource
    from refitkit.recipe.reads import Reads

_MANY = 1000
"""More subtrees than this may hold the model: then none is looked at, to bound time and memory."""
_ANCHORS = 8
"""By so many tensors subtrees are looked for, if there are too many with the first."""

_PATTERNS = 64
"""Most patterns in one flag."""

_ENDS = ("n_averaged", "position_ids", "rotary_emb.inv_freq", "attn.masked_bias", "_extra_state")
"""Entries that are no weights of a model, where a program does not have them: the counter of
``torch.optim.swa_utils.AveragedModel``, and buffers that older versions of transformers saved
(``_keys_to_ignore_on_load_unexpected`` of its models lists them), and what modules keep beside
their weights (``get_extra_state``)."""
_MASK = "attn.bias"
"""GPT-2's mask in older files, (1, 1, n, n); with another shape it is a weight."""
_COUNTERS = frozenset({"epoch", "global_step", "step", "iteration"})
"""Single numbers that trainers keep beside weights."""
_STATES = frozenset({"rng_state", "cpu_rng_state", "cuda_rng_state", "torch_rng_state"})
_TRAINING = frozenset({"optim", "optimizer", "optimizers", "optimizer_state", "optimizer_states"})
_TRAINING |= {"optimizer_state_dict", "optimizer_state_dicts", "optimizers_state_dict"}
"""Keys under which trainers keep the state of optimizers, at the top or one level below."""
_AT_THE_TOP = _TRAINING | _STATES | {"lr_scheduler", "lr_schedulers", "loops", "callbacks"}
"""Keys at the top under which nothing is a weight."""


class Spelling:
    """Names of a program, found by names with other wrapper parts in them."""

    def __init__(self, known: Iterable[str], wrappers: Collection[str]) -> None:
        """Index the names.

        Args:
            known: Names of the program.
            wrappers: Parts that wrappers add to names.
        """
        self._known = frozenset(known)
        self.wrappers = frozenset(wrappers)
        self._last_parts = {name.rpartition(".")[2] for name in self._known}
        self._by_bare: dict[str, list[str]] = defaultdict(list)
        for name in self._known:
            self._by_bare[self.bare(name)].append(name)
        self.has_wrappers = not self._known >= self._by_bare.keys()

    def __contains__(self, name: str) -> bool:
        """Whether the program has just this name."""
        return name in self._known

    def bare(self, name: str) -> str:
        """A name without the parts of wrappers. The last part is the tensor's own and stays."""
        *parts, last = name.split(".")
        if self.wrappers.isdisjoint(parts):
            return name
        return ".".join([*(part for part in parts if part not in self.wrappers), last])

    def without_wrappers(self, name: str) -> str | None:
        """The program's name that is left when parts of wrappers are taken out, wherever they are.

        Parts of the program's own name stay, even if they are wrapper words. As few as possible
        are taken out, and those at the beginning first. None if the program has no such name, or
        several that are equally near.
        """
        if name in self._known:
            return name
        if name.rpartition(".")[2] not in self._last_parts:
            return None
        alike = self._by_bare.get(self.bare(name))
        if alike is None:
            return None
        parts = name.split(".")
        found = [one for one in alike if _is_within(one, parts)]
        if len(found) < 2:  # noqa: PLR2004 - mostly one
            return found[0] if found else None
        most = max(one.count(".") for one in found)
        nearest = [one for one in found if one.count(".") == most]
        ends = [one for one in nearest if name.endswith(f".{one}")]
        return (ends or nearest)[0] if len(nearest) == 1 or ends else None

    def nearest(self, name: str) -> str | None:
        """The same, or the only name that differs in parts of wrappers alone."""
        found = self.without_wrappers(name)
        if found is not None or not self.has_wrappers:
            return found
        others = self._by_bare.get(self.bare(name), ())
        return others[0] if len(others) == 1 else None

    def prefixes(self, name: str, ends: Collection[str]) -> Iterator[str]:
        """Beginnings of a name after which it is one of some bare names.

        Where wrapper parts stand between beginning and end, they may belong to either.
        """
        bare = self.bare(name)
        for end in ends:
            if bare != end and not bare.endswith(f".{end}"):
                continue
            parts = name.split(".")
            place = len(parts)
            for part in reversed(end.split(".")):
                place -= 1
                while parts[place] != part:
                    place -= 1
            yield _prefix(parts[:place])
            while place and parts[place - 1] in self.wrappers:
                place -= 1
                yield _prefix(parts[:place])


@dataclass(frozen=True)
class Reading:
    """One way to read all names of a source.

    Attributes:
        found: The program's name for each name of the source that stands for one.
        rest: Names that stand for nothing in the program.
        beside: Names outside of the subtree that is read.
        dropped: The prefix that is taken away.
        added: The prefix that is put before every name.
        puts_wrappers: Whether parts of wrappers that only the program has are put into names.
        exact: Number of names that the program has as they are, after the prefix was taken away.
    """

    found: Mapping[str, str]
    rest: Collection[str] = ()
    beside: Collection[str] = ()
    dropped: str = ""
    added: str = ""
    puts_wrappers: bool = False
    exact: int = 0

    @cached_property
    def given(self) -> dict[str, str]:
        """The source's name for each of the program's."""
        return {new: name for name, new in self.found.items()}

    @property
    def doubles(self) -> bool:
        """Whether two names stand for one."""
        return len(self.given) < len(self.found)


@dataclass(frozen=True)
class Readings:
    """All ways to read the names of one source.

    Attributes:
        reads: The names, dtypes and shapes that a program reads.
        source: The source.
        rules: The rules of the user.
        names: The source's names that explicit rules leave, with the names that these rules give.
    """

    reads: Reads
    source: WeightSource
    rules: Rules
    names: Mapping[str, str]
    _infos: dict[str, TensorInfo] = field(default_factory=dict)

    def chosen(self, *, partial: bool) -> Reading:
        """The reading to take: names as they are, or the only other one that is complete.

        Args:
            partial: Whether slots without a value keep theirs: then nothing is ever complete.

        Raises:
            WeightMismatchError: Several readings are complete; lists a rule for each. Or only the
                shapes are wrong in the one that has all names; lists these.
        """
        plain = self._plain()
        whole = self.has_all(plain)
        if partial or not self.reads.demands or (whole and self._fits_exactly(plain)):
            return plain
        if whole and (self.rules.subtree or self.rules.rename) and not plain.doubles:
            return plain  # the user has chosen
        others = [one for one in self._others() if self.has_all(one) and not one.doubles]
        classes = self._fitting(plain, others)
        if len(classes) > 1:
            raise self._several(classes)
        if classes and not plain.doubles:
            return classes[0]
        if others and not whole and not classes:
            raise self._wrong_shapes(max(others, key=self._clarity))
        return plain

    def with_families(self, *families: str) -> Readings:
        """The same with more ready rules."""
        rules = self.rules.model_copy(update={"families": (*self.rules.families, *families)})
        return replace(self, rules=rules)

    @property
    def packs(self) -> bool:
        """Whether rules are for weights that the program has."""
        return bool(self._packings.names)

    @property
    def can_be_complete(self) -> bool:
        """Whether one reading is complete, or several are."""
        plain = self._plain()
        return any(map(self.is_complete, (plain, *self._fitting(plain, self._others()))))

    def _fitting(self, plain: Reading, others: Iterable[Reading]) -> list[Reading]:
        """One of all complete readings that give every tensor the same values.

        Args:
            plain: Names as they are, but for wrappers.
            others: Other readings.
        """
        fitting = [one for one in others if not one.doubles and self.is_complete(one)]
        as_named = plain.exact == len(plain.found)
        if not plain.doubles:
            if self.has_all(plain) and (as_named or not any(self._misfits(plain))):
                fitting.insert(0, plain)
        elif self.is_complete(exact := self._as_they_are()):
            fitting.insert(0, exact)
        return self._classes(fitting)

    def has_all(self, reading: Reading) -> bool:
        """Whether every tensor that a source must have is there, or all to make it of."""
        given = reading.given
        return all(
            not names.isdisjoint(given)
            or any(self._packings.complete(name, given) for name in names)
            for names in self.reads.demands.values()
        )

    def is_complete(self, reading: Reading) -> bool:
        """Whether all that a source must have is there, with its shape."""
        return self.has_all(reading) and not any(self._misfits(reading))

    # -- making them ------------------------------------------------------------------------

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self.reads.known | self._packings.names, self.rules.wrappers)

    @cached_property
    def _packings(self) -> Packings:
        return Packings(self.rules.packing, self.reads.leaves)

    def _plain(self) -> Reading:
        """Names as they are, but for wrappers."""
        return self._reading(self.names, removing=True)

    def _as_they_are(self) -> Reading:
        """Names without a word about wrappers."""
        found = {name: now for name, now in self.names.items() if now in self._spelling}
        rest = [name for name in self.names if name not in found]
        return Reading(found, rest, exact=len(found))

    def _others(self) -> list[Reading]:
        """All that have a name of the program under another one."""
        found = [self._reading(self.names, added=prefix) for prefix in self._addable()]
        if self._spelling.has_wrappers:
            found.append(self._reading(self.names))
        if not self.rules.subtree:
            subtrees = names_under(self._subtrees(), self.names)
            found += [self._reading(inside, dropped=prefix) for prefix, inside in subtrees.items()]
        return found

    def _reading(
        self,
        inside: Iterable[str],
        *,
        dropped: str = "",
        added: str = "",
        removing: bool = False,
    ) -> Reading:
        found, rest = dict[str, str](), list[str]()
        find = self._spelling.without_wrappers if removing else self._spelling.nearest
        exact = 0
        for name in inside:
            now = self.names[name].removeprefix(dropped)
            new = find(added + now)
            if new is None:
                rest.append(name)
            else:
                found[name] = new
                exact += new == now
        beside: Collection[str] = ()
        if dropped and len(found) + len(rest) < len(self.names):
            beside = [name for name in self.names if not self.names[name].startswith(dropped)]
        return Reading(found, rest, beside, dropped, added, not removing, exact)

    def no_weights(self, reading: Reading) -> list[str]:
        """Names that are known to be no weights of a model, and that the program does not have."""
        dropped, names = reading.dropped, self.names
        found = [n for n in reading.rest if self._is_no_weight(n, names[n].removeprefix(dropped))]
        if len(found) > _MANY:
            return found
        return [n for n in found if self._info(n).persistent]  # others are never in the way

    def _extra(self, reading: Reading) -> list[str]:
        """Names that stand for nothing in the program, without those that are no weights."""
        gone = set(self.no_weights(reading))
        return [name for name in reading.rest if name not in gone]

    def _is_no_weight(self, name: str, now: str) -> bool:
        if now in _STATES or _ends_with(now, _ENDS) or is_of_training(now):
            return True
        if now in _COUNTERS:
            return self._info(name).count == 1
        if _ends_with(now, (_MASK,)):
            shape = self._info(name).shape
            return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]  # noqa: PLR2004
        return False

    def _addable(self) -> list[str]:
        """Prefixes that one name of each tensor that a source must have begins with."""
        demands = list(self.reads.demands.values())
        found = {prefix for name in demands[0] for prefix in _beginnings(name)}
        for names in demands[1:]:
            found = {one for one in found if any(name.startswith(one) for name in names)}
        return sorted(found)

    def _subtrees(self) -> set[str]:
        """Prefixes under which the whole model may lie.

        Looked for by one tensor; if it lies under many prefixes, by others as well.
        """
        found: set[str] | None = None
        for names in self._anchors():
            ends = {self._spelling.bare(name) for name in names}
            last = tuple({end.rpartition(".")[2] for end in ends})
            here = {
                prefix
                for now in self.names.values()
                if now.endswith(last) and not is_of_training(now)
                for prefix in self._spelling.prefixes(now, ends)
                if prefix
            }
            found = here if found is None else found & here
            if len(found) <= _MANY:
                return found
        return set()

    def _anchors(self) -> list[set[str]]:
        """Names of a few tensors that a source must have, the longest first; parts count, too."""
        demands = self.reads.demands
        longest = sorted(demands, key=lambda name: (-name.count("."), name))
        return [self._with_parts(demands[first]) for first in longest[:_ANCHORS]]

    def _with_parts(self, names: set[str]) -> set[str]:
        return names | self._packings.names_for(names)

    # -- judging them -----------------------------------------------------------------------

    def _fits_exactly(self, reading: Reading) -> bool:
        """Whether no name is doubled, and none is left but those that no state_dict would have.

        A live module has a few of these.
        """
        if reading.doubles or len(reading.rest) > _MANY:
            return False
        return not any(self._info(name).persistent for name in self._extra(reading))

    def _misfits(self, reading: Reading) -> Iterator[Problem]:
        """Entries with another shape than the program's, or that are unusable.

        Dtypes do not count: whether they are cast is for other rules to say.
        """
        leaves = self.reads.leaves
        for name, new in reading.found.items():
            info, leaf = self._info(name), leaves.get(new)
            if leaf is None or self._packings.complete(new, (new,)):  # as it will be transposed
                continue
            if info.unusable:
                yield Problem(name, "unusable", info.unusable)
            elif info.shape != leaf.shape:
                yield Problem(name, "shape", str(info.shape), f"{leaf.shape} of {new!r}")
        view, seen = _View(self, reading), set[Packing]()
        for name in leaves:
            packing = self._packings.complete(name, reading.given)
            if packing and packing not in seen:
                seen.add(packing)
                yield from packing.misfits(view)

    def _info(self, name: str) -> TensorInfo:
        found = self._infos.get(name)
        if found is None:
            found = self._infos[name] = self.source.info(name)
        return found

    def _classes(self, fitting: Iterable[Reading]) -> list[Reading]:
        """Of readings that give every tensor the same values the one that says it best.

        One that leaves out names of tied weights, and is as another one otherwise, does not count:
        whether these are one weight is to be checked.
        """
        groups: dict[tuple[frozenset[str], ...], list[Reading]] = defaultdict(list)
        for one in fitting:
            groups[tuple(self._given_for(one))].append(one)
        return [
            max(group, key=self._clarity)
            for given, group in groups.items()
            if not any(given != other and _is_part(given, other) for other in groups)
        ]

    def _clarity(self, reading: Reading) -> tuple[bool, int, int]:
        """How well a reading says which weights are meant."""
        return not self._extra(reading), reading.exact, len(reading.dropped)

    def _given_for(self, reading: Reading) -> Iterator[frozenset[str]]:
        """The source's names for each of the tensors that a source must have."""
        given = reading.given
        for names in self.reads.demands.values():
            here = [name for name in names if name in given]
            packings = (self._packings.complete(name, given) for name in names if not here)
            made_of = next((packing.takes for packing in packings if packing), ())
            yield frozenset(given[name] for name in (*here, *made_of))

    # -- errors -----------------------------------------------------------------------------

    def _several(self, classes: Iterable[Reading]) -> WeightMismatchError:
        problems = [self._candidate(one) for one in classes]
        return WeightMismatchError("Several readings of the names fit.", problems=problems)

    def _candidate(self, reading: Reading) -> Problem:
        rule, flag = self._rule_for(reading)
        hint = f"to take it, set rules.{rule}, or pass {flag}"
        if reading.dropped:
            return Problem(repr(reading.dropped), WHOLE_SUBTREE, hint=hint)
        how = f"with {reading.added!r} before them" if reading.added else "as they are"
        return Problem(f"the names {how}", ALL_NAMES, hint=hint)

    def _rule_for(self, reading: Reading) -> tuple[str, str]:
        """The rules and the flags that make a reading the only one."""
        rules, flags = list[str](), list[str]()
        if reading.dropped:
            rules.append(f"subtree to {reading.dropped!r}")
            flags.append(f"--subtree '{reading.dropped}'")
        elif reading.added:
            to = rf"{reading.added}\1"
            rules.append(f"rename to [{{'pattern': '(.*)', 'to': {to!r}}}]")
            flags.append(f"--rename '(.*)={to}'")
        if extra := self._extra(reading):
            rests = {name.removeprefix(reading.dropped) for name in reading.found}
            kept = rests.union(reading.found)  # patterns match either
            pattern = ignoring(extra, kept, most=_PATTERNS)
            rules.append(f"ignore to {[pattern] if pattern else 'patterns of all others'}")
            flags.append(f"--ignore '{pattern}'" if pattern else "--ignore PATTERN")
        return " and rules.".join(rules), " ".join(flags)

    def _wrong_shapes(self, reading: Reading) -> WeightMismatchError:
        where = f"under {reading.dropped!r} " if reading.dropped else ""
        hint = f"all names of the program are there {where}and other shapes: it is another model"
        problems = [
            Problem(one.subject, one.kind, one.found, one.wanted, hint)
            for one in self._misfits(reading)
        ]
        return WeightMismatchError("These are weights of another model.", problems=problems)


@dataclass(frozen=True)
class _View:
    """Headers of a source under the names of a reading."""

    readings: Readings
    reading: Reading

    def names(self) -> Collection[str]:
        return self.reading.given.keys()

    def info(self, fqn: str) -> TensorInfo:
        return self.readings._info(self.reading.given[fqn])  # noqa: SLF001 - of one module


def is_of_training(name: str) -> bool:
    """Whether a trainer keeps the state of the training under this name, and no weights."""
    top, dot, below = name.partition(".")
    if top in _AT_THE_TOP:
        return bool(dot)
    second, dot, _ = below.partition(".")
    return second in _TRAINING and bool(dot)


def _ends_with(name: str, ends: tuple[str, ...]) -> bool:
    """Whether the last parts of a name are one of these."""
    if not name.endswith(ends):
        return False
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_part(some: Iterable[frozenset[str]], others: Iterable[frozenset[str]]) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))


def _is_within(name: str, parts: Iterable[str]) -> bool:
    """Whether a name's parts are among some parts, in their order."""
    left = iter(parts)
    return all(part in left for part in name.split("."))


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (_prefix(parts[:end]) for end in range(1, len(parts)))


def _prefix(parts: Iterable[str]) -> str:
    return "".join(f"{part}." for part in parts)
