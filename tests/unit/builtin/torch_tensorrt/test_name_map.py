"""The strategy ``name-map``, with maps as torch-tensorrt 2.11 and 2.12 write them, and worse."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.builtin.torch_tensorrt import refitkit_mapping_strategies
from refitkit.builtin.torch_tensorrt.name_map import HasNameMap, NameMapStrategy
from refitkit.builtin.weights.objects import ProgramWeights
from refitkit.model import Fingerprint, LedgerRow, PlanData, Slot, SlotState
from refitkit.program import KeptProgram, facts_of
from refitkit.protocols import Mapped, MappingStrategy, MapRequest
from refitkit.recipe import RefitPlan, TensorMap
from tests.unit.builtin.torch_tensorrt.scenes import engine_of, values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

F32 = torch.float32
KERNEL = "[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] KERNEL"
BIAS = "[CONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] BIAS"
_BN = "_native_batch_norm_legit_no_training"
SCALE = f"[SCALE]-[aten_ops.{_BN}.default]-[b/{_BN}] SCALE"
SHIFT = f"[SCALE]-[aten_ops.{_BN}.default]-[b/{_BN}] SHIFT"
FOUR = [f"b.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
IMAGE = torch.ones(1, 2, 6, 6)


class Model(torch.nn.Module):
    """Modules by name, and how they are called."""

    def __init__(self, call: Callable[[Any, Any], Any], **modules: Any) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


@dataclass
class Engine:
    """An engine with a cached map."""

    name_map: Mapping[str, Any] | None


@dataclass
class Case:
    """What a strategy is asked for one model."""

    model: torch.nn.Module
    x: torch.Tensor
    slots: Sequence[Slot]
    maps: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.program = torch.export.export(self.model.eval(), (self.x,))
        self.kept = KeptProgram.of(self.program)
        facts = facts_of(self.program)
        self.data = PlanData(
            backend="torch_tensorrt",
            leaves=facts.leaves,
            ties=facts.ties,
            ledger=tuple(LedgerRow(slot=slot, state=SlotState.UNMAPPED) for slot in self.slots),
            fingerprint=Fingerprint(graph=facts.graph, slots=""),
        )

    def ask(self, source: Any, **changes: Any) -> Mapped:
        """Ask for all rows; ``changes`` go into the request."""
        engines = {name: Engine(one) for name, one in self.maps.items()}
        request: dict[str, Any] = {
            "plan": RefitPlan(self.data, {}),
            "module": SimpleNamespace(engines=engines),
            "source": source if not isinstance(source, dict) else TensorMap(source),
            "wanted": self.data.ledger,
            "program": self.kept,
        }
        return NameMapStrategy().map(MapRequest(**{**request, **changes}))

    def weights(self) -> dict[str, torch.Tensor]:
        """New weights: another value for every parameter and buffer."""
        torch.manual_seed(1)
        return {
            name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
        }

    def served(self, slot: str) -> torch.Tensor:
        """The value of a slot that has to be served."""
        answer = self.ask(self.weights())
        assert ("e", slot) in answer.values, answer.declined
        return answer.values["e", slot].load()

    def reason(self, slot: str) -> str:
        """Why a slot is not served, which it must not be."""
        answer = self.ask(self.weights())
        assert ("e", slot) not in answer.values
        return answer.declined["e", slot]


def case(
    model: torch.nn.Module,
    x: torch.Tensor,
    slots: Mapping[str, tuple[int, ...]],
    name_map: Mapping[str, Any],
    dtype: str = "float32",
) -> Case:
    made = [
        Slot(engine="e", name=name, dtype=dtype, shape=shape, count=torch.Size(shape).numel())
        for name, shape in slots.items()
    ]
    return Case(model, x, made, {"e": {**name_map, "constant_mapping": {}}})


def conv_case(entry: Any = "c.weight", dtype: Any = F32, **options: Any) -> Case:
    model = Model(lambda m, x: m.c(x), c=torch.nn.Conv2d(2, 3, 3, **options))
    return case(model, IMAGE, {KERNEL: (3, 2, 3, 3)}, {KERNEL: [entry, dtype]})


def linear(name: str, operand: str = "weight", number: str = "") -> str:
    return f"{name}/linear{number}_{operand} CONSTANT"


# -- what is served -----------------------------------------------------------------------------


def test_it_is_a_strategy_between_recipe_and_rebuild() -> None:
    strategy = NameMapStrategy()
    assert isinstance(strategy, MappingStrategy)
    assert (strategy.name, strategy.priority) == ("name-map", 50)
    assert isinstance(Engine(None), HasNameMap)


def test_a_parameter_that_the_program_passes_on_as_it_is() -> None:
    found = conv_case()
    weights = found.weights()
    value = found.ask(weights).values["e", KERNEL]
    assert value.load().data_ptr() == weights["c.weight"].data_ptr()
    assert (value.strategy, value.sources, value.identity) == ("name-map", ("c.weight",), True)


def test_the_program_of_the_source_serves_where_none_was_kept() -> None:
    found = conv_case()
    answer = found.ask(ProgramWeights(found.program), program=None)
    assert torch.equal(answer.values["e", KERNEL].load(), found.model.state_dict()["c.weight"])


def test_the_shape_is_the_slots() -> None:
    model = Model(lambda m, x: m.c(x), c=torch.nn.Conv1d(2, 3, 3))
    found = case(model, torch.ones(1, 2, 6), {KERNEL: (3, 2, 3, 1)}, {KERNEL: ["c.weight", F32]})
    assert found.served(KERNEL).shape == (3, 2, 3, 1)


@pytest.mark.parametrize("kind", [list, tuple])
def test_maps_that_were_read_without_torch_have_text_for_dtypes(kind: Any) -> None:
    found = conv_case()
    found.maps["e"][KERNEL] = kind(("c.weight", "torch.float32"))
    assert torch.equal(found.served(KERNEL), found.weights()["c.weight"])


def test_two_operands_of_one_module_are_told_apart_by_their_sizes() -> None:
    """swin_t: the attention calls its projections' weights itself."""

    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        qkv = torch.nn.functional.linear(x, m.a.qkv.weight)
        return torch.nn.functional.linear(qkv[:, :4], m.a.proj.weight)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(4, 12, bias=False)
            self.proj = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(SimpleNamespace(a=self), x)

    model = Model(lambda m, x: m.a(x), a=Attention())
    slots = {linear("a"): (12, 4), linear("a", number="_1"): (4, 4)}
    entries = {linear("a"): ["a.qkv.weight", F32], linear("a", number="_1"): ["a.proj.weight", F32]}
    found = case(model, torch.ones(1, 4), slots, entries)
    assert torch.equal(found.served(linear("a", number="_1")), found.weights()["a.proj.weight"])


def test_engines_hand_on_the_map_of_their_handle() -> None:
    engine, handle = engine_of("e", values_of("e", 0))
    handle.weight_name_map = {KERNEL: ["c.weight", F32]}
    assert isinstance(engine, HasNameMap)
    assert engine.name_map is handle.weight_name_map


def test_the_backend_offers_it_before_rebuild() -> None:
    assert [one.name for one in refitkit_mapping_strategies()] == ["name-map", "rebuild"]


# -- the faults of the map ----------------------------------------------------------------------


def test_fault_1_values_within_a_hundredth_are_not_equal() -> None:
    """A weight that is standardized by the program was near enough when it was compiled."""

    class Standardized(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return torch.nn.functional.conv2d(x, weight)

    model = Model(lambda m, x: m.c(x), c=Standardized(2, 3, 3, bias=False))
    found = case(model, IMAGE, {KERNEL: (3, 2, 3, 3)}, {KERNEL: ["c.weight", F32]})
    assert "is computed; it is not a parameter or buffer" in found.reason(KERNEL)


def test_fault_2_the_first_equal_tensor_is_not_the_right_one() -> None:
    """gpt2: a bias of zeros was taken for the first bias of zeros that came along."""
    model = Model(lambda m, x: m.n(m.l(x)), l=torch.nn.Linear(4, 4), n=torch.nn.LayerNorm(4))
    entry = {linear("l", "bias"): ["n.bias", F32]}
    found = case(model, torch.ones(1, 4), {linear("l", "bias"): (4,)}, entry)
    reason = found.reason(linear("l", "bias"))
    assert reason == "the cached map says 'n.bias', the program 'l.bias'"


def test_fault_3_the_second_name_of_a_tied_weight() -> None:
    """Two modules, one weight: the entry of the second is empty, or has the first one's name."""
    shared = torch.nn.Linear(4, 4, bias=False)
    other = torch.nn.Linear(4, 4, bias=False)
    other.weight = shared.weight
    model = Model(lambda m, x: m.b(m.a(x)), a=shared, b=other)
    slots = {linear("a"): (4, 4), linear("b", number="_1"): (4, 4)}
    found = case(model, torch.ones(1, 4), slots, {linear("a"): ["a.weight", F32]})
    assert found.data.ties == (("a.weight", "b.weight"),)
    new = torch.rand(4, 4)
    for claim in ("a.weight", "b.weight"):
        found.maps["e"][linear("b", number="_1")] = [claim, F32]
        answer = found.ask({"a.weight": new, "b.weight": new})
        assert [torch.equal(value.load(), new) for value in answer.values.values()] == [True, True]
    found.maps["e"][linear("b", number="_1")] = ["", F32]
    assert "found no source" in found.reason(linear("b", number="_1"))
    for name in ("a.weight", "b.weight"):
        assert found.ask({name: new}).values["e", linear("a")].sources == (name,)


def test_fault_4_a_matrix_that_is_near_its_own_transpose() -> None:
    """A linear layer of zeros, decomposed to ``addmm`` with the transposed weight."""
    model = Model(lambda m, x: m.l(x), l=torch.nn.Linear(4, 4))
    torch.nn.init.zeros_(model.get_parameter("l.weight"))
    slot = "l/addmm_mm_other CONSTANT"
    found = case(model, torch.ones(1, 4), {slot: (4, 4)}, {slot: ["l.weight", F32]})
    assert "the program has no operand of 16 elements of float32" in found.reason(slot)


def test_addmm_takes_its_operands_as_they_are() -> None:
    """GPT2's Conv1D."""

    class Conv1D(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(4, 3))
            self.bias = torch.nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    slots = {"c/addmm_1_mm_other CONSTANT": (4, 3), "c/addmm_1_constant_0 CONSTANT": (3,)}
    entries = dict(zip(slots, (["c.weight", F32], ["c.bias", F32]), strict=True))
    found = case(Model(lambda m, x: m.c(x), c=Conv1D()), torch.ones(2, 4), slots, entries)
    for slot, (fqn, _) in entries.items():
        assert torch.equal(found.served(slot), found.weights()[str(fqn)])


@pytest.mark.parametrize(("engine", "cached"), [("float16", F32), ("float32", torch.float16)])
def test_fault_5_a_cast_on_the_way_is_never_made_up(engine: str, cached: Any) -> None:
    model = Model(lambda m, x: m.c(x), c=torch.nn.Conv2d(2, 3, 3, bias=False))
    found = case(model, IMAGE, {KERNEL: (3, 2, 3, 3)}, {KERNEL: ["c.weight", cached]}, engine)
    assert "float16" in found.reason(KERNEL)


def test_fault_6_constants_whose_old_value_is_cached_are_not_sources() -> None:
    found = conv_case()
    found.maps["e"].pop(KERNEL)
    assert found.reason(KERNEL) == "the cached map has no entry for it"
    found.maps["e"]["constant_mapping"][KERNEL] = torch.ones(1)
    assert "has its old value" in found.reason(KERNEL)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.25])
def test_fault_7_a_folded_batch_norm_has_its_own_eps(eps: float) -> None:
    model = Model(lambda m, x: m.b(x), b=torch.nn.BatchNorm2d(2, eps=eps))
    entries = {SCALE: [FOUR, F32], SHIFT: [FOUR, F32]}
    found = case(model, IMAGE, {SCALE: (2,), SHIFT: (2,)}, entries)
    new = {name.removeprefix("b."): value for name, value in found.weights().items()}
    scale = new["weight"] / torch.sqrt(new["running_var"] + eps)
    assert torch.equal(found.served(SCALE), scale)
    assert torch.equal(found.served(SHIFT), new["bias"] - new["running_mean"] * scale)
    value = found.ask(found.weights()).values["e", SCALE]
    assert value.sources == tuple(FOUR)
    assert not value.identity


@pytest.mark.parametrize("role", ["weight", "bias", "running_mean", "running_var"])
def test_2_11_has_the_four_operands_of_a_batch_norm_as_they_are(role: str) -> None:
    model = Model(lambda m, x: m.b(x), b=torch.nn.BatchNorm2d(2))
    slots = {f"b/{_BN}_7_{name.removeprefix('b.')} CONSTANT": (2,) for name in FOUR}
    entries = {slot: [name, F32] for slot, name in zip(slots, FOUR, strict=True)}
    found = case(model, IMAGE, slots, entries)
    assert torch.equal(found.served(f"b/{_BN}_7_{role} CONSTANT"), found.weights()[f"b.{role}"])


def test_fault_8_a_batch_norm_without_weight_and_bias() -> None:
    model = Model(lambda m, x: m.b(x), b=torch.nn.BatchNorm2d(2, affine=False))
    entries = {SCALE: [FOUR, F32], SHIFT: [FOUR, F32]}
    found = case(model, IMAGE, {SCALE: (2,), SHIFT: (2,)}, entries)
    new = found.weights()
    scale = torch.ones(2) / torch.sqrt(new["b.running_var"] + 1e-5)
    assert torch.equal(found.served(SCALE), scale)
    assert torch.equal(found.served(SHIFT), torch.zeros(2) - new["b.running_mean"] * scale)


def test_a_batch_norm_entry_of_another_layer_is_refused() -> None:
    model = Model(lambda m, x: m.b(x), b=torch.nn.BatchNorm2d(2))
    wrong = [name.replace("b.running_var", "d.running_var") for name in FOUR]
    found = case(model, IMAGE, {SCALE: (2,)}, {SCALE: [wrong, F32]})
    assert "the program 'b.running_var'" in found.reason(SCALE)


def test_fault_15_reading_takes_nothing_out_of_the_map() -> None:
    found = conv_case()
    before = copy.deepcopy(dict(found.maps["e"]))
    first, second = (found.ask(found.weights()).values.keys() for _ in range(2))
    assert first == second == {("e", KERNEL)}
    assert found.maps["e"] == before


def test_fault_16_an_engine_without_a_map_has_no_say_in_the_others() -> None:
    model = Model(lambda m, x: m.c(x), c=torch.nn.Conv2d(2, 3, 3))
    kernel = Slot(engine="z", name=KERNEL, dtype="float32", shape=(3, 2, 3, 3), count=54)
    bias = Slot(engine="e", name=BIAS, dtype="float32", shape=(3,), count=3)
    found = Case(model, IMAGE, [bias, kernel], {"e": None, "z": {KERNEL: ["c.weight", F32]}})
    answer = found.ask(found.weights())
    assert answer.values.keys() == {("z", KERNEL)}
    assert "has no cached map" in answer.declined["e", BIAS]


# -- what else must not be served ---------------------------------------------------------------


def test_without_a_program_nothing_is_proved() -> None:
    found = conv_case()
    answer = found.ask(found.weights(), program=None)
    assert not answer.values
    assert "there is no program" in answer.declined["e", KERNEL]


def test_another_program_proves_nothing() -> None:
    found = conv_case()
    other = conv_case(padding=1)
    answer = found.ask(ProgramWeights(other.program), program=None)
    assert "the program is not the compiled one" in answer.declined["e", KERNEL]


def test_a_kept_program_that_cannot_be_read_is_said_so() -> None:
    found = conv_case()
    broken = KeptProgram(b"{}", found.data.leaves, ())
    assert "cannot be read" in found.ask({}, program=broken).declined["e", KERNEL]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("", "found no source"),
        ("_frozen_param0", "the program 'c.weight'"),
        (("c.weight", 3, 0), "slice of a buffer"),
        ([3], "damaged"),
        (None, "damaged"),
    ],
)
def test_entries_that_say_nothing_of_use(entry: Any, said: str) -> None:
    assert said in conv_case(entry).reason(KERNEL)


@pytest.mark.parametrize("entry", [None, "c.weight", [], ["c.weight"], [1, 2, 3]])
def test_damaged_entries(entry: Any) -> None:
    found = conv_case()
    found.maps["e"][KERNEL] = entry
    assert found.reason(KERNEL) == "its entry in the cached map is damaged"


def test_two_candidates_of_one_size_are_not_guessed_between() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.rand(4, 4))
            self.b = torch.nn.Parameter(torch.rand(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)

    model = Model(lambda m, x: m.t(x), t=Twice())
    found = case(model, torch.ones(1, 4), {linear("t"): (4, 4)}, {linear("t"): ["t.a", F32]})
    assert "2 candidates" in found.reason(linear("t"))


def test_one_module_called_twice_has_one_weight() -> None:
    model = Model(lambda m, x: m.l(m.l(x)), l=torch.nn.Linear(4, 4))
    slots = {linear("l", number=number): (4, 4) for number in ("", "_1")}
    found = case(model, torch.ones(1, 4), slots, {name: ["l.weight", F32] for name in slots})
    for name in slots:
        assert torch.equal(found.served(name), found.weights()["l.weight"])


def test_two_slots_of_one_name_and_size_are_not_guessed_between() -> None:
    model = Model(lambda m, x: m.l(x), l=torch.nn.Linear(4, 4))
    slots = {linear("l"): (4, 4), linear("l", number="_1"): (4, 4)}
    found = case(model, torch.ones(1, 4), slots, {name: ["l.weight", F32] for name in slots})
    assert "2 slots" in found.reason(linear("l"))


def test_a_name_that_could_be_that_of_a_module_inside() -> None:
    class Outer(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.inner(x))

    model = Model(lambda m, x: m.o(x), o=Outer())
    found = case(model, torch.ones(1, 4), {linear("o"): (4, 4)}, {linear("o"): ["o.weight", F32]})
    assert "inner modules also have candidates" in found.reason(linear("o"))


def test_transposed_convolutions_are_not_served() -> None:
    model = Model(lambda m, x: m.c(x), c=torch.nn.ConvTranspose2d(3, 3, 3, bias=False))
    entry = {KERNEL: ["c.weight", F32]}
    found = case(model, torch.ones(1, 3, 6, 6), {KERNEL: (3, 3, 3, 3)}, entry)
    assert "computed" in found.reason(KERNEL)


def test_a_buffer_that_the_program_changes_is_not_served() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.rand(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.linear(x, self.w)
            self.w.add_(1.0)
            return y

    model = Model(lambda m, x: m.k(x), k=Counting())
    found = case(model, torch.ones(1, 4), {linear("k"): (4, 4)}, {linear("k"): ["k.w", F32]})
    assert found.reason(linear("k")) == "the program changes 'k.w'"


def test_statistics_of_another_dtype_than_weight_and_bias() -> None:
    norm = torch.nn.BatchNorm2d(2)
    norm.weight.data, norm.bias.data = norm.weight.data.half(), norm.bias.data.half()
    model = Model(lambda m, x: m.b(x), b=norm)
    found = case(model, IMAGE.half(), {SCALE: (2,)}, {SCALE: [FOUR, F32]})
    assert found.reason(SCALE) == "'b.weight' is float16[2], unlike the slot"


def test_a_plan_without_the_leaf() -> None:
    found = conv_case()
    leaves = tuple(leaf for leaf in found.data.leaves if leaf.fqn != "c.weight")
    plan = RefitPlan(found.data.model_copy(update={"leaves": leaves}), {})
    answer = found.ask(ProgramWeights(found.program), plan=plan, program=None)
    assert answer.declined["e", KERNEL] == "the plan does not contain 'c.weight'"


def test_programs_with_inner_graphs_are_not_followed() -> None:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return m.c(x) + 1

    model = Model(call, c=torch.nn.Conv2d(2, 3, 3))
    found = case(model, IMAGE, {KERNEL: (3, 2, 3, 3)}, {KERNEL: ["c.weight", F32]})
    assert "subgraphs" in found.reason(KERNEL)


@pytest.mark.parametrize(
    "slot",
    [
        "c/add_rhs CONSTANT",
        "c.weight",
        "[DECONVOLUTION]-[aten_ops.convolution.default]-[c/convolution] KERNEL",
        KERNEL.replace("convolution]", "convolution_depthwise]"),
        KERNEL + " KERNEL",
        "linear_weight CONSTANT",
    ],
)
def test_names_of_no_known_form(slot: str) -> None:
    model = Model(lambda m, x: m.c(x), c=torch.nn.Conv2d(2, 3, 3))
    found = case(model, IMAGE, {slot: (3, 2, 3, 3)}, {slot: ["c.weight", F32]})
    assert "has no form" in found.reason(slot)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "the source has no 'c.weight'"),
        ({"c.weight": torch.ones(2, 3, 3, 3)}, "is float32[2, 3, 3, 3], not float32[3, 2, 3, 3]"),
        ({"c.weight": torch.ones(3, 2, 3, 3, dtype=torch.float16)}, "is float16[3, 2, 3, 3]"),
        ({"c.weight": torch.ones(3, 2, 3, 3).to_sparse()}, "layout sparse"),
    ],
)
def test_sources_that_do_not_fit(weights: dict[str, torch.Tensor], said: str) -> None:
    assert said in conv_case().ask(weights).declined["e", KERNEL]
