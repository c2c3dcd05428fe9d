"""Values of one part in a file that two processes map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from refitkit.builtin.torch_tensorrt.worker.messages import Region
from refitkit.errors import EngineError
from refitkit.model import Slot
from refitkit.program.dtypes import dtype_of

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = ["float32", "bfloat16", "int64", "bool", "complex64", "float8_e4m3fn", "uint8"]


def slots(*counts: int) -> list[Slot]:
    return [
        Slot(engine="e", name=f"{dtype} {count}", dtype=dtype, shape=(count,), count=count)
        for count in counts
        for dtype in DTYPES
    ]


def test_all_dtypes_and_counts_are_seen_at_the_other_end(tmp_path: Path) -> None:
    listed = slots(0, 1, 3, 17)
    mine = Region.create(tmp_path / "region", listed)
    assert not mine.whole.any()
    theirs = Region.open(tmp_path / "region", listed)
    for number, slot in enumerate(listed):
        mine.views[slot.name].view(torch.uint8).fill_(number + 1)
    for number, slot in enumerate(listed):
        view = theirs.views[slot.name]
        assert (view.dtype, view.numel()) == (dtype_of(slot.dtype), slot.count)
        assert (view.view(torch.uint8) == number + 1).all()
        assert view.data_ptr() % 64 == 0 or not slot.count


def test_a_part_without_slots_has_a_region(tmp_path: Path) -> None:
    assert Region.create(tmp_path / "region", []).views == {}
    assert Region.open(tmp_path / "region", []).views == {}


def test_a_region_of_other_slots_is_refused(tmp_path: Path) -> None:
    """Mapped in spite of that, reading it would end the process, or it would grow."""
    Region.create(tmp_path / "region", slots(3))
    for others in (slots(100), slots()):
        with pytest.raises(EngineError, match="other slots"):
            Region.open(tmp_path / "region", others)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Somebody may have it mapped."""
    (tmp_path / "region").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Region.create(tmp_path / "region", slots(3))
    assert (tmp_path / "region").read_bytes() == b"mine"
