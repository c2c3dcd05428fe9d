"""LoRA adapters as weights for refitkit: a base plus scaled adapters.

::

    base = refitkit_peft.Base("model.safetensors")
    base.add("a", "path/of/adapter")
    refitkit.refit(compiled, refitkit_peft.Lora(base, {"a": 0.7}), delta=True)
    refitkit.refit(compiled, refitkit_peft.Lora(base), delta=True)  # the base again, bit for bit

Importing this package imports neither torch nor peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit_peft.lora import Lora

if TYPE_CHECKING:
    from refitkit_peft.base import Base, BaseMemory

__all__ = ["Base", "BaseMemory", "Lora"]


def __getattr__(name: str) -> Any:
    """``Base`` and ``BaseMemory`` on first use, because they import torch."""
    if name not in {"Base", "BaseMemory"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refitkit_peft import base

    return getattr(base, name)
