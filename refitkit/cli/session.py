"""The object that each command gets: it prints the result, warns, and creates pipelines.

A command of a plugin gets it with ``@click.pass_obj``::

    @click.command
    @common_options
    @click.pass_obj
    def hello(session: Session) -> None:
        session.result({"hello": "world"}, lambda console: console.print("Hello world"))

``Session`` comes first. ``Progress`` shows on stderr what a pipeline does. ``parse_early_options``
finds the options that act before commands exist.
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

from refitkit.cli.settings import CommandSettings
from refitkit.cli.tables import duration, shown
from refitkit.config import Config
from refitkit.errors import RefitError, raise_if_resource, resources
from refitkit.hookspecs import hookimpl
from refitkit.model import StageFailed, StageFinished, StageStarted, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from pydantic import BaseModel
    from rich.console import Console
    from rich.status import Status

    from refitkit.host import BrokenPlugin, Host
    from refitkit.model import Event
    from refitkit.pipeline import Pipeline

COMMANDS = "cli"
"""Name of the plugin that adds the built-in commands."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_UNBOUNDED = 10_000
"""Width of tables that do not go to a terminal, so that no row is broken."""


class Session:
    """One run of the command line.

    Attributes:
        as_json: Whether to print the result as JSON.
        no_plugins: Names of plugins that ``--no-plugin`` switches off.
        plugins: Explicit plugins, for the command line and for pipelines.
        host: Host with the plugins of the command line.
        registered: Explicit plugins of that host: the built-in commands, and ``plugins``.
        broken: Plugins that were left out because they are broken. Only commands that report broken
            plugins run in this case.
        progress: Plugin that shows the progress of pipelines.
        settings: Settings of pipelines that options gave.
    """

    host: Host
    registered: tuple[object, ...]

    def __init__(self, early: EarlyOptions, stdout: TextIO, plugins: Iterable[object] = ()) -> None:
        """Start a run.

        Args:
            early: Options that act before commands exist.
            stdout: Stream for the result.
            plugins: Explicit plugins, for the command line and for pipelines.
        """
        self.as_json = early.as_json
        # Known before click parses the arguments, because it decides which commands exist.
        self.no_plugins = frozenset(early.no_plugins)
        self.plugins = tuple(plugins)
        self.broken: list[BrokenPlugin] = []
        self.progress = Progress()
        self.settings = CommandSettings()
        self._stdout = stdout

    @property
    def verbose(self) -> bool:
        """Whether to print times and tracebacks on stderr."""
        return self.progress.verbose

    @verbose.setter
    def verbose(self, value: bool) -> None:
        self.progress.verbose = value

    def config(self, **settings: object) -> Config:
        """Settings of this run: ``--no-plugin``, those of options, and those of the command.

        Copies of old weights are switched off: the process ends with the command, so nothing can
        restore them.
        """
        kept: dict[str, object] = {"keep_base": False, "keep_versions": 0}
        given = self.settings.merged()
        off = self.no_plugins | frozenset(given.get("no_plugins", ()))
        # the last one wins: a file may switch copies on, and flags override the file
        return Config.of({**kept, **given, "no_plugins": off, **settings})

    def pipeline(self, **settings: object) -> Pipeline:
        """A pipeline whose progress is shown. Imports torch.

        Args:
            **settings: Fields of :class:`refitkit.Config`.
        """
        return self._pipeline(settings, (*self.plugins, self.progress))

    def silent_pipeline(self) -> Pipeline:
        """A pipeline whose progress is not shown, for measurements: each update costs time."""
        return self._pipeline({}, self.plugins)

    def _pipeline(self, settings: Mapping[str, object], plugins: Iterable[object]) -> Pipeline:
        self.progress.show("starting")
        if not self.verbose:
            _silence_torch()
        _check_torch()
        from refitkit.pipeline import Pipeline

        # which plugins exist, and so which settings, is known only now
        with self.settings.naming_file():
            return Pipeline(self.config(**settings), plugins)

    def result(self, data: Mapping[str, Any], human: Callable[[Console], object]) -> None:
        """Print the result; call it once.

        Args:
            data: Data that ``--json`` prints.
            human: Function that prints the same for people.

        Raises:
            ResourceError: stdout cannot be written.
        """
        self.progress.stop()
        text = as_json(data) if self.as_json else self._rendered(human)
        with resources("The result cannot be written to stdout"):
            self._stdout.write(text)
            self._stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning on stderr; the command goes on."""
        self.print_message("warning", "yellow", [text])

    def print_message(self, word: str, colour: str, lines: Iterable[str]) -> None:
        """Print lines on stderr after a coloured word."""
        from rich.console import Console
        from rich.text import Text

        self.progress.stop()
        plain = _COLOURS.sub("", "\n".join(lines))  # messages of torch contain colours
        text = Text.assemble((f"{word}: ", f"bold {colour}"), shown(plain))
        # soft_wrap: no line breaks inside paths, which users copy
        Console(stderr=True).print(text, soft_wrap=True)

    def _rendered(self, human: Callable[[Console], object]) -> str:
        from rich.console import Console

        wide = None if self._stdout.isatty() else _UNBOUNDED
        console = Console(file=self._stdout, width=wide, markup=False, emoji=False, highlight=False)
        # Render everything first, so that a failure does not leave half a result on stdout.
        with console.capture() as capture:
            human(console)
        text = capture.get()
        if console.is_terminal:
            return text
        # rich pads rows with spaces to the width of the table
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _silence_torch() -> None:
    """Hide log lines and warnings of torch that users cannot act on."""
    # torch/utils/cpp_extension.py warns on machines that have CUDA and no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not sys.warnoptions:
        # torch 2.11 copies trees of a class that it deprecates; the warning points at copyreg
        for module in ("torch", "copyreg"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


def _check_torch() -> None:
    """Check that torch can be imported. A broken installation is not a bug of refitkit.

    Raises:
        RefitError: torch cannot be imported.
    """
    try:
        import torch  # noqa: F401
    # OSError: a shared library is missing. RuntimeError: parts of the installation do not match.
    except (ImportError, OSError, RuntimeError) as exc:
        raise_if_resource(exc, "torch cannot be imported")
        raise RefitError(
            f"torch cannot be imported: {exc}.",
            hint="Install it again (see pytorch.org); refitkit doctor lists what else is missing.",
        ) from exc


def as_json(data: object) -> str:
    """Data as strict JSON that ends with a line break; infinities and NaN become strings."""
    return json.dumps(_finite(data), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def plain(model: BaseModel) -> dict[str, Any]:
    """A pydantic model as data for ``Session.result``."""
    data: dict[str, Any] = json.loads(model.model_dump_json())
    return data


def escape_unencodable_output() -> None:
    """Escape characters that a terminal cannot show; by default they end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of tests may lack it
            stream.reconfigure(errors="backslashreplace")


# -- progress ----------------------------------------------------------------------------------


class Progress:
    """A plugin that shows on stderr what a pipeline does, and records how long it took.

    Attributes:
        name: Name of the plugin.
        finished: All stages that succeeded, in order.
        verbose: Whether to print a line for each stage, even without a terminal.
    """

    name = "cli-progress"

    def __init__(self) -> None:
        """Show nothing until the first event."""
        self.finished: list[StageFinished] = []
        self.verbose = False
        self._status: Status | None = None

    @hookimpl
    def refitkit_event(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StageStarted):
            self.show(f"{event.verb}: {event.stage}")
        elif isinstance(event, Step):
            self.show(f"{event.verb}: {event.stage}: {event.text}")
        elif isinstance(event, StageFinished):
            self.finished.append(event)
            self._log(f"{event.verb}: {event.stage} took {duration(event.seconds)}")
        elif isinstance(event, StageFailed):
            self._log(f"{event.verb}: {event.stage} failed after {duration(event.seconds)}")

    def show(self, text: str) -> None:
        """Show a text beside a spinner, until the next text or ``stop``."""
        # A spinner would fill log files with control characters.
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
        """Remove the spinner, so that other output can follow."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _log(self, text: str) -> None:
        if self.verbose:
            sys.stderr.write(f"{shown(text)}\n")


# -- early options -----------------------------------------------------------------------------

_NO_PLUGIN = "--no-plugin"


@dataclass(frozen=True)
class EarlyOptions:
    """Options that act before commands exist.

    Attributes:
        as_json: Whether ``--json`` is among the arguments. Then errors in parsing the arguments are
            JSON, too.
        no_plugins: Names of plugins to switch off. Which commands exist depends on them.
        command: Likely name of the command: the first argument that is not an early option. Some
            commands run although a plugin is broken.
    """

    as_json: bool = False
    no_plugins: tuple[str, ...] = ()
    command: str = ""


def parse_early_options(args: Sequence[str]) -> EarlyOptions:
    """Find early options anywhere before a ``--``; click parses and checks them again later."""
    if "--" in args:
        args = args[: args.index("--")]
    # Both forms: ``--no-plugin NAME`` and ``--no-plugin=NAME``.
    names = [after for option, after in pairwise(args) if option == _NO_PLUGIN]
    joined = f"{_NO_PLUGIN}="
    names += [arg.removeprefix(joined) for arg in args if arg.startswith(joined)]
    return EarlyOptions("--json" in args, tuple(names), _first_command(args))


def _first_command(args: Sequence[str]) -> str:
    before = ""
    for arg in args:
        if not arg.startswith("-") and before != _NO_PLUGIN:
            return arg
        before = arg
    return ""
