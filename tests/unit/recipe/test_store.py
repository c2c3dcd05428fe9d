"""Plan files that are damaged, tampered with or made up: one error, whatever is wrong."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from refitkit.errors import PlanMismatchError
from refitkit.model import LedgerRow, SlotState, fingerprint_of_slots
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import DIGEST, MANIFEST, PINNED
from tests.fakes import make_plan, make_slot, pinned_row, recipe_row

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS = make_slot("w"), make_slot("b", (3,), "bfloat16"), make_slot("m", (2,), "int64")
TENSORS = {"m": torch.tensor([7, 8])}
PLAN = make_plan(
    [
        recipe_row(SLOTS[0], "w", "twin"),
        recipe_row(SLOTS[1]),
        pinned_row(SLOTS[2]),
        LedgerRow(slot=make_slot("eps"), state=SlotState.FROZEN, reason="a literal"),
        LedgerRow(slot=make_slot("odd"), state=SlotState.UNMAPPED, reason="nobody knows"),
    ],
    ties=[("w", "twin")],
    pinned=TENSORS,
)
GOOD = PLAN.to_bytes()
DATA: dict[str, Any] = PLAN.data.model_dump(mode="json")


def archive(
    members: dict[str, bytes], compression: int = zipfile.ZIP_STORED, **kinds: int
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(zipfile.ZipInfo(name), content, kinds.get(name, compression))
    return file.getvalue()


def members_of(text: bytes) -> dict[str, bytes]:
    digest = hashlib.sha256(text).hexdigest().encode() + b"\n"
    return {MANIFEST: text, PINNED: save(TENSORS), DIGEST: digest}


def with_manifest(text: bytes) -> bytes:
    return archive(members_of(text))


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = copy.deepcopy(DATA)
    change(data)
    return with_manifest(json.dumps(data).encode())


def refused(content: bytes) -> PlanMismatchError:
    with pytest.raises(PlanMismatchError, match=r"^This plan ") as info:
        RefitPlan.from_bytes(content)
    return info.value


def test_these_helpers_write_what_refitkit_reads() -> None:
    assert RefitPlan.from_bytes(GOOD).data == PLAN.data
    assert RefitPlan.from_bytes(edited(lambda data: None)).data == PLAN.data


# -- the container ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"PK\x03\x04", b"\0" * 100, b"{}", b"PK\x05\x06" + b"\0" * 18, save(TENSORS)],
    ids=["empty", "two", "magic", "zeros", "json", "no members", "safetensors"],
)
def test_what_is_no_archive(content: bytes) -> None:
    refused(content)


@pytest.mark.parametrize("cut", range(0, len(GOOD), 97))
def test_a_truncated_file(cut: int) -> None:
    refused(GOOD[:cut])


@pytest.mark.parametrize("missing", [MANIFEST, PINNED, DIGEST])
def test_a_missing_member(missing: str) -> None:
    members = members_of(json.dumps(DATA).encode())
    del members[missing]
    assert missing in str(refused(archive(members)))


@pytest.mark.parametrize("name", [MANIFEST, PINNED, DIGEST])
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member(name: str, kind: int) -> None:
    """A few bytes could otherwise become gigabytes."""
    members = members_of(json.dumps(DATA).encode())
    assert "compressed" in str(refused(archive(members, **{name: kind})))


@pytest.mark.parametrize(
    "name",
    ["../manifest.json", "/manifest.json", "Manifest.json", "manifest.json/", "x/manifest.json"],
)
def test_a_member_under_another_name_is_not_taken_for_it(name: str) -> None:
    members = members_of(json.dumps(DATA).encode())
    members[name] = members.pop(MANIFEST)
    assert "no member 'manifest.json'" in str(refused(archive(members)))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("second", ["manifest.json", "manifest.json\0x"])
def test_two_members_of_one_name(second: str) -> None:
    """Two readers could see two plans."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in (MANIFEST, PINNED, "x" * len(second)):
            made.writestr(name, json.dumps(DATA) if name != PINNED else save(TENSORS))
    content = file.getvalue().replace(b"x" * len(second), second.encode())
    refused(content)


def central(content: bytes, name: str) -> int:
    """Offset of a member's entry in the central directory."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))


@pytest.mark.parametrize("name", [MANIFEST, PINNED])
@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (6, "<H", 99),  # version needed
        (8, "<H", 1),  # encrypted
        (8, "<H", 0x20),  # patched data
        (8, "<H", 0x40),  # strong encryption
        (10, "<H", 8),  # deflated
        (10, "<H", 77),  # no such method
        (16, "<L", 0),  # CRC
        (20, "<LL", (0xFFFFFFF0, 0xFFFFFFF0)),  # sizes
        (20, "<LL", (200_000_000, 200_000_000)),
        (20, "<LL", (0, 0)),
        (20, "<LL", (0xFFFFFFFF, 0xFFFFFFFF)),  # in an extra field that is not there
        (28, "<H", 1),  # length of the name
        (42, "<L", 0xFFFFFFFE),  # where the member is
        (42, "<L", 1),
    ],
    ids=str,
)
def test_a_directory_that_lies(name: str, offset: int, form: str, value: Any) -> None:
    content = bytearray(GOOD)
    values = value if isinstance(value, tuple) else (value,)
    struct.pack_into(form, content, central(GOOD, name) + offset, *values)
    refused(bytes(content))


@pytest.mark.parametrize("where", [2**64 - 1, 2**63, 2**63 - 1, 2**62, 2**40])
def test_a_member_beyond_the_end_of_everything(where: int) -> None:
    start = central(GOOD, MANIFEST)
    end = GOOD.rindex(b"PK\x05\x06")
    extra = struct.pack("<HHQ", 1, 8, where)
    entry = bytearray(GOOD[start : start + 46 + len(MANIFEST)])
    struct.pack_into("<H", entry, 30, len(extra))
    struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
    directory = bytes(entry) + extra + GOOD[start + len(entry) : end]
    tail = bytearray(GOOD[end:])
    struct.pack_into("<L", tail, 12, len(directory))
    refused(GOOD[:start] + directory + bytes(tail))


@given(st.data())
@settings(max_examples=400)
def test_any_damage_is_seen_or_does_no_harm(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
        if what == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "set":
            content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
        elif what == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        if not content:
            return
    try:
        plan = RefitPlan.from_bytes(bytes(content))
    except PlanMismatchError:
        return
    assert plan.data == PLAN.data  # only what nobody reads was hit: a date, an attribute
    assert plan.pinned("m").equal(TENSORS["m"])


def test_a_kept_tensor_of_one_element_may_have_any_stride() -> None:
    kept = torch.arange(10)[::5][:1]
    row = pinned_row(make_slot("m", (1,), "int64"))
    plan = make_plan([row], pinned={"m": kept})
    assert RefitPlan.from_bytes(plan.to_bytes()).pinned("m").equal(kept)


# -- the manifest -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b"3", b'"text"', b"[" * 100_000,
        b'{"format": 1e999}', b'{"format": ' + b"9" * 5000 + b"}", b'{"backend": "\\ud800"}',
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_a_manifest_that_is_none(text: bytes) -> None:
    refused(with_manifest(text))


def test_a_manifest_of_another_kind_is_named_as_a_whole() -> None:
    """What is wrong with it lies at no place inside."""
    error = refused(with_manifest(b"[]"))
    assert [p.subject for p in error.problems] == [MANIFEST]
    error = refused(edited(lambda data: data["ledger"][0]["slot"].update(count="x")))
    assert [p.subject for p in error.problems] == ["ledger.0.slot.count"]


def test_another_version_of_the_format_is_named() -> None:
    error = refused(edited(lambda data: data.update(format="refitplan/3")))
    assert [p.subject for p in error.problems] == ["format"]
    assert "refitplan/2" in error.hint


def test_plans_of_version_1_have_no_digest_and_are_read() -> None:
    first = {name: value for name, value in DATA.items() if name not in {"calls", "guards"}}
    members = members_of(json.dumps({**first, "format": "refitplan/1"}).encode())
    del members[DIGEST]
    plan = RefitPlan.from_bytes(archive(members))
    assert plan.ledger == PLAN.ledger
    assert plan.pinned("m").equal(TENSORS["m"])


def test_a_plan_cannot_lose_its_digest_by_calling_itself_version_1() -> None:
    call = {"op": "aten.neg.default", "args": [{"kind": "source", "fqn": "w"}], "results": []}
    text = json.dumps({**DATA, "format": "refitplan/1", "calls": [call]}).encode()
    members = members_of(text)
    del members[DIGEST]
    assert "format" in [p.subject for p in refused(archive(members)).problems]


@pytest.mark.parametrize(
    ("digest", "told"),
    [
        (b"", "was changed"),
        (b"0" * 64 + b"\n", "was changed"),
        (b"0" * 65, "was changed"),
        (b"0" * 66, "66 bytes, at most 65 fit"),
    ],
)
def test_a_digest_that_is_another_one(digest: bytes, told: str) -> None:
    assert told in str(refused(archive({**members_of(json.dumps(DATA).encode()), DIGEST: digest})))


def test_a_manifest_that_was_edited_in_place_is_told_apart_from_one_that_cannot_be_read() -> None:
    members = members_of(json.dumps(DATA).encode())
    members[MANIFEST] = members[MANIFEST].replace(b"a literal", b"a liberal")
    error = refused(archive(members))
    assert "was changed after it was written" in str(error)
    assert [p.subject for p in error.problems] == [MANIFEST]


LEDGER: dict[str, Callable[[Any], object]] = {
    "unknown field": lambda data: data.update(extra=1),
    "unknown field of a row": lambda data: data["ledger"][0].update(extra=1),
    "unknown field of a slot": lambda data: data["ledger"][0]["slot"].update(extra=1),
    "unknown state": lambda data: data["ledger"][0].update(state="odd"),
    "unknown value": lambda data: data["ledger"][0]["value"].update(kind="code"),
    "unknown kind of leaf": lambda data: data["leaves"][0].update(kind="odd"),
    "unknown dtype of a slot": lambda data: data["ledger"][0]["slot"].update(dtype="float23"),
    "unknown dtype of a leaf": lambda data: data["leaves"][0].update(dtype="float23"),
    "unknown dtype of a pinned": lambda data: data["pinned"]["m"].update(dtype="float23"),
    "negative size": lambda data: data["ledger"][0]["slot"].update(shape=[-2], count=-2),
    "absurd size": lambda data: data["ledger"][0]["slot"].update(shape=[10**4000, 10**4000]),
    "huge pinned": lambda data: data["pinned"]["m"].update(shape=[2**40]),
    "count is not the shape's": lambda data: data["ledger"][0]["slot"].update(count=3),
    "row without value": lambda data: data["ledger"][0].update(value=None),
    "pinned row with source": lambda data: data["ledger"][2].update(value={"fqn": "w"}),
    "recipe row that is pinned": lambda data: data["ledger"][0].update(
        value={"kind": "pinned", "name": "m"}
    ),
    "unmapped row with value": lambda data: data["ledger"][0].update(state="unmapped"),
    "kept row with a source": lambda data: data["ledger"][2].update(state="frozen", sources=["b"]),
    "frozen row with a recipe": lambda data: data["ledger"][0].update(state="frozen", sources=[]),
    "unmapped row with sources": lambda data: data["ledger"][4].update(sources=["w"]),
    "frozen row with sources": lambda data: data["ledger"][3].update(sources=["w"]),
    "source that is no leaf": lambda data: data["leaves"].pop(0),
    "source not among sources": lambda data: data["ledger"][0].update(sources=["twin"]),
    "no sources at all": lambda data: data["ledger"][0].update(sources=[]),
    "other source that is no leaf": lambda data: data["ledger"][0].update(sources=["w", "zz"]),
    "pinned that is not there": lambda data: data["ledger"][2]["value"].update(name="zz"),
    "leaf of another dtype": lambda data: data["leaves"][0].update(dtype="float16"),
    "leaf of another shape": lambda data: data["leaves"][0].update(shape=[3]),
    "leaf twice": lambda data: data["leaves"].append(data["leaves"][0]),
    "tie without leaf": lambda data: data.update(ties=[["w", "zz"]]),
    "fingerprint of other slots": lambda data: data["fingerprint"].update(slots="0" * 64),
    "a row less": lambda data: data["ledger"].pop(1),
    "pinned not listed": lambda data: data["pinned"].clear(),
    "pinned listed, not there": lambda data: data["pinned"].update(x=data["pinned"]["m"]),
    "pinned digest": lambda data: data["pinned"]["m"].update(sha256="0" * 64),
    "pinned dtype": lambda data: data["pinned"]["m"].update(dtype="uint64"),
    "pinned shape": lambda data: data["pinned"]["m"].update(shape=[2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEDGER)
def test_a_manifest_that_contradicts_itself(name: str) -> None:
    error = refused(edited(LEDGER[name]))
    assert error.problems or "exceed" in str(error) or "at most" in str(error)


def test_a_row_twice() -> None:
    def twice(data: Any) -> None:
        data["ledger"].append(data["ledger"][0])
        slots = [*(row.slot for row in PLAN.ledger), PLAN.ledger[0].slot]
        data["fingerprint"]["slots"] = fingerprint_of_slots(slots)

    assert [p.subject for p in refused(edited(twice)).problems] == ["model/w"]


def test_a_slot_of_another_dtype_than_its_pinned_value() -> None:
    def change(data: Any) -> None:
        data["ledger"][2]["slot"]["dtype"] = "uint64"
        slots = [row.slot for row in PLAN.ledger]
        slots[2] = slots[2].model_copy(update={"dtype": "uint64"})
        data["fingerprint"]["slots"] = fingerprint_of_slots(slots)

    assert [p.subject for p in refused(edited(change)).problems] == ["m"]


def test_all_contradictions_are_listed_at_once() -> None:
    def change(data: Any) -> None:
        data["ledger"][0]["value"] = None
        data["ledger"][2]["value"]["name"] = "zz"
        data["pinned"]["m"]["sha256"] = "0" * 64

    assert {p.subject for p in refused(edited(change)).problems} == {"w", "m"}
    assert len(refused(edited(change)).problems) > 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10)
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63)])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["w", "m", "recipe", "pinned", "source", "float32", "int64"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "fqn", "name", "shape"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in inside:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


@given(st.lists(st.tuples(st.sampled_from(places(DATA)), JSON), min_size=1, max_size=3))
@settings(max_examples=300)
def test_any_change_of_the_manifest_is_refused_or_still_a_plan(changes: Any) -> None:
    data = copy.deepcopy(DATA)
    for path, value in changes:
        target: Any = data
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
        except (KeyError, TypeError, IndexError):
            continue  # an earlier change took it away
    try:
        plan = RefitPlan.from_bytes(with_manifest(json.dumps(data).encode()))
    except PlanMismatchError:
        return
    assert RefitPlan.from_bytes(plan.to_bytes()).data == plan.data
    assert plan.pinned("m").equal(TENSORS["m"])


# -- the pinned tensors -----------------------------------------------------------------------


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"m": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        safetensors(b"{"),
        safetensors([]),
        safetensors({}),
        safetensors(entry("I64", [2], 16), b"\0" * 15),
        safetensors(entry("I64", [2], 16), b"\0" * 17),
        safetensors(entry("I64", [3], 16), b"\0" * 16),
        safetensors(entry("I64", [-2], 16), b"\0" * 16),
        safetensors(entry("F4", [2], 1), b"\0"),
        safetensors(entry("F6_E2M3", [4], 3), b"\0" * 3),
        safetensors(entry("F8_E8M0", [2], 2), b"\0" * 2),
        safetensors(entry("X99", [2], 2), b"\0" * 2),
        safetensors(entry("I64", [0, 2**62, 2**62], 0)),
        safetensors(entry("I64", [0, 2**63], 0)),
        safetensors(entry("I64", [0, 2**64], 0)),
        save({"m": torch.tensor([7, 9])}),
        save({"m": torch.tensor([7, 8], dtype=torch.int32)}),
        save({"m": torch.tensor([[7, 8]])}),
        save({**TENSORS, "more": torch.ones(1)}),
        save({**TENSORS, "more": torch.ones(100_000)}),
    ],
)
def test_pinned_tensors_that_are_not_those_of_the_manifest(content: bytes) -> None:
    refused(archive({**members_of(json.dumps(DATA).encode()), PINNED: content}))


def test_a_message_names_what_was_read() -> None:
    with pytest.raises(PlanMismatchError, match=r"^the plan of this module is not"):
        RefitPlan.from_bytes(b"", "the plan of this module")
