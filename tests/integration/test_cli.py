"""The command line as a user runs it: in processes of its own, with real files, wrong ones too."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_models import CASES
from safetensors.torch import load_file, save_file

import refitkit
from refitkit.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Iterator

CASE = CASES["batch"]
SECONDS = 300

SERVER = """
import json, os, sys, tempfile
import safetensors.torch, torch._export.serde.serialize, torch._functorch.aot_autograd
from refitkit.cli.main import main
from refitkit.pipeline import Pipeline

Pipeline().backends

def answer(args, environment):
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for file, descriptor in zip(files, (1, 2)):
            os.dup2(file.fileno(), descriptor)
        code = 99
        try:
            code = main(args)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    return code, *(file.read().decode() for file in files)

for line in sys.stdin:
    print(json.dumps(answer(*json.loads(line))), flush=True)
"""
"""Runs each command line in a process of its own that starts with torch imported: importing it
takes seconds, and there are many command lines here."""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


class Server:
    """A process of :data:`SERVER`."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", SERVER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *args: object, **environment: str) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[*map(str, args)], environment]) + "\n")
        self._process.stdin.flush()
        return Done(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()

    def data(self, *args: object) -> Any:
        """What a command that ends well says as JSON."""
        done = self(*args, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def error(self, *args: object, code: int = 1) -> dict[str, Any]:
        """How a command refuses: with this code, in words, nothing but JSON on stdout."""
        done = self(*args, "--json")
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        found = json.loads(done.out)["error"]
        assert done.err.startswith(f"error: {found['message'][:40]}")
        return found


@pytest.fixture(scope="module")
def cli() -> Iterator[Server]:
    """The command line."""
    server = Server()
    yield server
    server.close()


def process(*args: object) -> Done:
    """Run a command from nothing, as a shell does."""
    command = [sys.executable, "-m", "refitkit.cli", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Files:
    """What a user has."""

    program: Path
    module: Path
    old: Path
    new: Path
    inputs: Path
    compiled: Any


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A program with the weights of seed 0, compiled by the command line, and other weights."""
    folder = tmp_path_factory.mktemp("cli")
    paths = {
        "program": folder / "batch.pt2",
        "module": folder / "batch.refitkit",
        "old": folder / "old.safetensors",
        "new": folder / "new.safetensors",
        "inputs": folder / "inputs.safetensors",
    }
    torch.export.save(CASE.program(0), paths["program"])
    for name, seed in (("old", 0), ("new", 1)):
        save_file(CASE.model(seed).state_dict(), paths[name])
    save_file({"0": CASE.args()[0]}, paths["inputs"])
    done = process("compile", paths["program"], "-o", paths["module"], "--json")
    assert done.code == 0, done.err
    return Files(**paths, compiled=json.loads(done.out))


def answers_like(module: Path, seed: int) -> None:
    """The saved module answers as the eager model with the weights of a seed does."""
    with torch.no_grad():
        found = refitkit.load(module)(*CASE.args())
    torch.testing.assert_close(found, CASE.expected(CASE.model(seed)))


# -- what works ---------------------------------------------------------------------------------


def test_compile(files: Files) -> None:
    assert files.compiled["output"] == str(files.module)
    assert files.compiled["slots"] == len(load_file(files.old))
    assert files.compiled["file_bytes"] == files.module.stat().st_size
    answers_like(files.module, 0)


def test_compile_proves_unless_told_not_to(cli: Server, files: Files, tmp_path: Path) -> None:
    stages = {one["stage"] for one in files.compiled["stages"]}
    assert "prove" in stages
    told = cli.data("compile", files.program, "-o", tmp_path / "out", "--no-prove", "--json")
    assert {one["stage"] for one in told["stages"]} == stages - {"prove"}


def test_inspect(cli: Server, files: Files) -> None:
    module = cli.data("inspect", files.module)
    assert module["kind"] == "module"
    assert {slot["name"] for slot in module["slots"]} == load_file(files.old).keys()
    weights = cli.data("inspect", files.new)
    assert {tensor["name"] for tensor in weights["tensors"]} == load_file(files.new).keys()
    printed = cli("inspect", files.module)
    assert printed.code == 0
    assert all(name in printed.out for name in load_file(files.old))


def test_refit_and_verify(cli: Server, files: Files, tmp_path: Path) -> None:
    out, before = tmp_path / "new.refitkit", files.module.read_bytes()
    report = cli.data("refit", files.module, files.new, "-o", out, "--inputs", files.inputs)
    assert (report["outcome"], report["changed"]) == ("committed", True)
    assert report["verification"]["verifier"] == "outputs"
    assert report["verification"]["ok"] is True
    assert files.module.read_bytes() == before
    answers_like(out, 1)
    for more in ((), ("--inputs", files.inputs), ("--with", "weights")):
        assert cli.data("verify", out, files.new, *more)["ok"] is True
        refusal = cli.error("verify", out, files.old, *more)
        assert refusal["type"] == "VerificationError"
        assert refusal["problems"]
        assert refusal["report"]["ok"] is False


def test_from_a_shell(files: Files, tmp_path: Path) -> None:
    """The same in processes that import everything themselves."""
    out = tmp_path / "out.refitkit"
    assert process("refit", files.module, files.new, "-o", out).code == 0
    answers_like(out, 1)
    held, other = process("verify", out, files.new), process("verify", out, files.old)
    assert (held.code, other.code) == (0, 1)
    assert (held.err, other.out) == ("", "")
    assert "does not hold" in other.err


def test_refit_in_place_to_and_fro_gives_the_same_bytes(
    cli: Server, files: Files, tmp_path: Path
) -> None:
    module = tmp_path / "module.refitkit"
    module.write_bytes(files.module.read_bytes())
    link = tmp_path / "link"
    link.symlink_to(module)
    assert cli("refit", link, files.new, "--in-place").code == 0
    answers_like(module, 1)
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"module.refitkit", "link"}
    printed = cli("refit", module, files.old, "--in-place")
    assert "committed: weights changed" in printed.out
    assert module.read_bytes() == files.module.read_bytes()


def test_plans(cli: Server, files: Files, tmp_path: Path) -> None:
    plan, out = tmp_path / "batch.refitplan", tmp_path / "out.refitkit"
    made = cli.data("plan", "make", files.program, "--target", files.module, "-o", plan)
    shown = cli.data("plan", "show", plan)
    assert made == {"output": str(plan), **shown}
    assert shown["ledger"] == cli.data("plan", "show", files.module)["ledger"]
    assert {row["slot"]["name"] for row in shown["ledger"]} == load_file(files.old).keys()
    cli.data("refit", files.module, files.new, "-o", out, "--plan", plan)
    answers_like(out, 1)


def test_diff(cli: Server, files: Files, tmp_path: Path) -> None:
    new, out = load_file(files.new), tmp_path / "out.refitkit"
    changed = {n for n, v in load_file(files.old).items() if not v.equal(new[n])}
    for a, b in ((files.old, files.new), (files.module, files.new), (files.old, files.module)):
        report = cli.data("diff", a, b)
        assert {row["name"] for row in report["rows"]} == new.keys()
        if b != files.module:
            assert report["counts"]["changed"] == len(changed)
    assert cli.data("diff", files.old, files.module)["counts"] == {"same": len(new)}
    assert cli("refit", files.module, files.new, "-o", out).code == 0
    assert cli("diff", out, files.new, "--exit-code").code == 0
    assert cli("diff", out, files.module, "--exit-code").code == 4
    assert cli.data("diff", files.module, out)["counts"]["changed"] == len(changed)
    refusal = cli.error("diff", files.module, files.inputs)
    assert refusal["type"] == "WeightMismatchError"
    assert {problem["kind"] for problem in refusal["problems"]} == {"missing", "unexpected"}


def test_rules_and_settings(cli: Server, files: Files, tmp_path: Path) -> None:
    half = {
        f"net.{n}": v.half() if v.is_floating_point() else v
        for n, v in load_file(files.new).items()
    }
    trained, settings = tmp_path / "trained.safetensors", tmp_path / "settings.toml"
    save_file(half, trained)
    settings.write_text('changes = "exact"\n[rules]\ncast = "lossless"\n')
    flags = ("--config", settings, "--subtree", "net.")
    out = tmp_path / "out.refitkit"
    assert cli.error("refit", files.module, trained, "-o", out)["type"] == "WeightMismatchError"
    report = cli.data("refit", files.module, trained, "-o", out, *flags)
    assert {row["transform"] for row in report["transforms"]} == {"names", "casts"}
    assert not any(row["sampled"] for row in report["changes"])
    assert len(report["changes"]) == report["slots_written"]
    assert cli.data("verify", out, trained, *flags)["ok"] is True
    assert cli("diff", out, trained, *flags, "--exit-code").code == 0
    assert "moved most" in cli("refit", files.module, trained, "-o", out, *flags).out


def test_partial(cli: Server, files: Files, tmp_path: Path) -> None:
    part, out = tmp_path / "part.safetensors", tmp_path / "out.refitkit"
    save_file({"b.bias": load_file(files.new)["b.bias"]}, part)
    refusal = cli.error("refit", files.module, part, "-o", out)
    assert {problem["kind"] for problem in refusal["problems"]} == {"missing"}
    assert all(problem["hint"].endswith("pass --partial") for problem in refusal["problems"])
    assert cli.data("refit", files.module, part, "-o", out, "--partial")["slots_written"] == 1
    assert refitkit.load(out).read("b.bias").equal(load_file(files.new)["b.bias"])
    assert refitkit.load(out).read("a.bias").equal(load_file(files.old)["a.bias"])


def test_showing_a_module_runs_none_of_it(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trap(*_: object) -> None:
        raise AssertionError("its library was opened")

    for name in ("container.open_container", "native.Library"):
        monkeypatch.setattr(f"refitkit.builtin.aotinductor.{name}", trap)
    for command in (["inspect"], ["plan", "show"]):
        assert main([*command, str(files.module)]) == 0
    assert main(["verify", str(files.module), str(files.old)]) == 3
    assert "its library was opened" in capsys.readouterr().err


# -- wrong input --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def junk(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Things that are no module, no program, no weights, no plan and no inputs."""
    folder = tmp_path_factory.mktemp("junk")
    made = {name: folder / name for name in ("empty", "random", "text", "truncated", "pickle.pt")}
    made["empty"].touch()
    made["random"].write_bytes(random.Random(0).randbytes(5000))  # noqa: S311
    made["text"].write_text("These are not the weights.\n")
    made["truncated"].write_bytes(files.module.read_bytes()[:-2000])
    torch.save({"optimizer": object}, made["pickle.pt"])
    return {**made, "folder": folder, "missing": folder / "missing"}


JUNK = ["empty", "random", "text", "truncated", "pickle.pt", "folder", "missing"]


@pytest.mark.parametrize("name", JUNK)
def test_junk_as_a_module(
    cli: Server, files: Files, junk: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path, out = junk[name], tmp_path / "out"
    assert cli.error("refit", path, files.new, "-o", out)["type"] == "UnsupportedTargetError"
    assert cli.error("verify", path, files.new)["type"] == "UnsupportedTargetError"
    assert cli.error("refit", path, files.new, "--in-place")["type"] == "UnsupportedTargetError"
    assert not out.exists()


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
def test_junk_as_weights(
    cli: Server, files: Files, junk: dict[str, Path], tmp_path: Path, name: str, suffix: str
) -> None:
    path = junk[name]
    if suffix and path.is_file():
        renamed = tmp_path / f"weights{suffix}"
        renamed.write_bytes(path.read_bytes())
        path = renamed
    out = tmp_path / "out"
    assert cli.error("refit", files.module, path, "-o", out)["type"] == "SourceError"
    assert not out.exists()


@pytest.mark.parametrize("name", JUNK)
def test_junk_in_a_diff(cli: Server, files: Files, junk: dict[str, Path], name: str) -> None:
    for args in ((junk[name], files.new), (files.new, junk[name]), (junk[name], files.module)):
        assert cli.error("diff", *args)["type"] == "SourceError"


@pytest.mark.parametrize("name", JUNK)
def test_junk_everywhere_else(
    cli: Server, files: Files, junk: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path, out = junk[name], tmp_path / "out"
    assert cli.error("compile", path, "-o", out)["type"] == "UnsupportedTargetError"
    assert cli.error("inspect", path)["type"] == "UnsupportedTargetError"
    assert cli.error("plan", "show", path)["type"] in {
        "PlanMismatchError",
        "UnsupportedTargetError",
    }
    with_plan = cli.error("refit", files.module, files.new, "-o", out, "--plan", path)
    assert with_plan["type"] in {"PlanMismatchError", "UnsupportedTargetError"}
    with_inputs = cli.error("refit", files.module, files.new, "-o", out, "--inputs", path)
    assert with_inputs["type"] == "SourceError"
    assert not out.exists()


@pytest.mark.parametrize("kind", ["program", "module", "new", "inputs"])
def test_files_in_each_others_place(cli: Server, files: Files, tmp_path: Path, kind: str) -> None:
    path, out = getattr(files, kind), tmp_path / "out"
    if kind != "program":
        assert cli.error("compile", path, "-o", out)["type"] == "UnsupportedTargetError"
    if kind != "module":
        assert cli.error("refit", path, files.new, "-o", out)["type"] == "UnsupportedTargetError"
        assert cli.error("plan", "show", path)["type"] == "PlanMismatchError"
    if kind != "new":
        refusal = cli.error("refit", files.module, path, "-o", out)
        assert refusal["type"] in {"SourceError", "WeightMismatchError"}
    assert not out.exists()


@pytest.mark.parametrize("command", ["compile", "refit", "plan make"])
def test_outputs_that_cannot_be_written(
    cli: Server, files: Files, tmp_path: Path, command: str
) -> None:
    work: tuple[object, ...] = {
        "compile": ("compile", files.program),
        "refit": ("refit", files.module, files.new),
        "plan make": ("plan", "make", files.program, "--target", files.module),
    }[command]
    for out in (tmp_path, tmp_path / "missing" / "out", files.new / "out", Path(os.devnull)):
        assert "cannot be written" in cli.error(*work, "-o", out)["message"]
    kept = files.program.read_bytes()
    mine = files.module if command == "refit" else files.program
    assert cli.error(*work, "-o", mine, code=2)["type"] == "UsageError"
    assert files.program.read_bytes() == kept
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody can write")
def test_an_output_in_a_folder_whose_rights_do_not_say_all(cli: Server, files: Files) -> None:
    refusal = cli.error("refit", files.module, files.new, "-o", "/proc/out")
    assert refusal["type"] == "ResourceError"
    assert "'/proc/out' cannot be written" in refusal["message"]
    assert ".part" not in refusal["message"]


def test_a_missing_compiler_is_told(cli: Server, files: Files, tmp_path: Path) -> None:
    done = cli("compile", files.program, "-o", tmp_path / "out", CXX="no-such-compiler")
    assert done.code == 1
    assert "no-such-compiler" in done.err
    assert "Traceback" not in done.err


def test_wrong_settings_are_usage_errors(cli: Server, files: Files, tmp_path: Path) -> None:
    compiling = ("compile", files.program, "-o", tmp_path / "out")
    assert cli.error(*compiling, "--option", "nothing=1", code=2)["type"] == "ConfigError"
    assert cli.error(*compiling, "--option", "freezing=true")["type"] == "NotRefittableError"
    refitting = ("refit", files.module, files.new, "-o", tmp_path / "out")
    assert cli.error(*refitting, "--verify", "nobody", code=2)["type"] == "ConfigError"
    assert cli.error(*refitting, "--verify", "outputs", code=2)["type"] == "ConfigError"
    without = ("--no-plugin", "aotinductor", *refitting)
    assert cli.error(*without)["type"] == "UnsupportedTargetError"


def test_weights_that_do_not_fit(cli: Server, files: Files, tmp_path: Path) -> None:
    wrong = load_file(files.new)
    wrong["a.weight"] = wrong["a.weight"].T.contiguous()
    wrong["b.weight"][0, 0] = float("nan")
    wrong["scale"] = wrong["scale"].double()
    wrong["a.bais"] = wrong.pop("a.bias")
    path, out = tmp_path / "wrong.safetensors", tmp_path / "out"
    save_file(wrong, path)
    refusal = cli.error("refit", files.module, path, "-o", out)
    assert refusal["type"] == "WeightMismatchError"
    assert {(one["subject"], one["kind"]) for one in refusal["problems"]} == {
        ("a.weight", "shape"),
        ("b.weight", "non-finite"),
        ("scale", "dtype"),
        ("a.bais", "unexpected"),
        ("a.bias", "missing"),
    }
    assert not out.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"0": torch.zeros(3, 5)},
        {"0": torch.zeros(3, 16, dtype=torch.float64)},
        {"0": torch.zeros(3, 16), "1": torch.zeros(1)},
        {"1": torch.zeros(3, 16)},
        {"nobody": torch.zeros(3, 16)},
    ],
)
def test_inputs_that_do_not_fit(
    cli: Server, files: Files, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    inputs, out = tmp_path / "inputs.safetensors", tmp_path / "out"
    save_file(tensors, inputs)
    refusal = cli.error("refit", files.module, files.new, "-o", out, "--inputs", inputs, code=2)
    assert refusal["type"] == "ConfigError"
    assert not out.exists()
