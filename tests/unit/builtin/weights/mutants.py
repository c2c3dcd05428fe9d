"""Files of weights that are damaged or edited, and what comes of them.

A mutant is known by its number alone: the same number gives the same file.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from refitkit.errors import SourceError
from refitkit.pipeline import Pipeline
from refitkit.program.dtypes import dtype_name
from refitkit.testing.oracles import bits
from tests.fuzzing import tried

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzzing import Verdict

BOTH = "taken by both, equal bits"
NONE = "refused by both"
THEIRS = "taken by the library alone"
UNUSABLE = "told as unusable by refitkit, unknown to the library"
SECONDS = 30
Found = dict[str, tuple[Any, ...]]

ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70),
    *(1.0, 1e30, "3", None, True, [], {}),
)
"""What a header may say instead of a size."""
DTYPES = ("F32", "F16", "F64", "BOOL", "F8_E4M3", "F4", "I64", "U64", "C64", "X", "", None, 5)


@functools.cache
def originals() -> dict[str, bytes]:
    """A good file of each format."""
    drawn = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=drawn)
    state = {
        "a.weight": torch.randn(4, 3, generator=drawn),
        "a.bias": torch.randn(4, generator=drawn).half(),
        "b": torch.arange(7),
        "c.t": base.t(),
        "c.v": base[1:3],
        "d": torch.randn(2, 2, generator=drawn).bfloat16(),
        "e": torch.tensor(3.5),
        "none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }
    whole = {name: value.contiguous() for name, value in state.items()}
    trained = {
        "state_dict": {"a": {"weight": state["a.weight"], "bias": state["a.bias"]}, "b": base.t()},
        "ema": {"a.weight": state["c.v"], "steps": 3},
        "optimizer": {"state": {0: {"step": state["e"]}}, "param_groups": [{"lr": 0.1}]},
        "scale": state["d"],
        "epoch": 7,
        "losses": [0.5, torch.ones(2)],
    }
    new, old, nested = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save(trained, nested)
    torch.save(whole, old, _use_new_zipfile_serialization=False)
    return {
        "safetensors": safetensors.torch.save(whole),
        "zip": new.getvalue(),
        "legacy": old.getvalue(),
        "nested": nested.getvalue(),
    }


# -- edits ---------------------------------------------------------------------------------------


def mutant(number: int) -> tuple[str, bytes]:
    """The format of a mutant, and its bytes."""
    drawn = random.Random(number)  # noqa: S311 - no secret
    kind = drawn.choice(["safetensors"] * 2 + ["zip"] * 3 + ["legacy", "nested"])
    edit: Callable[[random.Random, bytes], bytes] = {
        "safetensors": _header_edited,
        "zip": _packed_again,
        "legacy": _damaged,
        "nested": _packed_again,
    }[kind]
    if drawn.random() < 0.4:
        edit = _damaged
    return kind, edit(drawn, originals()[kind])


def _damaged(drawn: random.Random, content: bytes) -> bytes:
    """Cut, stretched, or with other bytes."""
    data, at = bytearray(content), drawn.randrange(len(content))
    match drawn.randrange(8):
        case 0:
            del data[at:]
        case 1:
            data[at:at] = drawn.randbytes(drawn.randrange(1, 9))
        case 2:
            del data[at : at + drawn.randrange(1, 40)]
        case 3:
            length, other = drawn.randrange(1, 64), drawn.randrange(len(content))
            data[at : at + length] = data[other : other + length]
        case _:
            for _ in range(drawn.choice([1, 1, 1, 2, 4])):
                at = drawn.randrange(len(data))
                flipped = data[at] ^ (1 << drawn.randrange(8))
                data[at] = drawn.choice([0, 255, 0x7F, 0x80, flipped, drawn.randrange(256)])
    return bytes(data)


def _header_edited(drawn: random.Random, content: bytes) -> bytes:
    """A header that says something else, as JSON with the right length mostly."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(drawn.choice([1, 1, 2])):
        _edit_entry(drawn, header, drawn.choice(sorted(header)))
    text = json.dumps(header).encode()
    if drawn.random() < 0.1:
        text = text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)
    text = drawn.choice([b"", b"", b"", b" "]) + text + b" " * drawn.choice([0, 0, 0, 3])
    body = drawn.choice([body, body, body, body + b"12345678", body[:-1]])
    said = drawn.choice([len(text)] * 12 + [0, len(text) - 1, len(text) + 1, 2**63, 100_000_001])
    return said.to_bytes(8, "little") + text + body


def _edit_entry(drawn: random.Random, header: dict[str, Any], name: str) -> None:
    entry = header[name]
    if not isinstance(entry, dict):
        return
    if drawn.random() < 0.5:
        _edit_fields(drawn, entry)
        return
    other = drawn.choice(["__metadata__", "", " ", "\ud800", "a\0", "a" * 70_000, name])
    known = drawn.choice(sorted(header))
    match drawn.randrange(3):
        case 0:
            header[other] = drawn.choice([{"format": "pt"}, {"x": 1}, "s", None, dict(entry)])
        case 1:
            header[name], header[known] = header[known], header[name]
        case 2:
            del header[name]


def _edit_fields(drawn: random.Random, entry: dict[str, Any]) -> None:
    field, odd = drawn.choice(["dtype", "shape", "data_offsets", "x"]), drawn.choice(ODD)
    sizes = entry.get(drawn.choice(["shape", "data_offsets"]))
    match drawn.randrange(3):
        case 0:
            entry[field] = drawn.choice(DTYPES) if field == "dtype" else odd
        case 1:
            entry.pop(field, None)
        case 2 if isinstance(sizes, list) and sizes:
            sizes[drawn.randrange(len(sizes))] = drawn.choice([*ODD, 4, 8, 16, 48])


Records = list[tuple[str, bytes]]


def _packed_again(drawn: random.Random, content: bytes) -> bytes:
    """Records in another order, lost, twice, damaged, renamed, exchanged, compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    how = drawn.choice([zipfile.ZIP_STORED] * 8 + [zipfile.ZIP_DEFLATED])
    edit = drawn.choice([_places_edited, _places_edited, _contents_edited])
    edit(drawn, records, drawn.randrange(len(records)))
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", how) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, value in records:
            archive.writestr(name, value)
    return made.getvalue()


def _places_edited(drawn: random.Random, records: Records, at: int) -> None:
    name, value = records[at]
    match drawn.randrange(6):
        case 0:
            drawn.shuffle(records)
        case 1:
            del records[at]
        case 2:
            records.append((name, value))
        case 3:
            others = [f"x/{name}", name.replace("archive", "b"), f"../{name}", f"{name}/"]
            records[at] = (drawn.choice(others), value)
        case 4:
            one, other = drawn.sample([i for i, (n, _) in enumerate(records) if "/data/" in n], 2)
            (first, data), (second, more) = records[one], records[other]
            records[one], records[other] = (first, more), (second, data)
        case 5:
            records.insert(at, ("archive/extra", drawn.randbytes(drawn.randrange(100))))


def _contents_edited(drawn: random.Random, records: Records, at: int) -> None:
    if drawn.random() < 0.5:
        at = next(number for number, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    name, value = records[at]
    records[at] = (name, _damaged(drawn, value) if value else b"x")


# -- verdicts ------------------------------------------------------------------------------------


def judge(number: int) -> Verdict:
    """What comes of a mutant, ``fault: ...`` where that may not be; and its format and error."""
    kind, content = mutant(number)
    return tried(lambda: _verdict(kind, content), SECONDS, kind, "SourceError")


def _verdict(kind: str, content: bytes) -> Verdict:
    try:
        ours: Found | None = _ours(kind, content)
        told = ""
    except SourceError as exc:
        ours, told = None, exc.message
    if ours is not None and not all(ours.values()):
        return UNUSABLE, ""
    try:
        theirs: Found | None = _theirs(kind, content)
        said = ""
    except Exception as exc:  # noqa: BLE001 - libraries raise anything
        theirs, said = None, f"{type(exc).__name__}: {exc}"
    if ours is None or theirs is None:
        verdicts = {(True, True): NONE, (True, False): THEIRS}
        verdict = verdicts.get((ours is None, theirs is None), "fault: taken by refitkit alone")
        return verdict, (told or said)[:200]
    if ours != theirs:
        return "fault: other values than the library's", ", ".join(_differing(ours, theirs))
    return BOTH, ""


def _differing(ours: Found, theirs: Found) -> list[str]:
    return sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))


def _ours(kind: str, content: bytes) -> Found:
    """What refitkit reads; nothing for entries that it calls unusable."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("w.safetensors" if kind == "safetensors" else "w.pt")
        path.write_bytes(content)
        source = Pipeline().open_weights(path)
        for name in source.names():
            info = source.info(name)
            found[name] = ()
            if not info.unusable:
                value = source.get(name)
                if (info.dtype, info.shape) != (dtype_name(value.dtype), tuple(value.shape)):
                    raise AssertionError(f"{name} is not what it was said to be: {info}")
                found[name] = _known(value)
    return found


def _theirs(kind: str, content: bytes) -> Found:
    if kind == "safetensors":
        state = safetensors.torch.load(content)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if any(isinstance(value, dict) for value in state.values()):
            state = _flat(state)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("no state_dict")
    return {name: _known(value) for name, value in state.items()}


def _flat(state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Tensors under the names of torch's own checkpoints, but those that are reached by numbers."""
    flat, paths = flatten_state_dict(state)
    made = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in made.items() if not _has_number(state, paths[name])}


def _has_number(state: Any, path: tuple[Any, ...]) -> bool:
    """Whether one of the containers on a path is a list or has keys that are no strings."""
    for key in path:
        if not isinstance(state, dict) or not all(isinstance(known, str) for known in state):
            return True
        state = state[key]
    return False


def _known(value: torch.Tensor) -> tuple[Any, ...]:
    return bits(value), tuple(value.shape)
