"""Edits of single weights of a base, and the formula of their sum.

An adapter edits a weight in one of three ways: it adds a product of factors, adds a vector, or
replaces the weight. The formulas are those of peft 0.21.2: ``tuners/lora/layer.py``
(``get_delta_weight`` of ``Linear``, ``Embedding`` and ``_ConvNd``; ``merge`` for biases) and
``tuners/lora/variants.py`` (``merge_safe`` of the DoRA variants). Unlike peft, :func:`summed` adds
all edits to the base in float32 or float64, and rounds once.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMULA = "refitkit-peft 1"
"""Part of revisions. Change it whenever a change of the code may change the bits of a sum."""


@dataclass(frozen=True)
class Product:
    """A scaled product of two factors that is added to a weight.

    The weight counts as a matrix: its first dimension by all others.

    Attributes:
        left: Factor of shape (rows, rank).
        right: Factor of shape (rank, columns).
        scaling: Number that multiplies the product, before the user's scale.
        magnitude: DoRA's norms, one for each output, to which the sum is rescaled; else None.
        by_column: Whether outputs are the columns of the matrix instead of its rows.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    by_column: bool = False


@dataclass(frozen=True)
class Added:
    """A scaled tensor that is added to a weight.

    Attributes:
        value: Tensor with the shape of the weight.
        scaling: Number that multiplies it, before the user's scale.
    """

    value: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Replaced:
    """A tensor that replaces a weight.

    Attributes:
        value: Tensor with the shape of the weight.
        of_base: Whether it was saved beside factors, so that it may be an unchanged copy of the
            base.
    """

    value: torch.Tensor
    of_base: bool = False


Edit: TypeAlias = Product | Added | Replaced


@dataclass(frozen=True)
class Scaled:
    """An edit with the user's scale of its adapter.

    Attributes:
        edit: The edit.
        scale: Scale of the adapter.
        digest: Digest of the adapter.
    """

    edit: Edit
    scale: float
    digest: str

    @property
    def key(self) -> tuple[str, float]:
        """Identity of the edit: equal keys mean equal bits on one entry of one base."""
        return self.digest, self.scale


def summed(base: torch.Tensor, edits: Sequence[Scaled]) -> torch.Tensor:
    """The sum of a weight and its edits.

    Args:
        base: Weight with a float dtype; it is not changed.
        edits: Edits in the order of the sum. At most one replaces the weight. An edit with a
            magnitude is the only product.

    Returns:
        A new contiguous tensor with the dtype and shape of the weight, on its device. Equal
        arguments give equal bits.
    """
    wide = torch.float64 if base.dtype is torch.float64 else torch.float32
    with _isolated(base.device):
        # Replace first, then add products, then biases: the order of the edits does not matter.
        start = next((e.edit.value for e in edits if isinstance(e.edit, Replaced)), base)
        total = start.to(base.device, wide).contiguous()
        products = [(e.edit, e.scale) for e in edits if isinstance(e.edit, Product)]
        if products:
            total = _with_products(total, products)
        for one in edits:
            if isinstance(one.edit, Added):
                value = one.edit.value.to(base.device, wide).reshape(total.shape)
                total = total + value * (one.edit.scaling * one.scale)
        total = total.to(base.dtype)
        # Without any edit, .to() and .contiguous() return the base itself: never hand it out.
        return total.clone() if total.data_ptr() == start.data_ptr() else total


def _with_products(total: torch.Tensor, products: Sequence[tuple[Product, float]]) -> torch.Tensor:
    matrix = total.reshape(total.shape[0], -1)
    factors = [(p.left.to(total) * (p.scaling * scale), p.right.to(total)) for p, scale in products]
    left = factors[0][0] if len(factors) == 1 else torch.cat([one for one, _ in factors], 1)
    right = factors[0][1] if len(factors) == 1 else torch.cat([one for _, one in factors], 0)
    # One addmm for all products: their factors side by side are one product of a higher rank.
    matrix = _plus_product(matrix, left, right)
    for product, _ in products:
        if product.magnitude is not None:
            matrix = _with_norms(matrix, product.magnitude.to(total), by_column=product.by_column)
    return matrix.reshape(total.shape)


def _plus_product(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix + left @ right`` in the full precision of the matrix's dtype."""
    # Where TF32 is allowed, a float32 product loses bits. Compute it in float64 then.
    if matrix.dtype is torch.float64 or _products_are_exact():
        return torch.addmm(matrix, left, right)
    return torch.addmm(matrix.double(), left.double(), right.double()).to(matrix.dtype)


def _products_are_exact() -> bool:
    """Whether torch multiplies float32 matrices in float32, not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises if the precision was set through torch.backends
        return False


def _with_norms(matrix: torch.Tensor, magnitude: torch.Tensor, *, by_column: bool) -> torch.Tensor:
    """A matrix whose rows, or columns, are rescaled to given norms."""
    norm: torch.Tensor = torch.linalg.vector_norm(matrix, dim=0 if by_column else 1)
    factor = magnitude.reshape(-1) / norm
    return matrix * (factor if by_column else factor[:, None])


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Switch gradients and autocast off, which a caller may have switched on."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
