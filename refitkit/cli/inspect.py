"""``refitkit inspect``: show the contents of a file, without running any of its code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from refitkit.cli.options import common_options, config_options, file_argument
from refitkit.cli.session import Session, plain
from refitkit.cli.tables import count, facts, shape, size, table
from refitkit.errors import Problem, RefitError, ResourceError, UnsupportedTargetError
from refitkit.model.slot import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rich.console import Console

    from refitkit.pipeline import Pipeline
    from refitkit.protocols import WeightSource


@dataclass(frozen=True)
class _FileContents:
    """The contents of a file.

    Attributes:
        kind: ``module``, ``plan`` or ``weights``.
        data: Contents as plain data, for JSON.
        human: Function that prints the contents for people.
    """

    kind: str
    data: dict[str, Any]
    human: Callable[[Console], None]


@click.command("inspect", short_help="Show the contents of a module, plan or weights file.")
@file_argument("file")
@config_options
@common_options
@click.pass_obj
def inspect_command(session: Session, file: Path) -> None:
    """Show the contents of FILE, a saved module, a plan or weights. None of its code is run."""
    from refitkit.cli.files import check_readable

    check_readable(file, UnsupportedTargetError)
    if not file.exists():
        raise UnsupportedTargetError(f"{str(file)!r} does not exist.")
    contents = _contents_of(session.pipeline(), file)
    data = {"file": str(file), "kind": contents.kind, **contents.data}
    session.result(data, contents.human)


def _contents_of(pipeline: Pipeline, file: Path) -> _FileContents:
    """The contents of a file, from the first reader that can read it.

    Raises:
        UnsupportedTargetError: No reader can read it; gives the reason for each.
    """
    problems = []
    for kind, read in _readers(file).items():
        try:
            return read(pipeline, file)
        # the other readers would meet the same refusal
        except ResourceError:
            raise
        except RefitError as exc:
            problems.append(Problem(f"as {kind}", exc.message.rstrip(".")))
    hint = "Programs of torch.export.save are not shown, because reading them could run code."
    raise UnsupportedTargetError(
        f"{str(file)!r} holds nothing that refitkit can show.", problems=problems, hint=hint
    )


def _readers(file: Path) -> dict[str, Callable[[Pipeline, Path], _FileContents]]:
    """Readers by kind; only one if the suffix of the file decides."""
    readers: dict[str, Callable[[Pipeline, Path], _FileContents]]
    readers = {"a module": _module, "a plan": _plan, "weights": _weights}
    by_suffix = {".safetensors": "weights", ".refitplan": "a plan"}
    if file.is_dir():
        return {"a module": _module}
    # With a single reader, the error gives only the reason that matters.
    kind = by_suffix.get(file.suffix)
    return {kind: readers[kind]} if kind else readers


def _module(pipeline: Pipeline, file: Path) -> _FileContents:
    described = dict(pipeline.describe(file))
    return _FileContents("module", described, lambda console: print_described(console, described))


def _plan(_: Pipeline, file: Path) -> _FileContents:
    from refitkit.cli.ledger import print_plan
    from refitkit.recipe import RefitPlan

    plan = RefitPlan.load(file)
    return _FileContents("plan", plain(plan.data), lambda console: print_plan(console, plan))


def _weights(pipeline: Pipeline, file: Path) -> _FileContents:
    data = described_weights(pipeline.open_weights(file))
    return _FileContents("weights", data, lambda console: print_weights(console, data))


# -- printing modules and weights of any backend or plugin -------------------------------------

# Hexadecimal digests from SHA-1 (40 digits) on.
_CHECKSUM = re.compile("[0-9a-f]{40,}")
_SLOT_COLUMNS = ("name", "dtype", "shape", "device")


def print_described(console: Console, described: Mapping[str, Any]) -> None:
    """Print a backend's description of a saved module: plain values first, then its slots."""
    rest = {key: value for key, value in described.items() if key != "slots"}
    console.print(facts((key.replace("_", " "), _value(key, v)) for key, v in rest.items()))
    slots = described.get("slots")
    if slots:
        rows = [[_cell(slot, column) for column in _SLOT_COLUMNS] for slot in slots]
        console.print(table(_SLOT_COLUMNS, rows, count(len(rows), "slot")))


def described_weights(source: WeightSource) -> dict[str, Any]:
    """Metadata of weights as plain data; reads only headers if the format has them."""
    tensors = []
    for name in sorted(source.names()):
        info = source.info(name)
        tensors.append(
            {
                "name": name,
                "dtype": info.dtype,
                "shape": info.shape,
                # A dtype that torch does not have has no known size; ``unusable`` names it.
                "bytes": info.count * ITEM_BYTES.get(info.dtype, 0),
                "unusable": info.unusable,
            }
        )
    return {"bytes": sum(tensor["bytes"] for tensor in tensors), "tensors": tensors}


def print_weights(console: Console, data: Mapping[str, Any]) -> None:
    """Print names, dtypes, shapes and sizes of weights."""
    columns = ("name", "dtype", "shape", "bytes")
    rows = [[_cell(tensor, column) for column in columns] for tensor in data["tensors"]]
    title = f"{count(len(rows), 'tensor')}, {size(data['bytes'])}"
    console.print(table(columns, rows, title))


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column == "shape":
        return shape(row.get("shape"))
    if column == "dtype" and row.get("unusable"):
        return f"not usable: {row['unusable']}"
    return str(row.get(column, ""))


def _value(key: str, value: Any) -> str:
    # bool first, because it is a subclass of int.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in key:
        return size(value)
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_inner(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "\n".join(map(_inner, value)) or "none"
    return "none" if value is None else str(value)


def _inner(value: Any) -> str:
    """A nested value as one line; a checksum is cut to its first 12 characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inner(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_inner, value))})"
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if _CHECKSUM.fullmatch(text) else text
