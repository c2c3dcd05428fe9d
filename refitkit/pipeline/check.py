"""The stage ``check``: all that forbids the refit, at once, before anything is staged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.errors import NotRefittableError, PluginError, Problem, WeightMismatchError
from refitkit.protocols import SupportsOverwrite, SupportsPartial

if TYPE_CHECKING:
    from collections.abc import Collection

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.protocols import OpenedModule, Plan, WeightSource


def check_weights(
    host: Host,
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    *,
    partial: bool,
    config: Config,
    unchanged: Collection[str] = (),
    deferred: Collection[str] = (),
) -> None:
    """Collect the problems of all checks; see the hook ``refitkit_check``.

    Raises:
        WeightMismatchError: There are some; lists all of them.
    """
    found = host.items(
        "refitkit_check",
        plan=plan,
        module=module,
        source=source,
        partial=partial,
        unchanged=unchanged,
        deferred=deferred,
        config=config,
    )
    problems = [_as_problem(plugin, item) for plugin, item in found]
    if problems:
        raise WeightMismatchError(
            f"{source.description} does not fit the module.", problems=problems
        )


def _as_problem(plugin: str, item: object) -> Problem:
    if not isinstance(item, Problem):
        kind = type(item).__name__
        raise PluginError(f"The plugin {plugin!r} lists a {kind} in refitkit_check, no Problem.")
    return item


def check_abilities(
    module: OpenedModule, *, partial: bool, overwrite: bool, config: Config
) -> None:
    """Check that the engines can do what is asked within the limits that were set.

    Args:
        module: The opened target.
        partial: Whether slots without a value keep theirs.
        overwrite: Whether weights are written over those from before, where engines can.
        config: The limits.

    Raises:
        NotRefittableError: They cannot; names the setting.
    """
    if partial:
        lacking = [n for n, e in module.engines.items() if not isinstance(e, SupportsPartial)]
        if lacking:
            problems = [Problem(name, "no partial refit") for name in lacking]
            raise NotRefittableError("These engines take all weights at once.", problems=problems)
    if config.rollback_limit is None:
        return
    keeping = [
        engine
        for engine in module.engines.values()
        if not (overwrite and isinstance(engine, SupportsOverwrite))
    ]
    needed = sum(engine.memory.bytes for engine in keeping)
    if needed > config.rollback_limit:
        raise NotRefittableError(
            f"Keeping the way back takes {needed} bytes, and rollback_limit is "
            f"{config.rollback_limit}.",
            hint="Raise rollback_limit, or give the weights from before up: rollback=False.",
        )
