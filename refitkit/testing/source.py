"""The suite for weight sources: inherit :class:`SourceSuite`, and write a factory and the truth."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import RefitError
from refitkit.model import TensorInfo
from refitkit.protocols import KnowsRevisions, MayChange, WeightSource
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, skip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import CodeType, FrameType

    Place = tuple[CodeType, int, str, str]

_NO_STATE = "Share no position, buffer or current name between calls, or take a lock."
_OWN_DATA = "Keep no data that outlives the source, or only with a sign of its version."
_UNKNOWN = "no.such.name"
_INFO = "WeightSource.info"
_GET = "WeightSource.get"
_NAMES = "WeightSource.names"
_REVISION = "KnowsRevisions.revision"
_DIGEST = "Include a digest of all bits or a sign of the data, or return None."
_CHANGE = "MayChange.require_unchanged"
_MANY = 16  # sources, more than anyone keeps open on purpose
_PLACES = 500  # of the code that are tried at most
_PATIENCE = 0.005  # seconds for a read that waits for a lock; too short a time hides a fault only
_OPEN_FILES = Path("/proc/self/fd")


class SourceSuite:
    """Every contract of :class:`refitkit.protocols.WeightSource`.

    Write ``make_source`` and ``truth``; if possible also ``make_source_of``, ``reads``,
    ``make_unusable`` and ``make_rewritable``.
    """

    def make_source(self) -> WeightSource:
        """A new source with exactly the tensors of ``truth``."""
        raise NotImplementedError("Write make_source: it returns a new source.")

    def truth(self) -> Mapping[str, torch.Tensor]:
        """The tensors by FQN that the source was made from, *read without the source*."""
        raise NotImplementedError("Write truth: the tensors that make_source puts in.")

    def make_source_of(
        self,
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG002 - for authors
    ) -> WeightSource | None:
        """A new source of these tensors, which replace those of the last call if they can.

        Write them to the same path each time, for example. None if a source of this kind cannot
        have any tensors.
        """
        return None

    def reads(self, source: Any) -> int | None:  # noqa: ARG002 - for authors
        """Number of reads of tensor data since the source was made, counted *below* the source.

        Count in the file or store that it reads. None if reads cannot be counted.
        """
        return None

    def make_unusable(self) -> tuple[WeightSource, str] | None:
        """A source, and the name of an entry in it that cannot be a weight, such as a text.

        None if all entries of a source of this kind are weights.
        """
        return None

    def make_rewritable(self) -> tuple[WeightSource, Callable[[], WeightSource]] | None:
        """A source of ``truth``, and a function that writes other tensors where the source reads.

        The function keeps names, dtypes and shapes, and writes the same tensors whenever
        ``make_rewritable`` is called. It goes past the source, as another process
        would: it writes a file in place, for example. It returns a new source of the new data.
        None if nobody can write to what a source of this kind reads.
        """
        return None

    # -- names and infos --------------------------------------------------------------------

    def test_it_is_a_source_that_says_what_it_is(self) -> None:
        """It has all members of ``WeightSource``, and a constant description in words."""
        source: Any = self.make_source()
        if not isinstance(source, WeightSource):
            found = f"{type(source).__name__} lacks members."
            raise Breach("WeightSource", found, "Implement description, names, info and get.")
        text = source.description
        if not isinstance(text, str) or not text.strip() or text != source.description:
            found = f"it returned {text!r}."
            advice = "Return a constant text, such as the name of the file: messages start with it."
            raise Breach("WeightSource.description", found, advice)

    def test_names_are_those_that_it_has(self) -> None:
        """``names`` returns a collection with each name once, on every call."""
        source = self.make_source()
        wanted = sorted(self.truth())
        for when in ("first", "second"):
            names = source.names()
            if sorted(names) != wanted:
                wrong = sorted(set(names) ^ set(wanted)) or ["some are repeated"]
                found = f"the {when} call returned wrong names: {oracles.quoted(wrong)}."
                raise Breach(_NAMES, found, "Return the name of every tensor once.")
            if _UNKNOWN in names or not all(name in names for name in wanted):
                found = "`in` and iteration disagree."
                raise Breach(_NAMES, found, "Return a collection, such as dict.keys().")

    def test_infos_are_true(self) -> None:
        """``info`` returns the dtype and shape of every tensor, and calls none unusable."""
        source = self.make_source()
        for name, tensor in self.truth().items():
            info: Any = source.info(name)
            if not isinstance(info, TensorInfo):
                found = f"for {name!r} it returned a {type(info).__name__}."
                raise Breach(_INFO, found, "Return a refitkit.model.TensorInfo.")
            wanted = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            if (info.dtype, info.shape) != wanted or info.unusable:
                found = f"{name!r} is {wanted[0]} {wanted[1]}, but it returned {info!r}."
                raise Breach(_INFO, found, "Describe the tensor that get returns.")

    def test_unknown_names_are_key_errors(self) -> None:
        """``info`` and ``get`` raise ``KeyError`` for unknown names, as callers expect."""
        source, truth = self.make_source(), self.truth()
        unknown = {_UNKNOWN: "an unknown name"}
        for name in truth:
            other = name.swapcase()
            if other not in truth:
                unknown[other] = f"{other!r}, which differs from {name!r} in upper and lower case,"
        for name, what in unknown.items():
            for member in ("info", "get"):
                try:
                    getattr(source, member)(name)
                except KeyError:
                    continue
                except Exception as exc:
                    found = f"{what} raised {type(exc).__name__}: {exc}."
                    raise Breach(f"WeightSource.{member}", found, "Raise KeyError.") from exc
                found = f"{what} returned a value."
                raise Breach(f"WeightSource.{member}", found, "Raise KeyError.")

    def test_similar_names_are_apart(self) -> None:
        """Each of several names that nearly equal another has its own tensor."""
        names = ("a.b_c.d", "a_b_c.d", "a.b.c.d", "aXb_c.d", "a.b_c.d1", "a.b_c.d10", "b_c.d")
        tensors = {name: torch.full((2,), float(n)) for n, name in enumerate(names)}
        source = self.make_source_of(tensors)
        if source is None:
            skip("make_source_of() returned None, so names cannot be chosen")
        if sorted(source.names()) != sorted(names):
            wrong = sorted({*source.names()} ^ {*names}) or ["some are repeated"]
            text = f"it returned wrong names: {oracles.quoted(wrong)}."
            raise Breach(_NAMES, text, "Keep names as they are.")
        found = {name: source.get(name) for name in names}
        wrong = oracles.differing(oracles.snapshot(found), oracles.snapshot(tensors))
        if wrong:
            text = f"it returned tensors of other names for {oracles.quoted(wrong)}."
            raise Breach(_GET, text, "Compare names as they are, without patterns.")

    # -- tensors ----------------------------------------------------------------------------

    def test_tensors_are_bit_equal(self) -> None:
        """``get`` returns each tensor bit for bit, in its shape, detached, on every call."""
        source = self.make_source()
        for name, tensor in self.truth().items():
            # Twice: a stream must not be used up by the first read.
            for _ in range(2):
                found = source.get(name)
                same = oracles.bits(found) == oracles.bits(tensor) and found.shape == tensor.shape
                if not same:
                    text = f"{name!r} differs from the truth in bits or shape."
                    raise Breach(_GET, text, "Return the stored tensor, in its shape.")
                if found.requires_grad:
                    text = f"{name!r} requires grad."
                    raise Breach(_GET, text, "Detach it: a weight needs no autograd history.")

    def test_order_and_company_do_not_matter(self) -> None:
        """A returned tensor does not change when other tensors are read, in any order."""
        truth = self.truth()
        source = self.make_source()
        # Hold all tensors: a source with one buffer overwrites those that it returned before.
        kept = {name: source.get(name) for name in reversed(list(truth))}
        wrong = oracles.differing(oracles.snapshot(kept), oracles.snapshot(truth))
        if wrong:
            found = f"tensors changed when others were read: {oracles.quoted(wrong)}."
            advice = "Keep a returned tensor unchanged while the caller has it."
            raise Breach(_GET, found, advice)

    def test_two_sources_are_independent(self) -> None:
        """Reading all tensors of one source changes no other source."""
        truth = self.truth()
        one, other = self.make_source(), self.make_source()
        for name in truth:
            one.get(name)
        # Closing one source must not close a file of the other.
        del one
        found = {name: other.get(name) for name in truth}
        wrong = oracles.differing(oracles.snapshot(found), oracles.snapshot(truth))
        if wrong:
            text = f"reads of another source changed {oracles.quoted(wrong)}."
            raise Breach(_GET, text, "Share no state that reading uses up.")

    def test_dropped_sources_close_their_files(self) -> None:
        """Sources that nobody holds any more have no open files."""
        if not _OPEN_FILES.exists():
            skip(f"{_OPEN_FILES} does not exist, so open files cannot be counted")

        def use() -> None:
            self.make_source().get(next(iter(self.truth())))

        counts = []
        for times in (1, _MANY):
            for _ in range(times):
                use()
            gc.collect()  # a source may be part of a cycle
            counts.append(len(list(_OPEN_FILES.iterdir())))
        if counts[1] - counts[0] >= _MANY:
            found = f"{_MANY} sources that were dropped left {counts[1] - counts[0]} files open."
            raise Breach("WeightSource", found, "Close files when the source is dropped.")

    def test_other_sources_are_not_remembered(self) -> None:
        """A source returns the data that is there, whatever earlier sources of it returned."""
        truth = oracles.snapshot(self.truth())
        new = self._read_after_rewrite(read_before=False)
        if new is None:
            skip("make_rewritable() returned None, so no data can be rewritten")
        changed = oracles.differing(new, truth)
        if not changed:
            text = "The function that make_rewritable() returned changed no tensor, or the new "
            raise SuiteError(f"{text}source returned those of the old one.")
        again: Any = self._read_after_rewrite(read_before=True)
        wrong = [name for name in changed if again[name] == truth[name]]
        if wrong:
            text = "after data was read and rewritten, a new source returned the old data for "
            raise Breach(_GET, f"{text}{oracles.quoted(wrong)}.", _OWN_DATA)

    def _read_after_rewrite(self, *, read_before: bool) -> dict[str, oracles.Bits] | None:
        """The tensors of a new source of rewritten data; the old one may have been read."""
        made = self.make_rewritable()
        if made is None:
            return None
        source, rewrite = made
        truth = self.truth()
        if read_before:
            found = oracles.snapshot({name: source.get(name) for name in truth})
            wrong = oracles.differing(found, oracles.snapshot(truth))
            if wrong:
                text = "it returned what an earlier source returned for "
                raise Breach(_GET, f"{text}{oracles.quoted(wrong)}.", _OWN_DATA)
        other = rewrite()
        return {name: oracles.bits(other.get(name)) for name in truth}

    def test_two_threads_read_at_once(self) -> None:
        """``get`` returns the right tensors to two threads that call it at the same time."""
        source, truth = self.make_source(), oracles.snapshot(self.truth())
        self._require_interruptible(source, truth)
        source = self.make_source()
        start = Barrier(2)

        def wrong_in(names: Sequence[str]) -> list[str]:
            start.wait()
            before = sys.gettrace(), sys.getprofile()  # of a debugger
            sys.settrace(_take_turns)
            sys.setprofile(_take_turns)
            try:
                reads = [(name, source.get(name)) for name in names]
            finally:
                sys.settrace(before[0])
                sys.setprofile(before[1])
            return [name for name, tensor in reads if oracles.bits(tensor) != truth[name]]

        try:
            with ThreadPoolExecutor(2) as pool:
                # Opposite orders, so that the threads read different tensors.
                readers = [
                    pool.submit(wrong_in, names) for names in (list(truth), list(truth)[::-1])
                ]
                wrong = sorted({name for reader in readers for name in reader.result()})
        except Exception as exc:
            found = f"it raised {type(exc).__name__} when two threads read at once: {exc}."
            raise Breach(_GET, found, "Keep no state between the steps of a read.") from exc
        if wrong:
            found = f"two threads that read at once got wrong tensors for {oracles.quoted(wrong)}."
            raise Breach(_GET, found, _NO_STATE)

    @staticmethod
    def _require_interruptible(source: WeightSource, truth: Mapping[str, oracles.Bits]) -> None:
        """One thread reads while another stands before each line of its read, in turn."""
        # The longest ones of other bits: a source may not read empty ones.
        by_length = sorted(truth, key=lambda name: len(truth[name][1]), reverse=True)
        one = by_length[0]
        other = next((name for name in by_length if truth[name] != truth[one]), "")
        if not other:
            return
        places: dict[Place, None] = {}
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as interrupted:

            def read(at: Place | None) -> list[str]:
                """Names whose tensors are wrong."""
                reads: list[Future[torch.Tensor]] = []

                def visit(place: Place) -> None:
                    places.setdefault(place)
                    if place == at and not reads:
                        reads.append(reader.submit(source.get, other))
                        wait(reads, _PATIENCE)  # longer if the source waits for a lock

                found = [(one, _visited(lambda: source.get(one), visit))]
                found += [(other, future.result()) for future in reads]
                return [name for name, tensor in found if oracles.bits(tensor) != truth[name]]

            try:
                wrong = interrupted.submit(read, None).result()
                for place in list(places)[:_PLACES]:
                    wrong += interrupted.submit(read, place).result()
            except Exception as exc:
                found = f"it raised {type(exc).__name__} when two threads read at once: {exc}."
                raise Breach(_GET, found, "Keep no state between the steps of a read.") from exc
        if wrong:
            names = oracles.quoted(sorted({*wrong}))
            found = f"two threads that read at once got wrong tensors for {names}."
            raise Breach(_GET, found, _NO_STATE)

    def test_changed_data_is_noticed(self) -> None:
        """If data is rewritten between two reads, ``get`` or ``require_unchanged`` raises.

        A source that goes on returning the old tensors is fine, too.
        """
        made = self.make_rewritable()
        if made is None:
            reason = "make_rewritable() returned None, so no data can be rewritten"
            if isinstance(self.make_source(), MayChange):
                reason += "; write it, because the source has require_unchanged"
            skip(reason)
        source, rewrite = made
        truth = oracles.snapshot(self.truth())
        first = oracles.bits(source.get(next(iter(truth))))
        self._require_unchanged(source)
        changed = self._rewritten(rewrite, truth)
        try:
            found = {name: oracles.bits(source.get(name)) for name in truth}
            if isinstance(source, MayChange):
                source.require_unchanged()
        except RefitError:
            return
        except Exception as exc:
            text = f"data that was rewritten raised {type(exc).__name__}: {exc}."
            raise Breach(_CHANGE, text, "Raise SourceError that names the data.") from exc
        wrong = oracles.differing(found, truth)
        if wrong or first != truth[next(iter(truth))]:
            text = f"{changed} were rewritten after the first was read. Later reads returned new "
            text += f"data for {oracles.quoted(wrong)}, and neither get nor require_unchanged "
            advice = (
                "Compare a sign of the data (inode, size, time of change) with its first value."
            )
            raise Breach(_CHANGE, f"{text}raised.", advice)

    @staticmethod
    def _require_unchanged(source: WeightSource) -> None:
        if not isinstance(source, MayChange):
            return
        try:
            source.require_unchanged()
        except Exception as exc:
            found = f"it raised {type(exc).__name__}, although nothing was changed: {exc}."
            raise Breach(_CHANGE, found, "Raise only if data was rewritten.") from exc

    @staticmethod
    def _rewritten(rewrite: Callable[[], WeightSource], truth: Mapping[str, oracles.Bits]) -> str:
        """Rewrite the data, and return the names that have other bits, for messages."""
        other = rewrite()
        new = {name: oracles.bits(other.get(name)) for name in truth}
        changed = oracles.differing(new, truth)
        if not changed:
            raise SuiteError("The function that make_rewritable() returned changed no tensor.")
        return oracles.quoted(changed)

    def test_names_and_infos_read_no_data(self) -> None:
        """Opening a source, ``names`` and ``info`` read no data: many calls need nothing more."""
        source = self.make_source()
        if self.reads(source) is None:
            skip("reads() returned None, so reads of data cannot be counted")
        for name in source.names():
            source.info(name)
        if self.reads(source):
            found = f"data was read {self.reads(source)} times before any call of get."
            advice = "Read headers when the source is opened, and data in get."
            raise Breach(_INFO, found, advice)
        # An oracle that never counts would pass everything above: one read has to count.
        name = next(iter(self.truth()))
        source.get(name)
        if not self.reads(source):
            found = "it counted no read although get was called."
            raise Breach("SourceSuite.reads", found, "Count where the data is stored.")

    def test_revisions_stand_for_bits(self) -> None:
        """``revision`` is hashable and constant, reads no data, and equal ones mean equal bits."""
        source = self.make_source()
        if not isinstance(source, KnowsRevisions):
            skip("the source has no revision")
        known = {name: source.revision(name) for name in source.names()}
        if self.reads(source):
            advice = "Return None if only the data can decide: callers then read it themselves."
            raise Breach(_REVISION, "it read data.", advice)
        try:
            first: dict[Any, str] = {}
            # Pairs of names with equal revisions.
            twins = [(first.setdefault(one, n), n) for n, one in known.items() if one is not None]
        except TypeError as exc:
            found = f"a revision is not hashable: {exc}."
            raise Breach(_REVISION, found, "Return a tuple of text, for example.") from exc
        truth = self.truth()
        for one, other in twins:
            if oracles.bits(truth[one]) != oracles.bits(truth[other]):
                found = f"{one!r} and {other!r} have equal revisions but different bits."
                raise Breach(_REVISION, found, "Include everything that the bits depend on.")
        self._require_constant(source, known)

    @staticmethod
    def _require_constant(source: Any, known: Mapping[str, Any]) -> None:
        advice = "Build revisions only from facts that cannot change."
        if known != {name: source.revision(name) for name in source.names()}:
            raise Breach(_REVISION, "a second call returned other revisions.", advice)
        for name in known:
            source.get(name)
        # A source may know a revision only after it has read the entry, so None may become one.
        again = {name: source.revision(name) for name, one in known.items() if one is not None}
        wrong = sorted(name for name, one in again.items() if one != known[name])
        if wrong:
            found = f"reading changed the revisions of {oracles.quoted(wrong)}."
            raise Breach(_REVISION, found, advice)

    def test_revisions_change_with_the_data(self) -> None:
        """Entries of other bits, in any source and at any time, have other revisions, or None."""
        made: Any = self.make_rewritable()
        is_rewritable = made is not None and isinstance(made[0], KnowsRevisions)
        if is_rewritable:
            source, rewrite = made
            truth = self.truth()
            before = {name: source.revision(name) for name in truth}
            other = rewrite()
            for name, tensor in truth.items():
                after = other.revision(name)
                is_same = after is not None and after == before[name]
                if is_same and oracles.bits(other.get(name)) != oracles.bits(tensor):
                    found = f"{name!r} has equal revisions before and after its data was rewritten."
                    raise Breach(_REVISION, found, _DIGEST)
        if not self._require_revisions_of_all_elements() and not is_rewritable:
            skip("make_rewritable() and make_source_of() returned None, or there is no revision")

    def _require_revisions_of_all_elements(self) -> bool:
        """Entries that differ in one element have other revisions; False if none can be made."""
        known: dict[Any, int | None] = {}
        # More elements than a digest of the beginning or the end would cover.
        size = 300_007
        for place in (None, 0, size // 2 + 1, size - 5_000, size - 1):
            tensor = torch.arange(float(size))
            if place is not None:
                tensor[place] = -1.0
            source: Any = self.make_source_of({"layer.weight": tensor})
            if source is None or not isinstance(source, KnowsRevisions):
                return False
            revision = source.revision("layer.weight")
            if revision is not None and revision in known:
                found = f"tensors that differ in element {place} of {size} have equal revisions."
                raise Breach(_REVISION, found, _DIGEST)
            known[revision] = place
        return True

    def test_what_cannot_be_a_weight_is_told(self) -> None:
        """``info`` says why an entry cannot be a weight; ``get`` returns a tensor or refuses."""
        made = self.make_unusable()
        if made is None:
            skip("make_unusable() returned None, so no entry is unusable")
        source, name = made
        # Refusing the entry in info is fine, too.
        try:
            info = source.info(name)
        except RefitError:
            return
        if not info.unusable:
            found = f"{name!r} cannot be a weight, but unusable is empty."
            raise Breach(_INFO, found, "Set TensorInfo.unusable to the reason.")
        try:
            source.get(name)
        except RefitError:
            return
        except Exception as exc:
            found = f"{name!r} raised {type(exc).__name__}: {exc}."
            raise Breach(_GET, found, "Raise SourceError.") from exc


def _take_turns(frame: FrameType, event: str, arg: object) -> Any:  # noqa: ARG001 - see sys.settrace
    """Let another thread run before each line and around each call, so that races show.

    It is both a trace and a profile function. Between other opcodes, CPython switches no threads.
    """
    time.sleep(0)
    return _take_turns


def _visited(read: Callable[[], torch.Tensor], visit: Callable[[Place], None]) -> torch.Tensor:
    """Read, and call a function before each line, and around each call of a C function."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = getattr(arg, "__qualname__", "") if event.startswith("c_") else ""
        visit((frame.f_code, frame.f_lineno, event, name))
        return trace

    before = sys.gettrace(), sys.getprofile()  # of a debugger
    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        return read()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
