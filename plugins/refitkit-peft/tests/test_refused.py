"""Refused adapters: a typed error lists all problems, and the module keeps its weights."""

from __future__ import annotations

import json
import pickle

import pytest
import refitkit
import torch
from peft_models import make_adapter, make_net, same, slots_of
from refitkit.errors import ConfigError, SourceError, WeightMismatchError
from safetensors.torch import load_file, save_file

import refitkit_peft
from refitkit_peft import Lora

pytest.importorskip("peft")

MODULES = ["lin", "two", "emb"]


class Small(torch.nn.Module):
    """Two layers that compile quickly, and one that the program does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(12, 20)
        self.two = torch.nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def compiled(model):
    return refitkit.compile(torch.export.export(model, (torch.ones(2, 12),)), prove=False)


@pytest.fixture
def made(model, tmp_path):
    return make_adapter(model, tmp_path / "a", target_modules=["one", "two"])


class Folder:
    """The folder of an adapter, whose files tests damage."""

    def __init__(self, path):
        self.path = path
        self.file, self.config = path / "adapter_model.safetensors", path / "adapter_config.json"

    def set(self, **fields):
        self.config.write_text(json.dumps({**json.loads(self.config.read_text()), **fields}))

    def tensors(self):
        return load_file(self.file)

    def write(self, tensors):
        save_file({name: value.contiguous() for name, value in tensors.items()}, self.file)

    def change(self, key, change):
        tensors = self.tensors()
        name = f"base_model.model.{key}"
        tensors[name] = change(tensors[name])
        self.write(tensors)


@pytest.fixture
def folder(made):
    return Folder(made.path)


@pytest.fixture
def refuses(compiled, model):
    """Expect a refit to raise an error of a type and to change nothing; returns the error."""

    def check(kind, adapters, base=None, **how):
        slots = slots_of(compiled)
        answer = compiled(torch.ones(2, 12))
        weights = Lora(model if base is None else base, adapters, **how)
        with pytest.raises(kind) as caught:
            refitkit.refit(compiled, weights)
        assert type(caught.value) is kind
        assert same(slots_of(compiled), slots)
        assert torch.equal(compiled(torch.ones(2, 12)), answer)
        return caught.value

    return check


def kinds(error):
    return sorted((p.subject.rpartition(": ")[2], p.kind) for p in error.problems)


def test_an_adapter_for_another_model(refuses, tmp_path):
    other = make_adapter(make_net(), tmp_path / "b", target_modules=["lin", "two", "head"])
    error = refuses(WeightMismatchError, {str(other.path): 1.0})
    assert kinds(error) == [
        ("head", "unknown module"),
        ("lin", "unknown module"),
        ("two.weight", "shape"),
    ]


def test_modules_of_the_same_names_and_other_shapes(refuses, tmp_path):
    torch.manual_seed(0)
    other = torch.nn.ModuleDict({"one": torch.nn.Linear(12, 21), "two": torch.nn.Linear(4, 20)})
    made = make_adapter(other, tmp_path / "b", target_modules=["one", "two"])
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    assert kinds(error) == [("one.weight", "shape"), ("two.weight", "shape")]
    hints = {p.found: p.hint for p in error.problems}
    assert "another model" in hints["factors for (21, 12)"]
    assert "fan_in_fan_out" in hints["factors for (20, 4)"]


def test_ranks_that_do_not_fit(refuses, folder, made):
    folder.change("one.lora_A.weight", lambda value: value[:3])  # lora_B has another rank
    tensors = folder.tensors()
    for side, dim in (("A", 0), ("B", 1)):  # equal in both, but not as the config says
        name = f"base_model.model.two.lora_{side}.weight"
        tensors[name] = tensors[name].narrow(dim, 0, 2)
    folder.write(tensors)
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    found = {p.subject.rpartition(": ")[2]: (p.kind, p.found, p.wanted) for p in error.problems}
    assert found["base_model.model.one.lora_A.weight"] == (
        "rank",
        "(3, 12) and (20, 4)",
        "(rank, inputs, ...) and (outputs, rank, ...)",
    )
    assert found["base_model.model.two.lora_A.weight"] == ("rank", "2", "4, as the config says")


def test_numbers_that_are_not_finite_are_told_with_all_else(refuses, folder, made):
    def spoil(value):
        value[0, 1], value[1, 0] = float("nan"), float("inf")
        return value

    folder.change("one.lora_A.weight", spoil)
    folder.change("two.lora_B.weight", lambda value: value[:3])
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    assert kinds(error) == [
        ("base_model.model.one.lora_A.weight", "non-finite"),
        ("two.weight", "shape"),
    ]
    assert "2 of 48 elements, the first at (0, 1)" in str(error)


def test_an_alpha_that_is_nowhere(refuses, compiled, model, folder, made, tmp_path):
    lone, slots = str(tmp_path / "lone.safetensors"), {}
    save_file(folder.tensors(), lone)
    error = refuses(WeightMismatchError, {lone: 1.0, str(made.path): 0.5})
    assert kinds(error) == [("one", "alpha unknown"), ("two", "alpha unknown")]
    assert f"alphas={{{lone!r}: 16}}" in error.hint
    refuses(WeightMismatchError, {str(made.path): 1.0, lone: -2.0}, alphas={str(made.path): 3})
    base = refitkit_peft.Base(model, "host")
    for name, alphas in ((lone, {lone: 6}), (str(made.path), {}), (lone, {lone: 12})):
        refitkit.refit(compiled, Lora(base, {name: -0.5}, alphas=alphas), delta=True)
        slots[name, alphas.get(lone)] = slots_of(compiled)
    assert same(slots[lone, 6], slots[str(made.path), None])
    assert not same(slots[lone, 6], slots[lone, 12])
    refitkit.refit(compiled, base, delta=True)
    assert torch.equal(slots_of(compiled)["model one.weight"], model.one.weight)


def test_weights_that_no_product_can_be_added_to(refuses, model, made):
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    base["one.weight"] = base["one.weight"].to(torch.int8)
    base["two.weight"] = base["two.weight"].to_sparse()
    error = refuses(WeightMismatchError, {str(made.path): 1.0}, base)
    assert kinds(error) == [("one.weight", "dtype"), ("two.weight", "unusable")]


def test_a_base_that_is_not_the_modules_own_is_told_by_the_refit(refuses, model, made):
    base = {name: value for name, value in model.state_dict().items() if name != "two.bias"}
    error = refuses(WeightMismatchError, {str(made.path): 1.0}, base)
    assert kinds(error) == [("two.bias", "missing")]


def test_a_sum_that_is_too_large_is_told_by_the_refit(refuses, made):
    error = refuses(WeightMismatchError, {str(made.path): 3e38})
    assert kinds(error) == [("one.weight", "non-finite"), ("two.weight", "non-finite")]


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


@pytest.mark.parametrize(
    "content", [{"a": Evil()}, Evil(), ["no", "mapping"], {"a.lora_A.weight": 5}]
)
def test_a_pickle_of_something_else(content, refuses, folder, made):
    folder.file.unlink()
    torch.save(content, made.path / "adapter_model.bin")
    refuses(SourceError, {str(made.path): 1.0})


def test_a_bare_pickle(refuses, folder, made):
    folder.file.unlink()
    (made.path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    refuses(SourceError, {str(made.path): 1.0})


def test_a_pickle_of_tensors_is_read(compiled, model, folder, made):
    refitkit.refit(compiled, Lora(model, {str(made.path): 1.0}))
    slots = slots_of(compiled)
    torch.save(folder.tensors(), made.path / "adapter_model.bin")
    folder.file.unlink()
    refitkit.refit(compiled, model)
    refitkit.refit(compiled, Lora(model, {str(made.path): 1.0}))
    assert same(slots_of(compiled), slots)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(size, refuses, folder, made):
    content = folder.file.read_bytes()
    folder.file.write_bytes(content[:size])
    refuses(SourceError, {str(made.path): 1.0})


def test_a_header_that_promises_more_than_there_is(refuses, folder, made):
    header = {"base_model.model.one.lora_A.weight": {"dtype": "F32", "shape": [1 << 40, 12]}}
    header["base_model.model.one.lora_A.weight"]["data_offsets"] = [0, (1 << 40) * 48]
    text = json.dumps(header).encode()
    folder.file.write_bytes(len(text).to_bytes(8, "little") + text)
    refuses(SourceError, {str(made.path): 1.0})


@pytest.mark.parametrize("lacking", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_without_a_file(lacking, refuses, made):
    (made.path / lacking).unlink()
    error = refuses(SourceError, {str(made.path): 1.0})
    assert kinds(error) == [(lacking, "missing")]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"r": 0}', '{"r": "many"}', '{"lora_alpha": NaN}', "{"]
)
def test_a_config_that_is_none(text, refuses, folder, made):
    folder.config.write_text(text)
    assert refuses(SourceError, {str(made.path): 1.0}).problems


UNMERGEABLE = {
    "ia3": ({"peft_type": "IA3"}, "peft_type"),
    "vera": ({"peft_type": "VERA"}, "peft_type"),
    "loha": ({"peft_type": "LOHA"}, "peft_type"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["a.b"]}, "target_parameters"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "unknown": ({"use_brand_new": True}, "use_brand_new"),
    "pattern": ({"rank_pattern": {"(a+)+": 2}}, "(a+)+"),
    "pattern-2": ({"alpha_pattern": {"(": 2}}, "("),
}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_adapters_that_no_weights_can_hold(case, refuses, folder, made):
    fields, subject = UNMERGEABLE[case]
    folder.set(**fields)
    error = refuses(SourceError, {str(made.path): 1.0})
    assert [problem.subject for problem in error.problems] == [subject]


def test_harmless_initializations_pass(compiled, model, folder, made):
    for init in (True, False, "gaussian", "eva", "orthogonal", "mica", None):
        folder.set(init_lora_weights=init)
        refitkit.refit(compiled, Lora(model, {str(made.path): 1.0}))


def test_a_pattern_cannot_take_long(compiled, model, folder, made):
    folder.set(rank_pattern={"(x|xx).*y": 2, ".*.*.*z": 3})
    refitkit.refit(compiled, Lora(model, {str(made.path): 1.0}))  # before the time limit


@pytest.mark.parametrize(
    "key", ["a.hada_w1_a", "base_model.model.one.lora_E", "lora_unet_a.lora_mid.weight", "x.diff_b"]
)
def test_entries_of_other_kinds_of_adapters(key, refuses, folder, made):
    folder.write({**folder.tensors(), key: torch.ones(2, 2)})
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    assert kinds(error) == [(key, "cannot be merged")]


def test_one_weight_by_two_names():
    base = {"a.b.weight": torch.zeros(3, 3)}
    names = {"a.b.lora_A": (2, 3), "a.b.lora_B": (3, 2)}
    names |= {"lora_unet_a_b.lora_down": (2, 3), "lora_unet_a_b.lora_up": (3, 2)}
    adapters = refitkit_peft.Base(base)
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in names.items()}
    adapters.add("a", tensors, alpha="rank")
    with pytest.raises(WeightMismatchError) as caught:
        refitkit.Pipeline().open_weights(Lora(adapters, {"a": 1.0}))
    assert kinds(caught.value) == [("a.b.weight", "given twice")]


def test_parts_without_their_others(refuses, folder, made):
    tensors = folder.tensors()
    del tensors["base_model.model.one.lora_B.weight"]
    tensors["base_model.model.two.lora_A.weight"] = tensors[
        "base_model.model.two.lora_A.weight"
    ].int()
    tensors["base_model.model.x.lora_magnitude_vector"] = torch.ones(3)
    folder.write(tensors)
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    assert {(s, k) for s, k in kinds(error) if k != "unknown module"} == {
        ("base_model.model.one.lora_A.weight", "incomplete"),
        ("base_model.model.two.lora_A.weight", "dtype"),
        ("base_model.model.x.lora_magnitude_vector", "incomplete"),
    }


def test_dora_without_magnitudes(refuses, folder, made):
    folder.set(use_dora=True)
    error = refuses(WeightMismatchError, {str(made.path): 1.0})
    assert kinds(error) == [("one.weight", "missing"), ("two.weight", "missing")]


def test_a_bias_for_a_layer_without_one(net, tmp_path, refuses):
    torch.manual_seed(0)
    given = torch.nn.ModuleDict({"one": torch.nn.Linear(12, 20), "two": torch.nn.Linear(20, 4)})
    made = make_adapter(given, tmp_path / "b", target_modules=["one"], lora_bias=True)
    base = {name: value for name, value in given.state_dict().items() if name != "one.bias"}
    error = refuses(WeightMismatchError, {str(made.path): 1.0}, base)
    assert kinds(error) == [("base_model.model.one.lora_B.bias", "unexpected")]


def test_convolutions_with_groups(tmp_path):
    torch.manual_seed(0)
    grouped = torch.nn.ModuleDict({"c": torch.nn.Conv2d(8, 8, 3, groups=4)})
    made = make_adapter(grouped, tmp_path / "b", target_modules=["c"])
    with pytest.raises(WeightMismatchError, match="of a convolution with groups") as caught:
        refitkit.Pipeline().open_weights(Lora(grouped, {str(made.path): 1.0}))
    assert [kind for _, kind in kinds(caught.value)] == ["rank"]


def test_everything_of_several_adapters_at_once(refuses, model, tmp_path, made):
    other = make_adapter(make_net(), tmp_path / "b", target_modules=["lin"])
    broken = make_adapter(model, tmp_path / "c", target_modules=["one"])
    Folder(broken.path).set(peft_type="IA3")
    scales = {str(one.path): 1.0 for one in (other, broken, made)}
    error = refuses(SourceError, {**scales, "nowhere": 1.0})
    told = str(error)
    for part in ("lin: unknown module", "peft_type: cannot be merged", "'nowhere'"):
        assert part in told


def test_several_adapters_in_one_file(refuses, folder, made):
    tensors = folder.tensors()
    folder.write(
        {
            key.replace("lora_A", f"lora_A.{name}").replace(
                "lora_B", f"lora_B.{name}"
            ): value.clone()
            for name in ("x", "y")
            for key, value in tensors.items()
        }
    )
    error = refuses(SourceError, {str(made.path): 1.0})
    assert kinds(error) == [("x", "adapter"), ("y", "adapter")]


def test_combinations_that_are_no_sums(refuses, model, tmp_path):
    def one(name, **config):
        return str(make_adapter(model, tmp_path / name, **config).path)

    plain, dora = one("p", target_modules=["one"]), one("d", target_modules=["one"], use_dora=True)
    whole = one("w", target_modules=["one"], modules_to_save=["two"])
    other = one("o", target_modules=["one"], modules_to_save=["two"])
    refuses(WeightMismatchError, {plain: 1.0, dora: 1.0})
    refuses(WeightMismatchError, {dora: 0.0})
    assert kinds(refuses(WeightMismatchError, {whole: 0.5})) == [
        ("two.bias", "scale"),
        ("two.weight", "scale"),
    ]
    assert {kind for _, kind in kinds(refuses(WeightMismatchError, {whole: 1.0, other: 1.0}))} == {
        "several adapters"
    }
    on_two = one("t", target_modules=["two"])
    assert kinds(refuses(WeightMismatchError, {whole: 1.0, on_two: 1.0})) == [
        ("two.weight", "several adapters")
    ]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1", None])
def test_scales_that_are_no_numbers(scale, model):
    with pytest.raises(ConfigError, match="a: scale"):
        Lora(model, {"a": scale})


@pytest.mark.parametrize("adapters", [["a"], "a", {5: 1.0}])
def test_adapters_that_are_no_mapping(adapters, model):
    with pytest.raises(ConfigError):
        Lora(model, adapters)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "cloud"},
        {"keep": -1},
        {"keep": True},
        {"memory": "device", "device": "meta"},
        {"memory": "device", "device": "nonsense"},
    ],
)
def test_settings_of_a_base_that_cannot_be_meant(settings, model):
    with pytest.raises(ConfigError):
        refitkit_peft.Base(model, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("memory", ["pinned", "device"])
def test_memory_that_is_not_there(memory, model):
    with pytest.raises(ConfigError, match="no CUDA here"):
        refitkit_peft.Base(model, memory)
