"""Built-in checks: conditions that weights must meet before anything is staged.

``names`` checks headers: names, ties, dtypes, shapes. ``finite`` checks values.
"""

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
    partial: bool,  # noqa: FBT001 - the hook passes it by name
    unchanged: Collection[str],
    deferred: Collection[str],
    same_headers: bool,  # noqa: FBT001 - as above
    config: Config,
) -> Iterable[Problem]:
    """Return problems of names, ties, dtypes, shapes and layouts, and non-finite entries.

    Finiteness is checked only for entries without other problems.
    """
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.checks import finite, names

    check = names.NameCheck(plan, source, same_headers=same_headers)
    problems = list(check.problems(partial=partial))
    if config.check_finite:
        # Deferred entries are checked when they are staged. If the refit is refused now, nothing is
        # staged, so they are checked here: the error then lists every problem at once.
        later: Collection[str] = () if problems else deferred
        new = [name for name in check.usable() if name not in unchanged and name not in later]
        problems += finite.problems(plan, module, source, new)
    return problems
