"""Write docs/reference/hooks.md and protocols.md from docstrings and from examples/plugins/.

usage: python scripts/reference_pages.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit import errors, hookspecs, model, protocols
from refitkit.model import events

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
EXAMPLES = ROOT / "examples" / "plugins"
LONGEST = 100  # as long as a line of code
SELF = "<!-- written by scripts/reference_pages.py: edit {} -->"

# -- parts that both pages have -----------------------------------------------------------------


def signature(name: str, arguments: list[str], result: str) -> str:
    """The head of a function as it is written, an argument a line if it is too long for one."""
    line = f"def {name}({', '.join(arguments)}) -> {result}"
    if len(line) <= LONGEST:
        return line
    inside = "".join(f"    {one},\n" for one in arguments)
    return f"def {name}(\n{inside}) -> {result}"


def fenced(language: str, text: str) -> str:
    """A block of code or of plain text."""
    return f"```{language}\n{text}\n```"


def prose(docstring: str) -> str:
    """The docstring of a module as Markdown: a role of Sphinx becomes the name that it shows."""
    text = re.sub(r":\w+:`~[\w.]+\.(\w+)`", r"``\1``", inspect.cleandoc(docstring))
    return re.sub(r":\w+:`([^`]+)`", r"``\1``", text)


def example(name: str) -> str:
    """The text of an example without its last line break."""
    return (EXAMPLES / f"{name}.py").read_text().rstrip("\n")


# -- hooks.md -----------------------------------------------------------------------------------


def hooks() -> dict[str, Any]:
    """All hook specifications by name, in the order in which they stand."""
    return {n: f for n, f in vars(hookspecs).items() if n.startswith("refitkit_")}


def deprecated(function: Any) -> list[str]:
    """A line for each argument that is on its way out."""
    marked = function.refitkit_spec["warn_on_impl_args"] or {}
    return [f"**Deprecated:** the argument `{name}`. {said}" for name, said in marked.items()]


def hook_page(specifications: dict[str, Any] | None = None) -> str:
    """The whole page about hooks.

    Args:
        specifications: Hooks by name; all that there are where None.
    """
    parts = ["# Hooks", SELF.format("refitkit/hookspecs.py and examples/plugins/")]
    parts.append(inspect.getdoc(hookspecs) or "")
    parts.append(
        "Objects that hooks return, with their members: [protocols](protocols.md). Each entry ends "
        "with an example that runs as it is. Comments at its end are what it prints. Examples make "
        "their modules with `refitkit.testing`, so they need no compiler."
    )
    for name, function in (specifications or hooks()).items():
        found = inspect.signature(function)
        arguments = [f"{one.name}: {one.annotation}" for one in found.parameters.values()]
        head = signature(name, arguments, found.return_annotation)
        parts += [f"## {name}", fenced("python", head), *deprecated(function)]
        parts.append(fenced("text", inspect.getdoc(function) or ""))
        if specifications is None:
            parts += [f"Example (`examples/plugins/{name}.py`):", fenced("python", example(name))]
    return "\n\n".join(parts) + "\n"


# -- protocols.md: classes ----------------------------------------------------------------------

FILES = {
    "backends": "Backends",
    "modules": "Opened modules",
    "engines": "Engines",
    "sources": "Weight sources",
    "transforms": "Weight transforms",
    "strategies": "Mapping strategies",
    "verifiers": "Verifiers",
    "transports": "Weight transports",
    "plans": "Plans and stored programs",
    "tools": "Tools of the pipeline",
}
"""Files of refitkit/protocols, in the order of the page, and their headings."""

OBJECTS = {
    "backends": "Backends, and parts of a program",
    "modules": "Opened modules",
    "engines": "Engines, and what they stage",
    "sources": "Weight sources",
    "transforms": "Weight transforms",
}
"""Headings of the tables of optional abilities, by file."""

CONSTRUCTED = {
    "Problem": "returned by `refitkit_check`; part of errors",
    "LayerType": "returned by `refitkit_layer_types`",
    "Slot": "in `Engine.slots`",
    "Metric": "in `OutputMeasure.metrics`",
    "TensorInfo": "returned by `WeightSource.info`; in `WeightGroup.gives`",
    "EngineMemory": "returned by `Engine.memory`",
    "LedgerRow": "in `PlanDraft.rows`",
    "SlotState": "in `LedgerRow.state`",
    "SourceRef": "in `LedgerRow.value`",
    "PinnedRef": "in `LedgerRow.value`",
    "OutputMeasure": "in `VerificationResult.measures` and `Made.measures`",
    "VerificationResult": "returned by the check of a `Verifier`: the verdict",
    "Rules": "a setting of users, which plugins may read",
    "Rename": "in `Rules.rename`",
    "Pack": "in `Rules.pack`",
}
"""Values that plugins construct or read as settings, and where they go."""


def written(node: ast.AST) -> str:
    """A piece of code on one line, with the quotes that ruff writes."""
    return ast.unparse(node).replace("'", '"')


def class_nodes(module: Any) -> dict[str, ast.ClassDef]:
    """Public classes of a file as they are written, by name."""
    body = ast.parse(inspect.getsource(module)).body
    return {n.name: n for n in body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")}


def class_head(node: ast.ClassDef) -> str:
    """The class with its fields, as it is written."""
    bases = [written(base) for base in node.bases]
    lines = [f"class {node.name}({', '.join(bases)})" if bases else f"class {node.name}"]
    kinds = (ast.AnnAssign, ast.Assign) if "StrEnum" in bases else ast.AnnAssign
    lines += [f"    {written(one)}" for one in node.body if isinstance(one, kinds)]
    if len(lines) > 1:
        lines[0] += ":"
    return "\n".join(lines)


def members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Public methods and properties."""
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
            yield one


def member_head(node: ast.FunctionDef) -> str:
    """A method or property as it is written."""
    given, kept = node.args, [written(one) for one in node.decorator_list]
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    arguments = [_argument(*one) for one in zip(positional, defaults, strict=True)]
    if given.kwonlyargs:
        arguments.append("*")
        pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
        arguments += [_argument(*one) for one in pairs]
    head = signature(node.name, arguments, written(node.returns) if node.returns else "None")
    return "\n".join([*(f"@{one}" for one in kept), head])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = written(argument)
    return text if default is None else f"{text} = {written(default)}"


def class_entry(node: ast.ClassDef) -> list[str]:
    """A class with its docstring, and then each member with its own."""
    parts = [f"### {node.name}", fenced("python", class_head(node))]
    parts.append(fenced("text", ast.get_docstring(node) or ""))
    for one in members(node):
        parts += [f"#### {node.name}: {one.name}", fenced("python", member_head(one))]
        parts.append(fenced("text", ast.get_docstring(one) or ""))
    return parts


# -- protocols.md: abilities --------------------------------------------------------------------


def ability_facts(node: ast.ClassDef) -> tuple[str, str] | None:
    """Who asks for an optional ability, and what an object gains; None for other classes."""
    text = " ".join((ast.get_docstring(node) or "").split())
    found = re.search(r"Asked by: (.*) Gain: (.*)$", text)
    return (found[1], found[2]) if found else None


def abilities() -> dict[str, list[ast.ClassDef]]:
    """Optional abilities by the file that they are in."""
    found = {file: class_nodes(import_module(f"refitkit.protocols.{file}")) for file in FILES}
    return {
        file: optional
        for file, nodes in found.items()
        if (optional := [node for node in nodes.values() if ability_facts(node)])
    }


def link(name: str, heading: str | None = None) -> str:
    """A link to an entry of the page."""
    return f"[`{name}`](#{(heading or name).lower()})"


def ability_parts() -> list[str]:
    """The section about optional abilities: a table for each kind of object, then all entries."""
    parts = ["## Optional abilities"]
    parts.append(
        "An object has an ability if it has all members of the protocol. refitkit looks for them; "
        "nothing is registered or inherited. Without the ability, the object works, and lacks the "
        "gain."
    )
    for file, nodes in abilities().items():
        rows = [
            f"| {link(node.name)} | {asked} | {gain} |"
            for node in nodes
            for asked, gain in [ability_facts(node) or ("", "")]
        ]
        title = f"**{OBJECTS[file]}** (`refitkit/protocols/{file}.py`)"
        parts += [title, table(("ability", "who asks", "gain"), rows)]
    for nodes in abilities().values():
        for node in nodes:
            parts += class_entry(node)
    return parts


# -- protocols.md: values and events ------------------------------------------------------------


def table(titles: Iterable[str], rows: Iterable[str]) -> str:
    """A table of Markdown."""
    titles = list(titles)
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    return "\n".join([*lines, *rows])


def value_map() -> list[tuple[str, str, str]]:
    """Each public name of ``refitkit.model``: its group, its name, and what it is."""
    found, group = [], ""
    for line in (model.__doc__ or "").splitlines():
        if line.endswith(":"):
            group = line.removesuffix(":")
        elif match := re.fullmatch(r"\* ``(\w+)``: (.*)", line):
            found.append((group, match[1], match[2]))
    return found


def value_parts() -> list[str]:
    """The section about values of ``refitkit.model`` and ``Problem``."""
    nodes = dict(class_nodes(errors))
    for file in ("slot", "plan", "report", "rules"):
        nodes |= class_nodes(import_module(f"refitkit.model.{file}"))
    parts = ["## Values", "Values are frozen. `refitkit.model` has all of them, except `Problem`,"]
    parts[-1] += (
        " which is in `refitkit.errors`. Plugins construct these, or read them as settings:"
    )
    rows = [f"| {link(name)} | {where} |" for name, where in CONSTRUCTED.items()]
    parts.append(table(("value", "where it goes"), rows))
    parts.append("All values of `refitkit.model`:")
    rows = []
    for group, name, text in value_map():
        named = re.search(r"\(``(\w+\.py)``\)", group)
        assert named, f"the group {group!r} names no file"  # noqa: S101 - a fault of the map
        has_entry = name in CONSTRUCTED or named[1] == "events.py"
        shown = link(name) if has_entry else f"`{name}`"
        rows.append(f"| {shown} | {text} | [{named[1]}](../../refitkit/model/{named[1]}) |")
    parts.append(table(("value", "what it is", "fields"), rows))
    for name in CONSTRUCTED:
        parts += class_entry(nodes[name])
    return parts


def event_parts() -> list[str]:
    """The sections about events and their order."""
    nodes = class_nodes(events)
    parts = ["## Events"]
    parts.append("Events go to the hook [`refitkit_event`](hooks.md#refitkit_event).")
    for node in nodes.values():
        parts += class_entry(node)
    code, printed = split_output(example("order_of_events"))
    parts += ["## Order of events", prose(events.__doc__ or "")]
    parts += ["An example (`examples/plugins/order_of_events.py`):", fenced("python", code)]
    parts += ["It prints:", fenced("text", printed)]
    return parts


def split_output(text: str) -> tuple[str, str]:
    """The code of an example, and what the comments at its end say that it prints."""
    lines = text.splitlines()
    count = next((n for n, line in enumerate(reversed(lines)) if not line.startswith("# ")), 0)
    printed = [line.removeprefix("# ") for line in lines[len(lines) - count :]]
    return "\n".join(lines[: len(lines) - count]), "\n".join(printed)


def protocol_page() -> str:
    """The whole page about protocols, values and events."""
    edit = "refitkit/protocols/, refitkit/model/ and examples/plugins/order_of_events.py"
    parts = ["# Protocols, values and events", SELF.format(edit)]
    titles = [*FILES.values(), "Optional abilities", "Values", "Events", "Order of events"]
    parts.append(
        "Everything that goes between refitkit and a plugin, except the [hooks](hooks.md). "
        "[Writing a plugin](../guides/writing-plugins.md) is the introduction. The parts that "
        "`refitkit_partition` of built-in backends returns have [a page of their own](parts.md)."
    )
    parts.append("\n".join(f"- [{one}](#{one.lower().replace(' ', '-')})" for one in titles))
    parts.append((inspect.getdoc(protocols) or "").partition("\n\n")[0])
    for file, title in FILES.items():
        module = import_module(f"refitkit.protocols.{file}")
        parts += [f"## {title}", prose(module.__doc__ or "")]
        if optional := abilities().get(file):
            names = ", ".join(link(node.name) for node in optional)
            parts.append(f"[Optional abilities](#optional-abilities): {names}.")
        for node in class_nodes(module).values():
            if not ability_facts(node):
                parts += class_entry(node)
    return "\n\n".join([*parts, *ability_parts(), *value_parts(), *event_parts()]) + "\n"


# -- command ------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """All pages by the name of their file."""
    return {"hooks.md": hook_page(), "protocols.md": protocol_page()}


def main() -> int:
    """Write the pages, or with --check report whether they are up to date."""
    if "--check" not in sys.argv[1:]:
        for name, text in pages().items():
            (REFERENCE / name).write_text(text)
        return 0
    code = 0
    for name, text in pages().items():
        same = (REFERENCE / name).exists() and (REFERENCE / name).read_text() == text
        print(f"docs/reference/{name} is", "up to date" if same else "out of date")
        code |= not same
    return code


if __name__ == "__main__":
    raise SystemExit(main())
