"""Refit a module and save it over a file, and stop in the middle of writing, for ever.

usage: save_slowly.py MODULE FILE BYTES
"""

from __future__ import annotations

import shutil
import signal
import sys
from typing import IO, Any

from aoti_models import CASES

import refitkit
from refitkit.recipe import archive


def copy_some(source: IO[bytes], target: IO[bytes], length: int = 0) -> None:
    """Copy as much as was asked for, tell the parent, and wait to be killed."""
    content = source.read()
    target.write(content[: max(0, left[0])])
    left[0] -= len(content)
    if left[0] <= 0:
        sys.stdout.write("stuck\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    module, file, size = sys.argv[1:]
    left = [int(size)]
    compiled = refitkit.load(module)
    refitkit.refit(compiled, CASES["small"].model(1))
    tools: Any = archive.shutil
    tools.copyfileobj = copy_some
    assert shutil.copyfileobj is copy_some
    compiled.save(file)
