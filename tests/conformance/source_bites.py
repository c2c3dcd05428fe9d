"""Broken sources, at least one for each check of ``SourceSuite``."""

from __future__ import annotations

import re
from tempfile import TemporaryFile
from threading import Event, Lock
from typing import Any, ClassVar

import torch

from refitkit.errors import SourceError
from refitkit.model import TensorInfo
from refitkit.testing import SourceSuite
from refitkit.testing.oracles import bits
from tests.conformance.bites import Bite

TRUTH = {
    "a": torch.tensor([-0.0, float("nan"), 1.0]),
    "b": torch.arange(6).reshape(2, 3),
    "c": torch.zeros(2, 0).half(),
}


class Store:
    """A store of tensors that counts reads."""

    def __init__(self) -> None:
        self.reads = 0

    def read(self, name: str) -> torch.Tensor:
        self.reads += 1
        return TRUTH[name].clone()


class Plain:
    """A correct source."""

    description = "three tensors in memory"
    kept: ClassVar[dict[str, torch.Tensor]] = {}  # by all sources, for those that do

    def __init__(self) -> None:
        self.store = Store()
        self.odd: dict[str, str] = {}

    def names(self) -> Any:
        return TRUTH.keys()

    def info(self, fqn: str) -> Any:
        tensor = TRUTH[fqn]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(dtype=dtype, shape=tuple(tensor.shape), unusable=self.odd.get(fqn, ""))

    def get(self, fqn: str) -> torch.Tensor:
        if fqn in self.odd:
            raise SourceError(f"{fqn} is {self.odd[fqn]}.")
        return self.store.read(fqn) if fqn in TRUTH else TRUTH[fqn]


class Chosen:
    """A correct source of any tensors. Its revisions are their bits."""

    description = "tensors in memory"

    def __init__(self, tensors: Any) -> None:
        self.tensors = dict(tensors)

    def names(self) -> Any:
        return self.tensors.keys()

    def info(self, fqn: str) -> Any:
        tensor = self.tensors[fqn]
        return TensorInfo(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))

    def get(self, fqn: str) -> torch.Tensor:
        return self.tensors[fqn]

    def revision(self, fqn: str) -> Any:
        return bits(self.tensors[fqn])


class GoodChosen(SourceSuite):
    source: type[Chosen] = Chosen

    def make_source(self) -> Any:
        return self.source(TRUTH)

    def truth(self) -> dict[str, torch.Tensor]:
        return TRUTH

    def make_source_of(self, tensors: Any) -> Any:
        return self.source(tensors)


class Good(SourceSuite):
    source: type[Plain] = Plain

    def make_source(self) -> Any:
        return self.source()

    def truth(self) -> dict[str, torch.Tensor]:
        return TRUTH

    def reads(self, source: Any) -> int | None:
        return int(source.store.reads)

    def make_unusable(self) -> Any:
        source = self.source()
        source.odd["a"] = "sparse"
        return source, "a"


BITES: list[Bite] = []


def breaks(check: str, says: str, good: type[Good | GoodChosen] = Good) -> Any:
    def note(source: type) -> type:
        suite = type(source.__name__, (good,), {"source": source})
        BITES.append(Bite(f"test_{check}", suite, says, good))
        return source

    return note


@breaks("it_is_a_source_that_says_what_it_is", "WeightSource.description: it returned ' '")
class Silent(Plain):
    description = " "


@breaks("it_is_a_source_that_says_what_it_is", "WeightSource: Nameless lacks members")
class Nameless(Plain):
    names = property(lambda _: (_ for _ in ()).throw(AttributeError()))


@breaks("names_are_those_that_it_has", "the first call returned wrong names: 'c'")
class Hides(Plain):
    def names(self) -> Any:
        return ["a", "b"]


@breaks("names_are_those_that_it_has", "the second call returned wrong names|disagree")
class UsedUp(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.once = iter(TRUTH)

    def names(self) -> Any:
        return self.once


@breaks("infos_are_true", "'b' is int64 .* it returned TensorInfo.dtype='float32'")
class SaysFloat(Plain):
    def info(self, fqn: str) -> Any:
        return super().info(fqn).model_copy(update={"dtype": "float32"})


@breaks("infos_are_true", "for 'a' it returned a Tensor")
class InfoIsTensor(Plain):
    def info(self, fqn: str) -> Any:
        return TRUTH[fqn]


@breaks("unknown_names_are_key_errors", "WeightSource.get: an unknown name returned a value")
class GivesZeros(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        return super().get(fqn) if fqn in TRUTH else torch.zeros(1)


@breaks("unknown_names_are_key_errors", "WeightSource.info: an unknown name raised SourceError")
class SourceErrors(Plain):
    def info(self, fqn: str) -> Any:
        if fqn not in TRUTH:
            raise SourceError("no")
        return super().info(fqn)


@breaks("tensors_are_bit_equal", "'a' differs from the truth")
class DropsSigns(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        return super().get(fqn) + 0


@breaks("tensors_are_bit_equal", "'b' differs from the truth")
class Flattens(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        return super().get(fqn).reshape(-1)


@breaks("tensors_are_bit_equal", "'a' requires grad")
class WithGradients(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        found = super().get(fqn)
        return found.requires_grad_(found.is_floating_point())


@breaks("order_and_company_do_not_matter", "tensors changed when others were read: 'b'")
class OneBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.zeros(64, dtype=torch.uint8)

    def get(self, fqn: str) -> torch.Tensor:
        found = super().get(fqn)
        room = self.buffer[: found.nbytes].view(found.dtype).view(found.shape)
        return room.copy_(found)


@breaks("two_sources_are_independent", "reads of another source changed 'a', 'b', 'c'|KeyError")
class Shares(Plain):
    """Reads from shared state that reading uses up."""

    left: ClassVar[dict[str, Any]] = {}

    def get(self, fqn: str) -> torch.Tensor:
        found = super().get(fqn)
        if fqn in Shares.left and Shares.left[fqn] is not self:
            return torch.zeros(7)
        Shares.left[fqn] = self
        return found


@breaks("names_and_infos_read_no_data", "data was read 3 times before any call of get")
class ReadsForInfos(Plain):
    def info(self, fqn: str) -> Any:
        self.store.read(fqn)
        return super().info(fqn)


@breaks(
    "names_and_infos_read_no_data", "SourceSuite.reads: it counted no read although get was called"
)
class PastTheOracle(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        return TRUTH[fqn].clone()


@breaks("what_cannot_be_a_weight_is_told", "'a' cannot be a weight, but unusable is empty")
class Optimist(Plain):
    def info(self, fqn: str) -> Any:
        return super().info(fqn).model_copy(update={"unusable": ""})


@breaks("what_cannot_be_a_weight_is_told", "'a' raised RuntimeError")
class Crashes(Plain):
    def get(self, fqn: str) -> torch.Tensor:
        if fqn in self.odd:
            raise RuntimeError("no")
        return super().get(fqn)


@breaks("unknown_names_are_key_errors", "WeightSource.info: 'A', which differs from 'a' in upper")
class IgnoresCase(Plain):
    def info(self, fqn: str) -> Any:
        return super().info(fqn.lower())

    def get(self, fqn: str) -> torch.Tensor:
        return super().get(fqn.lower())


@breaks("two_threads_read_at_once", "two threads that read at once got wrong tensors for 'b'")
class ReadsInTwoSteps(Plain):
    """Looks a name up in one step, and reads the current one in the next. Each has a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()

    def get(self, fqn: str) -> torch.Tensor:
        with self.lock:
            self.cursor = fqn
        with self.lock:
            return super().get(self.cursor)


@breaks("two_threads_read_at_once", "it raised ValueError when two threads read at once: busy")
class OpensOnce(Plain):
    """Opens its file in the first read, and refuses others meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.is_open, self.refused = Lock(), False, Event()

    def get(self, fqn: str) -> torch.Tensor:
        if self.first.acquire(blocking=False):
            self.refused.wait(2)  # for the other thread, so that the fault is certain
            self.is_open = True
        if not self.is_open:
            self.refused.set()
            raise ValueError("busy")
        return super().get(fqn)


class Revised(Plain):
    """A correct source with revisions."""

    def revision(self, fqn: str) -> Any:
        return fqn


class GoodRevised(Good):
    source = Revised

    def make_rewritable(self) -> Any:
        return self.source(), lambda: Rewritten(self.source())


class Rewritten:
    """A source whose tensors are other ones."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def get(self, fqn: str) -> torch.Tensor:
        return torch.ones_like(self.source.get(fqn))

    def revision(self, fqn: str) -> Any:
        found = self.source.revision(fqn)
        return found if isinstance(self.source, RevisedByName) else (found, "rewritten")


@breaks("revisions_stand_for_bits", "a revision is not hashable", GoodRevised)
class RevisedByList(Revised):
    def revision(self, fqn: str) -> Any:
        return [fqn]


@breaks("revisions_stand_for_bits", "it read data", GoodRevised)
class RevisedByReading(Revised):
    def revision(self, fqn: str) -> Any:
        return str(self.get(fqn))


@breaks("revisions_stand_for_bits", "have equal revisions but different bits", GoodRevised)
class RevisedByShapeless(Revised):
    def revision(self, fqn: str) -> Any:
        return "mine"


@breaks("revisions_stand_for_bits", "a second call returned other revisions", GoodRevised)
class RevisedByTheClock(Revised):
    def revision(self, fqn: str) -> Any:
        self.asked = getattr(self, "asked", 0) + 1
        return fqn, self.asked


@breaks("revisions_stand_for_bits", "reading changed the revisions of 'a', 'b', 'c'", GoodRevised)
class RevisedByReads(Revised):
    def revision(self, fqn: str) -> Any:
        return fqn, self.store.reads


@breaks(
    "revisions_change_with_the_data",
    "'a' has equal revisions before and after its data was rewritten",
    GoodRevised,
)
class RevisedByName(Revised):
    pass


class Shared(Plain):
    """A correct source of tensors that others can write to."""

    changed = False  # by others, after it was opened
    shift = 0

    def get(self, fqn: str) -> torch.Tensor:
        found = super().get(fqn)
        return found + self.shift if self.shift else found

    def require_unchanged(self) -> None:
        if self.changed:
            raise SourceError("The tensors were rewritten.")


class GoodShared(Good):
    source = Shared

    def make_rewritable(self) -> Any:
        source: Any = self.source()

        def rewrite() -> Any:
            source.changed = True
            other = self.source()
            source.shift = other.shift = 1
            return other

        return source, rewrite


@breaks(
    "changed_data_is_noticed",
    "'a', 'b' were rewritten .* new data for 'a', 'b', and neither get nor require_unchanged",
    GoodShared,
)
class NeverLooks(Shared):
    def require_unchanged(self) -> None:
        pass


@breaks("changed_data_is_noticed", "neither get nor require_unchanged raised", GoodShared)
class CannotLook(Shared):
    require_unchanged = None  # type: ignore[assignment]


@breaks("changed_data_is_noticed", "although nothing was changed: The tensors were", GoodShared)
class AlwaysChanged(Shared):
    def require_unchanged(self) -> None:
        raise SourceError("The tensors were rewritten.")


@breaks("changed_data_is_noticed", "data that was rewritten raised ValueError: short", GoodShared)
class Breaks(Shared):
    def get(self, fqn: str) -> torch.Tensor:
        if self.changed:
            raise ValueError("short")
        return super().get(fqn)


@breaks("dropped_sources_close_their_files", "16 sources that were dropped left 16 files open")
class LeavesFilesOpen(Plain):
    files: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__()
        self.files.append(TemporaryFile())  # noqa: SIM115 - the fault


@breaks(
    "other_sources_are_not_remembered",
    "a new source returned the old data for 'a', 'b'|returned what an earlier source returned",
    GoodShared,
)
class Remembers(Shared):
    def get(self, fqn: str) -> torch.Tensor:
        return self.kept.setdefault(fqn, super().get(fqn))


@breaks("similar_names_are_apart", "returned tensors of other names for 'a.b_c.d'", GoodChosen)
class ReadsPatterns(Chosen):
    def get(self, fqn: str) -> torch.Tensor:
        pattern = fqn.replace(".", "[.]").replace("_", ".")
        return [value for name, value in self.tensors.items() if re.fullmatch(pattern, name)][-1]


@breaks("similar_names_are_apart", "it returned wrong names: 'a.b.c.d1'", GoodChosen)
class RenamesEntries(Chosen):
    def __init__(self, tensors: Any) -> None:
        super().__init__({name.replace("_", "."): value for name, value in tensors.items()})


@breaks(
    "revisions_change_with_the_data",
    "tensors that differ in element 150004 of 300007 have equal revisions",
    GoodChosen,
)
class RevisedByEnds(Chosen):
    def revision(self, fqn: str) -> Any:
        kind, raw = super().revision(fqn)
        return kind, raw[:4096], raw[-4096:]
