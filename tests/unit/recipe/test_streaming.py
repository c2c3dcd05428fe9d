"""How much memory values take while they are computed: counted, storage by storage."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from refitkit.model import CallRef
from refitkit.program.ambient import WatchingMode
from refitkit.program.bits import same_bits
from refitkit.recipe.calls import _MAX_RESULT_ELEMENTS
from tests.fakes import call_row, leaf_for, make_plan, make_slot, op_call, recipe_row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.recipe import RefitPlan

WIDTH, LAYERS, ENGINES = 128, 16, 4
KERNEL, BIAS = WIDTH * WIDTH * 4, WIDTH * 4
"""Bytes of the slots of one layer."""
BATCH = 4 * _MAX_RESULT_ELEMENTS
AT_ONCE = 3 * BATCH + ENGINES * LAYERS * BIAS * 4
"""What is made at once: kernels of a batch, these end to end, the results; folds of all layers."""


class Census(WatchingMode):
    """Counts the bytes of storages that ops make and that live.

    Attributes:
        peak: The most that lived at once.
        made: All that were ever made.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._known = {storage._cdata for storage in self._kept}
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self._count(one.untyped_storage())
        self.peak = max(self.peak, self.living)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity not in self._known and identity not in self._living:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # keeps no data
            self._living[identity] = reference, storage.nbytes()
            self.made += storage.nbytes()

    @property
    def living(self) -> int:
        """Bytes that live now."""
        alive = (size for reference, size in self._living.values() if not reference.expired())
        return sum(alive)


def folding() -> tuple[RefitPlan, dict[str, torch.Tensor]]:
    """Engines of layers whose BatchNorm is folded into a kernel and a bias, and weights."""
    calls, rows, leaves = [], [], []
    for engine in range(ENGINES):
        for layer in range(LAYERS):
            name, first = f"{engine}.{layer}", len(calls)
            kernel = make_slot(f"{name} KERNEL", (WIDTH, WIDTH), engine=f"e{engine}")
            bias = make_slot(f"{name} BIAS", (WIDTH,), engine=f"e{engine}")
            wide, flat = (WIDTH, WIDTH), (WIDTH,)
            calls += [
                op_call("sqrt.default", f"@{name}.var", shape=flat),
                op_call("div.Tensor", f"@{name}.gain", CallRef(call=first), shape=flat),
                op_call("reshape.default", CallRef(call=first + 1), (WIDTH, 1), shape=(WIDTH, 1)),
                op_call("mul.Tensor", f"@{name}.w", CallRef(call=first + 2), shape=wide),
                op_call("neg.default", CallRef(call=first + 3), shape=wide),
                op_call("mul.Tensor", f"@{name}.mean", CallRef(call=first + 1), shape=flat),
            ]
            fold = [f"{name}.{what}" for what in ("var", "gain")]
            rows += [call_row(kernel, first + 4, f"{name}.w", *fold)]
            rows += [call_row(bias, first + 5, f"{name}.mean", *fold)]
            rows += [recipe_row(make_slot(f"{name} AS IT IS", wide, engine=f"e{engine}"))]
            leaves += [leaf_for(kernel, fqn=f"{name}.w"), leaf_for(kernel, fqn=f"{name} AS IT IS")]
            leaves += [leaf_for(bias, fqn=f"{name}.{what}") for what in ("var", "gain", "mean")]
    weights = {leaf.fqn: torch.rand(leaf.shape) + 0.5 for leaf in leaves}
    return make_plan(rows, leaves=leaves, calls=calls), weights


def test_a_stream_takes_the_memory_of_less_than_one_engine() -> None:
    plan, weights = folding()
    with Census(weights.values()) as census:
        for _, value in plan.iter_slots(weights):
            del value
    derived = LAYERS * (KERNEL + BIAS)
    assert census.made > ENGINES * LAYERS * 2 * KERNEL  # more than all slots went through it
    assert census.peak < derived
    assert census.living == 0


def test_a_consumer_that_keeps_an_engine_at_a_time_needs_that_and_a_batch() -> None:
    plan, weights = folding()
    peaks = []
    with Census(weights.values()) as census:
        for _, slots in groupby(plan.iter_slots(weights), lambda found: found[0].engine):
            kept = [value for _, value in slots]
            peaks.append(census.peak)
            del kept
    assert census.peak <= LAYERS * (KERNEL + BIAS) + AT_ONCE
    assert peaks[0] >= LAYERS * KERNEL


def test_all_at_once_takes_the_derived_slots_and_a_batch() -> None:
    plan, weights = folding()
    with Census(weights.values()) as census:
        found = plan.materialize(weights)
        assert census.living == ENGINES * LAYERS * (KERNEL + BIAS)
        assert census.peak <= census.living + AT_ONCE
        del found
    assert census.living == 0


def test_weights_that_are_slots_as_they_are_are_never_copied() -> None:
    slots = [make_slot(f"w{number}", (WIDTH, WIDTH)) for number in range(4)]
    turned = make_slot("turned", (WIDTH, WIDTH))
    plan = make_plan(
        [*map(recipe_row, slots), call_row(turned, 0, "w0")],
        calls=[op_call("permute.default", "@w0", (1, 0), shape=(WIDTH, WIDTH))],
        leaves=[leaf_for(slot) for slot in slots],
    )
    weights = {slot.name: torch.rand(WIDTH, WIDTH) for slot in slots}
    with Census(weights.values()) as census:
        found = plan.materialize(weights)["model"]
    assert census.made == 0
    assert all(found[name].data_ptr() == value.data_ptr() for name, value in weights.items())
    assert same_bits(found["turned"], weights["w0"].t())


def test_what_engines_have_in_common_lives_until_the_last_of_them_has_it() -> None:
    """And no longer: it is made once."""
    slots = [make_slot(f"s{n}", (WIDTH, WIDTH), engine=f"e{n}") for n in range(4)]
    wide = (WIDTH, WIDTH)
    plan = make_plan(
        [call_row(slot, number + 1, "w", *["v"][:number]) for number, slot in enumerate(slots)],
        leaves=[leaf_for(slots[0], fqn=fqn) for fqn in ("w", "v")],
        calls=[
            op_call("neg.default", "@w", shape=wide),
            op_call("abs.default", CallRef(call=0), shape=wide),
            *(op_call("mul.Tensor", CallRef(call=0), "@v", shape=wide) for _ in range(2)),
            op_call("mul.Tensor", "@w", "@v", shape=wide),
        ],
    )
    weights = {fqn: torch.rand(wide) for fqn in ("w", "v")}
    after = []
    with Census(weights.values()) as census:
        for _, value in plan.iter_slots(weights):
            del value
            after.append(census.living)
    assert after == [KERNEL, KERNEL, 0, 0]
    assert census.made == 5 * KERNEL
