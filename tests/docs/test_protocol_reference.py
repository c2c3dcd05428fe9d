"""docs/reference/protocols.md is what protocols, values and events say of themselves."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refitkit
from refitkit import model, protocols
from refitkit.model import Event, Failed, StageFinished, StageStarted, Started, events
from refitkit.pipeline import Pipeline
from refitkit.testing.fakes import OpenEngine
from refitkit.testing.scenes import VERDICT, ScenePlugin, planned_module
from tests.fakes import FakePlugin, make_module, weights_for

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "protocols.md").read_text()
ENTRY = re.compile(
    r"^####? (\w+(?:: \w+)?)\n\n```python\n(.*?)\n```\n\n```text\n(.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
ENTRIES = {name: (code, text) for name, code, text in ENTRY.findall(PAGE)}
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "reference_pages.py"))
OPTIONAL = {node.name for nodes in SCRIPT["abilities"]().values() for node in nodes}
MAP = re.compile(r"^\* ``(\w+)``: \S.*$", re.MULTILINE)


def test_the_page_is_up_to_date() -> None:
    assert SCRIPT["protocol_page"]() == PAGE, "run python scripts/reference_pages.py"


@pytest.mark.parametrize("name", protocols.__all__)
def test_each_protocol_has_an_entry_with_all_members(name: str) -> None:
    kind = getattr(protocols, name)
    assert ENTRIES[name][1] == inspect.getdoc(kind)
    fields = getattr(kind, "__dataclass_fields__", getattr(kind, "_fields", ()))
    for member, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else value
        if member.startswith("_") or member in fields or not inspect.isfunction(function):
            continue
        code, text = ENTRIES[f"{name}: {member}"]
        assert text == inspect.getdoc(function)
        shown = ast.parse(f"{code}: ...").body[0]
        assert isinstance(shown, ast.FunctionDef)
        assert [one.arg for one in shown.args.args + shown.args.kwonlyargs] == list(
            inspect.signature(function).parameters
        )
    for field in fields:
        assert re.search(rf"^    {field}: ", ENTRIES[name][0], re.MULTILINE), field


def test_abilities_have_a_section_of_their_own() -> None:
    section = PAGE.partition("\n## Optional abilities\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^### (\w+)$", section, re.MULTILINE)) == OPTIONAL
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert {name for name, *_ in rows} == OPTIONAL
    assert all(anchor == name.lower() for name, anchor, *_ in rows)


def test_the_map_of_protocols_says_which_ones_are_optional() -> None:
    """So each of those says who asks for it, and what an object gains."""
    text = (protocols.__doc__ or "").partition("Optional abilities are")[2]
    assert set(MAP.findall(text)) == OPTIONAL


def test_headings_are_unique_and_links_exist() -> None:
    headings = [line.lstrip("# ") for line in re.findall(r"^#+ .*$", PAGE, re.MULTILINE)]
    # comments of code have one mark and no blank line after them
    anchors = [h.lower().replace(" ", "-").replace(":", "") for h in headings]
    for anchor in re.findall(r"\]\(#([\w-]+)\)", PAGE):
        assert anchors.count(anchor) == 1, anchor
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / "reference" / link).exists(), link


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [model, protocols])
def test_the_docstring_is_a_map_of_all_public_names(module: Any) -> None:
    """``help(module)`` prints it before the long list of classes."""
    assert sorted(MAP.findall(module.__doc__)) == sorted(module.__all__)


@pytest.mark.parametrize("module", [model, protocols])
def test_help_begins_with_the_map(module: Any) -> None:
    before, _, after = pydoc.plaintext.document(module).partition("\nCLASSES\n")
    assert after
    assert sorted(re.findall(r"^ +\* ``(\w+)``: ", before, re.MULTILINE)) == sorted(module.__all__)


def test_values_are_in_the_table_with_their_file() -> None:
    table = PAGE.partition("| value | what it is | fields |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| \[?`(\w+)`(?:\]\(#\w+\))? \| .+ \| \[(\w+\.py)\]", table, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(model.__all__)
    for name, file in rows:
        written = (ROOT / "refitkit" / "model" / file).read_text()
        assert re.search(rf"^(class {name}\b|def {name}\b|{name}\b.* = )", written, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPT["CONSTRUCTED"])
def test_a_value_that_plugins_construct_has_an_entry(name: str) -> None:
    kind = getattr(model, name, None) or getattr(refitkit, name)
    code, text = ENTRIES[name]
    assert text == inspect.getdoc(kind)
    fields = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    for field in fields:
        assert re.search(rf"^    {field}: ", code, re.MULTILINE), field


# -- events -------------------------------------------------------------------------------------


def test_each_event_has_an_entry_with_its_fields() -> None:
    kinds = [
        one for one in vars(events).values() if inspect.isclass(one) and issubclass(one, Event)
    ]
    assert len(kinds) == 9
    for kind in kinds:
        own = [name for name in kind.__annotations__ if name not in Event.__annotations__]
        for field in kind.__annotations__ if kind is Event else own:
            assert re.search(rf"^    {field}: ", ENTRIES[kind.__name__][0], re.MULTILINE)


STAGES = {
    verb.strip("`"): [stage.strip() for stage in stages.split(",") if stage.strip() != "none"]
    for verbs, stages in re.findall(r"^\* (``[^:]+``): (.*)$", events.__doc__ or "", re.MULTILINE)
    for verb in verbs.split(", ")
}


class Listener:
    name = "listener"

    def __init__(self) -> None:
        self.stages: dict[str, list[str]] = {}

    @refitkit.hookimpl
    def refitkit_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self.stages[event.verb] = []
        elif isinstance(event, StageStarted):
            self.stages[event.verb].append(event.stage)


def test_the_order_of_events_names_every_verb() -> None:
    text = " ".join((Event.__doc__ or "").split())
    listed = re.search(r"verb: Name of the operation: (.*?)\.", text)
    assert listed
    assert set(re.findall(r"``(\w+)``", listed[1])) == STAGES.keys()


VERBS: dict[str, Callable[[Pipeline, Any, Path], object]] = {
    "load": lambda pipeline, _, __: pipeline.load(make_module(), warm=True),
    "refit": lambda pipeline, compiled, _: pipeline.refit(compiled, new(compiled, 2), delta=True),
    "restore": lambda pipeline, compiled, _: pipeline.restore(compiled, 0),
    "copy": lambda pipeline, compiled, _: pipeline.copy(compiled),
    "verify": lambda pipeline, compiled, _: pipeline.verify(compiled, new(compiled, 1)),
    "diff": lambda pipeline, compiled, _: pipeline.diff(new(compiled, 1), new(compiled, 2)),
    "open_weights": lambda pipeline, compiled, _: pipeline.open_weights(new(compiled, 1)),
    "save": lambda pipeline, compiled, folder: pipeline.save(compiled, folder / "m.fake"),
    "describe": lambda pipeline, compiled, folder: pipeline.describe(folder / "none"),
    "read_plan": lambda pipeline, compiled, folder: pipeline.read_plan(folder / "none"),
}


def new(compiled: Any, fill: float) -> dict[str, torch.Tensor]:
    return weights_for(compiled.opened, float(fill))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_the_stages_that_the_page_says(verb: str, tmp_path: Path) -> None:
    """Those of ``compile`` and its trials are in the example that the page prints."""
    listener = Listener()
    pipeline = Pipeline(plugins=[FakePlugin(), listener])
    compiled = pipeline.load(make_module())
    pipeline.refit(compiled, new(compiled, 1))
    try:
        VERBS[verb](pipeline, compiled, tmp_path)
    except refitkit.RefitError:
        assert verb in {"describe", "read_plan"}
    said = [stage.strip("[]") for stage in STAGES[verb]]
    assert listener.stages[verb] == said


def test_the_stages_of_planning_are_those_in_the_code() -> None:
    written = (ROOT / "refitkit" / "pipeline" / "planning.py").read_text()
    stages = re.findall(r'clock\.stage\("(\w+)"\)', written)
    said = [*STAGES["compile"], *STAGES["plan"]]
    assert stages == [stage.strip("[]") for stage in said]


def test_rejected_weights_finish_the_stage_and_fail_the_refit() -> None:
    found: list[Event] = []

    class Collector:
        name = "collector"

        @refitkit.hookimpl
        def refitkit_event(self, event: Event) -> None:
            found.append(event)

    plugin = ScenePlugin()
    plugin.verdict = False
    pipeline = Pipeline(plugins=[plugin, Collector()])
    compiled = pipeline.load(planned_module([OpenEngine("model", {"weight": torch.zeros(2)})]))
    with pytest.raises(refitkit.VerificationError):
        pipeline.refit(compiled, {"weight": torch.ones(2)}, verify=VERDICT)
    last = [(type(event), getattr(event, "stage", "")) for event in found[-2:]]
    assert last == [(StageFinished, "verify"), (Failed, "")]
