"""Measure the structure of ``refitkit/``: files, imports and import circles of each package.

Imports for types alone count, too. ``--check``, which ``make check`` runs, fails where a package
has more than its limits, which are what it had when they were written. Lower them with the numbers.

usage: python scripts/structure.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import grimp
import networkx as nx

ROOT = Path(__file__).resolve().parent.parent


class Size(NamedTuple):
    """What a package has.

    Attributes:
        files: Its files, those of packages in it included.
        imports: How often one of them imports another one.
        in_circles: Its files that import one another in a circle.
    """

    files: int
    imports: int
    in_circles: int


LIMITS = {
    "refitkit": Size(208, 1161, 19),
    "refitkit.builtin": Size(66, 123, 0),
    "refitkit.builtin.aotinductor": Size(9, 18, 0),
    "refitkit.builtin.checks": Size(3, 2, 0),
    "refitkit.builtin.merges": Size(3, 2, 0),
    "refitkit.builtin.rules": Size(5, 5, 0),
    "refitkit.builtin.strategies": Size(2, 1, 0),
    "refitkit.builtin.torch_tensorrt": Size(32, 79, 0),
    "refitkit.builtin.verify": Size(3, 2, 0),
    "refitkit.builtin.weights": Size(7, 12, 0),
    "refitkit.cli": Size(23, 66, 0),
    "refitkit.files": Size(7, 3, 0),
    "refitkit.model": Size(6, 10, 0),
    "refitkit.pipeline": Size(47, 159, 19),
    "refitkit.program": Size(9, 12, 0),
    "refitkit.protocols": Size(10, 26, 0),
    "refitkit.recipe": Size(17, 36, 0),
    "refitkit.testing": Size(15, 40, 0),
}
"""The most that each package may have."""


def main() -> int:
    """Print a table; 1 where ``--check`` is given and something is above its limit."""
    parser = argparse.ArgumentParser(description="Measure the structure of refitkit.")
    parser.add_argument("--check", action="store_true", help="fail above the limits")
    check = parser.parse_args().check
    sizes, circles = measured()
    print(f"{'package':32} {'files':>6} {'imports':>8} {'in circles':>11}")
    for package, size in sizes.items():
        print(f"{package:32} {size.files:6} {size.imports:8} {size.in_circles:11}")
    for circle in circles:
        print(f"circle of {len(circle)}: {', '.join(circle)}")
    faults = list(_faults(sizes)) if check else []
    print("\n".join(faults), end="\n" if faults else "")
    return bool(faults)


def measured() -> tuple[dict[str, Size], list[list[str]]]:
    """Sizes by package, and circles."""
    graph = grimp.build_graph("refitkit", cache_dir=None)
    arrows = nx.DiGraph(
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
    )
    parts = nx.strongly_connected_components(arrows)
    circles = sorted(sorted(part) for part in parts if len(part) > 1)
    circular = {module for circle in circles for module in circle}
    sizes = {}
    for package in sorted(_packages(graph.modules)):
        inside = {m for m in graph.modules if m == package or m.startswith(f"{package}.")}
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
