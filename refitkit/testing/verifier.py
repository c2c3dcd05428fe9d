"""The suite for verifiers: a refit to judge, and ways to spoil it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.errors import RefitError
from refitkit.model import VerificationResult
from refitkit.protocols import Verifier
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, refusal, skip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from refitkit.protocols import OpenedModule, VerifyRequest

_PREPARE = "Verifier.prepare"
_JUDGE = "what Verifier.prepare returns"
Key = tuple[str, str]


class VerifierSuite:
    """Every contract of :class:`refitkit.protocols.Verifier`.

    Write ``make_verifier``, ``make_request`` and ``held``; ``make_hopeless`` where there is a way.
    """

    def make_verifier(self) -> Verifier:
        """A new verifier."""
        raise NotImplementedError("Write make_verifier: it returns a new verifier.")

    def make_request(self) -> VerifyRequest:
        """A request that it can judge; the module still has other weights than the values."""
        raise NotImplementedError("Write make_request: what the verifier has to work with.")

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        """What the module holds, by any names, found *without the verifier*."""
        raise NotImplementedError("Write held: what the module holds.")

    def make_hopeless(self) -> VerifyRequest | None:
        """A request that it cannot judge; None: it can judge anything."""
        return None

    def write(self, request: VerifyRequest, values: Mapping[Key, torch.Tensor]) -> None:
        """Bring values into the module of a request; by default through its engines."""
        for name, engine in request.module.engines.items():
            some = [
                oracles.given(engine.slots[slot], value)
                for (of, slot), value in values.items()
                if of == name
            ]
            if some:
                engine.stage(some).commit()

    def spoilt(self, key: Key, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - for authors
        """A wrong value for a slot, which the verifier has to notice; by default other bits."""
        flat = value.detach().clone().reshape(-1)
        flat[0] = ~flat[0] if flat.dtype is torch.bool else flat[0].float() + 1
        return flat.reshape(value.shape)

    # -- what it says -----------------------------------------------------------------------

    def test_it_has_a_name(self) -> None:
        """The same each time: users write it in ``verify=``."""
        one: Any = self.make_verifier()
        if not isinstance(one, Verifier):
            raise Breach("Verifier", f"{type(one).__name__} lacks members.", "Give it prepare.")
        names = {one.name, one.name, self.make_verifier().name}
        if len(names) > 1 or not isinstance(one.name, str) or not one.name:
            raise Breach("Verifier.name", f"it is {names!r}.", "Give one name, always.")

    def test_the_right_module_is_accepted(self) -> None:
        """After a right refit it says yes, and so does every measure."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        self.write(request, self._values(request))
        result = self._judged(judge, request.module)
        if not result.ok:
            found = f"it rejects a module that holds the very values: {result.note}."
            raise Breach(_JUDGE, found, "Accept what is right.")

    def test_every_wrong_slot_is_rejected(self) -> None:
        """One slot after another is spoilt, and each time it says no."""
        keys = [key for key, value in self._values(self.make_request()).items() if value.numel()]
        for key in keys:
            request = self.make_request()
            judge = self.make_verifier().prepare(request)
            values = self._values(request)
            self.write(request, {**values, key: self.spoilt(key, values[key])})
            if self._judged(judge, request.module).ok:
                found = f"{'/'.join(key)!r} is wrong, and it says yes."
                raise Breach(_JUDGE, found, "Look at what depends on any slot, or refuse.")

    def test_old_weights_are_rejected(self) -> None:
        """A module that was not refitted at all."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        if self._judged(judge, request.module).ok:
            found = "the module still has its old weights, and it says yes."
            raise Breach(_JUDGE, found, "Judge the module as it is now, against the new weights.")

    def test_measures_name_what_is_wrong(self) -> None:
        """The verdict is that of its measures, each with a name; wrong ones say how."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        result = self._judged(judge, request.module)
        if result.ok:
            raise SuiteError("make_request() gives a module that the verifier accepts as it is.")
        wrong = [measure for measure in result.measures if not measure.ok]
        if not wrong and not result.note:
            raise Breach(_JUDGE, "it says no, and not why.", "Give a measure for what differs.")
        for measure in wrong:
            if not measure.name or not (measure.note or measure.max_abs_error):
                found = f"a measure says that something is wrong, and not what: {measure!r}."
                raise Breach("OutputMeasure", found, "Name it, and say how it differs.")

    def test_the_verdict_is_its_name_and_measures(self) -> None:
        """The result carries the verifier's name; ok means that every measure is."""
        request, verifier = self.make_request(), self.make_verifier()
        judge = verifier.prepare(request)
        before = self._judged(judge, request.module)
        self.write(request, self._values(request))
        for result in (before, self._judged(judge, request.module)):
            if result.verifier != verifier.name:
                found = f"it says it is of {result.verifier!r}, not of {verifier.name!r}."
                raise Breach("VerificationResult.verifier", found, "Give the verifier's name.")
            if result.ok and not all(measure.ok for measure in result.measures):
                found = "it is ok, and some of its measures are not."
                raise Breach("VerificationResult.ok", found, "One wrong measure is a no.")

    def test_the_same_verdict_twice(self) -> None:
        """Judging the same module again says the same."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        self.write(request, self._values(request))
        first, second = (self._judged(judge, request.module) for _ in range(2))
        if first.ok != second.ok:
            found = f"it says {first.ok}, and then {second.ok}, of the same module."
            raise Breach(_JUDGE, found, "Keep nothing between calls.")

    # -- what it does -----------------------------------------------------------------------

    def test_nothing_is_changed(self) -> None:
        """Neither preparing nor judging changes the module, the values or the inputs."""
        request = self.make_request()
        before = self._state(request)
        judge = self.make_verifier().prepare(request)
        self._require_state(request, before, _PREPARE)
        self.write(request, self._values(request))
        before = self._state(request)
        self._judged(judge, request.module)
        self._require_state(request, before, _JUDGE)

    def test_it_refuses_before_anything_is_written(self) -> None:
        """What it cannot judge, it refuses in ``prepare``, with a typed error."""
        request = self.make_hopeless()
        if request is None:
            skip("make_hopeless() gives no request that it cannot judge")
        before = self._state(request)
        advice = "Afterwards it would be too late: weights would be live that nobody judged."
        with refusal(_PREPARE, "a request that it cannot judge", advice):
            self.make_verifier().prepare(request)
        self._require_state(request, before, _PREPARE)

    def _state(self, request: VerifyRequest) -> dict[str, oracles.Bits]:
        found = oracles.snapshot(self.held(request.module))
        leaves = pytree.tree_leaves(request.inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        found.update({f"input {n}": oracles.bits(leaf) for n, leaf in enumerate(tensors)})
        values = self._values(request)
        found.update({f"value {key}": oracles.bits(value) for key, value in values.items()})
        return found

    def _require_state(
        self, request: VerifyRequest, before: Mapping[str, oracles.Bits], contract: str
    ) -> None:
        wrong = oracles.differing(self._state(request), before)
        if wrong:
            found = f"it changed {oracles.shown(wrong)}."
            raise Breach(contract, found, "Only look: call probe, copy what is written to.")

    @staticmethod
    def _values(request: VerifyRequest) -> dict[Key, torch.Tensor]:
        return {key: value.load() for key, value in request.values.items()}

    @staticmethod
    def _judged(
        judge: Callable[[OpenedModule], VerificationResult], module: OpenedModule
    ) -> VerificationResult:
        try:
            result: Any = judge(module)
        except RefitError as exc:
            found = f"it raised {type(exc).__name__}: {exc.message}"
            raise Breach(_JUDGE, found, "Refuse in prepare, and give a verdict here.") from exc
        if not isinstance(result, VerificationResult):
            found = f"it gives a {type(result).__name__}."
            raise Breach(_JUDGE, found, "Give a VerificationResult of refitkit.model.")
        return result
