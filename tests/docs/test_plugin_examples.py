"""examples/plugins/ and docs/reference/parts.md: each example runs and prints what it says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from refitkit import hookspecs
from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.network.planning import PlannedProgram
from refitkit.builtin.torch_tensorrt.recording import Interpreted
from refitkit.pipeline import Pipeline
from refitkit.recipe import Recorded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "plugins"
EXAMPLES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
HOOKS = {name: value for name, value in vars(hookspecs).items() if name.startswith("refitkit_")}
TOPICS = {"order_of_events", "wrap_partition"}
PARTS = (ROOT / "docs" / "reference" / "parts.md").read_text()

needs_tensorrt = pytest.mark.skipif(
    not upstream.is_installed(), reason="torch_tensorrt is not installed"
)


def told(code: str) -> list[str]:
    """The comments at the end of an example, which are what it prints."""
    return [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]


def implemented(code: str) -> dict[str, list[str]]:
    """Hooks that an example implements, with the arguments that they take."""
    return {
        node.name: [one.arg for one in node.args.args if one.arg != "self"]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("refitkit_")
    }


def test_each_hook_has_an_example() -> None:
    assert EXAMPLES.keys() == HOOKS.keys() | TOPICS


@pytest.mark.parametrize("hook", HOOKS)
def test_an_example_implements_its_hook(hook: str) -> None:
    assert hook in implemented(EXAMPLES[hook])
    for name, arguments in implemented(EXAMPLES[hook]).items():
        assert set(arguments) <= set(inspect.signature(HOOKS[name]).parameters)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_tensorrt if n == "wrap_partition" else ()) for n in EXAMPLES],
)
def test_an_example_prints_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLES[name]
    exec(compile(code, f"{name}.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - the page's
    assert told(code)
    assert capsys.readouterr().out.splitlines() == told(code)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_example_needs_its_hook(hook: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the mark, refitkit does not call the hook, and the example prints something else."""
    marked = rf"@refitkit\.hookimpl\n(    def {hook}\()"
    code, count = re.subn(marked, r"@staticmethod\n\1", EXAMPLES[hook])
    assert count == 1
    failed = False
    try:
        exec(compile(code, f"{hook}.py", "exec"), {"__name__": "__main__"})  # noqa: S102
    except Exception:  # noqa: BLE001 - any error shows that the hook is needed
        failed = True
    assert failed or capsys.readouterr().out.splitlines() != told(EXAMPLES[hook])


# -- parts.md -----------------------------------------------------------------------------------


def test_the_page_about_parts_has_the_example() -> None:
    (code,) = re.findall(r"<!-- example: wrap_partition -->\n```python\n(.*?)```", PARTS, re.DOTALL)
    assert code == EXAMPLES["wrap_partition"]
    assert PARTS.count("```python") == 1


def test_the_page_names_members_that_exist() -> None:
    table = PARTS.partition("| member |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert len(named) == 8
    for kind in (PlannedProgram, Interpreted):
        assert dataclasses.is_dataclass(kind)
        assert all(hasattr(kind, name) or name in kind.__dataclass_fields__ for name in named)
    assert hasattr(PlannedProgram, "all_slots")
    assert not hasattr(Interpreted, "all_slots")
    recorded = re.search(r"^\| `recorded` .*follow from the program: (.*) \|$", table, re.MULTILINE)
    assert recorded
    fields = [field.name for field in dataclasses.fields(Recorded)]
    assert re.findall(r"`(\w+)`", recorded[1]) == fields


def test_links_of_the_page_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PARTS):
        assert (ROOT / "docs" / "reference" / link).exists(), link
    for path in re.findall(r"`(refitkit/[\w/.]+)`", PARTS):
        assert (ROOT / path).exists(), path


class Looker:
    """Keeps the parts that other plugins return."""

    name = "looker"

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    @hookspecs.hookimpl(wrapper=True)
    def refitkit_partition(self, program: Any) -> Any:
        self.program, self.parts = program, (yield)
        return self.parts


@needs_tensorrt
@pytest.mark.parametrize("backend", ["torch_tensorrt", "tensorrt_network"])
def test_offline_parts_of_tensorrt_are_one_object(backend: str) -> None:
    import torch

    layers = torch.nn.Linear(4, 6), torch.nn.Sigmoid(), torch.nn.Linear(6, 4)
    program = torch.export.export(torch.nn.Sequential(*layers).eval(), (torch.ones(2, 4),))
    executed = ["torch.ops.aten.sigmoid.default"]
    options = {"min_block_size": 1, "torch_executed_ops": executed}
    looker = Looker()
    Pipeline(plugins=[looker]).plan(program, backend=backend, options=options, prove=False)
    (planned,) = {id(part): part for part in looker.parts.values()}.values()
    assert isinstance(planned, PlannedProgram)
    names = [one.name for one in planned.structures]
    assert list(looker.parts) == names
    assert f"`{names[0]}`" in PARTS
    assert f"`{names[1]}`" in PARTS
    assert [one.accelerated for one in planned.structures] == [True, False, True]
    values = planned.values()
    assert values.keys() == planned.slots.keys()
    for slot in planned.all_slots:
        value = values[slot.engine][slot.name]
        assert (str(value.dtype), value.shape) == (f"torch.{slot.dtype}", (slot.count,))


def test_the_part_of_aotinductor_is_the_program() -> None:
    from refitkit.builtin.aotinductor import refitkit_partition

    program: Any = object()
    assert refitkit_partition(program, "aotinductor") == {"model": program}
