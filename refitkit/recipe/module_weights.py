"""A live module as a weight source, by two sets of names where state_dict hooks change them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import SourceError, raised_as
from refitkit.recipe.sources import TensorMap

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Mapping

    from refitkit.protocols import WeightSource


class ModuleWeights(TensorMap):
    """What a live module's state_dict holds, as it is when it is read; gradients do not matter.

    Buffers that no state_dict holds are no weights, so that a module and its state_dict give the
    same result.

    A module's state_dict hooks may rename, drop, add or compute entries, while ``torch.export``
    names weights by where they are in the module. Then the parameters and buffers themselves are
    another set of names: see ``namings``.

    Attributes:
        left_out: Those buffers, by FQN; see ``refitkit.protocols.LeavesOut``.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Keep the tensors, no copies.

        Raises:
            SourceError: The module's own code fails to make a state_dict.
        """
        what = f"a live {type(module).__name__}"
        with raised_as(SourceError, f"The state_dict of {what} cannot be made"):
            state = _state_of(module)
        super().__init__(state, what)
        buffers = module.named_buffers(remove_duplicate=False)
        self.left_out = {name: value for name, value in buffers if name not in state}
        own = dict(_own_tensors(module))
        same = own.keys() == self.names() and all(value is state[n] for n, value in own.items())
        self._own = {} if same else own  # nearly always no hook changed anything

    def namings(self) -> Collection[WeightSource]:
        """By FQN, then by the state_dict; see ``refitkit.protocols.HasNamings``."""
        if not self._own:
            return ()
        by_state = f"{self.description}, by its state_dict"
        return self._by_fqn, _Naming(self, self._tensors, by_state)

    @property
    def without_plan(self) -> WeightSource:
        """The set of names for those who have no plan and need the parameters: averages.

        Those are FQNs, unless the state_dict has parameters only in a form that hooks computed and
        gave other names: wrappers do that which keep parameters in pieces.
        """
        own, state = self._own, self._tensors
        places = set(map(_place, own.values()))
        computed = [name for name, value in state.items() if _place(value) not in places]
        all_held = places.issubset(map(_place, state.values()))
        as_they_are = not computed or all_held or any(name in own for name in computed)
        return self._by_fqn if own and as_they_are else self

    @property
    def _by_fqn(self) -> WeightSource:
        """Parameters and buffers. One that hooks drop is no weight that a program has to know."""
        own, state = self._own, self._tensors
        held = {_place(value) for value in state.values()}
        dropped = {n for n, v in own.items() if n not in state and _place(v) not in held}
        what = f"{self.description}, by the names of its parameters and buffers"
        return _Naming(self, own, what, not_persistent=dropped)

    def ties(self) -> Collection[tuple[str, ...]]:
        """Names that are one tensor, be they FQNs or names in the state_dict.

        See ``refitkit.protocols.KnowsTies``. A name that hooks gave to another tensor is in none.
        """
        if not self._own:
            return super().ties()
        classes: dict[Hashable, dict[str, None]] = defaultdict(dict)
        for name, value in (*self._own.items(), *self._tensors.items()):
            here, there = self._own.get(name, value), self._tensors.get(name, value)
            if isinstance(value, torch.Tensor) and _place(here) == _place(there):
                classes[_place(value)][name] = None
        return [tuple(names) for names in classes.values() if len(names) > 1]


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """A module's state_dict, with parameters as they are, if its own code knows how to."""
    try:
        inspect.signature(module.state_dict).bind(keep_vars=True)
    except TypeError:
        return module.state_dict()
    return module.state_dict(keep_vars=True)


class _Naming(TensorMap):
    """One set of names of a module."""

    def __init__(
        self,
        module: ModuleWeights,
        tensors: Mapping[str, Any],
        description: str,
        *,
        not_persistent: Collection[str] = (),
    ) -> None:
        """Keep the tensors, no copies."""
        super().__init__(tensors, description, not_persistent=not_persistent)
        self._module = module

    def ties(self) -> Collection[tuple[str, ...]]:
        """Those of the module: another source may have the names of its other set."""
        return self._module.ties()


def _place(value: Any) -> Hashable:
    """What two tensors have in common if they are one: memory and layout, or the very object."""
    plain = type(value) in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
    if not plain or value.layout is not torch.strided or value.is_meta or not value.data_ptr():
        return id(value)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by FQN, tied ones under all names; no hook has a say."""
    for path, part in module.named_modules(remove_duplicate=False):
        lost = part._non_persistent_buffers_set  # noqa: SLF001 - torch has no other way
        found = {**part._parameters, **part._buffers}  # noqa: SLF001 - wrappers override the others
        for name, value in found.items():
            if value is not None and name not in lost:
                yield (f"{path}.{name}" if path else name), value
