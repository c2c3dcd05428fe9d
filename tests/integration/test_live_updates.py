"""Live updates of real engines: bit-equal to a refit, beside calls, in the memory of one bucket."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import digest
from aoti_models import CASES
from parts import AT, Callers, answer, state, weights

import refitkit
from refitkit import WeightReceiver
from refitkit.errors import UpdateStateError, VerificationError, WeightMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from refitkit.builtin.aotinductor.publishing import PublishingEngine


def values_of(compiled: refitkit.CompiledModule) -> dict[str, torch.Tensor]:
    return {slot.name: compiled.read(slot.name).clone() for slot in compiled.slots}


@pytest.mark.parametrize("name", [name for name in CASES if name not in {"wide", "batch"}])
@pytest.mark.parametrize("binding", [False, True])
def test_an_update_is_bit_equal_to_a_refit(
    name: str,
    binding: bool,
    fresh: Callable[[str], refitkit.CompiledModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if binding:
        monkeypatch.setenv("REFITKIT_AOTI_BINDING", "1")
    case = CASES[name]
    args, kwargs = case.args(), case.kwargs()
    updated, refitted = fresh(name), fresh(name)
    receiver = WeightReceiver(updated, inputs=(args, kwargs))
    for seed in (1, 2, 3):
        new = case.model(seed).state_dict()
        refitkit.refit(refitted, new)
        receiver.start_weight_update(f"seed-{seed}")
        # in another order than the engine's; where it is gradual, the memory is free at once
        for fqn, value in reversed(new.items()):
            sent = value.clone()
            receiver.update_weights(weights={fqn: sent})
            if not receiver.status().held_bytes:
                sent.fill_(-1)
        (result,) = receiver.finish_weight_update()
        assert result.report.verification is not None
        assert digest(updated(*args, **kwargs)) == digest(refitted(*args, **kwargs))
        mine, theirs = values_of(updated), values_of(refitted)
        assert digest(mine) == digest(theirs)
        assert updated.label == f"seed-{seed}"


def test_no_call_sees_a_mixture(parts: refitkit.CompiledModule) -> None:
    receiver = WeightReceiver(parts, verify="none")
    opened: Any = parts.opened
    seen: set[Any] = set()

    def call() -> None:
        seen.add(answer(opened))

    with Callers(call, call) as callers:
        for number in callers.steps(60):
            receiver.start_weight_update(str(number))
            for name, value in weights(number % 7).items():
                receiver.update_weights(weights={name: value})
            (result,) = receiver.finish_weight_update()
            assert result.report.pause_seconds == 0.0
    assert seen <= {state(number) for number in range(7)}
    assert len(seen) > 1


def test_two_sets_and_no_more(parts: refitkit.CompiledModule) -> None:
    """Nothing of an update stays: the memory of the set before the last one serves again."""
    engine: PublishingEngine = parts.engines["model"]  # type: ignore[attr-defined]
    receiver = WeightReceiver(parts)
    gc.collect()
    gc.disable()
    try:
        sets = set()
        for number in range(8):
            receiver.start_weight_update()
            receiver.update_weights(weights=weights(number))
            receiver.finish_weight_update()
            sets.add(frozenset(t.data_ptr() for t in engine.live.values()))
            assert answer(parts.opened) == state(number)
        assert len(sets) <= 3  # that of the file, and two
    finally:
        gc.enable()


@pytest.mark.parametrize("arrived", range(4))
def test_an_update_that_ends_early_changes_no_bit(
    arrived: int, parts: refitkit.CompiledModule
) -> None:
    receiver = WeightReceiver(parts)
    refitkit.refit(parts, weights(3))
    before = digest(values_of(parts))
    names = list(weights(5).items())
    for end in ("abort", "finish", "supersede", "unknown", "nan"):
        receiver.start_weight_update("never")
        receiver.update_weights(weights=dict(names[:arrived]))
        if end == "abort":
            assert receiver.abort_weight_update()
        elif end == "finish":
            with pytest.raises(WeightMismatchError, match="not complete"):
                receiver.finish_weight_update()
        elif end == "supersede":
            receiver.start_weight_update("other", supersede=True)
            receiver.abort_weight_update()
        elif end == "unknown":
            with pytest.raises(WeightMismatchError, match="unexpected"):
                receiver.update_weights(weights={"unknown": torch.ones(1)})
        else:
            bad = {name: torch.full_like(value, float("nan")) for name, value in names[arrived:]}
            receiver.update_weights(weights=bad)
            with pytest.raises(WeightMismatchError, match="finite"):
                receiver.finish_weight_update()
        assert digest(values_of(parts)) == before
        assert answer(parts.opened) == state(3)
        assert (parts.label, parts.version) == ("", 1)


def test_a_wrong_reference_fails_the_update(parts: refitkit.CompiledModule) -> None:
    receiver = WeightReceiver(parts, inputs=(AT,), reference=parts(AT))
    receiver.start_weight_update("wrong")
    receiver.update_weights(weights=weights(5))
    with pytest.raises(VerificationError, match="never live") as info:
        receiver.finish_weight_update()
    assert info.value.report is not None
    assert answer(parts.opened) == state(0)


def test_the_label_is_saved_and_shown(parts: refitkit.CompiledModule, tmp_path: Path) -> None:
    receiver = WeightReceiver(parts)
    receiver.start_weight_update("policy-7")
    receiver.update_weights(weights=weights(4))
    receiver.finish_weight_update()
    parts.save(tmp_path / "m.refitkit")
    again = refitkit.load(tmp_path / "m.refitkit")
    assert again.label == "policy-7"
    assert refitkit.inspect(tmp_path / "m.refitkit")["label"] == "policy-7"
    refitkit.refit(again, weights(1))
    assert again.label == ""
    again.restore(0)
    assert again.label == "policy-7"
    assert refitkit.Pipeline().copy(again).label == "policy-7"


def test_calls_that_write_buffers_go_on_from_the_new_ones(
    tally: refitkit.CompiledModule,
) -> None:
    x = torch.ones(4)
    tally(x)
    new = {slot.name: torch.full_like(tally.read(slot.name), 5.0) for slot in tally.slots}
    twin = refitkit.Pipeline().copy(tally)
    refitkit.refit(twin, new)
    receiver = WeightReceiver(tally)
    receiver.start_weight_update()
    receiver.update_weights(weights=new)
    tally(x)  # what it counts is overwritten by the update
    receiver.finish_weight_update()
    for _ in range(3):
        assert digest(tally(x)) == digest(twin(x))
    assert digest(values_of(tally)) == digest(values_of(twin))


class VllmClient:
    """A trainer's client, as those of vLLM are written: four methods with these dicts."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self.receiver = receiver

    def push(self, path: Path) -> None:
        self.receiver.init_weight_transfer_engine({"init_info": {"backend": "disk"}})
        self.receiver.start_weight_update()
        self.receiver.update_weights({"update_info": {"path": str(path)}})
        self.receiver.finish_weight_update()


def test_a_client_of_the_protocol_drives_it(parts: refitkit.CompiledModule, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    client = VllmClient(WeightReceiver(parts))
    for number in (2, 6):
        save_file(weights(number), tmp_path / f"{number}.safetensors")
        client.push(tmp_path / f"{number}.safetensors")
        assert answer(parts.opened) == state(number)


def test_threads_that_all_want_to_update(parts: refitkit.CompiledModule) -> None:
    """Each ends with its own weights live, or with an error that says why not."""
    receiver = WeightReceiver(parts, verify="none")
    done, errors = itertools.count(), []

    def push(number: int) -> None:
        for _ in range(10):
            try:
                receiver.start_weight_update(str(number))
                receiver.update_weights(weights=weights(number))
                receiver.finish_weight_update()
                next(done)
            except (UpdateStateError, WeightMismatchError) as error:
                errors.append(error)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receiver.status().state == "idle"
    assert answer(parts.opened) in {state(number) for number in range(4)}
    assert parts.version == next(done)
