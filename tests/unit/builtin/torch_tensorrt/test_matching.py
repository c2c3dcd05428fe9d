"""What differs between the parts of two programs."""

from __future__ import annotations

import pytest

from refitkit.builtin.torch_tensorrt.parts import Structure, check_slots, check_structures
from refitkit.errors import PlanMismatchError
from refitkit.model import Slot

PART = Structure(
    name="part", accelerated=True, graph="g", ops=("add", "mul"), inputs=("x",), outputs=1
)
SLOT = Slot(engine="part", name="w", dtype="float32", shape=(2,), count=2)


def test_alike_passes() -> None:
    check_structures([PART], [PART])
    check_slots({"part": [SLOT]}, {"part": [SLOT]})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"accelerated": False}, "kind of part"),
        ({"ops": ("add", "sub")}, "op 1"),
        ({"ops": ("add",)}, "op 1"),
        ({"inputs": ("x", "y")}, "inputs"),
        ({"outputs": 2}, "outputs"),
        ({"graph": "h"}, "shapes, dtypes or arguments of its ops"),
    ],
    ids=str,
)
def test_what_differs_is_told(changes: dict[str, object], kind: str) -> None:
    with pytest.raises(PlanMismatchError) as info:
        check_structures([PART.model_copy(update=changes)], [PART])
    assert [p.kind for p in info.value.problems] == [kind]


def test_all_parts_that_are_missing_or_too_many_are_told() -> None:
    others = [PART.model_copy(update={"name": name}) for name in ("a", "b")]
    with pytest.raises(PlanMismatchError) as info:
        check_structures(others, [PART])
    assert {p.subject: p.kind for p in info.value.problems} == {
        "a": "no engine for this part",
        "b": "no engine for this part",
        "part": "no part for this engine",
    }


@pytest.mark.parametrize(
    ("slots", "found"),
    [
        ([], {"part/w": "none"}),
        ([SLOT.model_copy(update={"dtype": "float16"})], {"part/w": "float16 (2,)"}),
        (
            [SLOT, SLOT.model_copy(update={"name": "v", "shape": None})],
            {"part/v": "float32 of 2 elements"},
        ),
    ],
    ids=["missing", "dtype", "too many"],
)
def test_slots_that_differ_are_told(slots: list[Slot], found: dict[str, str]) -> None:
    with pytest.raises(PlanMismatchError) as info:
        check_slots({"part": slots}, {"part": [SLOT]})
    assert {p.subject: p.found for p in info.value.problems} == found
