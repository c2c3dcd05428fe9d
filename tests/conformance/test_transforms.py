"""The built-in transforms pass the suite for transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.rules.casts import CastTransform
from refitkit.builtin.rules.names import NameTransform
from refitkit.builtin.rules.packs import PackTransform
from refitkit.model.rules import Pack, Rules
from refitkit.protocols import TransformRequest
from refitkit.recipe import TensorMap
from refitkit.testing import TransformSuite
from refitkit.testing.scenes import make_plan, make_slot, recipe_row

if TYPE_CHECKING:
    from collections.abc import Mapping


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def request_of(weights: Mapping[str, torch.Tensor], **leaves: torch.Tensor) -> TransformRequest:
    """A request for a program with these leaves; ``_`` in their names stands for a dot."""
    slots = [
        make_slot(name.replace("_", "."), tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))
        for name, leaf in leaves.items()
    ]
    return TransformRequest(make_plan([recipe_row(slot) for slot in slots]), TensorMap(weights))


class TestNames(TransformSuite):
    """Entries with the prefix of a wrapper."""

    def make_transform(self) -> Any:
        return NameTransform(Rules())

    def make_request(self, seed: int) -> TransformRequest:
        weights = {f"module.{name}": value for name, value in self.expected(seed).items()}
        return request_of(weights, a_weight=torch.ones(2, 3), a_bias=torch.ones(2))

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        return {"a.weight": drawn(seed, 2, 3), "a.bias": drawn(seed, 2)}


PARTS = ("q.weight", "k.weight", "v.weight")


class TestPacks(TransformSuite):
    """Three parts that are joined."""

    def make_transform(self) -> Any:
        return PackTransform((Pack(into="{}.qkv", parts=tuple(f"{{}}.{part}" for part in PARTS)),))

    def parts(self, seed: int) -> dict[str, torch.Tensor]:
        return {f"a.{part}": drawn(seed + len(part), 2, 3) * n for n, part in enumerate(PARTS, 1)}

    def make_request(self, seed: int) -> TransformRequest:
        return request_of(self.parts(seed), a_qkv=torch.ones(6, 3))

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        return {"a.qkv": torch.cat(list(self.parts(seed).values()))}

    def make_alone(self) -> TransformRequest:
        some = {name: value for name, value in self.parts(1).items() if name != "a.v.weight"}
        return request_of(some, a_qkv=torch.ones(6, 3))


class TestCuts(TestPacks):
    """A piece that is cut."""

    def make_transform(self) -> Any:
        return PackTransform((Pack(into="{}.qkv", parts=("{}.q", "{}.k")),))

    def make_request(self, seed: int) -> TransformRequest:
        piece = {"a.qkv": drawn(seed, 4, 3)}
        return request_of(piece, a_q=torch.ones(2, 3), a_k=torch.ones(2, 3))

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        return dict(zip(("a.q", "a.k"), drawn(seed, 4, 3).chunk(2), strict=True))

    def make_alone(self) -> None:  # type: ignore[override]
        return None


class TestCasts(TransformSuite):
    """float32 weights for a bfloat16 program."""

    def make_transform(self) -> Any:
        return CastTransform(any_cast=True)

    def make_request(self, seed: int) -> TransformRequest:
        weights = {"a.weight": drawn(seed, 2, 3), "a.bias": drawn(seed, 2)}
        return request_of(weights, a_weight=torch.ones(2, 3).bfloat16(), a_bias=torch.ones(2))

    def expected(self, seed: int) -> Mapping[str, torch.Tensor]:
        return {"a.weight": drawn(seed, 2, 3).bfloat16()}
