"""The suite for weight sources: ``class TestMySource(SourceSuite)``, a factory, the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.errors import RefitError
from refitkit.model import TensorInfo
from refitkit.protocols import KnowsRevisions, WeightSource
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_NOWHERE = "no.such.name"


class SourceSuite:
    """Every contract of :class:`refitkit.protocols.WeightSource`.

    Write ``make_source`` and ``truth``; ``reads`` and ``make_unusable`` where there is a way.
    """

    def make_source(self) -> WeightSource:
        """A new source that has what ``truth`` tells, and nothing else."""
        raise NotImplementedError("Write make_source: it returns a new source.")

    def truth(self) -> Mapping[str, torch.Tensor]:
        """What the source has, by name, *known without the source*: what it was made from."""
        raise NotImplementedError("Write truth: what make_source's sources have.")

    def reads(self, source: Any) -> int | None:  # noqa: ARG002 - for authors
        """How often data was read since the source was made, counted *beneath* it.

        None: there is no way to count.
        """
        return None

    def make_unusable(self) -> tuple[WeightSource, str] | None:
        """A source, and the name of an entry in it that cannot be a weight; None: none can be."""
        return None

    # -- names and infos --------------------------------------------------------------------

    def test_it_is_a_source_that_says_what_it_is(self) -> None:
        """It has all members, and a description in words, the same each time."""
        source: Any = self.make_source()
        if not isinstance(source, WeightSource):
            found = f"{type(source).__name__} lacks members."
            raise Breach("WeightSource", found, "Give it description, names, info and get.")
        text = source.description
        if not isinstance(text, str) or not text.strip() or text != source.description:
            found = f"it is {text!r}."
            advice = "Say in words what it is, such as the file it reads: messages begin with it."
            raise Breach("WeightSource.description", found, advice)

    def test_names_are_those_that_it_has(self) -> None:
        """``names`` has each name once, and can be asked again and searched."""
        source = self.make_source()
        wanted = sorted(self.truth())
        for when in ("", " when asked again"):
            names = source.names()
            if sorted(names) != wanted:
                wrong = sorted(set(names) ^ set(wanted)) or ["some more than once"]
                found = f"names are other ones{when}: {oracles.shown(wrong)}."
                raise Breach("WeightSource.names", found, "Name everything that it has, once.")
            if _NOWHERE in names or not all(name in names for name in wanted):
                found = "`in` and iteration tell different names."
                raise Breach("WeightSource.names", found, "Give a collection, such as dict.keys().")

    def test_infos_are_true(self) -> None:
        """Dtype and shape of every entry, and none of them called unusable."""
        source = self.make_source()
        for name, tensor in self.truth().items():
            info: Any = source.info(name)
            if not isinstance(info, TensorInfo):
                found = f"of {name!r} it gives a {type(info).__name__}."
                raise Breach("WeightSource.info", found, "Give a TensorInfo of refitkit.model.")
            wanted = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
            if (info.dtype, info.shape) != wanted or info.unusable:
                found = f"{name!r} is {wanted[0]} {wanted[1]}, and it says {info!r}."
                raise Breach("WeightSource.info", found, "Tell what get will give.")

    def test_unknown_names_are_key_errors(self) -> None:
        """Of ``info`` and of ``get``: that is how callers ask whether a name is there."""
        source = self.make_source()
        for member in ("info", "get"):
            try:
                getattr(source, member)(_NOWHERE)
            except KeyError:
                continue
            except Exception as exc:
                found = f"an unknown name is answered with {type(exc).__name__}: {exc}."
                raise Breach(f"WeightSource.{member}", found, "Raise KeyError.") from exc
            raise Breach(f"WeightSource.{member}", "an unknown name has one.", "Raise KeyError.")

    # -- tensors ----------------------------------------------------------------------------

    def test_tensors_are_bit_equal(self) -> None:
        """``get`` gives what is there, bit for bit, in its shape; without gradients; again, too."""
        source = self.make_source()
        for name, tensor in self.truth().items():
            for _ in range(2):
                found = source.get(name)
                same = oracles.bits(found) == oracles.bits(tensor) and found.shape == tensor.shape
                if not same:
                    text = f"{name!r} is not, bit for bit, what it should be."
                    raise Breach("WeightSource.get", text, "Give what is there, in its shape.")
                if found.requires_grad:
                    text = f"{name!r} requires grad."
                    raise Breach("WeightSource.get", text, "Detach it: weights have no history.")

    def test_order_and_company_do_not_matter(self) -> None:
        """Entries are the same whichever are read before, in whatever order."""
        truth = self.truth()
        source = self.make_source()
        kept = {name: source.get(name) for name in reversed(list(truth))}
        wrong = oracles.differing(oracles.snapshot(kept), oracles.snapshot(truth))
        if wrong:
            found = f"entries change when others are read: {oracles.shown(wrong)}."
            advice = "What was given stays as it is while its reader holds it."
            raise Breach("WeightSource.get", found, advice)

    def test_two_sources_are_independent(self) -> None:
        """Reading one to its end takes nothing from another."""
        truth = self.truth()
        one, other = self.make_source(), self.make_source()
        for name in truth:
            one.get(name)
        del one
        found = {name: other.get(name) for name in truth}
        wrong = oracles.differing(oracles.snapshot(found), oracles.snapshot(truth))
        if wrong:
            text = f"another source has read them first: {oracles.shown(wrong)}."
            raise Breach("WeightSource.get", text, "Share nothing that is used up.")

    def test_names_and_infos_read_no_data(self) -> None:
        """Headers alone: opening, ``names`` and ``info`` are asked long before data is."""
        source = self.make_source()
        if self.reads(source) is None:
            skip("reads() gives no way to count reads of data")
        for name in source.names():
            source.info(name)
        if self.reads(source):
            found = f"data was read {self.reads(source)} times, and nobody called get."
            advice = "Read headers when it is opened, and data in get."
            raise Breach("WeightSource.info", found, advice)
        name = next(iter(self.truth()))
        source.get(name)
        if not self.reads(source):
            found = "get was called, and reads() counted nothing: the oracle does not see reads."
            raise Breach("SourceSuite.reads", found, "Count where the data really comes from.")

    def test_revisions_stand_for_bits(self) -> None:
        """``revision`` is hashable, reads no data, and two alike are two tensors alike."""
        source = self.make_source()
        if not isinstance(source, KnowsRevisions):
            skip("the source has no revisions")
        known = {name: source.revision(name) for name in source.names()}
        contract = "KnowsRevisions.revision"
        if self.reads(source):
            raise Breach(contract, "data was read.", "Answer None: who asks can read it as well.")
        try:
            first: dict[Any, str] = {}
            twins = [(first.setdefault(one, n), n) for n, one in known.items() if one is not None]
        except TypeError as exc:
            raise Breach(contract, f"one is not hashable: {exc}.", "Give a tuple of text.") from exc
        if known != {name: source.revision(name) for name in source.names()}:
            raise Breach(contract, "asked again, they differ.", "Name what cannot change.")
        truth = self.truth()
        for one, other in twins:
            if oracles.bits(truth[one]) != oracles.bits(truth[other]):
                found = f"{one!r} and {other!r} have one revision, and other bits."
                raise Breach(contract, found, "Name in it what the bits depend on.")

    def test_what_cannot_be_a_weight_is_told(self) -> None:
        """``info`` says why; ``get`` gives a tensor or a typed error, never anything else."""
        made = self.make_unusable()
        if made is None:
            skip("make_unusable() gives no entry that cannot be a weight")
        source, name = made
        try:
            info = source.info(name)
        except RefitError:
            return
        if not info.unusable:
            found = f"{name!r} cannot be a weight, and nothing says so."
            raise Breach("WeightSource.info", found, "Fill TensorInfo.unusable with the reason.")
        try:
            source.get(name)
        except RefitError:
            return
        except Exception as exc:
            found = f"{name!r} is answered with {type(exc).__name__}: {exc}."
            raise Breach("WeightSource.get", found, "Raise SourceError.") from exc
