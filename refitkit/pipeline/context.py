"""What every stage of the pipeline is given: plugins, settings, backends, and the clock of a verb.

A ``Context`` is frozen and refers to no pipeline. So everything below ``pipeline.py`` can be read,
and called in a test, without one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from refitkit.config import Config
from refitkit.errors import ConfigError, Problem
from refitkit.host import Host, make_host
from refitkit.model import (
    Aborted,
    Failed,
    Finished,
    StageFailed,
    StageFinished,
    StageStarted,
    StageTime,
    Started,
    Step,
)
from refitkit.offered import owned
from refitkit.protocols import Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.model import Event
    from refitkit.protocols import Backend, OpenedModule

_REGISTER = "refitkit_register_backends"


@dataclass
class Operation:
    """One call of a verb; see ``refitkit.model.events``.

    Attributes:
        verb: Name of the verb.
        module: Name of the module; empty if there is none or there are several.
        parent: ``id`` of the operation that runs this one.
        trial: Whether it proves a plan, with weights that are not the user's.
        id: Identifies it.
        result: What it returns. Nothing once it has ended: plugins may keep their ``Tools``.
        has_ended: Whether its last event was emitted.
    """

    verb: str = ""
    module: str = ""
    parent: str = ""
    trial: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    result: object = None
    has_ended: bool = False

    def event(self, kind: type[Event], verb: str, *facts: object, module: str = "") -> Event:
        """An event of the operation.

        Args:
            kind: Its class.
            verb: Name of the verb, where the operation runs a part of another one.
            facts: What the class takes beside the verb.
            module: Name of the module, where the operation has several.
        """
        given: Callable[..., Event] = kind
        return given(
            verb,
            *facts,
            id=self.id,
            parent=self.parent,
            module=module or self.module,
            trial=self.trial,
        )


_NO_OPERATION = Operation(id="")
_operation: ContextVar[Operation] = ContextVar("refitkit_operation", default=_NO_OPERATION)


@dataclass(frozen=True)
class Context:
    """The plugins and settings that one pipeline works with.

    Attributes:
        host: All registered plugins.
        config: The settings.
    """

    host: Host
    config: Config

    @classmethod
    def of(cls, config: Config | Mapping[str, object] | None, plugins: object) -> Context:
        """Register all plugins and check the settings against them.

        Args:
            config: Settings, as a ``Config`` or as plain data.
            plugins: A list of plugins beside the built-in and installed ones.

        Raises:
            ConfigError: A setting does not exist or has a wrong type, a setting is for a plugin
                that is not there, or ``plugins`` is not a list.
            PluginError: A plugin cannot be registered; names it.
        """
        if isinstance(plugins, str) or not isinstance(plugins, Iterable):
            raise ConfigError(
                f"plugins= must be a list, and is a {type(plugins).__name__}.",
                hint="Write Pipeline(plugins=[plugin]), also for a single plugin.",
            )
        settings = Config.of(config)
        host = make_host(settings, plugins)
        _require_plugins(settings, host)
        return cls(host, settings)

    @property
    def backends(self) -> Mapping[str, Backend]:
        """All backends by name, registered when they are first asked for.

        Raises:
            PluginError: A plugin failed, or two plugins register one name; names them.
        """
        return self._registered[0]

    def who_made(self, backend: str) -> str:
        """Subject of a message: a backend, its plugin and the hook.

        Args:
            backend: Name of the backend.
        """
        return owned(_REGISTER, backend, self._registered[1][backend])

    def whose(self, module: OpenedModule) -> str:
        """Subject of a message: the backend of a module, and its plugin if it is registered.

        It registers all backends, which imports them: call it only once something is wrong.
        """
        name = module.backend
        is_known = name in self._registered[1]
        return self.who_made(name) if is_known else f"The backend {name!r}"

    # works in a frozen dataclass: it writes to ``__dict__``, not through ``__setattr__``
    @cached_property
    def _registered(self) -> tuple[Mapping[str, Backend], Mapping[str, str]]:
        """Backends, and the plugins that registered them, by name."""
        owners: dict[str, str] = {}
        backends: dict[str, Backend] = {}
        for info in self.host.plugins():
            given: list[Backend] = []
            if _REGISTER in info.hooks:
                # one plugin at a time, so that errors can name the owner of a backend
                self.host.call_one(info.name, _REGISTER, register=given.append)
            for backend in given:
                self.host.claim(owners, backend, info.name, _REGISTER)
                backends[backend.name] = backend
        return backends, owners

    def backend(self, name: str) -> Backend:
        """The backend of a name.

        Raises:
            ConfigError: No plugin registers this name; lists the names that there are.
        """
        if name not in self.backends:
            hint = f"There are: {', '.join(sorted(self.backends))}."
            raise ConfigError(f"There is no backend {name!r}.", hint=hint)
        return self.backends[name]

    def tools(self, verb: str, stage: str, shared: object = None) -> Tools:
        """The objects that the pipeline lends to plugins during one stage of one verb.

        Args:
            verb: Name of the verb.
            stage: Name of the stage.
            shared: See ``Tools.shared``.

        Raises:
            PluginError: Two plugins offer a layer type of the same name; names both.
        """
        return Tools(
            layer_types=self.host.named("refitkit_layer_types"),
            # now, because plugins may report progress from threads of their own
            progress=partial(self.step, verb, stage, during=self.operation),
            check_finite=self.config.check_finite,
            direct=self.config.direct,
            cache=self.config.cache_folder(),
            shared=shared,
            may_import=self.host.may_import,
        )

    @property
    def operation(self) -> Operation:
        """The operation that this thread runs; one without an ``id`` if it runs none."""
        return _operation.get()

    @contextmanager
    def operating(self, verb: str, module: str = "", *, trial: bool = False) -> Iterator[Operation]:
        """Run an operation: emit an event at its start, and exactly one at its end.

        Args:
            verb: Name of the verb.
            module: Name of the module, if it is about one.
            trial: Whether it proves a plan. Operations that it runs do, too.
        """
        outer = self.operation
        parent = "" if outer.has_ended else outer.id
        one = Operation(verb, module, parent, trial or outer.trial)
        end, error = Aborted, None  # type: tuple[type[Event], Exception | None]
        try:
            _operation.set(one)
            self.emit(Started, verb)
            yield one
            end = Finished
        except Exception as exc:
            end, error = Failed, exc
            raise
        finally:
            _operation.set(outer)  # first: an interrupt may follow
            self._end(one, end, error)
            error = None  # else this frame, which the traceback refers to, would refer to it

    def _end(self, operation: Operation, end: type[Event], error: Exception | None) -> None:
        """Emit the last event of an operation."""
        facts = {Finished: (operation.result,), Failed: (error,)}.get(end, ())
        operation.result, operation.has_ended = None, True
        if not self.host.has_listeners:
            return
        try:
            self.host.emit(operation.event(end, operation.verb, *facts))
        except BaseException as exc:  # a listener was interrupted
            if end is Finished:
                exc.add_note(f"The {operation.verb} was complete when it was interrupted.")
            raise

    def emit(self, kind: type[Event], verb: str, *facts: object, module: str = "") -> None:
        """Send an event of this thread's operation to all listeners; see ``Operation.event``."""
        if self.host.has_listeners:
            self.host.emit(self.operation.event(kind, verb, *facts, module=module))

    def step(self, verb: str, stage: str, text: str, *, during: Operation | None = None) -> None:
        """Report progress.

        Args:
            verb: Name of the verb.
            stage: Name of the stage.
            text: Description of the step that has ended.
            during: The operation of a thread that runs none. Nothing is reported after its end.
        """
        one = self.operation if self.operation.id or during is None else during
        if self.host.has_listeners and not one.has_ended:
            self.host.emit(one.event(Step, verb, stage, text))

    def clock(self, verb: str, module: str = "") -> StageClock:
        """A clock for the stages of one verb.

        Args:
            verb: Name of the verb.
            module: Name of the module.
        """
        return StageClock(self, verb, module)

    def with_settings(self, **changes: object) -> Context:
        """The same plugins with other settings, which are not validated again."""
        return replace(self, config=self.config.model_copy(update=changes))


class StageClock:
    """Times the stages of one verb and emits their events.

    Attributes:
        stages: The stages that have ended so far, in order, with their seconds.
        trial: Whether the operation proves a plan; see ``Event.trial``.
    """

    def __init__(self, context: Context, verb: str, module: str) -> None:
        """Start with no stages."""
        self._context, self._verb, self._module = context, verb, module
        self._stages: list[StageTime] = []
        self.trial = context.operation.trial

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """The stages that have ended so far, in order."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage, and emit an event at its start and at its end."""
        self._emit(StageStarted, name)
        # after the event, so that the time of listeners does not count
        start, end = time.perf_counter(), StageFailed  # type: tuple[float, type[Event]]
        try:
            yield
            end = StageFinished
        finally:
            self._stages.append(StageTime(stage=name, seconds=time.perf_counter() - start))
            self._emit(end, name, self._stages[-1].seconds)

    def _emit(self, kind: type[Event], *facts: object) -> None:
        self._context.emit(kind, self._verb, *facts, module=self._module)


def _require_plugins(config: Config, host: Host) -> None:
    """Raise ConfigError if ``plugin_settings`` names plugins that are not registered."""
    names = {info.name for info in host.plugins()}
    unknown = [name for name in config.plugin_settings if name not in names]
    if unknown:
        raise ConfigError(
            "plugin_settings names plugins that are not there.",
            problems=[Problem(f"plugin_settings.{name}", "no such plugin") for name in unknown],
            hint=f"There are: {', '.join(sorted(names))}.",
        )
