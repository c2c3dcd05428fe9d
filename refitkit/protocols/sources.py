"""Weight sources: objects that read new weights by FQN (fully qualified name).

The hook ``refitkit_load_weights`` returns a :class:`WeightSource`. A source serves one refit, one
verification or one diff. The other protocols are optional: refitkit checks for their members, so
no base class is inherited.

refitkit opens a source and reads its names and infos before anything is staged. It reads data for
checks, for ``delta`` and for verifiers, and while it stages. After staging and before the commit it
calls ``require_unchanged`` and ``reread``. A refit without rollback reads data during the commit.

An error of :mod:`refitkit.errors` passes through. Any other exception becomes a typed error that
names the source, the strategy or the engine, or a ``ResourceError`` if the system refused memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping

    import torch

    from refitkit.model import TensorInfo


@runtime_checkable
class WeightSource(Protocol, metaclass=Ability):
    """A set of weights, read lazily by FQN.

    A new source returns what its file or store holds now, even if an earlier one returned other
    data. Files that it opened are closed when it is dropped, at the latest.
    """

    @property
    def description(self) -> str:
        """Text that describes the source in reports and errors, such as a path."""

    def names(self) -> Collection[str]:
        """Return the FQNs of all entries.

        Called several times in one refit; it must be fast and always return the same names.
        """

    def info(self, fqn: str) -> TensorInfo:
        """Return dtype and shape of an entry, without reading its data.

        Called in each refit, before anything is staged.

        Args:
            fqn: Name of the entry.

        Raises:
            KeyError: There is no entry of this name.
            SourceError: The entry cannot be described.
        """

    def get(self, fqn: str) -> torch.Tensor:
        """Return the tensor of an entry.

        Called when a value is needed, possibly several times for one entry, and from any thread.
        The source neither writes to the tensor nor reuses its memory while the caller has it,
        whatever is read meanwhile. Others may write to it: it may belong to a live module. The
        caller does not write to it, and copies it to keep it after the refit.

        Args:
            fqn: Name of the entry.

        Returns:
            A tensor of the dtype and shape that ``info`` returns, with any strides, on any device.

        Raises:
            KeyError: There is no entry of this name.
            SourceError: The entry cannot be read.
        """


# -- reading less, and less memory ------------------------------------------------------------


@runtime_checkable
class KnowsRevisions(Protocol, metaclass=Ability):
    """A source that can recognize an entry by a revision, without reading it.

    A refit with ``delta=True`` compares revisions with those of the last refit.

    Asked by: ``delta=True``.
    Gain: entries that did not change are recognized without reading them.
    """

    def revision(self, fqn: str) -> Hashable | None:
        """Return a key for the bits of an entry.

        Within one process, entries of equal revisions have equal dtype, shape and bits, in any
        source and at any time. So a revision names data that cannot change, such as a file that
        must not be written to or a private copy. For computed entries it names the computation too.

        Called before anything is staged, for a refit with ``delta=True``.

        Args:
            fqn: Name of the entry.

        Returns:
            The key; None if the entry has to be read to recognize it.

        Raises:
            KeyError: There is no entry of this name.
        """


@runtime_checkable
class GivesPieces(Protocol, metaclass=Ability):
    """A source that reads entries in pieces, without memory for the whole tensor.

    It can also read an entry straight into the memory of an engine.

    Asked by: engines that stage a value, and checks of finite values.
    Gain: an entry is read straight into the engine's memory, or without memory for the whole.
    """

    def pieces(self, fqn: str, into: torch.Tensor | None = None) -> Iterator[torch.Tensor] | None:
        """Return the elements of an entry in row-major order, cut into runs.

        Called instead of ``get``: by engines with ``into``, and without it by checks and verifiers,
        for entries of several megabytes.

        Args:
            fqn: Name of the entry.
            into: Where the caller wants the elements: a contiguous tensor on the CPU. A source that
                reads into it returns its parts, and the caller copies nothing. The source ignores
                it if it has another dtype or number of elements than the entry.

        Returns:
            Tensors of one dimension on the CPU, in the dtype of the entry. Each is valid until the
            next one is requested. The caller does not write to them. None if the entry is small, or
            if only ``get`` can read it.

        Raises:
            KeyError: There is no entry of this name.
            SourceError: The entry cannot be read. The iteration may raise it too.
        """


@runtime_checkable
class KnowsBits(Protocol, metaclass=Ability):
    """A source that recognizes the bits of entries that it has read, without a second read.

    Asked by: the verifier ``weights``.
    Gain: a verification reads no file a second time.
    """

    def has_bits(self, fqn: str, tensor: torch.Tensor) -> bool | None:
        """Return whether a tensor has the bits that an entry had when it was read.

        Called by verifiers.

        Args:
            fqn: Name of the entry.
            tensor: A contiguous tensor on the CPU.

        Returns:
            None if the entry has to be read to answer.

        Raises:
            KeyError: There is no entry of this name.
        """


@runtime_checkable
class KeepsMade(Protocol, metaclass=Ability):
    """A source that computes its entries, and can keep the results for repeated reads.

    Asked by: each refit with rollback.
    Gain: a computed entry that is needed twice is computed once.
    """

    def keeping(self, limit: int | None) -> WeightSource:
        """Return a source of the same entries that keeps computed results during one refit.

        Called right after the source is opened for a refit, unless it is one without rollback.
        Sources that this one consists of keep nothing.

        Args:
            limit: Maximum size of the kept results, in bytes of host memory; None: no limit.
        """


@runtime_checkable
class GivesAway(Protocol, metaclass=Ability):
    """A source whose tensors an engine may keep as its own memory.

    Asked by: engines that stage a value.
    Gain: the engine takes the tensor as its memory, without a copy.
    """

    def gives_away(self, fqn: str) -> bool:
        """Return whether nobody writes to the tensor of an entry from now on, or reuses its memory.

        Args:
            fqn: Name of the entry.
        """


# -- detecting changed files ------------------------------------------------------------------


@runtime_checkable
class MayChange(Protocol, metaclass=Ability):
    """A source of data that others can write to, such as files.

    All data that ``get`` and ``pieces`` return must be of one version. They raise SourceError if
    they notice that the data was replaced.

    Asked by: each refit, before the commit.
    Gain: a file that is replaced during a refit is noticed, and nothing is committed.
    """

    def require_unchanged(self) -> None:
        """Check that all data that the source returned is of one version of the weights.

        Called after all engines are staged and before the commit.

        Raises:
            SourceError: The data may be of several versions. The message says what was changed.
        """


@runtime_checkable
class SupportsReread(Protocol, metaclass=Ability):
    """A source of files that can read them a second time and compare.

    With ``Config.reread``, refitkit refuses sources that implement ``MayChange`` and not this.

    Asked by: ``Config.reread``.
    Gain: the source can be used with that setting.
    """

    def reread(self) -> None:
        """Read again all data that was read from files, and compare its bytes or digests.

        Called with ``Config.reread``, after all engines are staged and before the commit.

        Raises:
            SourceError: Some data differs. The message says which file was changed.
        """


# -- facts about the weights ------------------------------------------------------------------


@runtime_checkable
class MadeOf(Protocol, metaclass=Ability):
    """A source whose entries are computed from another source: renamed, packed, cast, quantized.

    Asked by: checks of names, and the checks before the commit.
    Gain: errors name the entries that the user has; files behind the source are checked too.
    """

    @property
    def given(self) -> WeightSource:
        """The other source. refitkit calls its ``require_unchanged`` and ``reread`` too."""

    def made_from(self, fqn: str) -> tuple[str, ...]:
        """Return the names in ``given`` that an entry is computed from, for error messages.

        Args:
            fqn: Name of the entry.

        Returns:
            Names in ``given``; the name of the entry itself if it is unchanged.

        Raises:
            KeyError: There is no entry of this name.
        """


@runtime_checkable
class LeavesOut(Protocol, metaclass=Ability):
    """A source that has tensors that are not weights, because no state_dict contains them.

    The module keeps the values of the plan for them. The report names those that differ.

    Asked by: each refit, for its report.
    Gain: the report names tensors that are no weights and differ from those of the plan.
    """

    @property
    def left_out(self) -> Mapping[str, torch.Tensor]:
        """The tensors by FQN. The caller does not write to them."""


@runtime_checkable
class KnowsTies(Protocol, metaclass=Ability):
    """A source that knows which of its names are one tensor: tied weights.

    Asked by: each refit and diff.
    Gain: tied weights fit, whichever of their names the source has.
    """

    def ties(self) -> Collection[tuple[str, ...]]:
        """Return classes of two or more names that are one tensor, without reading data.

        Called in refits and diffs, to match names with those of a plan. Names outside all classes
        may still be tied, if nothing shows it.
        """


@runtime_checkable
class HasNamings(Protocol, metaclass=Ability):
    """A source that knows its weights by several sets of names: a module with state_dict hooks.

    Asked by: each verb that applies weights to a plan.
    Gain: the set of names that fits the program best is used.
    """

    def namings(self) -> Collection[WeightSource]:
        """Return one source for each set of names, the preferred one first.

        Called once when the source meets a plan. refitkit applies all rules and transforms to each
        set. It takes the set with the most weights that fit the program in name, dtype and shape;
        of equal ones the first. It never mixes sets. Without a plan, it uses the names of this
        source.

        Returns:
            No sources if there is only one set of names.
        """


@runtime_checkable
class HoldsProgram(Protocol, metaclass=Ability):
    """A source whose weights come with the program that they belong to.

    Asked by: the strategies ``recipe``, ``name-map`` and ``rebuild``.
    Gain: a strategy that converts the program again needs no stored one.
    """

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The program. Strategies read it in ``map``; the caller does not change it."""
