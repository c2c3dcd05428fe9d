"""Checking one model with AOTInductor: compile, refit to another model's weights, and back.

The oracle is the other model itself, run in eager mode: the refitted engine has to give its outputs
within ``refitkit.config.TOLERANCES``. Back at the first weights, outputs have to be equal bit for
bit to those from before.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

import refitkit
from refitkit.config import TOLERANCES
from refitkit.errors import CompileError, RefitError
from scripts.zoo.result import FIRST_SEED, Result, raw, timed, told

if TYPE_CHECKING:
    from scripts.zoo.entry import Entry

BACKEND = "aotinductor"
SECOND_SEEDS = (1, 5)
"""The first whose outputs are finite counts."""
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def check_aoti(entry: Entry, dtype: str) -> Result:
    """Everything that is checked of one model in one dtype."""
    result = Result(entry.name, dtype)
    try:
        model = entry.model(dtype, FIRST_SEED)
        calls = entry.calls(dtype)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the table says so
        return result.fail(f"cannot be made: {told(exc)}", "upstream")
    try:
        with timed(result, "export"):
            program = entry.program(copy.deepcopy(model), dtype)
    except Exception as exc:  # noqa: BLE001
        return result.fail(f"torch.export: {told(exc)}", "upstream")
    compiled = _compiled(program, result)
    if compiled is None:
        return result
    rows = compiled.plan.ledger
    result.slots, result.states = len(rows), dict(Counter(str(row.state) for row in rows))
    there_and_back(entry, dtype, model, compiled, calls, result)
    return result


def _compiled(program: torch.export.ExportedProgram, result: Result) -> Any:
    """The compiled module with its proof; None if there is none, and the result says why."""
    unproved: list[str] = []

    def listen(event: Any) -> None:
        text = str(getattr(event, "text", ""))
        if getattr(event, "stage", "") == "prove" and "no proof" in text:
            unproved.append(text)

    pipeline = refitkit.Pipeline(plugins=[_Listener(listen)])
    try:
        with timed(result, "compile"):
            compiled = pipeline.compile(program, BACKEND)
    except CompileError as exc:
        upstream = "upstream" if not _compiles_alone(program) else "failed"
        result.fail(f"compile: {told(exc)}", upstream)
        return None
    except RefitError as exc:
        result.fail(f"compile: {told(exc)}")
        return None
    if unproved:
        result.notes.append(unproved[0])
    return compiled


class _Listener:
    """A plugin that hears events."""

    def __init__(self, listen: Any) -> None:
        self._listen = listen

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        """Pass it on."""
        self._listen(event)


def _compiles_alone(program: torch.export.ExportedProgram) -> bool:
    """Whether AOTInductor compiles it without refitkit."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its public name
                program, package_path=f"{folder}/model.pt2"
            )
        except Exception:  # noqa: BLE001
            return False
    return True


def there_and_back(
    entry: Entry, dtype: str, model: torch.nn.Module, compiled: Any, calls: Calls, result: Result
) -> None:
    """Refit a compiled module to other weights and back; what is wrong is noted."""
    first_state = _state(model, whole=entry.stateful)
    eager = copy.deepcopy(model)
    first = _outputs(compiled, calls)
    before = _compare(first, _outputs(eager, calls), result, "A")
    other, expected = _other(entry, dtype, eager, calls, result)
    try:
        with timed(result, "refit"):
            report = refitkit.refit(compiled, other).report
    except RefitError as exc:
        result.fail(f"refit to B: {told(exc)}")
        return
    result.notes += [note for note in report.notes if "no inputs" not in note]
    second = _outputs(compiled, calls)
    after = _compare(second, expected, result, "B")
    result.errors = {"A": before, "B": after}
    if _bits(first) == _bits(second) and other:
        result.fail("B gives the outputs of A")
    try:
        refitkit.refit(compiled, first_state)
    except RefitError as exc:
        result.fail(f"refit back to A: {told(exc)}")
        return
    if _bits(_outputs(compiled, calls)) != _bits(first):
        result.fail("back at A, outputs are not bit-equal to those from before")


def _other(
    entry: Entry, dtype: str, eager: torch.nn.Module, calls: Calls, result: Result
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights of another model, and what the model says that loads them; it keeps its state."""
    weights: dict[str, torch.Tensor] = {}
    expected: list[Any] = []
    for seed in SECOND_SEEDS:
        weights = entry.model(dtype, seed).state_dict()
        loaded = copy.deepcopy(eager)
        loaded.load_state_dict(weights)
        expected = _outputs(loaded, calls)
        floats = [v for v in pytree.tree_leaves(expected) if _is_float(v)]
        if all(bool(v.isfinite().all()) for v in floats):
            return {name: value.clone() for name, value in weights.items()}, expected
    result.notes.append("outputs of B are not finite")
    return {name: value.clone() for name, value in weights.items()}, expected


def _state(model: torch.nn.Module, *, whole: bool) -> dict[str, torch.Tensor]:
    """A copy of what a state_dict has; and of other buffers, where calls change some."""
    state = {**dict(model.named_buffers())} if whole else {}
    return {name: value.detach().clone() for name, value in {**state, **model.state_dict()}.items()}


def _outputs(call: Any, calls: Calls) -> list[Any]:
    found = []
    for given in calls:
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, given)
        with torch.no_grad():
            out = call(*args, **kwargs)
        found.append(pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), out))
    return found


def _compare(found: list[Any], expected: list[Any], result: Result, name: str) -> float:
    """The largest error of all outputs, relative to the largest value of each."""
    a, structure = pytree.tree_flatten(found)
    b, wanted = pytree.tree_flatten(expected)
    if structure != wanted:
        result.fail(f"{name}: outputs have another structure than the model's")
        return float("nan")
    worst = 0.0
    for position, (one, other) in enumerate(zip(a, b, strict=True)):
        said, error = _difference(one, other)
        worst = max(worst, error)
        if said:
            result.fail(f"{name}: output {position} {said}")
    return worst


def _difference(found: Any, expected: Any) -> tuple[str, float]:
    """What is wrong with an output, and its relative error."""
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return ("" if found == expected else f"is {found!r}, not {expected!r}"), 0.0
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"is {found.dtype} {tuple(found.shape)}", float("inf")
    if not expected.numel() or not _is_float(expected):
        return ("" if found.equal(expected) else "differs"), 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.to(wide), expected.to(wide)
    finite = b.isfinite()
    if not bool((a.isfinite() == finite).all()):
        return "is not finite where it should be, or the other way round", float("inf")
    error = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    absolute, relative = TOLERANCES[str(expected.dtype).removeprefix("torch.")]
    wrong = error > absolute + relative * scale
    return (f"differs by {error:.3g}, largest value {scale:.3g}" if wrong else ""), (
        error / scale if scale else error
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _bits(outputs: list[Any]) -> list[Any]:
    leaves = pytree.tree_leaves(outputs)
    return [raw(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
