"""What commands of plugins share with ``refitkit refit``: options, checks of files, the ending."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import pytest
import torch
from safetensors.torch import save_file

import refitkit
from refitkit.cli import api
from refitkit.cli.api import RefitOptions, Session, common_options, refit_options, run_refit
from tests.fakes import Opener, make_module, same_state, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fakes import FakeModule
    from tests.unit.cli.conftest import Outcome

FILL = 7.0


class Filling:
    """A plugin with a command of its own: it fills a module with one number."""

    name = "filling"

    def __init__(self, module: FakeModule, *files: Path, **options: bool) -> None:
        self.module, self.files, self.options = module, files, options
        self.given: dict[str, Any] = {}

    @refitkit.hookimpl
    def refitkit_register_commands(self, cli: click.Group) -> None:
        @cli.command("fill")
        @click.argument("module")
        @refit_options(**self.options)
        @click.option("--half", is_flag=True)
        @common_options
        @click.pass_obj
        def fill(session: Session, /, module: str, *, half: bool, **given: Any) -> None:
            """Fill MODULE."""
            self.given = given
            options = RefitOptions(module, **given)
            options.check_files(*self.files)
            weights = weights_for(self.module, FILL)
            if half:
                weights = {name: value for name, value in weights.items() if "bias" in name}
            run_refit(session, options, weights, partial=half, settings={"changes": "off"})


@pytest.fixture
def module() -> FakeModule:
    return make_module(2)


@pytest.fixture
def fill(run: Callable[..., Outcome], module: FakeModule) -> Callable[..., Outcome]:
    def do(*args: object, files: tuple[Path, ...] = (), **options: bool) -> Outcome:
        return run("fill", *args, plugins=[Opener(module), Filling(module, *files, **options)])

    return do


def test_the_module_is_refitted_and_written_and_the_report_is_the_result(
    fill: Callable[..., Outcome], module: FakeModule, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = fill("fake:module", "-o", out, "--json")
    assert outcome.code == 0
    report = refitkit.RefitReport.model_validate_json(outcome.out)
    assert (report.outcome, report.slots_written, report.changes) == ("committed", 4, ())
    assert report.verification is not None
    assert same_state(module.by_slot(), weights_for(module, FILL))
    assert out.exists()
    printed = fill("fake:module", "-o", out, "--verify", "none").out
    assert str(out) in printed
    assert "only staging was checked" in printed


def test_plan_inputs_and_verifier_are_those_of_the_options(
    fill: Callable[..., Outcome], module: FakeModule, tmp_path: Path
) -> None:
    inputs, other, out = tmp_path / "inputs.safetensors", tmp_path / "other", tmp_path / "out"
    save_file({"1": torch.ones(2)}, inputs)
    outcome = fill("fake:module", "-o", out, "--inputs", inputs, "--json")
    assert "without gaps" in outcome.error["message"]
    other.write_bytes(b"no plan")
    outcome = fill("fake:module", "-o", out, "--plan", other, "--json")
    assert outcome.error["type"] == "PlanMismatchError"
    outcome = fill("fake:module", "-o", out, "--verify", "strange", "--json")
    assert "strange" in outcome.error["message"]
    assert not out.exists()
    assert not same_state(module.by_slot(), weights_for(module, FILL))


def test_a_refit_in_part(fill: Callable[..., Outcome], module: FakeModule, tmp_path: Path) -> None:
    before = module.by_slot()
    assert fill("fake:module", "--half", "-o", tmp_path / "out").code == 0
    new = {n: v for n, v in weights_for(module, FILL).items() if "bias" in n}
    assert same_state(module.by_slot(), {**before, **new})


def test_where_to_write_has_to_be_said(fill: Callable[..., Outcome], tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "module.fake"
    file.write_text("old")
    assert "--output" in fill("fake:module").err
    assert "No such option" in fill("fake:module", "--in-place").err
    for args in ((), ("-o", out, "--in-place")):
        outcome = fill(file, *args, in_place=True)
        assert outcome.code == 2
        assert "either -o FILE or --in-place" in outcome.err
    assert file.read_text() == "old"
    assert fill(file, "--in-place", in_place=True).code == 0
    assert "engines" in file.read_text()


def test_nothing_that_is_read_is_written_over(fill: Callable[..., Outcome], tmp_path: Path) -> None:
    file, weights = tmp_path / "module.fake", tmp_path / "weights"
    for path in (file, weights):
        path.write_text("old")
    for path in (file, weights):
        outcome = fill(file, "-o", path, files=(weights,))
        assert outcome.code == 2
        assert "is read by this command" in outcome.err
    assert file.read_text() == weights.read_text() == "old"


def test_a_wish_takes_what_the_options_give() -> None:
    for options in ({}, {"in_place": True}):
        command = refit_options(**options)(click.Command("some"))
        names = {str(param.name) for param in command.params}
        given: dict[str, Any] = dict.fromkeys(names)
        assert RefitOptions("module", **given).module == "module"


def test_the_names_for_plugins_are_these_and_documented() -> None:
    assert api.__all__ == [
        "RefitOptions",
        "Session",
        "check_output",
        "check_readable",
        "common_options",
        "config_options",
        "file_argument",
        "file_option",
        "load_inputs",
        "load_plan",
        "main",
        "plain",
        "refit_options",
        "run_refit",
        "weight_options",
    ]
    assert all(getattr(api, name).__doc__ for name in api.__all__)
