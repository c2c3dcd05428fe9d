"""Built-in transforms, as ``Config.rules`` says: names, packing, casts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.config import Config
    from refitkit.protocols import WeightTransform


@hookimpl
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """Those that have something to do."""
    from refitkit.builtin.rules.casts import Casts
    from refitkit.builtin.rules.names import Names
    from refitkit.builtin.rules.packs import Packs

    rules = config.rules
    yield Names(rules)
    if rules.packing:
        yield Packs(rules.packing)
    if rules.cast != "no":
        yield Casts(any_cast=rules.cast == "any")
