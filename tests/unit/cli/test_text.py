"""Values as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refitkit.cli import tables


@given(st.text())
def test_nothing_shown_can_steer_a_terminal(anything: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in tables.shown(anything))


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_what_is_printable_is_shown_as_it_is(plain: str) -> None:
    assert tables.shown(plain) == plain


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1572864, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert tables.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 us"),
        (0.0000123, "12.3 us"),
        (0.0123456, "12.3 ms"),
        (1.0, "1 s"),
        (12.345, "12.3 s"),
        (1234.5, "1234 s"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert tables.duration(seconds) == shown


@pytest.mark.parametrize(
    ("sizes", "shown"), [((16, 8), "16 x 8"), ([3], "3"), ((), "scalar"), (None, "?")]
)
def test_shapes(sizes: object, shown: str) -> None:
    assert tables.shape(sizes) == shown


def test_counts() -> None:
    assert (tables.count(1, "slot"), tables.count(2, "slot")) == ("1 slot", "2 slots")
