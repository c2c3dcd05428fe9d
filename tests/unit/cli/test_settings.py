"""Rules and settings on the command line: flags, files, which wins, and what is refused how."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit.model import Pack
from refitkit.model.rules import FAMILIES
from tests.fakes import Opener, make_module, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.unit.cli.conftest import Outcome


@pytest.fixture
def plugin() -> Opener:
    return Opener(make_module(1))


@pytest.fixture
def refit(run: Callable[..., Outcome], plugin: Opener, tmp_path: Path) -> Callable[..., Outcome]:
    """Refit the module from these tensors, with these flags."""

    def do(tensors: Mapping[str, torch.Tensor], *flags: object) -> Outcome:
        file = tmp_path / "w.safetensors"
        save_file(dict(tensors), file)
        args = ("refit", "fake:module", file, "-o", tmp_path / "out", "--json", *flags)
        return run(*args, plugins=[plugin])

    return do


def new(plugin: Opener) -> dict[str, torch.Tensor]:
    return weights_for(plugin.module, 5.0)


def holds(plugin: Opener, values: Mapping[str, torch.Tensor]) -> bool:
    found = plugin.module.holds()
    return all(found[f"e0/{name}"].equal(value) for name, value in values.items())


# -- rules --------------------------------------------------------------------------------------


def test_rename(refit: Callable[..., Outcome], plugin: Opener) -> None:
    wanted = new(plugin)
    given = {f"old=0.{name.partition('.')[2]}": value for name, value in wanted.items()}
    assert refit(given).code == 1
    flags = ("--rename", r"no(?=such)=x", "--rename", r"old=\d\.(.*)=e0.\1")
    outcome = refit(given, *flags)
    assert outcome.code == 0, outcome.err
    assert holds(plugin, wanted)
    assert [row["transform"] for row in outcome.data["transforms"]] == ["names", "names"]
    assert plugin.config.rules.rename[0].pattern == "no(?=such)"


def test_subtree(refit: Callable[..., Outcome], plugin: Opener) -> None:
    wanted = new(plugin)
    given = {f"net.{name}": value for name, value in wanted.items()}
    given |= {f"old.{name}": torch.zeros_like(value) for name, value in wanted.items()}
    given["optimizer.step"] = torch.zeros(1)
    refused = refit(given)
    assert refused.code == 1
    flags = {p["subject"]: p["hint"].rpartition("pass ")[2] for p in refused.error["problems"]}
    assert flags == {"'net.'": "--subtree 'net.'", "'old.'": "--subtree 'old.'"}
    assert refit(given, "--subtree", "net.").code == 0
    assert holds(plugin, wanted)


def test_a_trainers_checkpoint(run: Callable[..., Outcome], plugin: Opener, tmp_path: Path) -> None:
    file, wanted = tmp_path / "trainer.ckpt", new(plugin)
    state = {f"net.{name}": value for name, value in wanted.items()}
    steps = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"state_dict": state, "optimizer": steps, "epoch": 1}, file)
    args = ("refit", "fake:module", file, "-o", tmp_path / "out")
    done = run(*args, plugins=[plugin])
    assert done.code == 0, done.err
    assert "took the weights under 'state_dict.net.'" in " ".join(done.out.split())
    assert holds(plugin, wanted)
    refused = run(*args, "--partial", "--json", plugins=[plugin])
    assert refused.code == 1
    (problem,) = refused.error["problems"]
    assert problem["subject"] == "'state_dict.net.'"
    assert problem["hint"].endswith("pass --subtree 'state_dict.net.'")
    done = run(*args, "--partial", "--subtree", "state_dict.net.", plugins=[plugin])
    assert done.code == 0, done.err


def test_cast(refit: Callable[..., Outcome], plugin: Opener) -> None:
    wanted = new(plugin)
    half = {name: value.half() for name, value in wanted.items()}
    double = {name: value.double() for name, value in wanted.items()}
    refused = refit(half)
    assert refused.code == 1
    assert all("pass --cast lossless:" in p["hint"] for p in refused.error["problems"])
    assert all("pass --cast any:" in p["hint"] for p in refit(double).error["problems"])
    assert refit(half, "--cast", "no").code == 1
    assert refit(half, "--cast", "lossless").code == 0
    assert holds(plugin, wanted)
    assert refit(double, "--cast", "lossless").code == 1
    assert refit(double, "--cast", "any").code == 0


@pytest.mark.parametrize(("dim", "suffix"), [(0, ""), (0, "@0"), (1, "@1"), (1, "@-1")])
def test_pack(refit: Callable[..., Outcome], plugin: Opener, dim: int, suffix: str) -> None:
    wanted = new(plugin)
    wanted["e0.weight"] = torch.arange(6.0).reshape(2, 3) + 9
    given = {"e0.bias": wanted["e0.bias"]}
    for number, part in enumerate(wanted["e0.weight"].split(1, dim)):
        given[f"e0.part{number}"] = part.contiguous()
    parts = ",".join(f"{{}}.part{number}" for number in range(len(given) - 1))
    outcome = refit(given, "--pack", f"{{}}.weight={parts}{suffix}")
    assert outcome.code == 0, outcome.err
    assert holds(plugin, wanted)


def test_pack_stacks_and_transposes(refit: Callable[..., Outcome], plugin: Opener) -> None:
    wanted = new(plugin)
    wanted["e0.weight"] = torch.arange(6.0).reshape(2, 3) + 9
    bias, weight = {"e0.bias": wanted["e0.bias"]}, wanted["e0.weight"]
    rows = {f"e0.{number}.row": row.clone() for number, row in enumerate(weight)}
    for given, flag in (
        (rows, "{}.weight={}.*.row"),
        (rows, "{}.weight={}.0.row,{}.1.row@0"),
        ({"e0.turned": weight.T.contiguous()}, "{}.weight={}.turned@T"),
        ({f"e0.{n}": weight[n : n + 1].T.contiguous() for n in (0, 1)}, "{}.weight={}.0,{}.1@0@T"),
    ):
        outcome = refit(bias | given, "--pack", flag)
        assert outcome.code == 0, outcome.err
        assert holds(plugin, wanted)


def test_families(refit: Callable[..., Outcome], plugin: Opener) -> None:
    wanted = new(plugin)
    assert refit(wanted, "--family", "moe", "--family", "fused").code == 0
    assert plugin.config.rules.families == ("moe", "fused")
    assert refit(wanted, "--family", "no-such").code == 2


# -- hints --------------------------------------------------------------------------------------

HINTS = {
    "--subtree": lambda state: {
        f"{t}.{n}": v + 0 for t in ("net", "old") for n, v in state.items()
    },
    "--ignore": lambda state: {**state, "head.0.w": torch.ones(1), "head.1.w": torch.ones(1)},
    "--cast": lambda state: {name: value.half() for name, value in state.items()},
    "--family": lambda state: {
        "e0.bias": state["e0.bias"],
        **{
            f"e0.{n}_proj.weight": row
            for n, row in zip("qk", state["e0.weight"].split(1), strict=True)
        },
    },
    "--partial": lambda state: {"e0.bias": state["e0.bias"]},
    "--no-check-finite": lambda state: {**state, "e0.bias": state["e0.bias"] / 0},
}


@pytest.mark.parametrize("flag", HINTS)
def test_hints_are_printed_once_with_the_flag_to_paste(
    run: Callable[..., Outcome],
    plugin: Opener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    rule = Pack(into="{}.weight", parts=("{}.q_proj.weight", "{}.k_proj.weight"))
    monkeypatch.setitem(FAMILIES, "in_proj", (rule,))
    save_file(HINTS[flag](new(plugin)), tmp_path / "w.safetensors")
    args = ("refit", "fake:module", tmp_path / "w.safetensors", "-o", tmp_path / "out")
    refused = run(*args, plugins=[plugin])
    assert refused.code == 1
    pasted = re.findall(rf"pass ({flag}(?: '[^']*'| [\w-]+|))", refused.err)
    assert len(pasted) == len(set(pasted)) == (2 if flag == "--subtree" else 1), refused.err
    done = run(*args, *shlex.split(pasted[0]), plugins=[plugin])
    assert done.code == 0, done.err


def test_other_commands_have_no_hints_for_flags_that_they_lack(
    run: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    save_file({"e0.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    for how in ((), ("--json",)):
        refused = run("verify", "fake:module", tmp_path / "w.safetensors", *how, plugins=[plugin])
        assert refused.code == 1
        assert "missing" in refused.err + refused.out
        assert "partial" not in refused.err + refused.out


def test_verify_says_how_names_were_read(
    run: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    save_file({f"net.{name}": value for name, value in new(plugin).items()}, file)
    note = "names: took the weights under 'net.': all names of the program are there"
    failed = run("verify", "fake:module", file, plugins=[plugin])
    assert failed.code == 1
    assert failed.err.count(note) == 1
    assert run("refit", "fake:module", file, "-o", tmp_path / "out", plugins=[plugin]).code == 0
    done = run("verify", "fake:module", file, plugins=[plugin])
    assert done.code == 0, done.err
    assert " ".join(done.out.split()).count(note) == 1
    assert run("verify", "fake:module", file, "--json", plugins=[plugin]).data["notes"] == [note]


WRONG_FLAGS = [
    ("--rename", "nothing", "PATTERN=TO"),
    ("--rename", "=to", "PATTERN=TO"),
    ("--rename", "(=to", "not a regular expression"),
    ("--rename", r"a(.)=\2", "invalid group reference"),
    ("--rename", r"a(.)=\g<no>", "unknown group name"),
    ("--pack", "{}.w", "INTO=PART,PART[@DIM][@T]"),
    ("--pack", "={}.a,{}.b", "INTO=PART,PART[@DIM]"),
    ("--pack", "{}.w={}.a,,{}.b", "INTO=PART,PART[@DIM]"),
    ("--pack", "{}.w={}.a,{}.b@", "INTO=PART,PART[@DIM]"),
    ("--pack", "w={}.a,{}.b", "one {}"),
    ("--pack", "{}.w={}.a,b", "one {}"),
    ("--cast", "some", "lossless"),
    ("--changes", "some", "sampled"),
    ("--set", "fake", "KEY=VALUE"),
    ("--set", "fake=1", "PLUGIN.KEY"),
    ("--set", ".key=1", "PLUGIN.KEY"),
    ("--set", "fake.=1", "PLUGIN.KEY"),
    ("--set", "nobody.key=1", "There is no plugin 'nobody'. There are:"),
]


@pytest.mark.parametrize(("flag", "value", "says"), WRONG_FLAGS)
def test_wrong_flags_are_named(
    refit: Callable[..., Outcome], plugin: Opener, flag: str, value: str, says: str
) -> None:
    before = plugin.module.holds()
    outcome = refit(new(plugin), flag, value)
    assert outcome.code == 2
    assert flag in outcome.error["message"]
    assert says in outcome.error["message"]
    assert "Value error" not in outcome.error["message"]
    assert all(plugin.module.holds()[name].equal(value) for name, value in before.items())


# -- settings -----------------------------------------------------------------------------------


def test_settings_of_plugins(refit: Callable[..., Outcome], plugin: Opener) -> None:
    pairs = ("--set", "fake.limit=0.5", "--set", "fake.names=[1, 2]", "--set", "rules.x.y=text")
    assert refit(new(plugin), *pairs).code == 0
    assert plugin.config.plugin_settings == {
        "fake": {"limit": 0.5, "names": [1, 2]},
        "rules": {"x.y": "text"},
    }
    assert "given twice" in refit(new(plugin), *("--set", "fake.a=1") * 2).error["message"]


TOML = """
check_finite = false
change_limit = 3.5
no_plugins = ["quant"]

[rules]
cast = "lossless"
subtree = "net."

[[rules.rename]]
pattern = "a"
to = "b"

[plugin_settings.fake]
limit = 1
other = 2

[plugin_settings.rules]
unread = true
"""


def test_a_file_and_flags_over_it(
    refit: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(TOML)
    given = {f"net.{name}": value.half() for name, value in new(plugin).items()}
    outcome = refit(given, "--config", file, "--no-plugin", "torch_tensorrt")
    assert outcome.code == 0, outcome.err
    found = plugin.config
    assert (found.check_finite, found.change_limit, found.rules.cast) == (False, 3.5, "lossless")
    assert found.no_plugins == {"quant", "torch_tensorrt"}
    assert found.changes == "off"
    outcome = refit(
        {f"top.{name}": value for name, value in new(plugin).items()},
        *("--subtree", "top.", "--rename", "c=d", "--set", "fake.limit=7", "--changes", "exact"),
        *("--config", file),
    )
    assert outcome.code == 0, outcome.err
    found = plugin.config
    assert (found.rules.subtree, found.rules.cast) == ("top.", "lossless")
    assert [rule.pattern for rule in found.rules.rename] == ["c"]
    settings = {"fake": {"limit": 7, "other": 2}, "rules": {"unread": True}}
    assert found.plugin_settings == settings
    assert found.changes == "exact"


def test_a_flag_of_the_command_wins_too(
    refit: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"check_finite": True, "changes": "exact"}))
    assert refit(new(plugin), "--config", file).code == 0
    assert (plugin.config.check_finite, plugin.config.changes) == (True, "exact")
    assert not plugin.config.reread
    assert refit(new(plugin), "--config", file, "--reread").code == 0
    assert plugin.config.reread
    flags = ("--config", file, "--no-check-finite", "--changes", "off")
    assert refit(new(plugin), *flags).data["changes"] == []
    assert (plugin.config.check_finite, plugin.config.changes) == (False, "off")


WRONG_FILES = [
    ("s.toml", "a = ", "cannot be read"),
    ("s.json", "{", "cannot be read"),
    ("s.json", "[" * 100_000, "cannot be read"),
    ("s.json", b"\xff\xfe", "cannot be read"),
    ("s.json", "[1]", "holds a list"),
    ("s.yaml", "a: 1", "does not end in .toml or .json"),
    ("s.json", '{"checks": 1, "delta": "perhaps"}', "cannot be used"),
    ("s.toml", "[rules]\nrename = [{pattern = '(', to = ''}]", "cannot be used"),
    ("s.toml", "[plugin_settings.nobody]\na = 1", "not there"),
]


@pytest.mark.parametrize(("name", "content", "says"), WRONG_FILES)
def test_wrong_files_are_named(
    refit: Callable[..., Outcome],
    plugin: Opener,
    tmp_path: Path,
    name: str,
    content: str | bytes,
    says: str,
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = refit(new(plugin), "--config", file)
    assert outcome.code == 2
    assert outcome.error["type"] == "ConfigError"
    assert repr(str(file)) in outcome.error["message"]
    assert says in outcome.error["message"]


def test_everything_wrong_in_a_file_is_told(
    refit: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"checks": 1, "delta": "perhaps", "rules": {"cast": 1}}')
    outcome = refit(new(plugin), "--config", file)
    subjects = {problem["subject"] for problem in outcome.error["problems"]}
    assert subjects == {"checks", "delta", "rules.cast"}
    file.write_text('{"rules": 1, "plugin_settings": 2}')
    outcome = refit(new(plugin), "--config", file, "--cast", "any", "--set", "fake.x=1")
    assert outcome.code == 2
    subjects = {problem["subject"] for problem in outcome.error["problems"]}
    assert subjects == {"rules", "plugin_settings"}


def test_files_that_are_not_there(
    refit: Callable[..., Outcome], plugin: Opener, tmp_path: Path
) -> None:
    for file in (tmp_path, tmp_path / "missing.toml"):
        outcome = refit(new(plugin), "--config", file)
        assert (outcome.code, outcome.error["type"]) == (2, "ConfigError")
        assert str(file) in outcome.error["message"]


# -- who has which ------------------------------------------------------------------------------

RULES = {"--rename", "--subtree", "--pack", "--cast"}
SETTINGS = {"--config", "--set"}


@pytest.mark.parametrize("command", ["refit", "verify", "diff"])
def test_commands_that_read_weights_take_rules(run: Callable[..., Outcome], command: str) -> None:
    said = run(command, "--help").out
    assert all(flag in said for flag in RULES | SETTINGS)


@pytest.mark.parametrize("command", ["compile", "inspect", "plan make"])
def test_other_commands_take_settings(run: Callable[..., Outcome], command: str) -> None:
    said = run(*command.split(), "--help").out
    assert all(flag in said for flag in SETTINGS)
    assert not any(flag in said for flag in RULES)


def test_verify_follows_rules(run: Callable[..., Outcome], plugin: Opener, tmp_path: Path) -> None:
    held = plugin.module.by_slot()
    file = tmp_path / "w.safetensors"
    save_file({f"net.{name}": value.half() for name, value in held.items()}, file)
    args = ("verify", "fake:module", file, "--json")
    assert run(*args, plugins=[plugin]).code == 1
    done = run(*args, "--subtree", "net.", "--cast", "any", plugins=[plugin])
    assert done.data["ok"] is True


def test_a_pattern_is_checked_with_its_replacement_in_the_api_too() -> None:
    with pytest.raises(refitkit.ConfigError, match="not a valid replacement: invalid group"):
        refitkit.Pipeline({"rules": {"rename": [{"pattern": "a|b", "to": r"\1"}]}})
    for pattern, to in ((r"(?i)a(.)|b", r"\1"), (r"(?P<n>x)", r"\g<n>"), ("", "x")):
        refitkit.Pipeline({"rules": {"rename": [{"pattern": pattern, "to": to}]}})
