"""Alpha and rank: found where trainers write them, never assumed, contradictions refused."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from peft_models import assert_close, make_adapter, open_weights, same, weights_of
from refitkit.errors import ConfigError, SourceError, WeightMismatchError
from safetensors.torch import load_file, save_file

from refitkit_peft import Base, Lora
from refitkit_peft.declarations import declarations_in

pytest.importorskip("peft")

MODULES = ["lin", "two", "small"]
PEFT = "base_model.model."


@pytest.fixture(scope="module")
def made(net, tmp_path_factory):
    """An adapter of rank 4 and alpha 6."""
    return make_adapter(net, tmp_path_factory.mktemp("alpha") / "a", target_modules=MODULES)


def tensors_of(made, prefix="", down="lora_A", up="lora_B"):
    """The tensors that peft saved, under keys of another form."""
    found = load_file(made.path / "adapter_model.safetensors")
    names = {key: key.removeprefix(PEFT) for key in found}
    return {
        prefix + name.replace("lora_A", down).replace("lora_B", up): found[key]
        for key, name in names.items()
    }


def kohya_of(made, alpha=None):
    """The same tensors under kohya's keys."""
    found = {}
    for key, value in tensors_of(made, "lora_unet_", "lora_down", "lora_up").items():
        module, _, rest = key.partition(".lora_")
        module = module.replace(".", "_")
        found[f"{module}.lora_{rest}"] = value
        if alpha is not None:
            found[f"{module}.alpha"] = alpha.clone()
    return found


def saved(path, tensors, metadata=None):
    file = path / "lora.safetensors"
    save_file(tensors, file, metadata)
    return str(file)


def check(net, file, merged, scale=1.0, **how):
    found = weights_of(open_weights(Lora(net, {file: scale}, **how)))
    for name, value in merged.items():
        assert_close(found[name], value, name)


def refused(net, file, kind=WeightMismatchError, **how):
    with pytest.raises(kind) as caught:
        open_weights(Lora(net, {file: 1.0}, **how))
    return caught.value


def kinds(error):
    return {(p.subject.rpartition(": ")[2], p.kind) for p in error.problems}


def packed(**fields):
    return {"lora_adapter_metadata": json.dumps(fields)}


# -- where it is ----------------------------------------------------------------------------

HEADERS = {
    "diffusers": ("", packed(r=4, lora_alpha=6)),
    "diffusers, by component": ("unet.", packed(**{"unet.r": 4, "unet.lora_alpha": 6})),
    "diffusers, of two components": (
        "transformer.",
        packed(
            **{"transformer.r": 4, "transformer.lora_alpha": 6},
            **{"text_encoder.r": 2, "text_encoder.lora_alpha": 9},
        ),
    ),
    "names of ComfyUI, header of diffusers": (
        "diffusion_model.",
        packed(**{"transformer.r": 4, "transformer.lora_alpha": 6, "text_encoder.lora_alpha": 9}),
    ),
    "SimpleTuner": ("transformer.", {"transformer.lora_alpha": "6", "transformer.r": "4"}),
    "SimpleTuner, no prefix": (
        "",
        {"lora_alpha": "6", "r": "4", "use_rslora": "False", "alpha_pattern": "{}", "bias": "none"},
    ),
    "no prefix in the keys": ("", {"transformer.lora_alpha": "6.0", "transformer.r": "4"}),
    "lora_alpha": ("", {"lora_alpha": "6"}),
    "alpha and rank": (PEFT, {"alpha": " 6 ", "rank": "4"}),
    "network_alpha": ("", {"network_alpha": "6.0", "network_dim": "4", "format": "pt"}),
    "lora_rank": ("", {"lora_alpha": "6", "lora_rank": "4"}),
    "kohya's": ("", {"ss_network_alpha": "6.0", "ss_network_dim": "4"}),
    "kohya's and others that agree": ("", {"ss_network_alpha": "6.0", "lora_alpha": "6"}),
    "a config as JSON": ("", {"lora_config": json.dumps({"r": 4, "lora_alpha": 6})}),
    "layer by layer": ("", {f"{module}.alpha": "6" for module in MODULES}),
    "but for one layer": (
        "",
        {"lora_alpha": "3", "two.alpha": "6", "lin.alpha": "6", "small.alpha": "6"},
    ),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_header_of_a_file_says_alpha(case, scale, net, made, tmp_path):
    prefix, metadata = HEADERS[case]
    file = saved(tmp_path, tensors_of(made, prefix), metadata)
    check(net, file, made.merged(scale), scale)


def test_kohyas_header_stands_in_for_the_tensors_of_its_file(net, made, tmp_path):
    metadata = {"ss_network_module": "networks.lora", "ss_network_args": "None"}
    metadata |= {"ss_network_alpha": "6.0", "ss_network_dim": "4"}
    check(net, saved(tmp_path, kohya_of(made), metadata), made.merged())


def test_kohyas_convolutions_have_numbers_of_their_own(net, tmp_path):
    """``conv_dim`` and ``conv_alpha`` apply to kernels larger than 1; ``small`` has none."""
    fields = {"rank_pattern": {"two": 3}, "alpha_pattern": {"two": 2}}
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, **fields)
    arguments = {"conv_dim": "3", "conv_alpha": "2.0"}
    metadata = {"ss_network_alpha": "6.0", "ss_network_dim": "4", "ss_network_module": "networks.x"}
    metadata["ss_network_args"] = json.dumps(arguments)
    check(net, saved(tmp_path, kohya_of(made), metadata), made.merged())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_tensors_say_alpha_in_every_dtype(dtype, net, made, tmp_path):
    metadata = {"ss_network_alpha": "6.0", "ss_network_dim": "4"}
    file = saved(tmp_path, kohya_of(made, torch.tensor(6, dtype=dtype)), metadata)
    check(net, file, made.merged())


def test_an_alpha_that_was_rounded_is_no_contradiction(net, tmp_path):
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, lora_alpha=0.3)
    rounded = torch.tensor(0.3, dtype=torch.bfloat16)
    file = saved(tmp_path, kohya_of(made, rounded), {"ss_network_alpha": "0.3"})
    found = weights_of(open_weights(Lora(net, {file: 1.0})))
    torch.testing.assert_close(found["lin.weight"], made.merged()["lin.weight"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_alpha": "1.0", "ss_network_dim": "None"},  # --dim_from_weights
        {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"},  # resize_lora.py
        {
            "ss_network_alpha": "0.0",
            "ss_network_dim": "4",
        },  # 0 means the rank
        {
            "ss_network_alpha": "1",
            "ss_network_dim": "8",
            "ss_network_args": json.dumps({"block_alphas": "6,6", "block_dims": "4,4"}),
        },
        {
            "ss_network_alpha": "12",
            "ss_network_dim": "4",
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": "lora", "rs_lora": "True"}),
        },
        {  # LyCORIS has another default for conv_alpha
            "ss_network_alpha": "12",
            "ss_network_dim": "4",
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"conv_dim": "4"}),
        },
    ],
)
def test_where_kohyas_header_leaves_it_to_the_tensors_they_decide(metadata, net, made, tmp_path):
    check(net, saved(tmp_path, kohya_of(made, torch.tensor(6.0)), metadata), made.merged())
    error = refused(net, saved(tmp_path, kohya_of(made), metadata))
    assert kinds(error) == {(name, "alpha unknown") for name in MODULES}


def test_settings_of_peft_are_read_from_headers_too(net, tmp_path):
    fields = {"rank_pattern": {"lin": 2}, "alpha_pattern": {"^two": 3}, "use_rslora": True}
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, **fields)
    config = {f"unet.{name}": value for name, value in {**fields, "r": 4, "lora_alpha": 6}.items()}
    tensors = tensors_of(made, "unet.")
    check(net, saved(tmp_path, tensors, packed(**config)), made.merged())
    # SimpleTuner writes some entries with str
    written = {name: str(value) for name, value in config.items()}
    written |= {"unet.peft_type": "PeftType.LORA", "unet.peft_version": "0.21"}
    check(net, saved(tmp_path, tensors, written), made.merged())


@pytest.mark.parametrize("name", ["use_rslora", "rslora", "rs_lora", "use_rs_lora"])
@pytest.mark.parametrize("written", ["true", "True", "in a config"])
def test_the_square_root_of_the_rank_has_several_names(name, written, net, tmp_path):
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, use_rslora=True)
    metadata = {"lora_alpha": "6", "r": "4", name: written}
    if written == "in a config":
        metadata = packed(r=4, lora_alpha=6, **{name: True})
    check(net, saved(tmp_path, tensors_of(made), metadata), made.merged())


def test_dropout_of_ranks_gives_no_layer_a_number_of_its_own(net, made, tmp_path):
    arguments = {"rank_dropout": "0.1", "module_dropout": "0.1", "rank_dropout_scale": "True"}
    metadata = {"ss_network_alpha": "6", "ss_network_dim": "4"}
    metadata["ss_network_args"] = json.dumps(arguments)
    check(net, saved(tmp_path, kohya_of(made), metadata), made.merged())


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_a_folder_of_diffusers_holds_one_file_and_no_config(kind, net, made, tmp_path):
    folder = tmp_path / "diffusers"
    folder.mkdir()
    tensors, file = tensors_of(made, "unet."), folder / f"pytorch_lora_weights{kind}"
    if kind == ".bin":
        torch.save({**tensors, "lora_alpha": 6}, file)
    else:
        save_file(tensors, file, packed(**{"unet.r": 4, "unet.lora_alpha": 6}))
    check(net, str(folder), made.merged())
    # a config beside it may belong to another file
    (folder / "adapter_config.json").write_text((made.path / "adapter_config.json").read_text())
    assert kinds(refused(net, str(folder), SourceError)) == {
        ("adapter_model.safetensors", "missing")
    }


def test_a_dora_has_its_alpha_in_the_header(net, tmp_path):
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, use_dora=True)
    check(net, saved(tmp_path, tensors_of(made), {"lora_alpha": "6", "r": "4"}), made.merged())
    assert kinds(refused(net, saved(tmp_path, tensors_of(made)))) == {
        (name, "alpha unknown") for name in MODULES
    }


def test_files_of_ai_toolkit_have_no_alpha_because_it_is_the_rank(net, tmp_path):
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, lora_alpha=4)
    tensors, software = tensors_of(made, "transformer."), {"name": "ai-toolkit", "version": "0.9"}
    metadata = {"software": json.dumps(software)}
    check(net, saved(tmp_path, tensors, metadata), made.merged())
    error = refused(net, saved(tmp_path, tensors, {**metadata, "lora_alpha": "6"}))
    assert {kind for _, kind in kinds(error)} == {"contradiction"}
    # ai-toolkit's files with kohya's keys have alpha tensors, so a file without them is not its own
    error = refused(net, saved(tmp_path, kohya_of(made), metadata))
    assert {kind for _, kind in kinds(error)} == {"alpha unknown"}


PICKLES = {
    "beside the tensors": lambda tensors: {**tensors, "lora_alpha": 6, "r": 4},
    "around them": lambda tensors: {"state_dict": tensors, "lora_alpha": 6.0},
    "in a config": lambda tensors: {"model": tensors, "config": {"rank": 4, "alpha": 6, "lr": 0.1}},
    "in a config beside them": lambda tensors: {**tensors, "lora_config": {"lora_alpha": 6}},
    "by layer": lambda tensors: {"sd": {**tensors, **{f"{name}.alpha": 6.0 for name in MODULES}}},
    "as numbers": lambda tensors: {**tensors, **{f"{name}.alpha": 6 for name in MODULES}},
    "as tensors": lambda tensors: {
        **tensors, **{f"{name}.alpha": torch.tensor(6.0) for name in MODULES}
    },
    "of simpletuner": lambda tensors: {
        **tensors, **{f"{name}.lora_alpha": torch.tensor(6.0) for name in MODULES}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_files_of_torch_say_alpha(case, net, made, tmp_path):
    content = PICKLES[case](OrderedDict(tensors_of(made)))
    file = str(tmp_path / "lora.pt")
    torch.save(content, file)
    check(net, file, made.merged())


def test_a_file_of_torch_without_alpha_is_refused(net, made, tmp_path):
    file = str(tmp_path / "lora.pt")
    torch.save({"state_dict": tensors_of(made), "epoch": 3, "rank": 4}, file)
    error = refused(net, file)
    assert {kind for _, kind in kinds(error)} == {"alpha unknown"}
    torch.save({**tensors_of(made), "epoch": 3}, file)
    assert kinds(refused(net, file, SourceError)) == {("epoch", "not a tensor")}


def test_tensors_in_memory_say_alpha_or_a_user_does(net, made):
    base = Base(net)
    base.add("number", {**tensors_of(made), **{f"{name}.alpha": 6 for name in MODULES}})
    base.add("config", tensors_of(made), {"lora_alpha": 6, "r": 4})
    base.add("given", tensors_of(made), alpha=6)
    base.add("none", tensors_of(made))
    for name in ("number", "config", "given"):
        check(base, name, made.merged(-0.5), -0.5)
    assert kinds(refused(base, "none")) == {(name, "alpha unknown") for name in MODULES}
    check(base, "none", made.merged(), alphas={"none": 6})


# -- where it is nowhere --------------------------------------------------------------------


def test_all_layers_of_all_adapters_are_listed_and_the_error_says_how_to_give_it(
    net, made, tmp_path
):
    other = make_adapter(net, tmp_path / "b", target_modules=["emb", "head"])
    base = Base(net)
    base.add("one", tensors_of(made))
    base.add("two", kohya_of(made))
    base.add("three", tensors_of(other))
    base.add("right", made.path)
    with pytest.raises(WeightMismatchError) as caught:
        open_weights(Lora(base, {"one": 1.0, "two": 0.5, "right": 1.0, "three": 1.0}))
    error = caught.value
    assert error.message == "The alpha of 'one', 'two', 'three' is unknown."
    assert [(p.subject, p.kind) for p in error.problems] == [
        (f"{adapter}: {module}", "alpha unknown")
        for adapter, modules in (("one", MODULES), ("two", MODULES), ("three", ["emb", "head"]))
        for module in sorted(modules)
    ]
    for part in ("alphas={'one': 16}", "alpha=16)", "--alpha one=16", '"rank"'):
        assert part in error.hint


def test_it_is_listed_with_everything_else_that_is_wrong(net, made, tmp_path):
    tensors = tensors_of(made)
    tensors["lin.lora_A.weight"][0, 0] = float("nan")
    tensors["nowhere.lora_A.weight"] = torch.ones(4, 3)
    error = refused(net, saved(tmp_path, tensors))
    assert {("lin.lora_A.weight", "non-finite"), ("two", "alpha unknown")} < kinds(error)
    assert ("nowhere.lora_A.weight", "incomplete") in kinds(error)
    assert "--alpha" in error.hint


def test_one_layer_without_alpha_is_refused_where_others_have_it(net, made, tmp_path):
    tensors = kohya_of(made, torch.tensor(6.0))
    del tensors["lora_unet_two.alpha"]
    assert kinds(refused(net, saved(tmp_path, tensors))) == {("two", "alpha unknown")}


@pytest.mark.parametrize("fields", [{}, {"r": 4}, {"r": 4, "lora_alpha": None}])
def test_a_config_without_alpha_does_not_have_the_default_of_peft(fields, net, made, tmp_path):
    base = Base(net)
    base.add("a", tensors_of(made), fields)
    assert {kind for _, kind in kinds(refused(base, "a"))} == {"alpha unknown"}
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors_of(made), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert {kind for _, kind in kinds(refused(net, str(folder)))} == {"alpha unknown"}
    check(net, str(folder), made.merged(), alphas={str(folder): 6})


@pytest.mark.parametrize(
    ("prefix", "metadata"),
    [
        ("transformer.", {"text_encoder.lora_alpha": "6", "text_encoder.r": "4"}),
        ("text_encoder.", packed(**{"unet.lora_alpha": 6, "unet.r": 4})),
        ("", {"unet.lora_alpha": "6", "text_encoder.lora_alpha": "6"}),
        ("unet_2.", {"unet.lora_alpha": "6"}),
        ("", {"modelspec.alpha": "6", "training_info": "{}"}),
    ],
)
def test_the_alpha_of_another_component_is_not_taken(prefix, metadata, net, made, tmp_path):
    error = refused(net, saved(tmp_path, tensors_of(made, prefix), metadata))
    assert "alpha unknown" in {kind for _, kind in kinds(error)}


def test_each_component_has_its_own(net, made, tmp_path):
    other = make_adapter(net, tmp_path / "b", 2, target_modules=MODULES, lora_alpha=9, r=2)
    tensors = {**tensors_of(made, "transformer."), **tensors_of(other, "text_encoder.")}
    metadata = {"transformer.lora_alpha": "6", "text_encoder.lora_alpha": "9"}
    file = saved(tmp_path, tensors, metadata)
    check(net, file, made.merged(), component="transformer")
    check(net, file, other.merged(), component="text_encoder")
    del metadata["text_encoder.lora_alpha"]
    saved(tmp_path, tensors, metadata)
    check(net, file, made.merged(), component="transformer")
    error = refused(net, file, component="text_encoder")
    assert kinds(error) == {(name, "alpha unknown") for name in MODULES}


# -- contradictions -------------------------------------------------------------------------

CONTRADICTIONS = {
    "two entries": ("peft", {"lora_alpha": "6", "alpha": "8"}),
    "two entries for one layer": (
        "peft",
        {"lora_alpha": "6", "lin.alpha": "6", "lin.lora_alpha": "8"},
    ),
    "kohya's and a plain one": ("peft", {"ss_network_alpha": "8", "lora_alpha": "6"}),
    "diffusers' and a plain one": ("peft", {**packed(r=4, lora_alpha=6), "lora_alpha": "8"}),
    "all and a component": ("unet.", {"lora_alpha": "6", "unet.lora_alpha": "8"}),
    "rslora in one of two": (
        "peft",
        {**packed(r=4, lora_alpha=6, use_rslora=True), "use_rslora": "False"},
    ),
    "header and tensors": ("kohya", {"ss_network_alpha": "8"}),
    "header and tensors, of peft": ("kohya", {"lora_alpha": "8", "r": "4"}),
    "rank and shapes": ("peft", {"lora_alpha": "6", "r": "8"}),
    "kohya's rank and shapes": ("kohya", {"ss_network_alpha": "6", "ss_network_dim": "8"}),
    "square root and tensors": ("kohya", packed(r=4, lora_alpha=6, use_rslora=True)),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_places_that_contradict_one_another_are_refused(case, net, made, tmp_path):
    form, metadata = CONTRADICTIONS[case]
    tensors = tensors_of(made, "" if form == "peft" else form)
    if form == "kohya":
        tensors = kohya_of(made, torch.tensor(6.0))
    file = saved(tmp_path, tensors, metadata)
    found = {kind for _, kind in kinds(refused(net, file))}
    assert found == ({"rank"} if "rank" in case else {"contradiction"})
    if found == {"contradiction"} and "rslora" not in case and "square" not in case:
        check(net, file, made.merged(), alphas={file: 6})


def test_the_config_beside_a_file_and_its_header_are_compared(net, made, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    config = json.loads((made.path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config))
    file = path / "adapter_model.safetensors"
    save_file(tensors_of(made, PEFT), file, {"lora_alpha": "6"})
    check(net, str(path), made.merged())
    save_file(tensors_of(made, PEFT), file, {"lora_alpha": "8"})
    error = refused(net, str(path))
    assert kinds(error) == {("lora_alpha", "contradiction")}
    assert "6.0 in adapter_config.json, 8.0 in lora_alpha" in str(error)
    check(net, str(path), made.merged(), alphas={str(path): 6})


def test_one_alpha_for_layers_of_several_ranks_needs_a_rank(net, tmp_path):
    """diffusers divides by each layer's rank, but sglang does not: sgl-project/sglang#36082."""
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, rank_pattern={"lin": 2})
    file = saved(tmp_path, tensors_of(made), {"lora_alpha": "6"})
    assert kinds(refused(net, file)) == {(name, "unclear") for name in MODULES}
    check(net, file, made.merged(), alphas={file: 6})
    saved(tmp_path, tensors_of(made), packed(r=4, rank_pattern={"lin": 2}, lora_alpha=6))
    check(net, file, made.merged())
    saved(tmp_path, tensors_of(made), {f"{name}.alpha": "6" for name in MODULES})
    check(net, file, made.merged())


def test_tensors_under_rslora_are_unclear(net, made, tmp_path):
    """SimpleTuner then divides alpha by the root of the rank, but kohya's scripts never do."""
    file = saved(tmp_path, kohya_of(made, torch.tensor(6.0)), {"use_rslora": "True"})
    error = refused(net, file)
    assert kinds(error) == {(f"lora_unet_{name}.alpha", "unclear") for name in MODULES}
    check(net, file, made.merged(2.0), alphas={file: 6})  # the root of rank 4 is 2


def test_patterns_do_not_fit_names_with_underscores(net, made, tmp_path):
    """``(.*\\.)?(lin)$`` does not match ``outer_lin``, so peft would use the other alpha."""
    metadata = packed(r=4, lora_alpha=6, alpha_pattern={"lin": 2})
    error = refused(net, saved(tmp_path, kohya_of(made), metadata))
    assert kinds(error) == {(name, "unclear") for name in MODULES}
    check(net, saved(tmp_path, kohya_of(made, torch.tensor(6.0)), metadata), made.merged())


# -- nonsense -------------------------------------------------------------------------------

NONSENSE = ["nan", "inf", "-inf", "0", "-0.0", "-6", "six", "True", "[6]", "6,0", "1e999", "6" * 99]


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("entry", ["lora_alpha", "transformer.lora_alpha", "lin.alpha"])
def test_an_alpha_that_is_no_number_greater_than_0(text, entry, net, made, tmp_path):
    file = saved(tmp_path, tensors_of(made, "transformer."), {entry: text})
    error = refused(net, file, SourceError)
    assert [problem.subject for problem in error.problems] == [entry]


@pytest.mark.parametrize("text", [one for one in NONSENSE if one != "0"])
def test_kohyas_alpha_that_is_no_number_greater_than_0(text, net, made, tmp_path):
    file = saved(tmp_path, kohya_of(made, torch.tensor(6.0)), {"ss_network_alpha": text})
    error = refused(net, file, SourceError)
    assert [problem.subject for problem in error.problems] == ["ss_network_alpha"]


@pytest.mark.parametrize("text", ["0", "-4", "4.5", "nan", "four"])
@pytest.mark.parametrize("entry", ["r", "ss_network_dim"])
def test_a_rank_that_is_none(text, entry, net, made, tmp_path):
    file = saved(tmp_path, tensors_of(made), {"lora_alpha": "6", entry: text})
    assert [problem.subject for problem in refused(net, file, SourceError).problems] == [entry]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.0, -6.0])
def test_a_tensor_that_is_no_alpha(value, net, made, tmp_path):
    error = refused(net, saved(tmp_path, kohya_of(made, torch.tensor(value))))
    assert {kind for _, kind in kinds(error)} <= {"number", "non-finite"}
    assert {subject for subject, _ in kinds(error)} == {f"lora_unet_{n}.alpha" for n in MODULES}


@pytest.mark.parametrize("value", [float("nan"), 0, -6, True, "many", [6], {"a": 6}])
def test_a_config_with_an_alpha_that_is_none(value, net, made):
    for field in ({"lora_alpha": value}, {"lora_alpha": 6, "alpha_pattern": {"lin": value}}):
        with pytest.raises(SourceError) as caught:
            Base(net).add("a", tensors_of(made), field)
        assert [p.subject.partition(".")[0] for p in caught.value.problems] == [[*field][-1]]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 6, "lora_alpha": 8}',
        '{"lora_alpha": ' + "6" * 5000 + "}",
        '{"lora_alpha": true}',
        '{"lora_alpha": 6, "use_rslora": "False"}',
        '{"peft_type": "LOHA", "lora_alpha": 6}',
    ],
)
def test_a_header_that_cannot_be_read_is_refused(text, net, made, tmp_path):
    error = refused(
        net, saved(tmp_path, tensors_of(made), {"lora_adapter_metadata": text}), SourceError
    )
    assert error.problems
    assert len(str(error)) < 2000


@pytest.mark.parametrize(
    "text", ["(" * 60_000, "{1:" * 20_000, "-" * 60_000 + "1", "x" * (1 << 20)]
)
def test_notation_of_python_that_takes_too_much_is_refused(text, net, made, tmp_path):
    metadata = {"lora_alpha": "6", "alpha_pattern": text}
    error = refused(net, saved(tmp_path, tensors_of(made), metadata), SourceError)
    assert [problem.subject for problem in error.problems] == ["alpha_pattern"]


def test_alphas_of_more_layers_than_there_can_be_are_refused(net, made, tmp_path):
    file = saved(tmp_path, tensors_of(made), {f"a{number}.alpha": "6" for number in range(20_000)})
    assert "for more than 16384 layers" in refused(net, file, SourceError).message


def test_entries_of_other_things_are_no_declarations():
    metadata = {
        "format": "pt",
        "ss_output_name": "alpha",
        "ss_tag_frequency": '{"a": {"alpha": 3}}',
        "modelspec.title": "r",
        "sshs_model_hash": "00",
        "ss_network_dropout": "None",
        "training_info": '{"step": 10}',
        "config": {"alpha_cumprod": 3, "lr": 1},
        "optimizer": {"r": "no"},
    }
    assert declarations_in(metadata, "a file") == []


# -- given by users -------------------------------------------------------------------------


def test_a_user_has_the_last_word(net, made, tmp_path):
    file = saved(tmp_path, kohya_of(made, torch.tensor(24.0)), {"ss_network_alpha": "8"})
    check(net, file, made.merged(), alphas={file: 6})
    check(net, str(made.path), made.merged(2.0), alphas={str(made.path): 12})
    check(net, str(made.path), made.merged(4 / 6), alphas={str(made.path): "rank"})


def test_a_given_alpha_is_divided_as_the_config_says(net, tmp_path):
    made = make_adapter(net, tmp_path / "a", target_modules=MODULES, use_rslora=True)
    check(net, str(made.path), made.merged(2.0), alphas={str(made.path): 12})


def test_adapters_with_alphas_of_their_own_are_summed(net, made, tmp_path):
    other = make_adapter(net, tmp_path / "b", 2, target_modules=["lin"], lora_alpha=10, r=2)
    file = saved(tmp_path, tensors_of(other), {"lora_alpha": "10"})
    base = Base(net, "host")
    base.add("a", tensors_of(made), alpha=6)
    source = open_weights(Lora(base, {"a": 0.7, file: -0.2}))
    before, one, two = net.state_dict(), made.merged(0.7), other.merged(-0.2)
    for name, value in weights_of(source).items():
        assert_close(value, one[name] + (two[name] - before[name]), name)
    assert source.description.endswith(f" + 0.7 of 'a' - 0.2 of '{file}'")
    # the alpha of one refit, then the alpha of ``add`` again
    source = open_weights(Lora(base, {"a": 0.7}, alphas={"a": 12}))
    assert source.description.endswith(" + 0.7 of 'a' with alpha 12")
    for name, value in made.merged(1.4).items():
        assert_close(source.get(name), value, name)
    check(base, "a", one, 0.7)


def test_sums_with_another_alpha_have_other_revisions(net, made):
    base = Base(net, "host", keep=4)
    base.add("a", tensors_of(made), alpha=6)
    first = open_weights(Lora(base, {"a": 1.0}))
    other = open_weights(Lora(base, {"a": 1.0}, alphas={"a": 12}))
    again = open_weights(Lora(base, {"a": 1.0}, alphas={"a": 6}))
    assert first.revision("lin.weight") != other.revision("lin.weight")
    assert first.revision("lin.weight") == again.revision("lin.weight")
    assert same(weights_of(first), weights_of(again))
    assert not torch.equal(first.get("lin.weight"), other.get("lin.weight"))
    assert first.revision("lin.bias") == other.revision("lin.bias")
    base.prepare({"a": 1.0}, alphas={"a": 24})
    assert "base a live Net + 1 of 'a' with alpha 24" in base.memory.ready
    base.remove("a")
    assert not base.memory.ready


@pytest.mark.parametrize(
    "alpha", [0, -1, float("nan"), float("inf"), True, "16", "many", None, [3]]
)
def test_alphas_that_cannot_be_meant(alpha, net, made):
    with pytest.raises(ConfigError, match="a number greater than 0, or 'rank'"):
        Lora(net, {"a": 1.0}, alphas={"a": alpha})
    if alpha is not None:
        with pytest.raises(ConfigError, match="a number greater than 0, or 'rank'"):
            Base(net).add("a", tensors_of(made), alpha=alpha)


def test_an_alpha_for_no_adapter_is_an_error(net):
    with pytest.raises(ConfigError, match="b: alpha, wanted a"):
        Lora(net, {"a": 1.0}, alphas={"b": 3, "a": 3})
    with pytest.raises(ConfigError, match="alphas: not a mapping"):
        Lora(net, {"a": 1.0}, alphas=3)


def test_an_output_projection_is_added_twice_whatever_says_alpha(tmp_path):
    """peft up to 0.21 adds it twice, also in training: huggingface/peft#3774."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(12, 3, batch_first=True)})
    made = make_adapter(net, tmp_path / "a", target_modules=["attn"])
    file = saved(tmp_path, tensors_of(made), {"lora_alpha": "6", "r": "4"})
    check(net, file, made.merged())
    check(net, file, made.merged(2.0), alphas={file: 12})
