"""The verifier ``outputs``: compare every output with a reference.

An output passes if no element differs by more than ``absolute + relative * scale``, where scale is
the largest absolute element of the reference output, and the two numbers belong to the dtype
(:data:`refitkit.config.TOLERANCES`). NaN and infinity never pass, on either side. Integers,
booleans and everything that is no tensor have to be equal.
"""

from __future__ import annotations

import cmath
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.errors import ConfigError, NotRefittableError, raised_as
from refitkit.model import CallRef, OutputMeasure, TensorInfo, VerificationResult
from refitkit.program.dtypes import dtype_name
from refitkit.protocols import ProbesFromState, SupportsReadback
from refitkit.recipe.reads import state_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from refitkit.model import LedgerRow, SlotKey
    from refitkit.protocols import OpenedModule, VerifyRequest

    State = Mapping[SlotKey, torch.Tensor]

NAME = "outputs"
_EXACT = (0.0, 0.0)


class OutputsVerifier:
    """Compares what the module answers with what it should answer."""

    @property
    def name(self) -> str:
        """``outputs``."""
        return NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Compute what the module should answer, before anything is written.

        Raises:
            ConfigError: There are no inputs, or nothing to compare with.
        """
        if request.inputs is None:
            raise ConfigError(
                "The verifier 'outputs' needs inputs to call the module with.",
                hint="Pass inputs=(x,), or choose verify='weights' or verify='none'.",
            )
        args, kwargs = request.inputs
        state = {} if request.reference is not None else _kept_state(request)
        with _plain_mode():
            expected = _expected(request, state, _copied(args), _copied(dict(kwargs)))

        def judge(module: OpenedModule) -> VerificationResult:
            with _plain_mode():
                found = _probed(module, state, _copied(args), _copied(dict(kwargs)))
            return compare(found, expected, request.tolerances)

        return judge


def _kept_state(request: VerifyRequest) -> State:
    """Copies of the state that the refit keeps: the program and the module both start from them.

    Calls go on until the commit, so what is live then may be another state.
    """
    engines = request.module.engines
    return {
        (name, slot): engine.read(slot).clone()
        for name, slot in state_slots(request.plan)
        if (name, slot) not in request.values
        and isinstance(engine := engines[name], SupportsReadback)
    }


def _probed(module: OpenedModule, state: State, args: Any, kwargs: Any) -> Any:
    if state and isinstance(module, ProbesFromState):
        return module.probe_from(state, args, kwargs)
    return module.probe(args, kwargs)


def _expected(request: VerifyRequest, state: State, args: Any, kwargs: Any) -> Any:
    reference = request.reference
    if reference is None and request.program is None:
        raise ConfigError(
            "The verifier 'outputs' has nothing to compare with: no reference was given and the "
            "module was not saved with its program.",
            hint="Pass reference=, a callable or the expected outputs, or choose verify='weights'.",
        )
    if reference is None and request.program is not None:
        reference = request.program.bind(_Merged(request, state), request.plan.pinned)
    if not callable(reference):
        return reference
    with raised_as(ConfigError, "The reference cannot be called with these inputs"):
        return reference(*args, **kwargs)


class _Merged:
    """The new weights, and for names that they lack what the module holds now.

    A partial refit changes some weights and keeps the others: the reference must do the same.
    """

    def __init__(self, request: VerifyRequest, state: State) -> None:
        self._source, self._state = request.source, state
        self.description = request.source.description
        views = {leaf.fqn for leaf in request.plan.data.leaves if leaf.derived}
        self._kept = {
            name: row.slot.key
            for row in request.plan.data.ledger
            if row.slot.key not in request.values
            for name in _names_of(row, views)
        }
        self._leaves = {leaf.fqn: leaf for leaf in request.plan.data.leaves}
        self._module = request.module
        self._names = frozenset(request.source.names()) | self._kept.keys()

    def names(self) -> frozenset[str]:
        """Names of both."""
        return self._names

    def info(self, fqn: str) -> Any:
        """The new entry's, else the program's: a slot holds what the program reads."""
        if fqn not in self._kept:
            return self._source.info(fqn)
        leaf = self._leaves[fqn]
        return TensorInfo(dtype=leaf.dtype, shape=leaf.shape)

    def get(self, fqn: str) -> torch.Tensor:
        """The new value, else the one that the module holds."""
        if fqn not in self._kept:
            return self._source.get(fqn)
        name, slot = self._kept[fqn]
        if (name, slot) in self._state:
            return self._state[name, slot]
        engine = self._module.engines[name]
        if not isinstance(engine, SupportsReadback):
            raise NotRefittableError(
                f"What the slot {slot!r} holds cannot be read, so there is nothing to compare "
                "the outputs of a partial refit with.",
                hint="Pass reference=, or verify='none'.",
            )
        return engine.read(slot).clone()


def _names_of(row: LedgerRow, views: Collection[str]) -> tuple[str, ...]:
    """Entries of a source that a slot holds as they are; of a computed slot, a view of weights."""
    if not isinstance(row.value, CallRef):
        return row.sources
    return (row.slot.name,) if row.slot.name in views else ()


def compare(
    found: Any, expected: Any, tolerances: Mapping[str, tuple[float, float]]
) -> VerificationResult:
    """Compare two results, leaf by leaf.

    Args:
        found: What the module answered.
        expected: What it should have answered.
        tolerances: ``(absolute, relative)`` by dtype name.
    """
    mine, structure = pytree.tree_flatten_with_path(found)
    theirs, wanted = pytree.tree_flatten_with_path(expected)
    if structure != wanted:
        note = f"the outputs have the structure {structure}, not {wanted}"
        return VerificationResult(verifier=NAME, ok=False, note=note)
    measures = tuple(
        _measure(pytree.keystr(path) or "output", a, b, tolerances)
        for (path, a), (_, b) in zip(mine, theirs, strict=True)
    )
    wrong = sum(not m.ok for m in measures)
    note = f"{len(measures)} outputs compared, {wrong} differ"
    return VerificationResult(verifier=NAME, ok=not wrong, measures=measures, note=note)


def _measure(
    name: str, found: Any, expected: Any, tolerances: Mapping[str, tuple[float, float]]
) -> OutputMeasure:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return _measure_values(name, found, expected)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        is_, wanted = (f"{dtype_name(t.dtype)} {tuple(t.shape)}" for t in (found, expected))
        return OutputMeasure(name=name, ok=False, note=f"is {is_}, should be {wanted}")
    if not expected.numel():
        return OutputMeasure(name=name, ok=True)
    if not expected.is_floating_point() and not expected.is_complex():
        return _measure_integers(name, found, expected)
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (t.detach().to("cpu", kind) for t in (found, expected))
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return OutputMeasure(name=name, ok=False, note="has NaN or infinite elements")
    scale, error = float(b.abs().max()), float((a - b).abs().max())
    absolute, relative = tolerances.get(dtype_name(expected.dtype), _EXACT)
    limit = absolute + relative * scale
    ok = error <= limit
    note = "" if ok else f"differs by up to {error:.3g}, at most {limit:.3g} passes"
    return OutputMeasure(name=name, ok=ok, max_abs_error=error, limit=limit, scale=scale, note=note)


def _measure_integers(name: str, found: torch.Tensor, expected: torch.Tensor) -> OutputMeasure:
    wrong = int((found.detach().cpu() != expected.detach().cpu()).sum())
    note = f"{wrong} of {expected.numel()} elements differ" if wrong else ""
    return OutputMeasure(name=name, ok=not wrong, note=note)


def _measure_values(name: str, found: Any, expected: Any) -> OutputMeasure:
    """Compare leaves of which at least one is no tensor: they are to be the same, and finite."""
    ok = type(found) is type(expected) and not isinstance(found, torch.Tensor)
    ok = ok and bool(found == expected) and not _is_endless(found)
    note = "" if ok else f"is {_shown(found)}, should be {_shown(expected)}"
    return OutputMeasure(name=name, ok=ok, note=note)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor, {dtype_name(value.dtype)} {tuple(value.shape)}"
    return f"{value!r}"[:100]


def _is_endless(value: Any) -> bool:
    return isinstance(value, float | complex) and not cmath.isfinite(value)


@contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients, and no autocast of the caller's: an engine knows neither."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _copied(inputs: Any) -> Any:
    """The inputs with tensors of their own, so that a model that writes to them harms nobody."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
