"""What an adapter does to single weights of a base, and how the sum is made.

Formulas are those of peft 0.21.2, ``tuners/lora/layer.py`` (``get_delta_weight`` of ``Linear``,
``Embedding`` and ``_ConvNd``; ``merge`` for biases) and ``tuners/lora/variants.py`` (``merge_safe``
of the DoRA variants). Other than there everything is summed in float32 at least, on the base alone,
and rounded once.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMULA = "refitkit-peft 1"
"""Part of revisions: another one whenever a sum may come out with other bits."""


@dataclass(frozen=True)
class Product:
    """A scaled product of two factors is added to a weight.

    Attributes:
        left: (rows, rank): of the weight as a matrix of its first dimension and all others.
        right: (rank, columns).
        scaling: What the product is multiplied by.
        magnitude: Of DoRA: a number for each output; the sum is brought to these norms.
        by_column: Whether outputs are the columns of the matrix, not its rows.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    by_column: bool = False


@dataclass(frozen=True)
class Added:
    """Something scaled is added.

    Attributes:
        value: Of the shape of the weight.
        scaling: What it is multiplied by.
    """

    value: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Replaced:
    """The weight is another one.

    Attributes:
        value: It; of the shape of the weight.
        beside: Whether it was saved as what factors were trained beside, and may be the base's own.
    """

    value: torch.Tensor
    beside: bool = False


Edit: TypeAlias = Product | Added | Replaced


@dataclass(frozen=True)
class Scaled:
    """An edit, with the scale that a user gave its adapter.

    Attributes:
        edit: It.
        scale: The scale.
        digest: The digest of the adapter.
    """

    edit: Edit
    scale: float
    digest: str

    @property
    def key(self) -> tuple[str, float]:
        """What on one base stands for what this adds to one entry."""
        return self.digest, self.scale


def summed(base: torch.Tensor, edits: Sequence[Scaled]) -> torch.Tensor:
    """A weight with edits, in its own dtype, contiguous.

    Args:
        base: The weight, of a float dtype. It is not changed.
        edits: What is done to it, in this order. At most one replaces it, and at most one has a
            magnitude: then it is the only product.

    Returns:
        A new tensor on the device of the base. The same bits for the same arguments.
    """
    wide = torch.float64 if base.dtype is torch.float64 else torch.float32
    with _alone(base.device):
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
        return total.clone() if total.data_ptr() == start.data_ptr() else total


def _with_products(total: torch.Tensor, products: Sequence[tuple[Product, float]]) -> torch.Tensor:
    matrix = total.reshape(total.shape[0], -1)
    factors = [(p.left.to(total) * (p.scaling * scale), p.right.to(total)) for p, scale in products]
    left = factors[0][0] if len(factors) == 1 else torch.cat([one for one, _ in factors], 1)
    right = factors[0][1] if len(factors) == 1 else torch.cat([one for _, one in factors], 0)
    matrix = _plus_product(matrix, left, right)
    for product, _ in products:
        if product.magnitude is not None:
            matrix = _with_norms(matrix, product.magnitude.to(total), by_column=product.by_column)
    return matrix.reshape(total.shape)


def _plus_product(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum, in full precision whatever precision a user has allowed for products."""
    if matrix.dtype is torch.float64 or _products_are_exact():
        return torch.addmm(matrix, left, right)
    return torch.addmm(matrix.double(), left.double(), right.double()).to(matrix.dtype)


def _products_are_exact() -> bool:
    """Whether torch multiplies float32 as float32, and not as TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to say where it was set in a newer way
        return False


def _with_norms(matrix: torch.Tensor, magnitude: torch.Tensor, *, by_column: bool) -> torch.Tensor:
    """A matrix whose rows, or columns, are brought from their own norms to given ones."""
    norm: torch.Tensor = torch.linalg.vector_norm(matrix, dim=0 if by_column else 1)
    factor = magnitude.reshape(-1) / norm
    return matrix * (factor if by_column else factor[:, None])


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Without gradients and without casts, whatever is on around."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
