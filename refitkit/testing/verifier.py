"""The suite for verifiers: inherit :class:`VerifierSuite`, write a request and an oracle."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.errors import RefitError
from refitkit.model import VerificationResult
from refitkit.protocols import Verifier
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, SuiteError, refusal, skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from refitkit.protocols import OpenedModule, VerifyRequest

_PREPARE = "Verifier.prepare"
_JUDGE = "what Verifier.prepare returns"  # the function that checks a module; it has no name
Key = tuple[str, str]
_LEAST = 0.1  # of the largest output whose sign a verifier has to see, far above all tolerances


class VerifierSuite:
    """Every contract of :class:`refitkit.protocols.Verifier`.

    Write ``make_verifier``, ``make_request`` and ``held``; also ``make_hopeless`` if possible.
    """

    def make_verifier(self) -> Verifier:
        """A new verifier."""
        raise NotImplementedError("Write make_verifier: it returns a new verifier.")

    def make_request(self) -> VerifyRequest:
        """A request that the verifier can check; its module has weights other than the values."""
        raise NotImplementedError("Write make_request: it returns a VerifyRequest.")

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        """The live weights of a module, by any unique names, *read without the verifier*."""
        raise NotImplementedError("Write held: it reads the live weights of the module.")

    def make_hopeless(self) -> VerifyRequest | None:
        """A request that the verifier cannot check; None if it can check all requests."""
        return None

    def write(self, request: VerifyRequest, values: Mapping[Key, torch.Tensor]) -> None:
        """Write values into the module of a request. By default, stage and commit its engines."""
        for name, engine in request.module.engines.items():
            some = [
                oracles.slot_value(engine.slots[slot], value)
                for (of, slot), value in values.items()
                if of == name
            ]
            if some:
                engine.stage(some).commit()

    def wrong_value(self, key: Key, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - for authors
        """A wrong value for a slot that the verifier has to reject.

        By default the first element changes: a bool is negated, a number grows by 1. Override it
        if the engine accepts only certain values, such as indices.
        """
        flat = value.detach().clone().reshape(-1)
        flat[0] = ~flat[0] if flat.dtype is torch.bool else flat[0].float() + 1
        return flat.reshape(value.shape)

    # -- verdicts ---------------------------------------------------------------------------

    def test_it_has_a_name(self) -> None:
        """``name`` is a constant text, because users write it in ``verify=``."""
        one: Any = self.make_verifier()
        if not isinstance(one, Verifier):
            found = f"{type(one).__name__} lacks members."
            raise Breach("Verifier", found, "Implement name and prepare.")
        names = {one.name, one.name, self.make_verifier().name}
        if len(names) > 1 or not isinstance(one.name, str) or not one.name:
            raise Breach("Verifier.name", f"it returned {names!r}.", "Return one constant name.")

    def test_the_right_module_is_accepted(self) -> None:
        """The verdict for a module with the right values is ok."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        self.write(request, self._values(request))
        result = self._judged(judge, request.module)
        if not result.ok:
            found = f"it rejected a module that has exactly the new values: {result.note}."
            raise Breach(_JUDGE, found, "Accept a module whose weights are right.")

    def test_every_wrong_slot_is_rejected(self) -> None:
        """A wrong value in any one slot is rejected."""
        # An empty slot has no wrong value.
        keys = [key for key, value in self._values(self.make_request()).items() if value.numel()]
        for key in keys:
            # A new module for each slot: the wrong value of the last one must not remain.
            request = self.make_request()
            judge = self.make_verifier().prepare(request)
            values = self._values(request)
            self.write(request, {**values, key: self.wrong_value(key, values[key])})
            if self._judged(judge, request.module).ok:
                found = f"it accepted a module with a wrong value in {'/'.join(key)!r}."
                raise Breach(_JUDGE, found, "Check results that depend on every slot, or refuse.")

    def test_signs_matter(self) -> None:
        """Right weights with negated outputs are rejected; or negated weights, if it reads those.

        Whether the verifier calls the module or reads its weights, shows in the check itself.
        """
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        self.write(request, self._values(request))
        with _negated_outputs(request.module) as sizes:
            is_accepted = self._judged(judge, request.module).ok
        what = "a module that returns all outputs with the wrong sign"
        if not sizes:
            request = self.make_request()
            judge = self.make_verifier().prepare(request)
            self.write(request, {key: _negated(v) for key, v in self._values(request).items()})
            is_accepted = self._judged(judge, request.module).ok
            what = "a module that has all weights with the wrong sign"
            sizes = [_size(value) for value in self._values(request).values()]
        if max(sizes, default=0.0) < _LEAST:
            skip(f"no output, or weight, is as large as {_LEAST}, so signs may not matter")
        if is_accepted:
            advice = "Compare values with their signs: (a - b).abs(), not a.abs() - b.abs()."
            raise Breach(_JUDGE, f"it accepted {what}.", advice)

    def test_old_weights_are_rejected(self) -> None:
        """A module that still has its old weights is rejected."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        if self._judged(judge, request.module).ok:
            found = "it accepted a module with its old weights."
            raise Breach(_JUDGE, found, "Compare the module as it is now with the new weights.")

    def test_measures_name_what_is_wrong(self) -> None:
        """A rejection has a note or failed measures; these have a name and a note or an error."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        result = self._judged(judge, request.module)
        if result.ok:
            raise SuiteError("make_request() returned a module that already has the new weights.")
        failed = [measure for measure in result.measures if not measure.ok]
        if not failed and not result.note:
            found = "it rejected the module without a reason."
            raise Breach(_JUDGE, found, "Add a measure for each difference.")
        for measure in failed:
            if not measure.name or not (measure.why or measure.max_abs_error):
                found = f"a failed measure does not say what differs: {measure!r}."
                raise Breach(
                    "OutputMeasure", found, "Set its name, and a note, an error or a metric."
                )

    def test_the_verdict_is_its_name_and_measures(self) -> None:
        """The result has the verifier's name, and is ok only if all measures are."""
        request, verifier = self.make_request(), self.make_verifier()
        judge = verifier.prepare(request)
        before = self._judged(judge, request.module)
        self.write(request, self._values(request))
        for result in (before, self._judged(judge, request.module)):
            if result.verifier != verifier.name:
                found = f"it is {result.verifier!r}, not {verifier.name!r}."
                raise Breach("VerificationResult.verifier", found, "Set the verifier's name.")
            if result.ok and not all(measure.ok for measure in result.measures):
                found = "it is True, but some measures are not ok."
                advice = "Set it to False if any measure failed."
                raise Breach("VerificationResult.ok", found, advice)

    def test_the_same_verdict_twice(self) -> None:
        """A second call with the same module returns the same verdict."""
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        self.write(request, self._values(request))
        first, second = (self._judged(judge, request.module) for _ in range(2))
        if first.ok != second.ok:
            found = f"it returned ok={first.ok}, then ok={second.ok}, for the same module."
            raise Breach(_JUDGE, found, "Keep no state between calls.")

    # -- side effects -----------------------------------------------------------------------

    def test_nothing_is_changed(self) -> None:
        """Neither ``prepare`` nor the check changes the module, the values or the inputs.

        That includes the training flags of torch modules, and a reference that the user passed.
        """
        request = self.make_request()
        before = self._state(request)
        judge = self.make_verifier().prepare(request)
        self._require_unchanged(request, before, _PREPARE)
        # A rejected module, too: it has its old weights.
        self._judged(judge, request.module)
        self._require_unchanged(request, before, _JUDGE)
        # Take the state again: the refit itself changes the module.
        self.write(request, self._values(request))
        before = self._state(request)
        self._judged(judge, request.module)
        self._require_unchanged(request, before, _JUDGE)

    def test_it_refuses_before_anything_is_written(self) -> None:
        """``prepare`` raises a typed error for a request that the verifier cannot check."""
        request = self.make_hopeless()
        if request is None:
            skip("make_hopeless() returned None, so the verifier can check all requests")
        before = self._state(request)
        advice = "Refuse in prepare: later, unverified weights would be live."
        with refusal(_PREPARE, "a request that it cannot check", advice):
            self.make_verifier().prepare(request)
        self._require_unchanged(request, before, _PREPARE)

    def _state(self, request: VerifyRequest) -> dict[str, oracles.Bits]:
        found = oracles.snapshot(self.held(request.module))
        # Inputs and values belong to the user, so they count as state as well.
        leaves = pytree.tree_leaves(request.inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        found.update({f"input {n}": oracles.bits(leaf) for n, leaf in enumerate(tensors)})
        values = self._values(request)
        found.update({f"value {key}": oracles.bits(value) for key, value in values.items()})
        found.update(_torch_state("module", request.module))
        found.update(_torch_state("reference", request.reference))
        return found

    def _require_unchanged(
        self, request: VerifyRequest, before: Mapping[str, oracles.Bits], contract: str
    ) -> None:
        wrong = oracles.differing(self._state(request), before)
        if wrong:
            found = f"it changed {oracles.quoted(wrong)}."
            advice = "Only read: call probe instead of run, and copy tensors before writing."
            raise Breach(contract, found, advice)

    @staticmethod
    def _values(request: VerifyRequest) -> dict[Key, torch.Tensor]:
        return {key: value.load() for key, value in request.values.items()}

    @staticmethod
    def _judged(
        judge: Callable[[OpenedModule], VerificationResult], module: OpenedModule
    ) -> VerificationResult:
        # At this point the new weights are live: an error would come too late to refuse.
        try:
            result: Any = judge(module)
        except RefitError as exc:
            found = f"it raised {type(exc).__name__}: {exc.message}"
            raise Breach(_JUDGE, found, "Refuse in prepare; return a verdict here.") from exc
        if not isinstance(result, VerificationResult):
            found = f"it returned a {type(result).__name__}."
            raise Breach(_JUDGE, found, "Return a refitkit.model.VerificationResult.")
        return result


def _torch_state(name: str, owner: object) -> dict[str, oracles.Bits]:
    """Training flags and weights of an object and its attributes, as far as they are modules."""
    attributes = {
        name: owner,
        **{f"{name}.{n}": v for n, v in getattr(owner, "__dict__", {}).items()},
    }
    found: dict[str, oracles.Bits] = {}
    if isinstance(flag := getattr(owner, "training", None), bool):
        found[f"{name}.training"] = oracles.bits(torch.tensor(flag))
    for label, module in attributes.items():
        if isinstance(module, torch.nn.Module):
            for path, part in module.named_modules(prefix=label):
                found[f"{path}.training"] = oracles.bits(torch.tensor(part.training))
            for path, tensor in module.state_dict(prefix=f"{label}.").items():
                found[path] = oracles.bits(tensor)
    return found


@contextmanager
def _negated_outputs(module: Any) -> Iterator[list[float]]:
    """Have calls of a module return negated outputs; yields the largest output of each call."""
    sizes: list[float] = []
    depth = [0]

    def negating(call: Callable[..., Any]) -> Callable[..., Any]:
        def negated(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                found = call(*args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0]:  # run, which probe calls: negate once
                return found
            tensors = [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
            sizes.append(max(map(_size, tensors), default=0.0))
            return pytree.tree_map_only(torch.Tensor, _negated, found)

        return negated

    attributes: dict[str, Any] | None = getattr(module, "__dict__", None)
    if attributes is None:
        skip("the module has fixed attributes, so its outputs cannot be replaced")
    before = dict(attributes)
    calls = [name for name in ("run", "probe", "probe_from") if hasattr(module, name)]
    # Past __setattr__, which a module may refuse.
    attributes.update({name: negating(getattr(module, name)) for name in calls})
    try:
        yield sizes
    finally:
        for name in calls:
            attributes.pop(name, None)
            attributes.update({name: before[name]} if name in before else {})


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor if tensor.is_floating_point() or tensor.is_complex() else tensor


def _size(tensor: torch.Tensor) -> float:
    """The largest absolute value that ``_negated`` changes."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(tensor.detach().abs().float().nan_to_num(0.0).max())
