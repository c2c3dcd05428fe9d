"""Refit a module and save it over a file, and stop in the middle of writing, for ever.

usage: save_slowly.py MODULE FILE BYTES
"""

from __future__ import annotations

import io
import signal
import sys
import zipfile
from typing import Any

from aoti_models import CASES

import refitkit


def write_some(self: Any, content: bytes | memoryview) -> int:
    """Write as much as was asked for, report it to the parent, and wait to be killed."""
    if isinstance(self._fileobj, io.BytesIO):  # a plan, which is an archive in the archive
        return int(real(self, content))
    size = len(content)
    real(self, content[: max(0, left[0])])
    left[0] -= size
    if left[0] <= 0:
        sys.stdout.write("stuck\n")
        sys.stdout.flush()
        signal.pause()
    return size


if __name__ == "__main__":
    module, file, size = sys.argv[1:]
    left = [int(size)]
    compiled = refitkit.load(module)
    refitkit.refit(compiled, CASES["small"].model(1))
    member: Any = zipfile._ZipWriteFile  # type: ignore[attr-defined]
    real = member.write
    member.write = write_some
    compiled.save(file)
