"""Broken verifiers, at least one for each check of ``VerifierSuite``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from refitkit.errors import NotRefittableError
from refitkit.model import OutputMeasure, VerificationResult
from refitkit.protocols import VerifyRequest
from refitkit.recipe import TensorMap
from refitkit.testing import VerifierSuite
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import plan_for
from tests.conformance.bites import Bite

NEW = {"w": torch.arange(1.0, 7.0).reshape(2, 3), "b": torch.tensor([-1.0, 2.0])}


class Plain:
    """A correct verifier, which probes the module and compares all outputs."""

    name: Any = "plain"

    def prepare(self, request: VerifyRequest) -> Any:
        if request.inputs is None:
            raise NotRefittableError("It needs inputs.")
        args, kwargs = request.inputs
        wanted = {f"e/{name}": v.load() * args[0] for (_, name), v in request.values.items()}
        return lambda module: self.judge(module.probe(args, kwargs), wanted)

    def judge(self, found: Any, wanted: Any) -> Any:
        measures = tuple(self.measure(name, found[name], wanted[name]) for name in wanted)
        ok = all(measure.ok for measure in measures)
        return VerificationResult(verifier=self.name, ok=ok, measures=measures)

    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        ok = torch.equal(found, wanted)
        return OutputMeasure(name=name, ok=ok, note="" if ok else "differs")


class Good(VerifierSuite):
    verifier: type[Plain] = Plain

    def make_verifier(self) -> Any:
        return self.verifier()

    def make_request(self) -> VerifyRequest:
        module: Any = FakeModule(
            [OpenEngine("e", {n: torch.zeros_like(v) for n, v in NEW.items()})]
        )
        module.training = True
        plan, source = plan_for(module), TensorMap({n: v.clone() for n, v in NEW.items()})
        values: Any = plan.values_of(plan.ledger, source)
        inputs = ((torch.tensor(2.0),), {})
        reference = torch.nn.Sequential(torch.nn.Dropout())
        return VerifyRequest(plan, module, source, values, inputs, reference, None, {})

    def held(self, module: Any) -> dict[str, torch.Tensor]:
        return dict(module.engines["e"].live)

    def make_hopeless(self) -> VerifyRequest:
        return replace(self.make_request(), inputs=None)


class Referring(Plain):
    """A correct verifier, which compares outputs with a reference."""

    def prepare(self, request: VerifyRequest) -> Any:
        assert request.inputs is not None
        args, kwargs = request.inputs
        given = request.reference
        wanted = given(*args, **kwargs) if callable(given) else given
        return lambda module: self.judge(module.probe(args, kwargs), wanted)

    def judge(self, found: Any, wanted: Any) -> Any:
        if found.keys() != wanted.keys():
            return VerificationResult(verifier=self.name, ok=False, note="other outputs")
        return super().judge(found, wanted)


class GoodReferring(Good):
    verifier = Referring

    def make_request(self) -> VerifyRequest:
        right = {f"e/{name}": value * 2.0 for name, value in NEW.items()}
        return replace(super().make_request(), reference=lambda _: right)


class Reading(Plain):
    """A correct verifier, which reads weights."""

    def prepare(self, request: VerifyRequest) -> Any:
        wanted = {f"e/{name}": v.load() for (_, name), v in request.values.items()}
        return lambda module: self.judge(module.holds(), wanted)


class GoodReading(Good):
    verifier = Reading


BITES: list[Bite] = []


def breaks(check: str, says: str, good: type[Good] = Good) -> Any:
    def note(verifier: type) -> type:
        suite = type(verifier.__name__, (good,), {"verifier": verifier})
        BITES.append(Bite(f"test_{check}", suite, says, good))
        return verifier

    return note


@breaks("it_has_a_name", "Verifier.name: it returned {''}")
class Nameless(Plain):
    name = ""


@breaks("it_has_a_name", "Verifier: Unprepared lacks members")
class Unprepared(Plain):
    prepare = property(lambda _: (_ for _ in ()).throw(AttributeError()))  # type: ignore[assignment]


@breaks("the_right_module_is_accepted", "it rejected a module that has exactly the new values")
class Never(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return VerificationResult(verifier=self.name, ok=False, note="no")


@breaks("every_wrong_slot_is_rejected", "it accepted a module with a wrong value in 'e/b'")
class LooksAtOne(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return super().judge(found, {"e/w": wanted["e/w"]})


@breaks("old_weights_are_rejected", "it accepted a module with its old weights")
class Always(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return VerificationResult(verifier=self.name, ok=True)


@breaks("measures_name_what_is_wrong", "it rejected the module without a reason")
class Curt(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return VerificationResult(verifier=self.name, ok=super().judge(found, wanted).ok)


@breaks("measures_name_what_is_wrong", "a failed measure does not say what differs")
class Mumbles(Plain):
    def measure(self, name: str, found: Any, wanted: Any) -> Any:
        return super().measure(name, found, wanted).model_copy(update={"note": ""})


@breaks("the_verdict_is_its_name_and_measures", "it is 'outputs', not 'plain'")
class Poses(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return super().judge(found, wanted).model_copy(update={"verifier": "outputs"})


@breaks("the_verdict_is_its_name_and_measures", "it is True, but some measures are not ok")
class Lenient(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return super().judge(found, wanted).model_copy(update={"ok": True})


@breaks("the_same_verdict_twice", "it returned ok=True, then ok=False, for the same module")
class Once(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge, calls = super().prepare(request), iter([True])
        no = VerificationResult(verifier=self.name, ok=False)
        return lambda module: judge(module) if next(calls, False) else no


@breaks("nothing_is_changed", r"Verifier.prepare: it changed 'b', 'w'")
class TriesFirst(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        request.module.engines["e"].stage(list(request.values.values())).commit()
        return super().prepare(request)


@breaks("nothing_is_changed", r"what Verifier.prepare returns: it changed 'input 0'")
class WritesInputs(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge = super().prepare(request)

        def judged(module: Any) -> Any:
            result = judge(module)
            request.inputs[0][0].zero_()  # type: ignore[index]
            return result

        return judged


@breaks("it_refuses_before_anything_is_written", "a request that it cannot check was accepted")
class RefusesLate(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        return super().prepare(request) if request.inputs else lambda _: None


@breaks("it_refuses_before_anything_is_written", "a request that it cannot check raised TypeError")
class Stumbles(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        _args, _ = request.inputs  # type: ignore[misc]
        return super().prepare(request)


@breaks(
    "the_right_module_is_accepted", "it returned a bool. Return a refitkit.model.VerificationResult"
)
class Bools(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        return True


@breaks("old_weights_are_rejected", "it raised NotRefittableError")
class RaisesNo(Plain):
    def judge(self, found: Any, wanted: Any) -> Any:
        raise NotRefittableError("No.")


@breaks("signs_matter", "it accepted a module that returns all outputs with the wrong sign")
class ComparesSizes(Plain):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found.abs(), wanted.abs())


@breaks("signs_matter", "it accepted a module that has all weights with the wrong sign")
class ReadsSizes(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        wanted = {f"e/{name}": v.load().abs() for (_, name), v in request.values.items()}
        return lambda module: self.judge(
            {name: value.abs() for name, value in module.holds().items()}, wanted
        )


@breaks("nothing_is_changed", "Verifier.prepare: it changed 'reference.0.training', 'reference.tr")
class EvaluatesReferences(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        request.reference.eval()
        return super().prepare(request)


@breaks("nothing_is_changed", "what Verifier.prepare returns: it changed 'b', 'w'")
class ZeroesRejected(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge = super().prepare(request)

        def judged(module: Any) -> Any:
            result = judge(module)
            if not result.ok:
                for value in module.engines["e"].live.values():
                    value.fill_(1)
            return result

        return judged


@breaks("nothing_is_changed", "what Verifier.prepare returns: it changed 'module.training'")
class SetsTheFlag(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge = super().prepare(request)

        def judged(module: Any) -> Any:
            module.training = False
            return judge(module)

        return judged


@breaks("wrong_outputs_are_rejected", "it accepted a module with nan in output 0", GoodReferring)
class NanPasses(Referring):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        error = (found - wanted).abs().max()
        return OutputMeasure(name=name, ok=not error > 0, note="differs")


@breaks("wrong_outputs_are_rejected", "a module with inf in output 0", GoodReferring)
class InfinityPasses(Referring):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found.where(~found.isinf(), wanted), wanted)


@breaks("wrong_outputs_are_rejected", "a module that returns another number", GoodReferring)
class LosesOutputs(Referring):
    def judge(self, found: Any, wanted: Any) -> Any:
        return super().judge(found, {name: wanted[name] for name in found})


@breaks("wrong_outputs_are_rejected", "that returns output 0 in another shape", GoodReferring)
class CountsElements(Referring):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found.reshape(-1), wanted.reshape(-1))


@breaks("wrong_outputs_are_rejected", "a module that has NaN in all weights", GoodReading)
class SkipsNan(Reading):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found.where(~found.isnan(), wanted), wanted)


@breaks("every_output_counts", "with NaN in output 0, where the reference is 0", GoodReferring)
class MasksNan(Referring):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found.nan_to_num(), wanted.nan_to_num())


@breaks("every_output_counts", "output 0 with the wrong sign, beside larger ones", GoodReferring)
class ComparesAllTogether(Referring):
    def judge(self, found: Any, wanted: Any) -> Any:
        found, wanted = (torch.cat([v.reshape(-1) for v in vs.values()]) for vs in (found, wanted))
        error = (found - wanted).norm() / wanted.norm()
        return VerificationResult(verifier=self.name, ok=bool(error < 0.01), note=f"{error}")


@breaks("the_module_that_it_gets_is_judged", "the new weights, and returned ok=False")
class JudgesTheRequest(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge = super().prepare(request)
        return lambda _: judge(request.module)


@breaks("requests_do_not_mix", "the first got the other's verdict", GoodReferring)
class KeepsTheLast(Referring):
    def prepare(self, request: VerifyRequest) -> Any:
        self.last = super().prepare(request)

        def judged(module: Any) -> Any:
            return self.last(module)

        return judged


@breaks("requests_do_not_mix", "the second got the other's verdict")
class KeepsTheFirst(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        self.first = getattr(self, "first", None) or super().prepare(request)
        return self.first


@breaks("it_probes_the_module", "it called run of the module")
class Runs(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        judge = super().prepare(request)

        def judged(module: Any) -> Any:
            module.run((torch.tensor(1.0),), {})
            return judge(module)

        return judged


@breaks("references_are_computed_in_prepare", "its check called the reference", GoodReferring)
class RefersLate(Referring):
    def prepare(self, request: VerifyRequest) -> Any:
        prepare = super().prepare

        def judged(module: Any) -> Any:
            return prepare(request)(module)

        return judged


@breaks("nothing_is_changed", r"it changed 'torch.is_grad_enabled\(\)'")
class LeavesGradOff(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        torch.set_grad_enabled(False)
        return super().prepare(request)


@breaks("nothing_is_changed", r"it changed 'torch.initial_seed\(\)'")
class SetsTheSeed(Plain):
    def prepare(self, request: VerifyRequest) -> Any:
        torch.manual_seed(0)
        return super().prepare(request)


@breaks("nothing_is_changed", "it changed the expected outputs that the user", GoodReferring)
class CleansReferences(Referring):
    def measure(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> Any:
        return super().measure(name, found, wanted.nan_to_num_())
