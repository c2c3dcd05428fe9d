"""What every command is given: where results go, and how to make a pipeline.

A command of a plugin gets it with ``@click.pass_obj``::

    @click.command
    @common_options
    @click.pass_obj
    def hello(session: Session) -> None:
        session.result({"hello": "world"}, lambda console: console.print("Hello world"))
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TextIO

from refitkit.cli.settings import Settings
from refitkit.cli.tables import duration, shown
from refitkit.config import Config
from refitkit.errors import RefitError, raise_if_resource, resources
from refitkit.hookspecs import hookimpl
from refitkit.model import StageFinished, StageStarted, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pydantic import BaseModel
    from rich.console import Console
    from rich.status import Status

    from refitkit.host import BrokenPlugin, Host
    from refitkit.model import Event
    from refitkit.pipeline import Pipeline


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_UNBOUNDED = 10_000
"""Width of tables that do not go to a terminal: wide enough that no row is broken."""


class Session:
    """One run of the command line.

    Attributes:
        as_json: Whether the result is to be JSON.
        no_plugins: Names of plugins that are switched off.
        host: The plugins of the command line.
        registered: Those of them that were passed: its own commands, and explicit ones.
        broken: Plugins that were left out because they are broken; only commands that are there to
            tell of them run then.
        progress: Shows what pipelines are at.
        settings: What options say of the settings of pipelines.
    """

    host: Host
    registered: tuple[object, ...]

    def __init__(self, early: Early, stdout: TextIO, plugins: Iterable[object] = ()) -> None:
        """Start one.

        Args:
            early: Options that act before commands exist.
            stdout: Where the result goes.
            plugins: Explicit plugins, for the command line and for pipelines.
        """
        self.as_json = early.as_json
        self.no_plugins = frozenset(early.no_plugins)
        self.plugins = tuple(plugins)
        self.broken: list[BrokenPlugin] = []
        self.progress = Progress()
        self.settings = Settings()
        self._stdout = stdout

    @property
    def verbose(self) -> bool:
        """Whether to tell more, on stderr."""
        return self.progress.verbose

    @verbose.setter
    def verbose(self, value: bool) -> None:
        self.progress.verbose = value

    def config(self, **settings: object) -> Config:
        """Settings of this run: switched-off plugins, those of options, and what a command adds.

        Nothing is kept for a way back: when the command ends, nobody is there to take it.
        """
        kept: dict[str, object] = {"keep_base": False, "keep_versions": 0}
        given = self.settings.merged()
        off = self.no_plugins | frozenset(given.get("no_plugins", ()))
        return Config.of({**kept, **given, "no_plugins": off, **settings})

    def pipeline(self, **settings: object) -> Pipeline:
        """A pipeline whose progress is shown. Imports torch.

        Args:
            **settings: Fields of :class:`refitkit.Config`.
        """
        return self._pipeline(settings, (*self.plugins, self.progress))

    def silent_pipeline(self) -> Pipeline:
        """A pipeline whose progress is not shown: a spinner for every stage costs time, too."""
        return self._pipeline({}, self.plugins)

    def _pipeline(self, settings: Mapping[str, object], plugins: Iterable[object]) -> Pipeline:
        self.progress.say("starting")
        if not self.verbose:
            _hush_torch()
        _check_torch()
        from refitkit.pipeline import Pipeline

        with self.settings.named():
            return Pipeline(self.config(**settings), plugins)

    def result(self, data: Mapping[str, Any], human: Callable[[Console], object]) -> None:
        """Give the result, once.

        Args:
            data: What ``--json`` prints.
            human: Prints the same for people.
        """
        self.progress.stop()
        text = as_json(data) if self.as_json else self._rendered(human)
        with resources("The result cannot be written to stdout"):
            self._stdout.write(text)
            self._stdout.flush()

    def warn(self, text: str) -> None:
        """Tell something on stderr that does not stop the command."""
        self.complain("warning", "yellow", [text])

    def complain(self, word: str, colour: str, lines: Iterable[str]) -> None:
        """Write lines to stderr behind a coloured word."""
        from rich.console import Console
        from rich.text import Text

        self.progress.stop()
        plain = _COLOURS.sub("", "\n".join(lines))  # torch's messages have some
        text = Text.assemble((f"{word}: ", f"bold {colour}"), shown(plain))
        Console(stderr=True).print(text, soft_wrap=True)

    def _rendered(self, human: Callable[[Console], object]) -> str:
        from rich.console import Console

        wide = None if self._stdout.isatty() else _UNBOUNDED
        console = Console(file=self._stdout, width=wide, markup=False, emoji=False, highlight=False)
        with console.capture() as capture:
            human(console)
        text = capture.get()
        if console.is_terminal:
            return text
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _hush_torch() -> None:
    """Keep from users what torch says to its own developers."""
    # what torch/utils/cpp_extension.py warns of on machines with CUDA and no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for module in ("torch", "copyreg"):  # 2.11 copies trees of a class that it deprecates
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


def _check_torch() -> None:
    """Check that torch can be imported; a broken installation is nobody's bug here.

    Raises:
        RefitError: It cannot.
    """
    try:
        import torch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as exc:
        raise_if_resource(exc, "torch cannot be imported")
        raise RefitError(
            f"torch cannot be imported: {exc}.",
            hint="Install it again (see pytorch.org); refitkit doctor tells what else is missing.",
        ) from exc


def as_json(data: object) -> str:
    """Data as strict JSON, in a line of its own; infinities and NaN become strings."""
    return json.dumps(_finite(data), indent=2, allow_nan=False, default=str) + "\n"


def plain(model: BaseModel) -> dict[str, Any]:
    """A pydantic model as data for ``result``."""
    data: dict[str, Any] = json.loads(model.model_dump_json())
    return data


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def tolerant_of_encodings() -> None:
    """Have characters that a terminal cannot show escaped instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# MERGED progress: Progress on stderr, hung on the hook ``refitkit_event``.


class Progress:
    """A plugin that shows what a pipeline is at, and remembers how long it took.

    Attributes:
        name: Its name among the plugins.
        finished: All stages that ended well, in order.
        verbose: Whether to print a line for every stage, terminal or not.
    """

    name = "cli-progress"

    def __init__(self) -> None:
        """Show nothing before the first event."""
        self.finished: list[StageFinished] = []
        self.verbose = False
        self._status: Status | None = None

    @hookimpl
    def refitkit_event(self, event: Event) -> None:
        """Follow one event."""
        if isinstance(event, StageStarted):
            self.say(f"{event.verb}: {event.stage}")
        elif isinstance(event, Step):
            self.say(f"{event.verb}: {event.stage}: {event.text}")
        elif isinstance(event, StageFinished):
            self.finished.append(event)
            self._log(f"{event.verb}: {event.stage} took {duration(event.seconds)}")

    def say(self, text: str) -> None:
        """Show a text beside a spinner, until the next one or ``stop``."""
        if self.verbose or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.text import Text

        line = Text(shown(text))
        if self._status is None:
            self._status = Console(stderr=True).status(line)
            self._status.start()
        self._status.update(line)

    def stop(self) -> None:
        """Clear the line, so that others can write."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _log(self, text: str) -> None:
        if self.verbose:
            sys.stderr.write(f"{shown(text)}\n")


# MERGED arguments: What has to be known of the command line before there are commands that could
# parse it.

_NO_PLUGIN = "--no-plugin"


@dataclass(frozen=True)
class Early:
    """Options that act before commands exist.

    Attributes:
        as_json: Whether ``--json`` is among the arguments. An error in parsing them is told as
            JSON, too.
        no_plugins: Names of plugins to switch off: which commands there are depends on them.
        command: What is likely the first command: the first argument that is no early option. Some
            commands can work although a plugin is broken.
    """

    as_json: bool = False
    no_plugins: tuple[str, ...] = ()
    command: str = ""


def look_ahead(args: Sequence[str]) -> Early:
    """Find early options anywhere before a ``--``; click parses and checks them again later."""
    if "--" in args:
        args = args[: args.index("--")]
    names = [after for option, after in pairwise(args) if option == _NO_PLUGIN]
    joined = f"{_NO_PLUGIN}="
    names += [arg.removeprefix(joined) for arg in args if arg.startswith(joined)]
    return Early("--json" in args, tuple(names), _first_command(args))


def _first_command(args: Sequence[str]) -> str:
    before = ""
    for arg in args:
        if not arg.startswith("-") and before != _NO_PLUGIN:
            return arg
        before = arg
    return ""


# MERGED names: The name of the plugin that adds the built-in commands.

COMMANDS = "cli"
