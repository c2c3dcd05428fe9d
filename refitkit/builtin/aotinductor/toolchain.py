"""What compiling needs of the machine. Loading and refitting need none of it."""

from __future__ import annotations

import os
import shutil

from refitkit.errors import Problem, ToolchainError

_COMPILERS = ("g++", "c++", "clang++")


def check() -> None:
    """Check that a C++ compiler and openssl are there.

    ``CXX`` chooses the compiler, as for inductor (``torch/_inductor/cpp_builder.py``). openssl is
    what inductor's packaging calls.

    Raises:
        ToolchainError: Names everything that is missing and what to install.
    """
    problems = []
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else _COMPILERS
    if not any(shutil.which(name) for name in candidates):
        hint = "correct or unset CXX" if chosen else "Debian, Ubuntu: apt-get install g++"
        problems.append(Problem(chosen or "g++", "C++ compiler not found", hint=hint))
    if not shutil.which("openssl"):
        hint = "Debian, Ubuntu: apt-get install openssl"
        problems.append(Problem("openssl", "command not found", hint=hint))
    if problems:
        raise ToolchainError(
            "This machine cannot compile with AOTInductor.",
            problems=problems,
            hint="A module compiled elsewhere can be loaded and refitted here without them.",
        )
