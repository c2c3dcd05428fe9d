"""Where new weights come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping

    import torch

    from refitkit.model import TensorInfo


@runtime_checkable
class WeightSource(Protocol):
    """Where new weights come from, read lazily by FQN."""

    @property
    def description(self) -> str:
        """What it is, in words, for reports and messages."""

    def names(self) -> Collection[str]:
        """FQNs of everything it has."""

    def info(self, fqn: str) -> TensorInfo:
        """What it has under this name, without reading the data.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be described.
        """

    def get(self, fqn: str) -> torch.Tensor:
        """The tensor of this name. Not to be written to, and to be copied before it is kept.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be read.
        """


@runtime_checkable
class KnowsRevisions(Protocol):
    """A source that can tell without reading an entry that it is what it was before."""

    def revision(self, fqn: str) -> Hashable | None:
        """What the bits of an entry are known by.

        In one process, entries of equal revisions have the same dtype, shape and bits, whatever
        source they are of, and however much time lies between. So it names what nobody can change:
        a file that must not be written to, a copy that nobody else has; and what is made of it how.

        Returns:
            None where only reading tells.

        Raises:
            KeyError: It has no such name.
        """


@runtime_checkable
class GivesPieces(Protocol):
    """A source that reads large entries piece by piece, without memory for the whole."""

    def pieces(self, fqn: str) -> Iterator[torch.Tensor] | None:
        """The elements of an entry in logical order, cut into runs.

        Returns:
            Tensors of one dimension on the CPU, each valid until the next one is asked for, and not
            to be written to; None where the entry is small, or only ``get`` can give it.

        Raises:
            KeyError: It has no such name.
            SourceError: The entry cannot be read; also while it is iterated over.
        """


@runtime_checkable
class KeepsMade(Protocol):
    """A source that computes what it gives, and can keep it for those who look several times."""

    def keeping(self, limit: int | None) -> WeightSource:
        """A source of the same entries, for one refit, whose parts keep nothing.

        Args:
            limit: Most bytes of host memory that it may keep; None: no limit.
        """


@runtime_checkable
class MayChange(Protocol):
    """A source of what others can write to: files. It is asked once all of it was staged.

    What ``get`` gives must be of one version: a source whose data is another one by now raises.
    """

    def require_unchanged(self) -> None:
        """Check that all that it gave is of one version of the weights.

        Raises:
            SourceError: It may be of several; says what was changed.
        """


@runtime_checkable
class SupportsReread(Protocol):
    """A source of files that can hold everything it gave against a second reading.

    It is asked with ``Config.reread``, once all was staged. A source that others can write to
    (``MayChange``) and that cannot do this is refused then.
    """

    def reread(self) -> None:
        """Read again all that was read from files, and compare bytes or digests of them.

        Raises:
            SourceError: Some are others; says which file was changed.
        """


@runtime_checkable
class MadeOf(Protocol):
    """A source whose entries are made of another's: renamed, packed, cast, quantized."""

    @property
    def given(self) -> WeightSource:
        """The other one."""

    def made_from(self, fqn: str) -> tuple[str, ...]:
        """Names in ``given`` that an entry is made from: its own, where it is left as it was.

        Raises:
            KeyError: It has no such name.
        """


@runtime_checkable
class LeavesOut(Protocol):
    """A source that has tensors that are no weights, because no state_dict holds them.

    Reports name those that are not what the plan keeps, as the module goes on with the plan's.
    """

    @property
    def left_out(self) -> Mapping[str, torch.Tensor]:
        """The tensors, by FQN. Not to be written to."""


@runtime_checkable
class KnowsTies(Protocol):
    """A source that can see which of its names are one tensor: tied weights."""

    def ties(self) -> Collection[tuple[str, ...]]:
        """Classes of two and more names that are one tensor, without reading data.

        Names that are not in a class may be tied all the same, where nothing shows it.
        """


@runtime_checkable
class HasNamings(Protocol):
    """A source that knows its weights by several sets of names: a module with state_dict hooks."""

    def namings(self) -> Collection[WeightSource]:
        """One source for each set of names, the preferred one first; none where there is one set.

        A plan decides: the set is taken by which most of the program's weights are there, with
        their dtypes and shapes, after all rules and transforms; of equal ones the first. Sets are
        never mixed. Without a plan, names are those of this source itself.
        """


@runtime_checkable
class HoldsProgram(Protocol):
    """A source whose weights are those of a program, which is at hand."""

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The program. Not to be changed."""
