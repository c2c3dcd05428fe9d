"""What every stage of the pipeline is given: plugins, settings, backends, and the clock of a verb.

A ``Context`` is frozen and refers to no pipeline. So everything below ``pipeline.py`` can be read,
and called in a test, without one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from refitkit.config import Config
from refitkit.errors import ConfigError, Problem
from refitkit.host import Host, make_host
from refitkit.model import StageFinished, StageStarted, StageTime, Step
from refitkit.offered import owned
from refitkit.protocols import Tools

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.protocols import Backend

_REGISTER = "refitkit_register_backends"


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
            progress=lambda text: self.host.emit(Step(verb, stage, text)),
            check_finite=self.config.check_finite,
            direct=self.config.direct,
            cache=self.config.cache_folder(),
            shared=shared,
        )

    def clock(self, verb: str) -> StageClock:
        """A clock for the stages of one verb."""
        return StageClock(self.host, verb)

    def with_settings(self, **changes: object) -> Context:
        """The same plugins with other settings, which are not validated again."""
        return replace(self, config=self.config.model_copy(update=changes))


class StageClock:
    """Times the stages of one verb and emits their events.

    Attributes:
        stages: The stages that have ended so far, in order, with their seconds.
    """

    def __init__(self, host: Host, verb: str) -> None:
        """Start with no stages."""
        self._host, self._verb = host, verb
        self._stages: list[StageTime] = []

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """The stages that have ended so far, in order."""
        return tuple(self._stages)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage. A stage that raises is timed and emits no ``StageFinished``."""
        self._host.emit(StageStarted(self._verb, name))
        # after the event, so that the time of listeners does not count
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages.append(StageTime(stage=name, seconds=time.perf_counter() - start))
        self._host.emit(StageFinished(self._verb, name, self._stages[-1].seconds))


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
