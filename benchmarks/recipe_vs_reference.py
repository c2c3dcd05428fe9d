"""A plan's replay against the reference's refit path: speed, memory, and what planning costs.

For each model, in one process: ``torch_tensorrt``'s own way from a new module to the values of all
slots (export, lower, partition, interpret; no engine is built), and ``plan.materialize`` from the
module's state_dict, which must give the same bits. Every call gets other weights than the one
before. Peaks of memory are measured in further processes, each of which starts clean. What is
asked is in ``TARGETS``; nothing here asserts a time.

usage: python benchmarks/recipe_vs_reference.py [--quick] [--huge] [--json FILE] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe_models import MODELS, QUICK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LARGE = 20_000_000
"""Bytes of slots from which a model counts where copies are compared."""
PACKAGES = (
    *("torch", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx-cu13"),
    *("torchvision", "transformers"),
)
Found = dict[str, Any]


# -- numbers ------------------------------------------------------------------------------------


def speed_up(found: Found) -> float:
    """The reference over a later call."""
    return median(found, "reference") / median(found, "materialize")


def cpu_speed_up(found: Found) -> float:
    """The same in time that processors worked, in which other work on the machine shows less."""
    return median(found, "reference cpu") / median(found, "materialize cpu")


def first_speed_up(found: Found) -> float:
    """The reference over the first call of a plan."""
    return median(found, "reference") / float(found["speed"]["first"])


def over_memmove(found: Found) -> float:
    """A later call over a copy of as many bytes."""
    return median(found, "materialize") / median(found, "memmove")


def cpu_over_memmove(found: Found) -> float:
    """The same in time that processors worked."""
    return median(found, "materialize cpu") / median(found, "memmove cpu")


def staged_over_memmove(found: Found) -> float:
    """Computing all values and writing them in one piece, over a copy, in CPU time."""
    return median(found, "staged cpu") / median(found, "memmove cpu")


def planning(found: Found) -> float:
    """Planning a program over a whole refit by the reference, its export included."""
    return median(found, "planning") / median(found, "reference")


def cpu_planning(found: Found) -> float:
    """The same in time that processors worked, in all processes that plan."""
    return median(found, "planning cpu") / median(found, "reference cpu")


def with_export(found: Found) -> float:
    """Export and planning over the reference, export included."""
    export = statistics.median(found["speed"]["stages"]["export"])
    return (median(found, "planning") + float(export)) / median(found, "reference")


def median(found: Found, what: str) -> float:
    """In seconds."""
    return float(statistics.median(found["speed"][what]))


@dataclass(frozen=True)
class Target:
    """What a number should be over all models that it is known of.

    Attributes:
        name: What is asked.
        value: The number of one model.
        over_all: What makes one number of those of all models.
        limit: What it should not exceed, or should reach.
        at_least: Whether it should be reached.
        large: Whether only large models count.
    """

    name: str
    value: Callable[[Found], float]
    over_all: Callable[[Iterable[float]], float]
    limit: float
    at_least: bool = False
    large: bool = False

    def measured(self, models: Iterable[Found]) -> float | None:
        """The number; None where no model has it."""
        some = [
            self.value(found)
            for found in models
            if "materialize" in found["speed"]
            and (not self.large or found["speed"]["slot_bytes"] >= LARGE)
        ]
        return self.over_all(some) if some else None

    def met(self, measured: float) -> bool:
        """Whether it is what was asked."""
        return measured >= self.limit if self.at_least else measured <= self.limit


MEAN: Callable[[Iterable[float]], float] = statistics.geometric_mean
TARGETS = (
    Target("reference over materialize, geometric mean", speed_up, MEAN, 500, at_least=True),
    Target("the same in CPU time", cpu_speed_up, MEAN, 500, at_least=True),
    Target("reference over materialize, lowest", speed_up, min, 100, at_least=True),
    Target("the same in CPU time, lowest", cpu_speed_up, min, 100, at_least=True),
    Target("materialize over memmove, geometric mean", over_memmove, MEAN, 0.5, large=True),
    Target("the same in CPU time, of copies", cpu_over_memmove, MEAN, 0.5, large=True),
    Target("materialize over memmove, highest", over_memmove, max, 3, large=True),
    Target("the same in CPU time, of copies, highest", cpu_over_memmove, max, 3, large=True),
    Target("planning over the reference, highest", planning, max, 1.5),
    Target("the same in CPU time, of planning", cpu_planning, max, 1.5),
)


# -- running ------------------------------------------------------------------------------------


def measured(name: str, folder: Path) -> Found:
    """All phases of one model, each in its own process."""
    found = {"speed": phase("speed", name, folder)}
    print(f"{name}: {summary(found)}", file=sys.stderr, flush=True)
    found["memory reference"] = phase("reference", name, folder)
    if "error" not in found["speed"]:
        found["memory materialize"] = phase("materialize", name, folder)
        found["memory network"] = phase("network", name, folder)
        if MODELS[name].aotinductor:
            found["memory aotinductor"] = phase("aotinductor", name, folder)
    return found


def phase(what: str, name: str, folder: Path) -> Found:
    """What one process found; it is asked for in ``main`` below."""
    out = folder / f"{what}.json"
    command = [sys.executable, __file__, "--phase", what, "--json", str(out), name]
    done = subprocess.run(  # noqa: S603 - this file
        command, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return {"error": f"the process ended with {done.returncode}: {''.join(last)}"}
    result: Found = json.loads(out.read_text())
    return result


def run_phase(what: str, name: str, out: Path) -> None:
    """One phase, in this process."""
    import recipe_phases

    out.write_text(json.dumps(recipe_phases.PHASES[what](name, out.parent)))


def summary(found: Found) -> str:
    """One line, as soon as it is known."""
    if "error" in found["speed"]:
        return str(found["speed"]["error"])
    return f"{speed_up(found):.0f}x, {over_memmove(found):.2f} memmoves"


# -- tables -------------------------------------------------------------------------------------


def tables(all_found: Found) -> Iterator[str]:
    """Everything as markdown."""
    yield f"{all_found['versions']}; {all_found['machine']}"
    models: dict[str, Found] = all_found["models"]
    good = {name: found for name, found in models.items() if "error" not in found["speed"]}
    yield from table(SPEED, good)
    yield from table(PLANNING, good)
    yield from table(MEMORY, good)
    yield from verdicts(good.values())
    for name, found in models.items():
        for what, some in found.items():
            if "error" in some:
                yield f"{name}, {what}: {some['error']}"
    if "huge" in all_found:
        yield from huge(all_found["huge"])


Column = tuple[str, "Callable[[Found], object]"]


def ms(what: str) -> Column:
    return f"{what}, ms", lambda found: f"{median(found, what) * 1e3:.3g}"


def stage(what: str) -> Column:
    def value(found: Found) -> str:
        return f"{statistics.median(found['speed']['stages'][what]):.2f}"

    return f"{what}, s", value


def peak(title: str, *keys: str) -> Column:
    def value(found: Found) -> str:
        some: Any = found
        for key in keys:
            some = some.get(key, {}) if isinstance(some, dict) else {}
        return f"{some / 1e6:.1f}" if isinstance(some, int) else ""

    return title, value


def ratio(title: str, of: Callable[[Found], float]) -> Column:
    return title, lambda found: f"{of(found):.3g}"


SPEED: tuple[Column, ...] = (
    ("slots, MB", lambda found: f"{found['speed']['slot_bytes'] / 1e6:.0f}"),
    ("slots", lambda found: found["speed"]["slots"]),
    ("calls", lambda found: found["speed"]["calls"]),
    ("equal", lambda found: f"{found['speed']['equal']} of {found['speed']['of']}"),
    ("reference, s", lambda found: f"{median(found, 'reference'):.2f}"),
    ("first, ms", lambda found: f"{found['speed']['first'] * 1e3:.3g}"),
    ms("materialize"),
    ("lowest, ms", lambda found: f"{min(found['speed']['materialize']) * 1e3:.3g}"),
    ms("memmove"),
    ms("staged"),
    ratio("reference over first", first_speed_up),
    ratio("reference over materialize", speed_up),
    ratio("in CPU time", cpu_speed_up),
    ratio("materialize over memmove", over_memmove),
    ratio("in CPU time", cpu_over_memmove),
    ratio("staged over memmove, in CPU time", staged_over_memmove),
)
PLANNING: tuple[Column, ...] = (
    *(stage(what) for what in ("export", "lower", "partition", "interpret")),
    ("planning, s", lambda found: f"{median(found, 'planning'):.2f}"),
    ratio("planning over reference", planning),
    ratio("in CPU time", cpu_planning),
    ratio("export and planning over reference", with_export),
)
MEMORY: tuple[Column, ...] = (
    ("slots", lambda found: f"{found['speed']['slot_bytes'] / 1e6:.0f}"),
    peak("reference", "memory reference", "own"),
    peak("materialize", "memory materialize", "later", "own"),
    peak("iter_slots", "memory materialize", "stream", "own"),
    peak("refit, tensorrt_network", "memory network", "first", "own"),
    peak("and its build", "memory network", "first", "all"),
    peak("refit, aotinductor", "memory aotinductor", "first", "own"),
)


def table(columns: tuple[Column, ...], models: dict[str, Found]) -> Iterator[str]:
    """One row for each model."""
    yield ""
    yield "| model | " + " | ".join(title for title, _ in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, found in models.items():
        yield f"| {name} | " + " | ".join(str(value(found)) for _, value in columns) + " |"


def verdicts(models: Iterable[Found]) -> Iterator[str]:
    """Each target with what was measured."""
    yield ""
    yield "| target | wanted | measured | met |"
    yield "|---|---|---|---|"
    listed = list(models)
    for target in TARGETS:
        value = target.measured(listed)
        if value is None:
            continue
        wanted = f"{'at least' if target.at_least else 'at most'} {target.limit}"
        met = "yes" if target.met(value) else "NO"
        yield f"| {target.name} | {wanted} | {value:.3g} | {met} |"


def huge(found: Found) -> Iterator[str]:
    """The model that hardly fits."""
    yield ""
    if "planning" not in found:
        yield f"huge: {found['error']}"
        return
    planning, replay = found["planning"], found.get("materialize", {})
    workers = (planning["all"] - planning["own"]) / 1e6
    yield (
        f"{found['weight_bytes'] / 1e9:.1f} GB of mapped weights, planned in {found['seconds']:.1f}"
        f" s: peak anonymous memory {planning['own'] / 1e6:.1f} MB here, {workers:.1f} MB in the "
        f"process that plans; materialize {replay.get('own', 0) / 1e6:.1f} MB"
    )


def installed() -> Iterator[tuple[str, str]]:
    """Name and version of what the numbers depend on."""
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def write_huge(path: Path, width: int = 16384, layers: int = 4) -> None:
    """A ``.safetensors`` file for ``recipe_models.HUGE``, written piece by piece."""
    import torch

    sizes: dict[str, list[int]] = {}
    for layer in range(0, 2 * layers, 2):
        sizes |= {f"{layer}.weight": [width, width], f"{layer}.bias": [width]}
    header: dict[str, Found] = {}
    end = 0
    for name, shape in sizes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    piece = torch.randn(1 << 20).mul_(0.01).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            file.write(piece[:end])
            end -= min(end, len(piece))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--huge", action="store_true", help="plan 4.3 GB of weights, too")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        run_phase(given.phase, given.models[0], given.json)
        return
    unknown = set(given.models) - MODELS.keys()
    if unknown:
        parser.error(f"there are no models {', '.join(sorted(unknown))}")
    names = given.models or (QUICK if given.quick else tuple(MODELS))
    all_found: Found = {
        "versions": ", ".join(map(" ".join, installed())),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "models": {},
    }
    for name in names:
        with tempfile.TemporaryDirectory(prefix="refitkit-bench-") as folder:
            all_found["models"][name] = measured(name, Path(folder))
        if given.json:
            given.json.write_text(json.dumps(all_found, indent=1))
    if given.huge:
        with tempfile.TemporaryDirectory(prefix="refitkit-bench-") as folder:
            write_huge(Path(folder) / "model.safetensors")
            all_found["huge"] = phase("huge", "huge", Path(folder))
        if given.json:
            given.json.write_text(json.dumps(all_found, indent=1))
    print("\n".join(tables(all_found)))


if __name__ == "__main__":
    main()
