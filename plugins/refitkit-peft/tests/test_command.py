"""The command ``refitkit lora``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import refitkit
import torch
from peft_models import make_adapter
from refitkit.cli.main import main
from safetensors.torch import load_file, save_file

from refitkit_peft import Lora

pytest.importorskip("peft")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(12, 20)
        self.two = torch.nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a module, a base, two adapters and inputs."""
    path = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 12)
    refitkit.compile(torch.export.export(model, (x,)), prove=False).save(path / "module.refitkit")
    save_file(dict(model.state_dict()), path / "base.safetensors")
    save_file({"0": x}, path / "inputs.safetensors")
    make_adapter(model, path / "a", 1, target_modules=["one"])
    make_adapter(model, path / "b=1", 2, target_modules=["one", "two"])
    lone = load_file(path / "a/adapter_model.safetensors")
    save_file(lone, path / "lone.safetensors")
    save_file(lone, path / "lone=2.safetensors")
    return path


def run(folder, *arguments):
    command = [sys.executable, "-m", "refitkit.cli", "lora", "module.refitkit", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_base_with_adapters_goes_in_and_comes_out_again(folder, tmp_path):
    out = str(tmp_path / "out.refitkit")
    files = ("base.safetensors", "a=0.5", "b=1=-0.25", "--inputs", "inputs.safetensors")
    done = run(folder, *files, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["source"] == "base 'base.safetensors' + 0.5 of 'a' - 0.25 of 'b=1'"
    assert report["outcome"] == "committed"
    assert report["verification"]["verifier"] == "outputs"
    done = run(folder, "base.safetensors", "-o", str(tmp_path / "again.refitkit"))
    assert done.returncode == 0, done.stderr
    assert "committed" in done.stdout
    x = torch.ones(2, 12)
    first, lora, again = (
        refitkit.load(path)(x)
        for path in (folder / "module.refitkit", out, tmp_path / "again.refitkit")
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, lora)


def test_rules_are_those_of_a_refit(folder, tmp_path):
    """A base with two models, in float64 and under other names."""
    base = load_file(folder / "base.safetensors")
    renamed = {name.replace("one", "enc.one"): value.double() for name, value in base.items()}
    both = {
        f"{tree}.{n}": v + k for k, tree in enumerate(("net", "old")) for n, v in renamed.items()
    }
    save_file(both, tmp_path / "base.safetensors")
    arguments = (str(tmp_path / "base.safetensors"), "a", "-o", str(tmp_path / "out"))
    refused = run(folder, *arguments)
    assert refused.returncode == 1
    hint = "choose one with rules.subtree or --subtree: names start with 'net.enc.' or 'old.enc.'"
    assert hint in refused.stderr
    flags = ("--subtree", "net.", "--rename", r"enc\.(.*)=\1", "--cast", "any")
    done = run(folder, *arguments, *flags)
    assert done.returncode == 0, done.stderr
    plain = refitkit.load(folder / "module.refitkit")
    refitkit.refit(plain, Lora(folder / "base.safetensors", {folder / "a": 1.0}))
    x = torch.ones(2, 12)
    torch.testing.assert_close(refitkit.load(tmp_path / "out")(x), plain(x))


def test_a_whole_name_that_is_there_is_no_scale(folder, tmp_path):
    done = run(folder, "base.safetensors", "b=1", "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"].endswith(" + 1 of 'b=1'")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("base.safetensors", "a=much"), "'much' in 'a=much' is not a number"),
        (("base.safetensors", "a=1", "a=2"), "repeats one"),
        (("base.safetensors", "=1"), "no path"),
        (("base.safetensors", "a=nan"), "scale, found nan"),
        (("base.safetensors", "nowhere"), "no adapter, file or folder with the name 'nowhere'"),
        (("nowhere.safetensors", "a"), "There is no file"),
        (("a/adapter_model.safetensors", "a"), "one: unknown module"),
        (("base.safetensors", "base.safetensors"), "contains no factors of a LoRA adapter"),
        (("base.safetensors", "a", "--component", "unet"), "has nothing for 'unet'"),
        (("base.safetensors", "lone.safetensors"), "lone.safetensors: one: alpha unknown"),
        (("base.safetensors", "lone.safetensors"), "--alpha lone.safetensors=16 on the command"),
        (("base.safetensors", "lone=2.safetensors"), "'lone=2.safetensors'"),
        (("base.safetensors", "a", "b=1", "--alpha", "6"), "name the adapter: --alpha ADAPTER=6"),
        (("base.safetensors", "a", "--alpha", "c=6"), "'c' is not an adapter"),
        (("base.safetensors", "a", "--alpha", "6", "--alpha", "a=7"), "is repeated"),
        (("base.safetensors", "a", "--alpha", "many"), "'many' is not a number or rank"),
        (("base.safetensors", "a", "--alpha", "nan"), "a number greater than 0, or 'rank'"),
        (("base.safetensors", "a", "--alpha", "0"), "a number greater than 0, or 'rank'"),
    ],
)
def test_what_cannot_be_meant_writes_nothing(arguments, told, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    code = main(["lora", "module.refitkit", *arguments, "-o", str(tmp_path / "out.refitkit")])
    errors = capfd.readouterr().err
    assert code in {1, 2}
    assert told in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alphas", [("6",), ("lone.safetensors=6",)])
def test_an_alpha_that_a_file_does_not_say_is_given(alphas, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    given = [text for alpha in alphas for text in ("--alpha", alpha)]
    x, outputs = torch.ones(2, 12), []
    for number, adapter in enumerate((["lone.safetensors=-0.5", *given], ["a=-0.5"])):
        out = str(tmp_path / str(number))
        code = main(["lora", "module.refitkit", "base.safetensors", *adapter, "-o", out, "--json"])
        report = json.loads(capfd.readouterr().out)
        assert code == 0
        outputs.append(refitkit.load(out)(x))
    assert report["source"].endswith(" - 0.5 of 'a'")
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], refitkit.load("module.refitkit")(x))


def test_one_of_several_adapters_is_given_its_alpha(folder, tmp_path):
    out = str(tmp_path / "out")
    files = ("base.safetensors", "b=1", "lone=2.safetensors=0.5")
    done = run(folder, *files, "--alpha", "lone=2.safetensors=rank", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    source = json.loads(done.stdout)["source"]
    assert source.endswith(" + 1 of 'b=1' + 0.5 of 'lone=2.safetensors' with alpha rank")


def test_a_file_of_an_adapter_is_not_written_over(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    adapter = folder / "a/adapter_model.safetensors"
    before = adapter.read_bytes()
    code = main(["lora", "module.refitkit", "base.safetensors", str(adapter), "-o", str(adapter)])
    assert "is read by this command: write to another file" in capfd.readouterr().err
    assert code == 2
    assert adapter.read_bytes() == before


def test_help_is_there_without_torch(folder):
    code = (
        "import sys; from refitkit.cli.main import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command = [sys.executable, "-c", code, "lora", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ADAPTER[=SCALE]" in done.stdout


def test_importing_the_plugin_imports_neither_torch_nor_peft():
    code = (
        "import sys, refitkit_peft, refitkit_peft.plugin\n"
        "refitkit_peft.Lora('base', {'a': 1})\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_refit_does_not_import_peft(folder):
    code = (
        "import sys, refitkit, refitkit_peft\n"
        "compiled = refitkit.load('module.refitkit')\n"
        "refitkit.refit(compiled, refitkit_peft.Lora('base.safetensors', {'a': 0.5}))\n"
        "assert not {'peft', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
