"""Built-in checks: what must be true of weights before anything is staged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from refitkit.config import Config
    from refitkit.errors import Problem
    from refitkit.protocols import OpenedModule, Plan, WeightSource


@hookimpl
def refitkit_check(
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    partial: bool,  # noqa: FBT001 - passed by name, as the hook says
    unchanged: Collection[str],
    deferred: Collection[str],
    config: Config,
) -> Iterable[Problem]:
    """Names, ties, dtypes, shapes, layouts; then, of what passed, finiteness."""
    from refitkit.builtin.checks import finite, names

    found = names.Names(plan, source)
    problems = list(found.problems(partial=partial))
    if config.check_finite:
        # what is refused now is never staged: then all that is wrong is reported at once
        later: Collection[str] = () if problems else deferred
        new = [name for name in found.usable() if name not in unchanged and name not in later]
        problems += finite.problems(plan, module, source, new)
    return problems
