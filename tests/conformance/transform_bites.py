"""Broken transforms, at least one for each check of ``TransformSuite``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from refitkit.errors import Problem, WeightMismatchError
from refitkit.model import Metric, OutputMeasure, TensorInfo
from refitkit.protocols import Made, TransformRequest, WeightGroup
from refitkit.recipe import TensorMap
from refitkit.testing import TransformSuite
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import plan_for
from tests.conformance.bites import Bite

INFOS = {
    "q": TensorInfo(dtype="int8", shape=(2, 3)),
    "scale": TensorInfo(dtype="float32", shape=(2, 1)),
}
GIVES = {f"w.{name}": info for name, info in INFOS.items()}
LIMIT = 0.5


def floats(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def quantized(value: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = value.abs().amax(1, keepdim=True) / 127
    return {"w.q": (value / scale).round().to(torch.int8), "w.scale": scale}


def error_of(value: torch.Tensor) -> float:
    found = quantized(value)
    return float((found["w.q"] * found["w.scale"] - value).abs().max())


class Plain:
    """A correct transform that makes ``w.q`` and ``w.scale`` from ``w``."""

    name: Any = "plain"
    priority: Any = 50

    def groups(self, request: TransformRequest) -> Any:
        names = request.source.names()
        if "w.q" not in {leaf.fqn for leaf in request.plan.data.leaves}:
            return []
        if "w.scale" in names and "w.q" not in names:
            raise WeightMismatchError("No weight.", problems=[Problem("w.scale", "alone")])
        return [self.group(request)] if "w" in names else []

    def group(self, request: TransformRequest) -> WeightGroup:
        return WeightGroup(("w",), GIVES, lambda: self.make(request.source))

    def make(self, source: Any) -> Any:
        value = source.get("w")
        return Made(self.values(value), (self.measure(value),))

    def values(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return quantized(value)

    def measure(self, value: torch.Tensor) -> OutputMeasure:
        error = error_of(value)
        return OutputMeasure(name="w.q", ok=error <= LIMIT, max_abs_error=error, limit=LIMIT)


class OfAllLayers(Plain):
    """A correct transform that makes ``<name>.q`` and ``<name>.scale`` from each ``<name>``."""

    def groups(self, request: TransformRequest) -> Any:
        leaves = [leaf.fqn for leaf in request.plan.data.leaves]
        names = [leaf.removesuffix(".q") for leaf in leaves if leaf.endswith(".q")]
        return [self.of(name, request) for name in names if name in request.source.names()]

    def of(self, name: str, request: TransformRequest) -> WeightGroup:
        gives = {f"{name}.{end}": info for end, info in INFOS.items()}

        def make() -> Made:
            found = quantized(request.source.get(name))
            return Made({f"{name}.{end}": found[f"w.{end}"] for end in INFOS})

        return WeightGroup((name,), gives, make)


class Good(TransformSuite):
    transform: type[Plain] = Plain

    def make_transform(self) -> Any:
        return self.transform()

    def request(self, **weights: torch.Tensor) -> TransformRequest:
        held = {**quantized(floats(0)), "b": torch.zeros(2)}
        module = FakeModule([OpenEngine("e", held)])
        return TransformRequest(plan_for(module), TensorMap(weights))

    def make_request(self, seed: int) -> TransformRequest:
        return self.request(w=floats(seed), b=torch.ones(2))

    def expected(self, seed: int) -> dict[str, torch.Tensor]:
        return quantized(floats(seed))

    def expected_errors(self, seed: int) -> dict[str, float]:
        return {"w.q": error_of(floats(seed))}

    def make_alone(self) -> TransformRequest:
        return self.request(**{"w.scale": torch.ones(2, 1)})


class GoodOfAllLayers(Good):
    transform = OfAllLayers


class Unpacks(Plain):
    """A correct transform that makes ``u`` from ``u.packed`` and ``u.scale``."""

    def groups(self, request: TransformRequest) -> Any:
        takes = ("u.packed", "u.scale")
        have = [name for name in takes if name in request.source.names()]
        if len(have) == 1:
            raise WeightMismatchError(
                "Its partner is missing.", problems=[Problem(have[0], "alone")]
            )
        return [self.unpack(request, *takes)] if have else []

    def unpack(self, request: TransformRequest, *takes: str) -> WeightGroup:
        get, gives = request.source.get, {"u": TensorInfo(dtype="float32", shape=(2, 3))}
        return WeightGroup(takes, gives, lambda: Made({"u": get("u.packed") * get("u.scale")}))


class GoodUnpacks(Good):
    transform = Unpacks

    def request(self, **weights: torch.Tensor) -> TransformRequest:
        module = FakeModule([OpenEngine("e", {"u": torch.zeros(2, 3)})])
        return TransformRequest(plan_for(module), TensorMap(weights))

    def make_request(self, seed: int) -> TransformRequest:
        found = quantized(floats(seed))
        return self.request(**{"u.packed": found["w.q"], "u.scale": found["w.scale"]})

    def expected(self, seed: int) -> dict[str, torch.Tensor]:
        found = quantized(floats(seed))
        return {"u": found["w.q"] * found["w.scale"]}


BITES: list[Bite] = []


def breaks(check: str, says: str, good: type[Good] = Good) -> Any:
    def note(transform: type) -> type:
        suite = type(transform.__name__, (good,), {"transform": transform})
        BITES.append(Bite(f"test_{check}", suite, says, good))
        return transform

    return note


@breaks("it_has_a_name_and_a_priority", "name and priority are '' and 50")
class Nameless(Plain):
    name = ""


@breaks("it_has_a_name_and_a_priority", "name and priority change: ")
class Fickle(Plain):
    @property
    def priority(self) -> int:  # type: ignore[override]
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked


@breaks("it_has_a_name_and_a_priority", "WeightTransform: Groupless lacks members")
class Groupless(Plain):
    groups = property(lambda _: (_ for _ in ()).throw(AttributeError()))  # type: ignore[assignment]


@breaks("values_are_bit_equal", "differ from the expected ones in bits: 'w.q'")
class Truncates(Plain):
    def values(self, value: torch.Tensor) -> Any:
        scale = quantized(value)["w.scale"]
        return {"w.q": (value / scale).to(torch.int8), "w.scale": scale}


@breaks("values_are_bit_equal", "it returned a dict. Return a refitkit.protocols.Made")
class Dicts(Plain):
    def make(self, source: Any) -> Any:
        return super().make(source).values


@breaks("groups_are_made_of_what_is_there", "neither source nor plan has 'w.zero'")
class GivesStrangers(Plain):
    def group(self, request: TransformRequest) -> WeightGroup:
        gives = {**GIVES, "w.zero": GIVES["w.scale"]}
        return WeightGroup(("w",), gives, lambda: self.make(request.source))


@breaks("groups_are_made_of_what_is_there", "two groups give 'w.q', 'w.scale'")
class Twice(Plain):
    def groups(self, request: TransformRequest) -> Any:
        return super().groups(request) * 2


@breaks("groups_make_what_they_announce", "names are only in gives or only made: 'w.scale'")
class ForgetsTheScale(Plain):
    def values(self, value: torch.Tensor) -> Any:
        return {"w.q": quantized(value)["w.q"]}


@breaks(
    "groups_make_what_they_announce", "'w.q' is announced as int8 .2, 3., but make returned float32"
)
class StaysFloat(Plain):
    def values(self, value: torch.Tensor) -> Any:
        found = quantized(value)
        return {**found, "w.q": found["w.q"].float()}


@breaks("a_part_of_a_group_is_refused", "an incomplete group was accepted")
class TakesScales(Plain):
    def groups(self, request: TransformRequest) -> Any:
        return [self.group(request)] if "w" in request.source.names() else []


@breaks("a_part_of_a_group_is_refused", "an incomplete group raised KeyError")
class LooksUp(Plain):
    def groups(self, request: TransformRequest) -> Any:
        request.source.info("w")
        return super().groups(request)


@breaks("a_part_of_a_group_is_refused", r"the problems name \[\], but no entry")
class Vague(Plain):
    def groups(self, request: TransformRequest) -> Any:
        try:
            return super().groups(request)
        except WeightMismatchError as exc:
            raise WeightMismatchError("Something is wrong.") from exc


@breaks("what_needs_nothing_is_left_alone", "it makes 'w.q', 'w.scale', which the source has")
class Requantizes(Plain):
    def groups(self, request: TransformRequest) -> Any:
        if "w.q" in request.source.names():
            return [WeightGroup(("w.q", "w.scale"), GIVES, lambda: Made({}))]
        return super().groups(request)


@breaks("grouping_reads_no_tensors", "it read the tensors 'w'")
class Eager(Plain):
    def group(self, request: TransformRequest) -> WeightGroup:
        made = self.make(request.source)
        return WeightGroup(("w",), GIVES, lambda: made)


@breaks("grouping_reads_no_tensors", "make read 'b', which the group does not take")
class ReadsMore(Plain):
    def make(self, source: Any) -> Any:
        source.get("b")
        return super().make(source)


@breaks(
    "the_same_each_time",
    "equal weights gave other results after other weights were made: 'w.scale'",
)
class RunningRange(Plain):
    """Keeps the largest range of all calls."""

    scale = torch.zeros(2, 1)

    def values(self, value: torch.Tensor) -> Any:
        self.scale = torch.maximum(self.scale * 2, quantized(value)["w.scale"])
        return {**quantized(value), "w.scale": self.scale}


@breaks("the_same_each_time", "earlier results changed after other weights were made: 'w.scale'")
class OneBuffer(Plain):
    def __init__(self) -> None:
        self.scale = torch.zeros(2, 1)

    def values(self, value: torch.Tensor) -> Any:
        found = quantized(value)
        return {**found, "w.scale": self.scale.copy_(found["w.scale"])}


@breaks("the_source_is_not_changed", "it changed tensors of the source: 'w'")
class InPlace(Plain):
    def values(self, value: torch.Tensor) -> Any:
        found = quantized(value)
        value.div_(found["w.scale"])
        return found


@breaks("the_source_is_not_changed", "it wrote to tensors of the source: 'w'")
class ReshapesInPlace(Plain):
    """It refuses what it has reshaped before."""

    def values(self, value: torch.Tensor) -> Any:
        if value.dim() != 2:
            raise WeightMismatchError("It has no two dimensions.")
        found = quantized(value.clone())
        value.unsqueeze_(-1)
        return found


@breaks("measures_are_honest", "'w.q' has ok=True, the error .* and the limit 0.0")
class Lenient(Plain):
    def measure(self, value: torch.Tensor) -> OutputMeasure:
        return super().measure(value).model_copy(update={"limit": 0.0})


@breaks("measures_are_honest", "a measure names 'w', which the group does not give")
class MeasuresSources(Plain):
    def measure(self, value: torch.Tensor) -> OutputMeasure:
        return super().measure(value).model_copy(update={"name": "w"})


@breaks(
    "measures_tell_the_true_error",
    "the largest absolute error of 'w.q' is .*, but its measure says 0.0. Set max_abs_error",
)
class Flatters(Plain):
    def measure(self, value: torch.Tensor) -> OutputMeasure:
        return super().measure(value).model_copy(update={"max_abs_error": 0.0})


@breaks(
    "weights_of_other_layers_are_made_too",
    "with two copies of the weights, 'second.w.q', 'second.w.scale' are missing or wrong",
    GoodOfAllLayers,
)
class OnlyTheFirst(OfAllLayers):
    def groups(self, request: TransformRequest) -> Any:
        return super().groups(request)[:1]


@breaks(
    "weights_of_other_layers_are_made_too",
    "with two copies of the weights, 'w.q', 'w.scale' are missing or wrong",
    GoodOfAllLayers,
)
class OneForAll(OfAllLayers):
    """Every group reads the weight of the last one."""

    def of(self, name: str, request: TransformRequest) -> WeightGroup:
        self.name_to_read = name
        found = super().of(name, request)

        def make() -> Made:
            values = quantized(request.source.get(self.name_to_read))
            return Made({fqn: values[f"w.{fqn.rpartition('.')[2]}"] for fqn in found.gives})

        return replace(found, make=make)


@breaks("formulas_are_hashable", "the formula of the group that gives 'w.q', 'w.scale' is not hash")
class FormulaOfLists(Plain):
    def group(self, request: TransformRequest) -> WeightGroup:
        return replace(super().group(request), formula=("int8", [2, 3]))


@breaks(
    "lone_entries_are_refused_or_left_alone",
    "a checkpoint without 'u.packed', in a full refit, raised KeyError",
    GoodUnpacks,
)
class UnpacksBlindly(Unpacks):
    def groups(self, request: TransformRequest) -> Any:
        for name in ("u.packed", "u.scale"):
            request.source.info(name)
        return super().groups(request)


@breaks(
    "lone_entries_are_refused_or_left_alone",
    "a checkpoint without 'u.packed', in a partial refit, gave a group that takes 'u.packed'",
    GoodUnpacks,
)
class UnpacksInPart(Unpacks):
    def groups(self, request: TransformRequest) -> Any:
        if request.partial:
            return [self.unpack(request, "u.packed", "u.scale")]
        return super().groups(request)


@breaks(
    "lone_entries_are_refused_or_left_alone",
    "a lone 'w.scale', in a full refit, raised KeyError",
)
class TakesScalesForWeights(Plain):
    def groups(self, request: TransformRequest) -> Any:
        if "w.scale" in request.source.names():
            request.source.info("w.q")
        return super().groups(request)


@breaks(
    "lone_entries_are_refused_or_left_alone",
    "a checkpoint without 'u.packed', in a full refit, raised WeightMismatchError without a mess",
    GoodUnpacks,
)
class RefusesWithoutWords(Unpacks):
    def groups(self, request: TransformRequest) -> Any:
        try:
            return super().groups(request)
        except WeightMismatchError:
            raise WeightMismatchError("") from None


@breaks("a_part_of_a_group_is_refused", "an incomplete group in a partial refit was accepted")
class TakesScalesInPart(Plain):
    def groups(self, request: TransformRequest) -> Any:
        if request.partial and "w" not in request.source.names():
            return []
        return super().groups(request)


@breaks("the_source_is_not_changed", "it wrote to tensors of the source: 'w'")
class RepairsInPlace(Plain):
    def values(self, value: torch.Tensor) -> Any:
        return quantized(value.nan_to_num_())


@breaks("the_source_is_not_changed", "it wrote to tensors of the source: 'w'")
class RepairsUnseen(Plain):
    """Writes through NumPy, and only where an element is not finite."""

    def values(self, value: torch.Tensor) -> Any:
        array = value.numpy()
        array[~np.isfinite(array)] = 0
        return quantized(value)


@breaks("the_same_each_time", "a new source got the results of a deleted one: 'w.q', 'w.scale'")
class KeepsById(Plain):
    def __init__(self) -> None:
        self.made: dict[int, Any] = {}

    def make(self, source: Any) -> Any:
        return self.made.setdefault(id(source), super().make(source))


@breaks(
    "entries_with_other_dimensions_are_not_reshaped",
    r"'w' of shape \(3, 2\) instead of \(2, 3\) was made into 'w.q', 'w.scale'",
)
class CountsElements(Plain):
    def values(self, value: torch.Tensor) -> Any:
        return quantized(value.reshape(2, 3))


class OfRows(Plain):
    """A correct transform that refuses other shapes, and takes ``(in, out)`` as it is meant."""

    def values(self, value: torch.Tensor) -> Any:
        return quantized(value if value.shape == (2, 3) else value.T.contiguous())


class Judges(Plain):
    """A correct transform whose measures have metrics only."""

    def measure(self, value: torch.Tensor) -> OutputMeasure:
        error = error_of(value)
        metric = Metric(name="error", value=error, limit=LIMIT)
        return OutputMeasure(name="w.q", ok=metric.ok, metrics=(metric,))


class GoodOfRows(Good):
    transform = OfRows


class GoodJudges(Good):
    transform = Judges


@breaks(
    "measures_tell_the_true_error",
    "the largest absolute error of 'w.q' is .*, but its measure says 0.25. Set max_abs_error",
    GoodJudges,
)
class JudgesByOther(Judges):
    def measure(self, value: torch.Tensor) -> OutputMeasure:
        metric = Metric(name="share", value=0.25, limit=LIMIT)
        return OutputMeasure(name="w.q", ok=True, metrics=(metric,))


@breaks(
    "entries_with_other_dimensions_are_not_reshaped", "'w' of shape .3, 2. instead of", GoodOfRows
)
class ReshapesOthers(Plain):
    def values(self, value: torch.Tensor) -> Any:
        return quantized(value if value.shape == (2, 3) else value.reshape(2, 3))
