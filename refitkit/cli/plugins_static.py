"""What can be said of a plugin from outside: registration, names of offers, imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from refitkit.cli.known import BROKEN
from refitkit.errors import PluginError, RefitError
from refitkit.host import make_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.cli.known import KnownPlugin
    from refitkit.cli.session import Session

SUITE = "registration"
_HEAVY = ("torch", "numpy", "tensorrt", "torch_tensorrt", "transformers")
"""Packages that nobody should wait for who only asks for ``refitkit --help``."""

_NAMED: Mapping[str, tuple[str, ...]] = {
    "refitkit_layer_types": (),
    "refitkit_mapping_strategies": (),
    "refitkit_verifiers": (),
    "refitkit_weight_transforms": ("config",),
}
"""Hooks whose results have names of their own, with their arguments."""

_PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(" ".join(name for name in sys.argv[2:] if name in sys.modules))
"""


@dataclass(frozen=True)
class Check:
    """What became of one check; fields as in ``refitkit.testing.check.CheckResult``.

    Attributes:
        suite: What it belongs to.
        check: Its name.
        outcome: ``passed``, ``failed``, ``skipped``, ``missing`` or ``deprecated``.
        message: Why, and what to do.
        seconds: Wall-clock time.
    """

    suite: str
    check: str
    outcome: str
    message: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def static_checks(session: Session, plugin: KnownPlugin) -> Iterator[Check]:
    """Checks that need neither pytest nor anything of the plugin's but the plugin itself.

    Args:
        session: The run of the command line.
        plugin: The plugin; it may be broken, and then this says why, and no more.
    """
    if plugin.state == BROKEN:
        yield Check(SUITE, "hooks_and_arguments", "failed", plugin.problem)
        return
    yield Check(SUITE, "hooks_and_arguments", "passed")
    yield _deprecated(session, plugin)
    yield _timed("names_of_offers", lambda: _unnamed(session, plugin))
    if plugin.origin == "explicit":
        yield Check(SUITE, "light_import", "skipped", "it was given as an object, not imported")
    else:
        yield _timed("light_import", lambda: _heavy(plugin))


def _timed(name: str, find: Callable[[], str]) -> Check:
    began = time.perf_counter()
    wrong = find()
    return Check(SUITE, name, "failed" if wrong else "passed", wrong, time.perf_counter() - began)


def _deprecated(session: Session, plugin: KnownPlugin) -> Check:
    """Register everybody once more, and hear what the host warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        make_host(session.config(), session.plugins, on_broken=lambda _: None)
    said = [str(one.message) for one in caught if f"plugin {plugin.name!r} " in str(one.message)]
    return Check(SUITE, "arguments_that_stay", "deprecated" if said else "passed", "\n".join(said))


def _unnamed(session: Session, plugin: KnownPlugin) -> str:
    """What is wrong with the names of what it offers: none, or taken by another plugin."""
    given = {"config": session.config()}
    for hook, arguments in _NAMED.items():
        if hook in plugin.hooks:
            try:
                session.host.offers(hook, **{name: given[name] for name in arguments})
            except PluginError as exc:
                if repr(plugin.name) in str(exc):
                    return str(exc)
            except RefitError as exc:
                return f"{hook}: {exc}"
    return ""


def _heavy(plugin: KnownPlugin) -> str:
    """What importing the plugin imports that it should not, found in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(  # noqa: S603 - our own probe, and the plugin that was asked for
        [sys.executable, "-P", "-c", _PROBE, plugin.module, *_HEAVY],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        return f"Importing {plugin.module} alone fails: {done.stderr.strip().splitlines()[-1]}"
    loaded = done.stdout.split()
    if not loaded:
        return ""
    return (
        f"Importing {plugin.module} imports {', '.join(loaded)}, which everybody waits for who "
        "starts refitkit: import what is heavy inside the hooks."
    )
