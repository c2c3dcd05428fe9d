"""Broken plugins, at least one for each check of ``OfferSuite``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import refitkit
from refitkit.host import make_host
from refitkit.model import LayerType, TensorInfo, VerificationResult
from refitkit.protocols import Made, Mapped, SlotValue, WeightGroup
from refitkit.testing.offers import OfferSuite
from refitkit.testing.scenes import isolated_config
from tests.conformance.backend_bites import Plain as PlainBackend
from tests.conformance.bites import Bite
from tests.conformance.strategy_bites import Plain as PlainStrategy
from tests.conformance.transform_bites import Plain as PlainTransform
from tests.conformance.verifier_bites import Plain as PlainVerifier


class Plain:
    """A correct plugin that implements all checked hooks."""

    name = "plain"
    Strategy: Any = PlainStrategy
    Verifier: Any = PlainVerifier
    Transform: Any = PlainTransform

    @refitkit.hookimpl
    def refitkit_register_backends(self, register: Any) -> None:
        register(PlainBackend())

    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> Any:
        return None

    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> Any:
        return None

    @refitkit.hookimpl
    def refitkit_partition(self, program: Any, backend: str) -> Any:
        return None

    @refitkit.hookimpl
    def refitkit_mapping_strategies(self) -> Any:
        return [self.Strategy()]

    @refitkit.hookimpl
    def refitkit_layer_types(self) -> Any:
        return [LayerType(name="PLAIN", interface="IPlainLayer", weights=(("weights", "PLAIN"),))]

    @refitkit.hookimpl
    def refitkit_weight_transforms(self) -> Any:
        return [self.Transform()]

    @refitkit.hookimpl
    def refitkit_check(self, source: Any) -> Any:
        return []

    @refitkit.hookimpl
    def refitkit_verifiers(self) -> Any:
        return [self.Verifier()]

    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        pass

    @refitkit.hookimpl
    def refitkit_weights_changed(self, module: Any) -> None:
        pass


def suite_for(plugin: type) -> type:
    host = make_host(isolated_config(), [plugin()])
    return type(plugin.__name__, (OfferSuite,), {"plugin": "plain", "host": host})


@cache
def good() -> type:
    return suite_for(Plain)


BITES: list[Bite] = []


def breaks(check: str, says: str) -> Any:
    def note(plugin: type) -> type:
        BITES.append(Bite(f"test_{check}", suite_for(plugin), says, good()))
        return plugin

    return note


@breaks("offers_keep_their_protocols", "refitkit_verifiers: .* has no name")
class Nameless(Plain):
    @refitkit.hookimpl
    def refitkit_verifiers(self) -> Any:
        return [object()]


@breaks("offers_keep_their_protocols", "the strategy 'half' lacks members of MappingStrategy")
class Half(Plain):
    class Strategy:
        name = "half"


@breaks("offers_are_the_same_each_time", r"it returned \['plain'\], and then \[\]")
class Once(Plain):
    @refitkit.hookimpl
    def refitkit_verifiers(self) -> Any:
        self.asked = [*getattr(self, "asked", []), 1]
        return [self.Verifier()] * (len(self.asked) == 1)


@breaks("foreign_targets_are_left_to_others", "it returned a str for an argument of unknown type")
class OpensAll(Plain):
    @refitkit.hookimpl
    def refitkit_load_module(self, target: object) -> Any:
        return "a module"


@breaks("foreign_targets_are_left_to_others", "'object' object has no attribute 'suffix'")
class ExpectsPaths(Plain):
    @refitkit.hookimpl
    def refitkit_load_module(self, target: Any) -> Any:
        return target.suffix == ".mine" or None


@breaks("foreign_weights_are_left_to_others", "refitkit_load_weights: it returned a dict")
class ReadsAll(Plain):
    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> Any:
        return {}


@breaks(
    "foreign_weights_are_left_to_others",
    "refitkit_load_weights: it raised PluginError for a .safetensors file: .* not mine",
)
class ReadsFormatsOfOthers(Plain):
    @refitkit.hookimpl
    def refitkit_load_weights(self, source: object) -> Any:
        if isinstance(source, Path):
            raise OSError("not mine")


@breaks(
    "parts_for_other_backends_are_left_to_others", "it returned a dict for a backend of another"
)
class CutsAll(Plain):
    @refitkit.hookimpl
    def refitkit_partition(self, program: Any) -> Any:
        return {"all": program}


@breaks(
    "partitioning_leaves_the_program_alone",
    "for the backend 'plain' it changed the program: '0.bias.requires_grad', '0.weight.requires_gr",
)
class Freezes(Plain):
    @refitkit.hookimpl
    def refitkit_partition(self, program: Any, backend: str) -> Any:
        if backend != "plain":
            return None
        for tensor in program.state_dict.values():
            tensor.requires_grad_(False)
        return {"all": program}


@breaks("partitioning_leaves_the_program_alone", "for the backend 'plain' .* program: 'the graph'")
class CutsGraphs(Plain):
    @refitkit.hookimpl
    def refitkit_partition(self, program: Any, backend: str) -> Any:
        if backend == "plain":
            output = program.graph.output_node()
            with program.graph.inserting_before(output):
                program.graph.call_function(len, (output.args[0],))


@breaks("strategies_decline_what_they_do_not_know", "'eager' returned values from an empty source")
class WithEager(Plain):
    class Strategy(PlainStrategy):
        name = "eager"

        def map(self, request: Any) -> Any:
            rows = request.wanted
            return Mapped({r.slot.key: SlotValue(r.slot, "eager", (), list) for r in rows})  # type: ignore[arg-type]


@breaks("strategies_decline_what_they_do_not_know", "plain.map: it raised KeyError")
class WithBrittle(Plain):
    class Strategy(PlainStrategy):
        def map(self, request: Any) -> Any:
            request.source.info("w")


@breaks(
    "transforms_leave_plain_weights_alone",
    r"the transform 'plain' makes \['w'\], which the source has",
)
class WithBusy(Plain):
    class Transform(PlainTransform):
        def groups(self, request: Any) -> Any:
            gives = {"w": TensorInfo(dtype="float32", shape=(2, 3))}
            return [WeightGroup(("w",), gives, lambda: Made({}))]


@breaks("verifiers_refuse_or_judge", "'plain' returned ok=True for a module with other weights")
class WithYes(Plain):
    class Verifier(PlainVerifier):
        def prepare(self, request: Any) -> Any:
            return lambda _: VerificationResult(verifier="plain", ok=True)


@breaks("verifiers_refuse_or_judge", "'plain' returned ok=False for a module with the new weights")
class WithNo(Plain):
    class Verifier(PlainVerifier):
        def prepare(self, request: Any) -> Any:
            return lambda _: VerificationResult(verifier="plain", ok=False)


@breaks("verifiers_refuse_or_judge", "plain.prepare: it raised TypeError")
class WithHaste(Plain):
    class Verifier(PlainVerifier):
        def prepare(self, request: Any) -> Any:
            return len(request.inputs)


@breaks("transforms_leave_plain_weights_alone", "plain.groups: it raised KeyError")
class WithWholeSources(Plain):
    class Transform(PlainTransform):
        def groups(self, request: Any) -> Any:
            for leaf in request.plan.data.leaves:
                request.source.info(leaf.fqn)
            return super().groups(request)


@breaks("verifiers_refuse_or_judge", "'plain' returned ok=True for a module with other weights")
class WithSizes(Plain):
    class Verifier(PlainVerifier):
        def measure(self, name: str, found: Any, wanted: Any) -> Any:
            return super().measure(name, found.abs(), wanted.abs())


@breaks("verifiers_refuse_or_judge", "the verifier 'plain' changed .'reference.training'.")
class WithEvaluation(Plain):
    class Verifier(PlainVerifier):
        def prepare(self, request: Any) -> Any:
            judge = super().prepare(request)
            request.reference.eval()
            return judge


@breaks("verifiers_refuse_or_judge", "the verifier 'plain' changed .'e/w'.")
class WithWrites(Plain):
    class Verifier(PlainVerifier):
        def prepare(self, request: Any) -> Any:
            judge = super().prepare(request)
            request.module.engines["e"].live["w"].zero_()
            return judge


@breaks("checks_give_problems", "refitkit_check: it returned 'bad weights'")
class Texts(Plain):
    @refitkit.hookimpl
    def refitkit_check(self) -> Any:
        return ["bad weights"]


@breaks("checks_give_problems", "refitkit_check: it changed new weights: 'b', 'w'")
class Corrects(Plain):
    @refitkit.hookimpl
    def refitkit_check(self, source: Any) -> Any:
        return [name for name in source.names() if not source.get(name).abs_().numel()]


@breaks("checks_give_problems", "refitkit_check: it changed the module: 'w'")
class ChecksByWriting(Plain):
    @refitkit.hookimpl
    def refitkit_check(self, module: Any) -> Any:
        module.engines["e"].live["w"].fill_(1)
        return []


@breaks("listeners_keep_no_modules", "the module of Finished.result is still alive")
class KeepsEvents(Plain):
    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        self.seen = [*getattr(self, "seen", []), event]


@breaks("news_of_other_modules_do_no_harm", "refitkit_weights_changed: ")
class KnowsOneModule(Plain):
    @refitkit.hookimpl
    def refitkit_weights_changed(self, module: Any) -> None:
        module.cuda_graph.reset()


@breaks("news_of_other_modules_do_no_harm", "refitkit_event: ")
class KnowsOneEvent(Plain):
    @refitkit.hookimpl
    def refitkit_event(self, event: Any) -> None:
        print(event.seconds)  # noqa: T201
