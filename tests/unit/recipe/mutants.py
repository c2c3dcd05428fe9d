"""Plan files that are damaged or edited, and what comes of them.

A mutant is known by its number alone: the same number gives the same file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import random
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from refitkit.errors import RefitError
from refitkit.model import (
    CallRef,
    Guard,
    Leaf,
    LeafKind,
    LedgerRow,
    OpCall,
    PinnedRef,
    SlotState,
    SourceRef,
    Tensor,
    fingerprint_of_slots,
)
from refitkit.model.plan import PlanData
from refitkit.model.slot import ITEM_BYTES, Slot
from refitkit.program.bits import digest, same_bits
from refitkit.recipe import RefitPlan, ops, store
from refitkit.recipe.ops import encode_literal
from refitkit.recipe.store import DIGEST, MANIFEST, PINNED, TensorMetadata, index_of
from tests.fakes import call_row, make_plan, make_slot, pinned_row, recipe_row
from tests.fuzzing import tried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSED_AT_LOAD = "refused when it is read"
REFUSED_AT_USE = "refused when it is used"
SAME = "the same slots"
NEEDS_PROOF = "valid edits that need proof"
GOOD = (REFUSED_AT_LOAD, REFUSED_AT_USE, SAME, NEEDS_PROOF)
"""All else is a fault."""

# -- the plan that is mutated -----------------------------------------------------------------

_W, _GAMMA, _MEAN = SourceRef(fqn="conv.weight"), SourceRef(fqn="bn.weight"), SourceRef(fqn="mean")
_LEAVES = {
    "conv.weight": (4, 3, 2, 2),
    "bn.weight": (4,),
    "mean": (4,),
    "var": (4,),
    "embed": (6, 4),
    "twin": (6, 4),
    "flat": (24,),
    "scale": (),
}


def _gives(*shape: int, dtype: str = "float32") -> tuple[Tensor, ...]:
    return (Tensor(dtype=dtype, shape=shape),)


def _call(op: str, *args: Any, to: tuple[Tensor, ...], **kwargs: Any) -> OpCall:
    literals = {name: encode_literal(value) for name, value in kwargs.items()}
    return OpCall(
        op=f"aten.{op}", args=tuple(map(encode_literal, args)), kwargs=literals, results=to
    )


def _at(call: int, output: int = 0) -> CallRef:
    return CallRef(call=call, output=output)


def _calls() -> Iterator[OpCall]:
    """Folds, splits, tables, casts, writes: what recordings of real models hold."""
    flat, embed, index = SourceRef(fqn="flat"), SourceRef(fqn="embed"), PinnedRef(name="index")
    yield _call("add.Tensor", SourceRef(fqn="var"), 1e-3, to=_gives(4))
    yield _call("rsqrt.default", _at(0), to=_gives(4))
    yield _call("mul.Tensor", _GAMMA, _at(1), to=_gives(4))
    yield _call("reshape.default", _at(2), (4, 1, 1, 1), to=_gives(4, 1, 1, 1))
    yield _call("mul.Tensor", _W, _at(3), to=_gives(4, 3, 2, 2))
    yield _call("mul.Tensor", _MEAN, _at(2), to=_gives(4))
    yield _call("neg.default", _at(5), to=_gives(4))
    yield _call(
        "_to_copy.default", _at(4), dtype=torch.bfloat16, to=_gives(4, 3, 2, 2, dtype="bfloat16")
    )
    yield _call(
        "split_with_sizes.default", flat, (8, 4, 12), to=(*_gives(8), *_gives(4), *_gives(12))
    )
    yield _call("reshape.default", _at(8, 2), (3, 4), to=_gives(3, 4))
    yield _call("permute.default", _at(9), (1, 0), to=_gives(4, 3))
    yield _call("cat.default", (_at(8, 0), _at(8, 1)), 0, to=_gives(12))
    yield _call("index.Tensor", embed, (index, None), to=_gives(3, 4))
    yield _call("add_.Tensor", _at(12), _at(8, 1), alpha=2, to=_gives(3, 4))
    yield _call("slice.Tensor", embed, 0, 1, 6, 2, to=_gives(3, 4))
    yield _call("copy_.default", _at(13), _at(14), to=_gives(3, 4))
    yield _call("masked_fill.Scalar", _at(15), PinnedRef(name="mask"), -math.inf, to=_gives(3, 4))
    yield _call("clamp.default", _at(16), -2.5, None, to=_gives(3, 4))
    yield _call("contiguous.default", _at(11), to=_gives(12))
    yield _call("as_strided_scatter.default", _at(18), _at(8, 1), (4,), (3,), 1, to=_gives(12))
    yield _call("linalg_vector_norm.default", _at(10), 2, (1,), True, to=_gives(4, 1))
    yield _call("div.Tensor", _at(10), _at(20), to=_gives(4, 3))
    yield _call("gt.Scalar", SourceRef(fqn="scale"), 0.5, to=_gives(dtype="bool"))
    yield _call("cumsum.default", _at(21), 1, dtype=torch.float64, to=_gives(4, 3, dtype="float64"))
    yield _call("expand.default", SourceRef(fqn="scale"), (5,), to=_gives(5))
    yield _call("sort.default", _at(8, 0), 0, True, to=(*_gives(8), *_gives(8, dtype="int64")))
    yield _call(
        "convolution.default",
        _W,
        _at(4),
        None,
        (1, 1),
        (0, 0),
        (1, 1),
        False,
        (0, 0),
        1,
        to=_gives(4, 4, 1, 1),
    )


def weights(seed: int) -> dict[str, torch.Tensor]:
    """A state_dict for the plan."""
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=generator) for n, s in _LEAVES.items() if n != "table"}
    made["var"] = made["var"].abs() + 0.5
    made["scale"] = torch.tensor(1.0)
    made["twin"] = made["embed"]
    return made


@functools.cache
def original() -> RefitPlan:
    """The plan, whole."""
    pinned = {
        "index": torch.tensor([5, 0, 3]),
        "mask": torch.tensor([[True, False, False, True]]),
        "table": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
    }
    fold = ("conv.weight", "bn.weight", "var")
    rows = [
        call_row(make_slot("conv KERNEL", (4, 3, 2, 2), "bfloat16"), 7, *fold),
        call_row(make_slot("conv BIAS", (4,)), 6, "bn.weight", "mean", "var"),
        call_row(make_slot("[SHUFFLE] CONSTANT", (12,)), 10, "flat"),
        call_row(make_slot("embedding", (3, 4)), 17, "embed", "twin", "flat"),
        call_row(make_slot("written", (12,)), 19, "flat"),
        call_row(make_slot("sums", (4, 3), "float64"), 23, "flat"),
        call_row(make_slot("scales", (5,)), 24, "scale"),
        call_row(make_slot("self", (4, 4, 1, 1)), 26, *fold),
        LedgerRow(
            slot=make_slot("order", (8,), "int64"),
            state=SlotState.RECIPE,
            value=_at(25, 1),
            sources=("flat",),
        ),
        recipe_row(make_slot("embed", (24,)), "embed", "twin"),
        pinned_row(make_slot("table", (2, 2), "int32"), "table"),
        LedgerRow(
            slot=make_slot("index", (3,), "int64"),
            state=SlotState.FROZEN,
            value=PinnedRef(name="index"),
            reason="a literal",
        ),
    ]
    leaves = [
        Leaf(fqn=n, kind=LeafKind.PARAMETER, dtype="float32", shape=s) for n, s in _LEAVES.items()
    ]
    table = Leaf(fqn="table", kind=LeafKind.NON_PERSISTENT_BUFFER, dtype="int32", shape=(2, 2))
    true = torch.tensor(True)
    guard = Guard(
        value=_at(22), sha256=digest(true), dtype="bool", shape=(), shown="True", reason="bool()"
    )
    plan = make_plan(
        rows,
        leaves=[*leaves, table],
        ties=[("embed", "twin")],
        calls=tuple(_calls()),
        guards=[guard],
        pinned=pinned,
    )
    return RefitPlan(plan.data, pinned)


@functools.cache
def content() -> bytes:
    """The file that is mutated."""
    return original().to_bytes()


@functools.cache
def truth(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """What the slots must be."""
    return {slot.key: value for slot, value in original().iter_slots(weights(seed))}


# -- mutations --------------------------------------------------------------------------------


def mutant(number: int) -> tuple[str, bytes]:
    """What was done, and the file that came of it."""
    rng = random.Random(number)  # noqa: S311 - not for secrets
    kinds: list[tuple[Callable[[random.Random], bytes], int]] = [
        (_bytes_changed, 3),
        (_members_changed, 1),
        (_text_changed, 1),
        (_anything_changed, 3),
        (_calls_changed, 6),
        (_ledger_changed, 4),
        (_kept_changed, 1),
        (_call_made_up, 6),
    ]
    change = rng.choices([k for k, _ in kinds], [n for _, n in kinds])[0]
    return change.__name__.strip("_").replace("_", " "), change(rng)


def _members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(members: dict[str, bytes], *, seal: bool = True) -> bytes:
    """A file of these members; with a digest that fits unless told otherwise."""
    if seal and MANIFEST in members:
        members[DIGEST] = hashlib.sha256(members[MANIFEST]).hexdigest().encode() + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in members.items():
            made.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def _bytes_changed(rng: random.Random) -> bytes:
    """A file as disks and networks damage it."""
    data = bytearray(content())
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, size = rng.randrange(len(data) or 1), rng.choice([1, 1, 4, 16, 200])
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([(data + b"\0")[at] ^ (1 << rng.randrange(8))])
            case 1:
                data[at : at + size] = rng.randbytes(size)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = rng.randbytes(size)
            case _:
                data[at:at] = data[: rng.randrange(len(data) or 1)]
    return bytes(data)


def _members_changed(rng: random.Random) -> bytes:
    members = _members()
    names = list(members)
    one, other = rng.sample(names, 2)
    match rng.randrange(6):
        case 0:
            members[one], members[other] = members[other], members[one]
        case 1:
            del members[one]
        case 2:
            members[rng.choice(["x", "../x", one.upper(), f"a/{one}"])] = members.pop(one)
        case 3:
            members[one] = rng.randbytes(rng.choice([0, 1, 65, 1000]))
        case 4:
            members[one] = members[one][: rng.randrange(len(members[one]))]
        case _:
            members = {name: members[name] for name in rng.sample(names, len(names))}
            members["more"] = b"x"
    return _archive(members, seal=rng.random() < 0.5)


_PIECES = (
    *(b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"1E400"),
    *(b"0.1e-400", b"\xff", b"\\ud800", b"null", b"-", b"0", b"}", b"]", b",", b'"', b"{", b"\0"),
)


def _text_changed(rng: random.Random) -> bytes:
    """A manifest that may be no JSON."""
    members = _members()
    text = members[MANIFEST]
    at = rng.randrange(len(text))
    piece = rng.choice(_PIECES)
    members[MANIFEST] = text[:at] + piece + text[at + rng.choice([0, 1, len(piece)]) :]
    return _archive(members)


def _edited(rng: random.Random, edit: Callable[[Any], object]) -> bytes:
    members = _members()
    data = json.loads(members[MANIFEST])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError, ValueError):
            edit(data)  # an edit before it may have taken away what it edits
    if rng.random() < 0.7:
        with contextlib.suppress(Exception):
            slots = [Slot.model_validate(row["slot"]) for row in data["ledger"]]
            data["fingerprint"]["slots"] = fingerprint_of_slots(slots)
    members[MANIFEST] = json.dumps(data).encode()
    return _archive(members)


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_ODD))


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, 1e-30, 1e308, math.nan, math.inf, -math.inf, "", "w", "float32", "x" * 5000),
    *("\0", [], {}, [[]], [[[[1]]]], [0] * 100),
    *({"kind": "call", "call": number} for number in (0, 1, 5, 20, 30)),
    {"kind": "source", "fqn": "embed"},
    {"kind": "pinned", "name": "mask"},
    {"kind": "number", "text": "inf"},
    {"kind": "torch", "name": "int8"},
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _anything_changed(rng: random.Random) -> bytes:
    def edit(data: Any) -> None:
        places = list(_places(data))
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1:
                others = [h[k] for h, k in places if k == key and type(h[k]) is type(holder[key])]
                holder[key] = copy.deepcopy(rng.choice(others))
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(rng.choice(holder)))
            case 3 if isinstance(holder[key], int | float):
                holder[key] += rng.choice([1, -1, 0.5, 2**31])
            case _:
                holder[key] = _odd(rng)

    return _edited(rng, edit)


@functools.cache
def _op_names() -> list[str]:
    names = [
        n.removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names() if "aten::" in n
    ]
    full = [f"aten.{n}" if "." in n else f"aten.{n}.default" for n in names]
    return sorted(name for name in full if ops.is_allowed(name))


def _atoms(data: Any) -> list[Any]:
    """All arguments of all calls."""
    given = [v for call in data["calls"] for v in (*call["args"], *call["kwargs"].values())]
    return [atom for v in given for atom in (v if isinstance(v, list) else [v])]


def _replace(rng: random.Random, holder: list[Any], value: Any) -> None:
    holder[rng.randrange(len(holder))] = value


def _swap(rng: random.Random, holder: list[Any]) -> None:
    one, other = rng.randrange(len(holder)), rng.randrange(len(holder))
    holder[one], holder[other] = holder[other], holder[one]


def _replace_inside(rng: random.Random, data: Any, call: Any) -> None:
    lists = [argument for argument in call["args"] if isinstance(argument, list)]
    _replace(rng, rng.choice(lists), rng.choice([*_atoms(data), _odd(rng)]))


def _nudge(rng: random.Random, call: Any) -> None:
    numbers = [n for n, a in enumerate(call["args"]) if isinstance(a, int | float)]
    call["args"][rng.choice(numbers)] += rng.choice([1, -1, 0.25])


_CALL_EDITS: list[Callable[[random.Random, Any, Any], object]] = [
    lambda rng, data, call: call.update(op=rng.choice(_op_names())),
    lambda rng, data, call: call.update(op=rng.choice(data["calls"])["op"]),
    lambda rng, data, call: _replace(rng, call["args"], rng.choice(_atoms(data))),
    lambda rng, data, call: _replace(rng, call["args"], _odd(rng)),
    _replace_inside,
    lambda rng, data, call: _nudge(rng, call),
    lambda rng, data, call: call["args"].pop(),
    lambda rng, data, call: call["args"].append(_odd(rng)),
    lambda rng, data, call: call["args"].reverse(),
    lambda rng, data, call: call["kwargs"].update({rng.choice(["dtype", "alpha"]): _odd(rng)}),
    lambda rng, data, call: rng.choice(call["results"]).update(dtype=rng.choice(list(ITEM_BYTES))),
    lambda rng, data, call: rng.choice(call["results"])["shape"].reverse(),
    lambda rng, data, call: rng.choice(call["results"]).update(shape=rng.choice([[], [2**40]])),
    lambda rng, data, call: data["calls"].remove(call),
    lambda rng, data, call: data["calls"].append(copy.deepcopy(call)),
    lambda rng, data, call: _swap(rng, data["calls"]),
]


def _calls_changed(rng: random.Random) -> bytes:
    """Edits that somebody could mean."""
    return _edited(rng, lambda data: rng.choice(_CALL_EDITS)(rng, data, rng.choice(data["calls"])))


def _reshape_slot(rng: random.Random, slot: Any) -> None:
    shape = rng.choice([slot["shape"][::-1], [slot["count"]], None, [2, 3]])
    slot.update(shape=shape, count=math.prod(shape or [slot["count"]]))


_NAMES = ("x", "", "embed", "flat", "\x1b[2J", "\ud800")
_STATES = ("recipe", "pinned", "frozen", "unmapped")
_ROW_EDITS: list[Callable[[random.Random, Any, Any], object]] = [
    lambda rng, data, row: row.update(value=copy.deepcopy(rng.choice(data["ledger"])["value"])),
    lambda rng, data, row: row.update(value={"kind": "call", "call": rng.randrange(30)}),
    lambda rng, data, row: row["value"].update(output=rng.randrange(3)),
    lambda rng, data, row: row.update(sources=rng.sample(list(_LEAVES), rng.randrange(4))),
    lambda rng, data, row: row.update(state=rng.choice(_STATES)),
    lambda rng, data, row: row["slot"].update(dtype=rng.choice(list(ITEM_BYTES))),
    lambda rng, data, row: _reshape_slot(rng, row["slot"]),
    lambda rng, data, row: row["slot"].update(name=rng.choice(_NAMES)),
    lambda rng, data, row: row["slot"].update(engine=rng.choice(_NAMES)),
    lambda rng, data, row: data["ledger"].remove(row),
    lambda rng, data, row: _swap(rng, data["ledger"]),
    lambda rng, data, row: rng.choice(data["leaves"]).update(dtype=rng.choice(list(ITEM_BYTES))),
    lambda rng, data, row: rng.choice(data["leaves"]).update(fqn=rng.choice(_NAMES)),
    lambda rng, data, row: rng.choice(data["leaves"])["shape"].reverse(),
    lambda rng, data, row: rng.choice(data["leaves"]).update(shape=rng.choice([[2**60], [0]])),
    lambda rng, data, row: data.update(ties=rng.choice([[], [["mean", "var"]]])),
    lambda rng, data, row: data["guards"][0].update(value=rng.choice(data["ledger"])["value"]),
    lambda rng, data, row: data["guards"][0].update(sha256="0" * 64),
    lambda rng, data, row: data["guards"][0].update(shape=[1]),
    lambda rng, data, row: data["guards"].clear(),
]  # fmt: skip


def _ledger_changed(rng: random.Random) -> bytes:
    return _edited(rng, lambda data: rng.choice(_ROW_EDITS)(rng, data, rng.choice(data["ledger"])))


def _kept_changed(rng: random.Random) -> bytes:
    """Other tensors, with digests that fit."""
    members = _members()
    data = PlanData.model_validate_json(members[MANIFEST])
    kept = load(members[PINNED])
    name = rng.choice(sorted(kept))  # what is loaded has no order
    value = kept[name]
    kept[name] = rng.choice(
        [value + 1, value.flip(0), value.to(torch.int64), value[:1], value * 2**30]
    )
    if rng.random() < 0.2:
        kept[rng.choice(["w", name])] = kept.pop(name)
    members[PINNED] = save({n: v.contiguous() for n, v in kept.items()})
    if rng.random() < 0.8:
        data = data.model_copy(update={"pinned": index_of(kept)})
        members[MANIFEST] = data.model_dump_json().encode()
    return _archive(members)


_INTS = (
    *(0, 1, 1, 1, 2, 2, 3, 4, -1, -1, -2, 5, 12, 24, 100),
    *(2**31, -(2**31), 2**40, 2**62, -(2**63)),
)
_FLOATS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e-5, -0.0, 1e30, math.inf, -math.inf, math.nan)
_WORDS = (
    *("mean", "sum", "floor", "trunc", "none", "reflect", "constant", "replicate", "circular"),
    *("ij", "xy", "same", "valid", "tanh", "prod", "amax", "fro", "nuc", "linear", "ij,jk->ik", ""),
)


def _call_made_up(rng: random.Random) -> bytes:
    """Any op that is allowed, with arguments of the types that it takes; a guard asks for it."""
    members = _members()
    data = json.loads(members[MANIFEST])
    facts = TensorMetadata(original().data)
    values: list[Any] = [SourceRef(fqn=name) for name in _LEAVES]
    values += [PinnedRef(name=name) for name in sorted(original().data.pinned)]
    for number, one in enumerate(original().data.calls):
        values += [_at(number, output) for output in range(len(one.results))]
    for _ in range(40):
        made = _made_up(rng, facts, values)
        if made is not None:
            data["calls"].append(made.model_dump(mode="json"))
            result = data["calls"][-1]["results"][0]
            value = {"kind": "call", "call": len(data["calls"]) - 1, "output": 0}
            data["guards"].append(
                {"value": value, "sha256": "0" * 64, "reason": "made up", **result}
            )
            break
    members[MANIFEST] = json.dumps(data).encode()
    return _archive(members)


def _made_up(rng: random.Random, facts: TensorMetadata, values: list[Any]) -> OpCall | None:
    op = ops.overload(rng.choice(_op_names()))
    args: list[Any] = []
    for argument in op._schema.arguments:
        if argument.kwarg_only or (argument.has_default_value() and rng.random() < 0.6):
            break
        args.append(_argument(rng, str(argument.real_type), values))

    def ready(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return [ready(one) for one in argument]
        is_value = isinstance(argument, SourceRef | PinnedRef | CallRef)
        return store._meta_tensor(facts.tensor(argument)) if is_value else argument

    try:
        results = store._run_op(op, [ready(argument) for argument in args], {})
        stated = tuple(Tensor(dtype=str(r.dtype)[6:], shape=tuple(r.shape)) for r in results)
    except NotImplementedError:
        shape = rng.choice([(), (3,), (2, 2)])
        stated = (Tensor(dtype=rng.choice(["float32", "int64"]), shape=shape),)
    except Exception:  # noqa: BLE001 - torch refuses it; the next one may be taken
        return None
    encoded = tuple(encode_literal(argument) for argument in args)
    return OpCall(op=str(op), args=encoded, results=stated) if stated else None


def _argument(rng: random.Random, kind: str, values: list[Any]) -> Any:
    if kind.startswith("Optional["):
        return None if rng.random() < 0.5 else _argument(rng, kind[9:-1], values)
    if kind.startswith("List["):
        return tuple(
            _argument(rng, kind[5:-1], values) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4]))
        )
    choices: dict[str, Any] = {
        "Tensor": values,
        "int": _INTS,
        "SymInt": _INTS,
        "bool": (True, False),
        "float": _FLOATS,
        "number": (*_INTS, *_FLOATS, True, 1j),
        "ScalarType": [getattr(torch, name) for name in ITEM_BYTES],
        "str": _WORDS,
        "MemoryFormat": (torch.contiguous_format, torch.channels_last),
        "Layout": (torch.strided,),
    }
    return rng.choice(choices.get(kind, (None,)))


# -- what comes of them -----------------------------------------------------------------------

SECONDS = 30


def judge(number: int) -> tuple[str, str]:
    """What comes of a mutant: one of ``GOOD``, or a fault; and what was done, with the error."""
    kind, file = mutant(number)
    verdict, more = tried(lambda: _verdict(file), SECONDS, kind, "RefitError")
    if verdict == NEEDS_PROOF and kind == "bytes changed":  # and not sealed with a new digest
        return "fault: damage that gave other slots", kind
    return verdict, more


def _verdict(file: bytes) -> tuple[str, str]:
    try:
        plan = RefitPlan.from_bytes(file)
    except RefitError as exc:
        return REFUSED_AT_LOAD, type(exc).__name__
    differing = False
    for seed in (1, 2):
        given = weights(seed)
        before = {name: tensor.clone() for name, tensor in given.items()}
        try:
            plan.check_engines(original().backend, [row.slot for row in original().ledger])
            values = {slot.key: value for slot, value in plan.iter_slots(given)}
        except RefitError as exc:
            return REFUSED_AT_USE, type(exc).__name__
        finally:
            if not all(same_bits(before[name], given[name]) for name in before):
                raise AssertionError("the caller's weights were changed")
        wrong = [key for key, value in truth(seed).items() if not _same(values.get(key), value)]
        misfit = [row.slot for row in original().ledger if _misfits(values, row.slot)]
        if misfit:
            raise AssertionError(f"a value that does not fit its slot: {misfit}")
        differing |= bool(wrong)
    return (NEEDS_PROOF if differing else SAME), ""


def _same(value: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    return value is not None and same_bits(value.contiguous(), wanted.contiguous())


def _misfits(values: dict[tuple[str, str], torch.Tensor], slot: Slot) -> bool:
    value = values.get(slot.key)
    return value is not None and (str(value.dtype), value.numel()) != (
        f"torch.{slot.dtype}",
        slot.count,
    )
