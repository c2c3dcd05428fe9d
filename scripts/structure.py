"""Measure the structure of ``refitkit/``: files, imports and import circles of each package.

Imports for types alone count, too. ``make check`` runs ``--check``, which fails if a package has
more than its limits. The limits are the measured values; lower them whenever the values fall.
``--goals`` prints the goals of the rebuild beside the values reached. It compiles a small module
to count the files and functions that one warm refit enters.

usage: python scripts/structure.py [--check] [--goals]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grimp
import networkx as nx

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
_TENSORRT = "refitkit.builtin.torch_tensorrt"


class Size(NamedTuple):
    """The size of a package.

    Attributes:
        files: Number of its files, with those of packages in it.
        imports: Number of pairs of its files of which one imports the other.
        in_circles: Number of its files that are part of an import circle.
    """

    files: int
    imports: int
    in_circles: int


LIMITS = {
    "refitkit": Size(222, 1222, 0),
    "refitkit.builtin": Size(90, 192, 0),
    "refitkit.builtin.aotinductor": Size(14, 37, 0),
    "refitkit.builtin.checks": Size(3, 2, 0),
    "refitkit.builtin.merges": Size(3, 2, 0),
    "refitkit.builtin.rules": Size(5, 5, 0),
    "refitkit.builtin.strategies": Size(2, 1, 0),
    "refitkit.builtin.torch_tensorrt": Size(48, 127, 0),
    "refitkit.builtin.transports": Size(4, 4, 0),
    "refitkit.builtin.verify": Size(3, 2, 0),
    "refitkit.builtin.weights": Size(7, 12, 0),
    "refitkit.cli": Size(23, 66, 0),
    "refitkit.files": Size(7, 3, 0),
    "refitkit.live": Size(3, 3, 0),
    "refitkit.model": Size(8, 14, 0),
    "refitkit.pipeline": Size(24, 119, 0),
    "refitkit.program": Size(9, 12, 0),
    "refitkit.protocols": Size(12, 38, 0),
    "refitkit.recipe": Size(20, 41, 0),
    "refitkit.testing": Size(15, 42, 0),
}
"""The most that each package may have."""

GOALS = {
    "files in refitkit/": 215,
    "files of pipeline/": 18,
    "files of recipe/": 15,
    "files of torch_tensorrt/ (top)": 21,
    "imports inside pipeline/": 55,
    "imports inside recipe/": 28,
    "imports inside torch_tensorrt/ (top)": 54,
    "files in import circles": 0,
    "files entered by one warm refit": 25,
    "lines without cli/ and testing/": 26_000,
}
"""The goals of the rebuild, written before it began."""


def main() -> int:
    """Print a table. Returns 1 if ``--check`` is given and a value is above its limit."""
    parser = argparse.ArgumentParser(description="Measure the structure of refitkit.")
    parser.add_argument("--check", action="store_true", help="fail above the limits")
    parser.add_argument("--goals", action="store_true", help="print the goals beside the values")
    arguments = parser.parse_args()
    check = arguments.check
    imports = _imports()
    sizes, circles = measured(imports)
    if arguments.goals:
        print_goals(sizes, imports)
        return 0
    print(f"{'package':32} {'files':>6} {'imports':>8} {'in circles':>11}")
    for package, size in sizes.items():
        print(f"{package:32} {size.files:6} {size.imports:8} {size.in_circles:11}")
    for circle in circles:
        print(f"circle of {len(circle)}: {', '.join(circle)}")
    faults = list(_faults(sizes)) if check else []
    print("\n".join(faults), end="\n" if faults else "")
    return bool(faults)


def print_goals(sizes: dict[str, Size], imports: nx.DiGraph) -> None:
    """Print the goals beside the values."""
    top = {m for m in imports if m.rpartition(".")[0] == _TENSORRT or m == _TENSORRT}
    files, functions = entered_by_a_refit()
    values = {
        "files in refitkit/": sizes["refitkit"].files,
        "files of pipeline/": sizes["refitkit.pipeline"].files - 1,  # without __init__.py
        "files of recipe/": sizes["refitkit.recipe"].files - 1,
        "files of torch_tensorrt/ (top)": len(top),
        "imports inside pipeline/": sizes["refitkit.pipeline"].imports,
        "imports inside recipe/": sizes["refitkit.recipe"].imports,
        "imports inside torch_tensorrt/ (top)": imports.subgraph(top).number_of_edges(),
        "files in import circles": sizes["refitkit"].in_circles,
        "files entered by one warm refit": len(files),
        "lines without cli/ and testing/": _lines(),
    }
    print(f"{'':38} {'goal':>7} {'value':>7}")
    for name, goal in GOALS.items():
        print(f"{name:38} {goal:7} {values[name]:7}")
    print(f"{'functions entered by one warm refit':38} {'':7} {len(functions):7}")
    print("files entered:", ", ".join(sorted(files)))


def entered_by_a_refit() -> tuple[set[str], set[str]]:
    """Files of refitkit, and functions in them, that one warm refit of four slots enters."""
    import torch  # noqa: PLC0415 - the other measures do not need it

    import refitkit  # noqa: PLC0415

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    compiled = refitkit.compile(torch.export.export(model, (torch.randn(1, 4),)))
    pipeline = refitkit.Pipeline()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pipeline.refit(compiled, weights)
    files, functions, package = set[str](), set[str](), str(ROOT / "refitkit")

    def note(frame: FrameType, event: str, _argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(package):
            files.add(str(Path(name).relative_to(package)))
            functions.add(f"{name}:{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        pipeline.refit(compiled, weights)
    finally:
        sys.setprofile(None)
    return files, functions


def _lines() -> int:
    paths = (ROOT / "refitkit").rglob("*.py")
    kept = (p for p in paths if p.relative_to(ROOT / "refitkit").parts[0] not in {"cli", "testing"})
    return sum(len(path.read_text().splitlines()) for path in kept)


def _imports() -> nx.DiGraph:
    """All modules, with an edge for each import of one by another."""
    graph = grimp.build_graph("refitkit", cache_dir=None)
    imports = nx.DiGraph()
    imports.add_nodes_from(graph.modules)
    imports.add_edges_from(
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
    )
    return imports


def measured(arrows: nx.DiGraph) -> tuple[dict[str, Size], list[list[str]]]:
    """Sizes by package, and the import circles, of a graph of imports."""
    modules = set(arrows)
    parts = nx.strongly_connected_components(arrows)
    circles = sorted(sorted(part) for part in parts if len(part) > 1)
    circular = {module for circle in circles for module in circle}
    sizes = {}
    for package in sorted(_packages(modules)):
        inside = {m for m in modules if m == package or m.startswith(f"{package}.")}
        imports = arrows.subgraph(inside).number_of_edges()
        sizes[package] = Size(len(inside), imports, len(circular & inside))
    return sizes, circles


def _packages(modules: set[str]) -> set[str]:
    """The whole, its packages, and families of built-in plugins."""
    wholes = {"refitkit", "refitkit.builtin"}
    children = {m for m in modules if m.rpartition(".")[0] in wholes}
    return {"refitkit"} | {m for m in children if any(o.startswith(f"{m}.") for o in modules)}


def _faults(sizes: dict[str, Size]) -> list[str]:
    faults = []
    for package, size in sizes.items():
        limits = LIMITS.get(package)
        if limits is None:
            faults.append(f"{package} has no limits in scripts/structure.py")
            continue
        faults += [
            f"{package}: {found} {what.replace('_', ' ')}, the limit is {limit}"
            for what, found, limit in zip(Size._fields, size, limits, strict=True)
            if found > limit
        ]
    return faults


if __name__ == "__main__":
    sys.exit(main())
