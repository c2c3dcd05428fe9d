"""The verifier ``outputs``: it compares every output of the module with a reference.

An output passes if no element differs by more than ``absolute + relative * scale``. ``scale`` is
the largest absolute element of the reference output. ``absolute`` and ``relative`` depend on the
dtype (:data:`refitkit.config.TOLERANCES`). NaN and infinity never pass, on either side. Integers,
booleans and values that are not tensors must be equal.

``prepare`` computes the reference before the refit writes anything, and ``compare`` checks outputs.
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
    """Compares the outputs of a refitted module with a reference."""

    @property
    def name(self) -> str:
        """Name that users write in ``verify=``: ``outputs``."""
        return NAME

    def prepare(self, request: VerifyRequest) -> Callable[[OpenedModule], VerificationResult]:
        """Compute the reference, and return a function that compares the module with it.

        The reference is that of the user, or the program with the new weights.

        Raises:
            ConfigError: There are no inputs, there is no reference and no program, or the reference
                cannot be called with the inputs.
            NotRefittableError: A partial refit keeps a slot that cannot be read, so the program
                cannot be given its value.
        """
        if request.inputs is None:
            raise ConfigError(
                "The verifier 'outputs' needs inputs to call the module with.",
                hint="Pass inputs=(x,), or choose verify='weights' or verify='none'.",
            )
        args, kwargs = request.inputs
        # A reference of the user has state of its own.
        state = {} if request.reference is not None else _kept_state(request)
        # Computed now: a partial refit needs present weights for the program, and an error at this
        # point stops the refit before anything was written.
        with _plain_mode():
            expected = _expected(request, state, _copied(args), _copied(dict(kwargs)))

        def verify(module: OpenedModule) -> VerificationResult:
            with _plain_mode():
                found = _probe(module, state, _copied(args), _copied(dict(kwargs)))
            return compare(found, expected, request.tolerances)

        return verify


def _kept_state(request: VerifyRequest) -> State:
    """Return copies of the state that the refit keeps, such as KV caches, by engine and slot.

    The program and the module both start from these copies: calls go on until the commit, so the
    live state may have changed by then.
    """
    engines = request.module.engines
    return {
        (name, slot): engine.read(slot).clone()  # ``read`` returns an alias that calls write to
        for name, slot in state_slots(request.plan)
        if (name, slot) not in request.values
        and isinstance(engine := engines[name], SupportsReadback)
    }


def _probe(module: OpenedModule, state: State, args: Any, kwargs: Any) -> Any:
    if state and isinstance(module, ProbesFromState):
        return module.probe_from(state, args, kwargs)
    return module.probe(args, kwargs)


def _expected(request: VerifyRequest, state: State, args: Any, kwargs: Any) -> Any:
    """Return the expected outputs."""
    reference = request.reference
    if reference is None and request.program is None:
        raise ConfigError(
            "The verifier 'outputs' has nothing to compare with: no reference was given and the "
            "module was not saved with its program.",
            hint="Pass reference=, a callable or the expected outputs, or choose verify='weights'.",
        )
    if reference is None and request.program is not None:
        reference = request.program.bind(_RefittedWeights(request, state), request.plan.pinned)
    if not callable(reference):
        return reference
    with raised_as(ConfigError, "The reference cannot be called with these inputs"):
        return reference(*args, **kwargs)


class _RefittedWeights:
    """The weights that the module will hold: the new ones, else the present ones.

    A partial refit changes some weights and keeps the others. The program needs all of them.
    """

    def __init__(self, request: VerifyRequest, state: State) -> None:
        self._source, self._state = request.source, state
        self.description = request.source.description
        # A slot that holds a view of weights is computed, but the program reads the view by name.
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
        """Return the names of new and kept weights."""
        return self._names

    def info(self, fqn: str) -> Any:
        """Return the header of the new weight, else that of the program's leaf."""
        if fqn not in self._kept:
            return self._source.info(fqn)
        leaf = self._leaves[fqn]
        return TensorInfo(dtype=leaf.dtype, shape=leaf.shape)

    def get(self, fqn: str) -> torch.Tensor:
        """Return the new value, else the value that the module holds now.

        Raises:
            NotRefittableError: The engine that holds the value cannot be read back.
        """
        if fqn not in self._kept:
            return self._source.get(fqn)
        name, slot = self._kept[fqn]
        if (name, slot) in self._state:
            return self._state[name, slot]
        engine = self._module.engines[name]
        if not isinstance(engine, SupportsReadback):
            raise NotRefittableError(
                f"The kept value of slot {slot!r} cannot be read, so there is nothing to compare "
                "the outputs of a partial refit with.",
                hint="Pass reference=, or verify='none'.",
            )
        return engine.read(slot).clone()  # the alias is valid until the next commit only


def _names_of(row: LedgerRow, views: Collection[str]) -> tuple[str, ...]:
    """Return the names under which the program reads the value of a slot.

    A slot that holds an entry unchanged has the names of its sources. A computed slot has a name
    only if it is a view of weights.
    """
    if not isinstance(row.value, CallRef):
        return row.sources
    return (row.slot.name,) if row.slot.name in views else ()


def compare(
    found: Any, expected: Any, tolerances: Mapping[str, tuple[float, float]]
) -> VerificationResult:
    """Return a measure for each output, and whether all of them pass.

    Args:
        found: Outputs of the module: any pytree.
        expected: Outputs of the reference. Another tree structure fails.
        tolerances: ``(absolute, relative)`` by dtype name. Dtypes without an entry must be equal.
    """
    found_leaves, structure = pytree.tree_flatten_with_path(found)
    expected_leaves, wanted = pytree.tree_flatten_with_path(expected)
    if structure != wanted:
        note = f"the outputs have the structure {structure}, not {wanted}"
        return VerificationResult(verifier=NAME, ok=False, note=note)
    measures = tuple(
        _measure(pytree.keystr(path) or "output", a, b, tolerances)
        for (path, a), (_, b) in zip(found_leaves, expected_leaves, strict=True)
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
    # Integers are indices or classes: a near value is as wrong as any other.
    if not expected.is_floating_point() and not expected.is_complex():
        return _measure_integers(name, found, expected)
    # The difference of two float16 values may overflow in float16.
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (t.detach().to("cpu", kind) for t in (found, expected))
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return OutputMeasure(name=name, ok=False, note="has NaN or infinite elements")
    scale, error = float(b.abs().max()), float((a - b).abs().max())
    absolute, relative = tolerances.get(dtype_name(expected.dtype), _EXACT)
    limit = absolute + relative * scale
    ok = error <= limit
    note = "" if ok else f"differs by up to {error:.3g}; limit {limit:.3g}"
    return OutputMeasure(name=name, ok=ok, max_abs_error=error, limit=limit, scale=scale, note=note)


def _measure_integers(name: str, found: torch.Tensor, expected: torch.Tensor) -> OutputMeasure:
    wrong = int((found.detach().cpu() != expected.detach().cpu()).sum())
    note = f"{wrong} of {expected.numel()} elements differ" if wrong else ""
    return OutputMeasure(name=name, ok=not wrong, note=note)


def _measure_values(name: str, found: Any, expected: Any) -> OutputMeasure:
    """Compare two outputs if one is not a tensor: they must be equal, and finite."""
    ok = type(found) is type(expected) and not isinstance(found, torch.Tensor)
    ok = ok and bool(found == expected) and not _is_non_finite(found)
    note = "" if ok else f"is {_text(found)}, should be {_text(expected)}"
    return OutputMeasure(name=name, ok=ok, note=note)


def _text(value: Any) -> str:
    """Return a value as short text for messages."""
    if isinstance(value, torch.Tensor):
        return f"a tensor, {dtype_name(value.dtype)} {tuple(value.shape)}"
    return f"{value!r}"[:100]


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float | complex) and not cmath.isfinite(value)


@contextmanager
def _plain_mode() -> Iterator[None]:
    """Turn off gradients and autocast: an engine has neither, so the program must not."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _copied(inputs: Any) -> Any:
    """Return inputs with copied tensors, because a model may write to its inputs."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)
