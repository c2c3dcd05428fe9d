"""Which modules an installed distribution contains, found without importing any of them.

A file can name modules that a session has to import. Only modules of installed plugins are, so the
answer must be sure: a namespace package has parts of other distributions, and a folder earlier on
``sys.path`` can hide a module.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution


def contains_module(dist: Distribution | None, plugin: str, module: str) -> bool:
    """Whether a module lies in the top-level package of a plugin, in files of its distribution.

    Every package above the module must be of the distribution, too, because an import runs them.

    Args:
        dist: Distribution of the plugin; None if it is unknown.
        plugin: Name of the plugin's module, which was imported.
        module: Name of the other module, with all dots.
    """
    if module == plugin:
        return plugin in sys.modules
    names = module.split(".")
    if dist is None or names[0] != plugin.partition(".")[0]:
        return False
    # modules named __main__ are programs, and refitkit is never a plugin's package
    if not all(map(str.isidentifier, names)) or names[0] == "refitkit" or "__main__" in names:
        return False
    # a namespace package has no file, and an import of it runs no code
    files = [_file(".".join(names[:length])) for length in range(1, len(names) + 1)]
    is_own = _file_test(dist)
    return files[-1] is not None and all(file is None or is_own(file) for file in files)


def _file(module: str) -> Path | None:
    """The real path of the file that an import of a module runs; None if there is none."""
    spec = _spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()


def _spec(module: str) -> ModuleSpec | None:
    """The spec of a module below an imported top-level package; None if there is none.

    ``importlib.util.find_spec`` would import the packages above it.
    """
    above, _, _ = module.rpartition(".")
    if not above:
        return getattr(sys.modules.get(module), "__spec__", None)
    package = _spec(above)
    if package is None or package.submodule_search_locations is None:
        return None
    try:
        return PathFinder.find_spec(module, list(package.submodule_search_locations))
    except KeyError:  # of a namespace package in one that was not imported
        return None


def _file_test(dist: Distribution) -> Callable[[Path], bool]:
    """A function that says whether a file, given by its real path, is one of the distribution."""
    project = _editable_project(dist)
    listed = {Path(str(dist.locate_file(file))).resolve() for file in dist.files or ()}
    return lambda file: file in listed or (project is not None and file.is_relative_to(project))


def _editable_project(dist: Distribution) -> Path | None:
    """The project folder of an editable installation, whose list of files lacks the modules.

    Source: https://packaging.python.org/en/latest/specifications/direct-url/
    """
    try:
        found = json.loads(dist.read_text("direct_url.json") or "{}")
        if not found.get("dir_info", {}).get("editable"):
            return None
        url = urlsplit(found["url"])
    except (ValueError, KeyError, AttributeError):
        return None
    return Path(url2pathname(url.path)).resolve() if url.scheme == "file" else None
