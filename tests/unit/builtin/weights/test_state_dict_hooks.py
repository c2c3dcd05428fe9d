"""Live modules whose state_dict hooks rename, drop, add or compute: parameters by their FQN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from refitkit import WeightedAverage
from refitkit.errors import SourceError, WeightMismatchError
from tests.fakes import UnderRules, same_state

if TYPE_CHECKING:
    from collections.abc import Callable

    State = dict[str, Any]


class Hooked(nn.Module):
    """A module with a state_dict hook: ``change(state, prefix, module)``."""

    def __init__(self, change: Callable[[State, str, Any], None], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._register_state_dict_hook(lambda me, state, prefix, _: change(state, prefix, me))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def without_layer(state: State, prefix: str, _: Any) -> None:
    """As torchtune's FusionLayer does it."""
    for name in [n for n in state if n.startswith(f"{prefix}layer.")]:
        state[prefix + name.removeprefix(f"{prefix}layer.")] = state.pop(name)


def fused(state: State, prefix: str, _: Any) -> None:
    state[f"{prefix}qkv"] = torch.cat([state.pop(prefix + n).detach() for n in "qkv"])


def doubled(state: State, prefix: str, _: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].detach() * 2


def dequantized(state: State, prefix: str, module: Any) -> None:
    state[f"{prefix}weight"] = module.weight.float() * module.scale
    del state[f"{prefix}scale"]


def folded(state: State, prefix: str, module: Any) -> None:
    """A norm into the weight before it, which gets a bias by that."""
    state[f"{prefix}weight"] = (module.weight * module.gain).detach()
    state[f"{prefix}bias"] = (module.shift * module.gain).detach()
    del state[f"{prefix}gain"], state[f"{prefix}shift"]


def exchanged(state: State, prefix: str, _: Any) -> None:
    a, b = f"{prefix}a", f"{prefix}b"
    state[a], state[b] = state[b], state[a]


def extended(state: State, prefix: str, _: Any) -> None:
    state[f"{prefix}version"] = 3
    state[f"{prefix}computed"] = torch.zeros(2)


def cut(state: State, prefix: str, _: Any) -> None:
    del state[f"{prefix}frozen"], state[f"{prefix}table"]


def tied_layer() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.other = layer.weight
    return layer


def with_buffers() -> nn.Module:
    module = Hooked(cut, weight=parameter(2), frozen=parameter(3))
    module.register_buffer("table", torch.randn(4))
    module.register_buffer("lost", torch.randn(4), persistent=False)
    return module


def quantized() -> nn.Module:
    module = Hooked(dequantized)
    module.register_buffer("weight", torch.randint(-9, 9, (4, 2), dtype=torch.int8))
    module.register_buffer("scale", torch.rand(4, 1))
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    "renamed": lambda: Hooked(without_layer, layer=nn.Linear(3, 2)),
    "renamed, tied": lambda: Hooked(without_layer, layer=tied_layer()),
    "renamed, parametrized": lambda: Hooked(
        without_layer, layer=parametrizations.weight_norm(nn.Linear(3, 2))
    ),
    "fused": lambda: Hooked(fused, q=parameter(2, 2), k=parameter(2, 2), v=parameter(2, 2)),
    "computed, under the same name": lambda: Hooked(doubled, weight=parameter(3)),
    "dequantized": quantized,
    "folded": lambda: Hooked(folded, weight=parameter(3), gain=parameter(3), shift=parameter(3)),
    "exchanged": lambda: Hooked(exchanged, a=parameter(3), b=parameter(3)),
    "extended": lambda: Hooked(extended, weight=parameter(3)),
    "cut": with_buffers,
}


def kinds_but(*others: str) -> list[str]:
    return [kind for kind in KINDS if kind not in others]


def own(module: nn.Module) -> State:
    """What the module computes with, by the names that ``torch.export`` gives."""
    found = dict(module.named_parameters(remove_duplicate=False))
    lost = {"lost"}
    found |= {
        name: value
        for name, value in module.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2] not in lost
    }
    return {name: value.detach() for name, value in found.items()}


def held(module: nn.Module) -> State:
    """Tensors of its state_dict."""
    return {n: value for n, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_fits_the_engine_that_was_made_of_it(kind: str) -> None:
    module = KINDS[kind]()
    assert same_state(UnderRules(own(module)).refit(module), own(module))
    assert same_state(UnderRules(own(module)).refit(module, partial=True), own(module))


@pytest.mark.parametrize(
    "kind", kinds_but("computed, under the same name", "exchanged", "extended")
)
def test_it_fits_an_engine_with_the_names_of_its_state_dict(kind: str) -> None:
    """A model without those hooks was exported."""
    module = KINDS[kind]()
    assert same_state(UnderRules(held(module)).refit(module), held(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, checkpoint_wrapper])
def test_wrappers_around_it(kind: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = KINDS[kind]()
    assert same_state(UnderRules(own(module)).refit(wrap(module)), own(module))


def test_names_are_never_mixed() -> None:
    """Weight and bias were folded together: neither is right beside the other one's old value."""
    module = KINDS["folded"]()
    program = {name: held(module)[name] for name in ("weight", "bias")}
    assert same_state(UnderRules(program).refit(module), program)
    assert same_state(UnderRules(program).refit(module, partial=True), program)


def test_a_cast_that_rules_allow_counts() -> None:
    module = quantized()
    program = {"weight": held(module)["weight"].double()}
    assert same_state(UnderRules(program, cast="lossless").refit(module), program)
    with pytest.raises(WeightMismatchError, match="dtype, found float32, wanted float64"):
        UnderRules(program).refit(module)


def test_of_two_floats_the_programs_own_is_taken() -> None:
    """A hook that keeps weights in float32, as trainers in half precision do."""

    def widened(state: State, prefix: str, module: Any) -> None:
        state[f"{prefix}weight"] = module.weight.detach().float() * 3

    module = Hooked(widened, weight=nn.Parameter(torch.randn(3).half()))
    for program in (own(module), held(module)):
        assert same_state(UnderRules(program).refit(module), program)


def test_another_models_is_refused_by_its_fqns() -> None:
    module = nn.Sequential(KINDS["renamed"](), nn.Linear(2, 2))
    program = own(KINDS["renamed"]())
    with pytest.raises(WeightMismatchError, match=r"1\.weight: unexpected"):
        UnderRules({f"0.{name}": value for name, value in program.items()}).refit(module)
    bigger = {**own(module), "2.weight": torch.zeros(2)}
    with pytest.raises(WeightMismatchError, match=r"2\.weight: missing"):
        UnderRules(bigger).refit(module)


def test_a_hook_that_fails_is_no_fault_of_a_plugin() -> None:
    def fail(*_: Any) -> None:
        raise ValueError("not now")

    with pytest.raises(SourceError, match="state_dict of a live Hooked cannot be made: ValueErr"):
        UnderRules({"a": torch.zeros(1)}).refit(Hooked(fail))


@pytest.mark.parametrize("tower", ["net", "ema"])
def test_a_hook_does_not_choose_between_two_models(tower: str) -> None:
    """A trainer's module that saves its moving average under the names of the model."""

    def published(state: State, prefix: str, _: Any) -> None:
        for name in [n for n in state if n.startswith(f"{prefix}ema.")]:
            state[name.replace("ema.", "net.")] = state.pop(name)

    module = Hooked(published, net=nn.Linear(3, 2), ema=nn.Linear(3, 2))
    program = own(getattr(module, tower))
    with pytest.raises(WeightMismatchError, match=r"--subtree 'ema\.'.*\n.*--subtree 'net\.'"):
        UnderRules(program).refit(module)
    assert same_state(UnderRules(program, subtree=f"{tower}.").refit(module), program)


def test_a_state_dict_of_the_users_own() -> None:
    """It takes no arguments, and leaves out a part of the names."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def state_dict(self) -> State:  # type: ignore[override]
            return self.layer.state_dict()

    module = Own()
    for program in (own(module), held(module)):
        assert same_state(UnderRules(program).refit(module), program)


def test_values_are_read_when_they_are_read() -> None:
    module = KINDS["renamed"]()
    source = UnderRules(own(module)).pipeline.open_weights(module)
    with torch.no_grad():
        module.layer.weight.fill_(7.0)
    (by_fqn, by_state) = source.namings()
    assert by_fqn.get("layer.weight").data_ptr() == by_state.get("weight").data_ptr()
    assert by_fqn.get("layer.weight").unique().tolist() == [7.0]
    assert not by_fqn.get("layer.weight").requires_grad


def test_parameters_that_are_not_made_yet_say_so() -> None:
    module = Hooked(without_layer, layer=nn.LazyLinear(2))
    (by_fqn, _) = UnderRules({"a": torch.zeros(1)}).pipeline.open_weights(module).namings()
    assert "Uninitialized" in by_fqn.info("layer.weight").unusable
    module(torch.ones(1, 3)) if module.layer is None else module.layer(torch.ones(1, 3))
    assert same_state(UnderRules(own(module)).refit(module), own(module))


def test_without_hooks_there_is_one_set_of_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), tied_layer())
    assert UnderRules(own(module)).pipeline.open_weights(module).namings() == ()


# -- merges -----------------------------------------------------------------------------------


def mean(a: State, b: State) -> State:
    return {name: (a[name] + b[name]) / 2 for name in a}


@pytest.mark.parametrize("kind", kinds_but("dequantized"))
def test_averages_of_two(kind: str) -> None:
    """The scales of quantized ones differ, so they cannot be averaged."""
    a, b = KINDS[kind](), KINDS[kind]()
    wanted = mean(own(a), own(b))
    average = WeightedAverage([(a, 1), (b, 1)])
    assert same_state(UnderRules(wanted).refit(average), wanted)
    nested = WeightedAverage([(average, 1), (average, 3)])
    assert same_state(UnderRules(wanted).refit(nested), wanted)


@pytest.mark.parametrize("kind", ["renamed", "renamed, tied"])
@pytest.mark.parametrize("of", [own, held])
def test_averages_with_a_state_dict(kind: str, of: Callable[[nn.Module], State]) -> None:
    a, b = KINDS[kind](), KINDS[kind]()
    for parts in ([(a, 1), (of(b), 1)], [(of(b), 1), (a, 1)]):
        for program in (own, held):
            wanted = mean(program(a), program(b))
            assert same_state(UnderRules(wanted).refit(WeightedAverage(parts)), wanted)
