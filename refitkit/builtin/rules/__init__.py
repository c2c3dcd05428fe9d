"""Built-in transforms for ``Config.rules``: names, then packing, then casts.

Each module has one transform, except ``name_matching``, which ``names`` uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refitkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refitkit.config import Config
    from refitkit.protocols import WeightTransform


@hookimpl
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """Yield the transforms that the rules need."""
    # Imported here because every start of refitkit imports this module.
    from refitkit.builtin.rules.casts import CastTransform
    from refitkit.builtin.rules.names import NameTransform
    from refitkit.builtin.rules.packs import PackTransform

    rules = config.rules
    # Names are matched without any rule, too.
    yield NameTransform(rules)
    if rules.packing:
        yield PackTransform(rules.packing)
    if rules.cast != "no":
        yield CastTransform(any_cast=rules.cast == "any")
