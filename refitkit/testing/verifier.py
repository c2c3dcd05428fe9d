"""The suite for verifiers: inherit :class:`VerifierSuite`, write a request and an oracle."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
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

    Judge = Callable[[OpenedModule], VerificationResult]
    Change = Callable[[Any], Any]

_PREPARE = "Verifier.prepare"
_JUDGE = "what Verifier.prepare returns"  # the function that checks a module; it has no name
Key = tuple[str, str]
_LEAST = 0.1  # of the largest output whose sign a verifier has to see, far above all tolerances
_SCALE = 1e4  # of outputs beside a smaller one
_SEED = 987_654_321  # that no verifier sets


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
        with _changed_outputs(request.module, _negated_all) as calls:
            is_accepted = self._judged(judge, request.module).ok
        sizes = [_size(leaf) for _, outputs in calls for leaf in _tensors(outputs)]
        what = "a module that returns all outputs with the wrong sign"
        if not calls:
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

    def test_wrong_outputs_are_rejected(self) -> None:
        """Right weights with NaN, infinity, a lost output or another shape are rejected.

        A verifier that reads weights has to reject NaN in these.
        """
        request = self.make_request()
        judge = self.make_verifier().prepare(request)
        values = self._values(request)
        self.write(request, values)
        with _changed_outputs(request.module, _same) as calls:
            self._judged(judge, request.module)
        if calls:
            for what, change in _wrong_changes(calls[-1][1]):
                with _changed_outputs(request.module, change):
                    self._require_rejection(judge, request.module, f"a module {what}")
        elif any(_can_be_nan(value) for value in values.values()):
            request = self.make_request()
            judge = self.make_verifier().prepare(request)
            spoilt = {key: _ending(v, float("nan")) for key, v in values.items()}
            self.write(request, spoilt)
            self._require_rejection(judge, request.module, "a module that has NaN in all weights")

    def test_every_output_counts(self) -> None:
        """An output with the wrong sign is rejected beside larger ones; NaN is, where 0 is right.

        The outputs of the module, and of the reference, are replaced for it.
        """
        outputs, count = self._right_outputs(), 0
        for what, wanted, found in _hidden_faults(outputs):
            request = self._expecting(wanted)
            judge = self._prepared(self.make_verifier(), request)
            self.write(request, self._values(request))
            with _changed_outputs(request.module, partial(_replaced, by=wanted)):
                if not self._is_accepted(judge, request.module):
                    continue  # the reference has no effect, so nothing can be hidden
            with _changed_outputs(request.module, partial(_replaced, by=found)) as calls:
                is_accepted = self._is_accepted(judge, request.module)
            count += bool(calls)
            if calls and is_accepted:
                advice = "Judge each output by itself, and reject NaN."
                raise Breach(_JUDGE, f"it accepted a module {what}.", advice)
        if not count:
            skip("the verifier compares no outputs with a reference that is given")

    def test_the_module_that_it_gets_is_judged(self) -> None:
        """The verdict is on the module that the check gets, not on that of the request."""
        for is_right in (True, False):
            request = self.make_request()
            judge = self.make_verifier().prepare(request)
            # As if the module published: the check gets one that has the staged weights.
            other = request.module.reopen()
            right = other if is_right else request.module
            self.write(replace(request, module=right), self._values(request))
            if self._judged(judge, other).ok is not is_right:
                weights = "the new weights" if is_right else "the old weights"
                found = f"it got a module with {weights}, and returned ok={not is_right}."
                raise Breach(_JUDGE, found, "Check the module that you get, not request.module.")

    def test_requests_do_not_mix(self) -> None:
        """One verifier judges two requests, each by its own values and reference."""
        requests = self.make_request(), self._other_request()
        if requests[1] is None:
            skip("the verifier refuses the request with other values or another reference")
        verifier = self.make_verifier()
        judges = [self._prepared(verifier, request) for request in requests]
        fresh = self._other_request()
        alone = self._prepared(self.make_verifier(), fresh)
        values = self._values(self.make_request())
        for request in (*requests, fresh):
            self.write(request, values)
        wanted = True, self._is_accepted(alone, fresh.module)
        for n, (judge, request) in enumerate(zip(judges, requests, strict=True)):
            if self._is_accepted(judge, request.module) is not wanted[n]:
                which = ("first", "second")[n]
                found = f"of two requests on one verifier, the {which} got the other's verdict."
                advice = "Keep the facts of a request in the returned check, not in the verifier."
                raise Breach(_PREPARE, found, advice)

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

        That includes the training flags of torch modules, a reference that the user passed, and
        the state of torch: its modes, defaults and seed.
        """
        with _usual_torch():
            self._require_no_side_effects()
            self._require_kept_outputs()

    def _require_no_side_effects(self) -> None:
        request = self.make_request()
        torch.manual_seed(_SEED)
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

    def _require_kept_outputs(self) -> None:
        """Expected outputs that the user passed stay as they are, NaN included."""
        if self.make_request().inputs is None:
            return
        reference = pytree.tree_map_only(
            torch.Tensor, lambda leaf: _ending(leaf, float("nan")), self._right_outputs()
        )
        request = replace(self.make_request(), reference=reference)
        before = [oracles.bits(leaf) for leaf in _tensors(reference)]
        with suppress(RefitError):  # it may refuse outputs as a reference
            judge = self.make_verifier().prepare(request)
            self._is_accepted(judge, request.module)
        if [oracles.bits(leaf) for leaf in _tensors(reference)] != before:
            found = "it changed the expected outputs that the user passed as the reference."
            raise Breach(_PREPARE, found, "Copy tensors before writing to them.")

    def test_it_probes_the_module(self) -> None:
        """It calls ``probe``, never ``run``, which may write buffers of the module."""
        request = self.make_request()
        with _changed_outputs(request.module, _same) as calls:
            judge = self.make_verifier().prepare(request)
            self.write(request, self._values(request))
            self._judged(judge, request.module)
        if any(name == "run" for name, _ in calls):
            raise Breach(_JUDGE, "it called run of the module.", "Call probe instead of run.")

    def test_references_are_computed_in_prepare(self) -> None:
        """The check calls no reference: calls of the module wait for the check."""
        outputs, times = self._right_outputs(), [0]

        def reference(*_: Any, **__: Any) -> Any:
            times[0] += 1
            return _copied(outputs)

        request = replace(self.make_request(), reference=reference)
        judge = self._prepared(self.make_verifier(), request)
        before = times[0]
        self.write(request, self._values(request))
        self._is_accepted(judge, request.module)
        if times[0] > before:
            found = "its check called the reference, while calls of the module wait."
            raise Breach(_PREPARE, found, "Compute the reference in prepare.")
        if not before:
            skip("the verifier calls no reference")

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
        found.update(_ambient_state())
        return found

    def _require_unchanged(
        self, request: VerifyRequest, before: Mapping[str, oracles.Bits], contract: str
    ) -> None:
        wrong = oracles.differing(self._state(request), before)
        if wrong:
            found = f"it changed {oracles.quoted(wrong)}."
            advice = "Only read: call probe instead of run, and copy tensors before writing."
            raise Breach(contract, found, advice)

    # -- requests with another reference ------------------------------------------------------

    def _right_outputs(self) -> Any:
        """The outputs of the module of a request with the new values."""
        request = self.make_request()
        if request.inputs is None:
            skip("the request has no inputs, so the verifier compares no outputs")
        self.write(request, self._values(request))
        return _copied(request.module.probe(*request.inputs))

    def _expecting(self, outputs: Any) -> VerifyRequest:
        """A request whose reference has other outputs; a callable, if the author's is one."""
        request = self.make_request()
        if callable(request.reference):
            return replace(request, reference=lambda *_, **__: _copied(outputs))
        return replace(request, reference=_copied(outputs))

    def _other_request(self) -> Any:
        """A request that expects other values and outputs; None if the verifier refuses it."""
        request = self.make_request()
        if request.inputs is not None:
            request = self._expecting(_negated_all(self._right_outputs()))
        values = {
            key: oracles.slot_value(value.slot, _negated(value.load()))
            for key, value in request.values.items()
        }
        request = replace(request, values=values)
        try:
            self.make_verifier().prepare(request)
        except RefitError:
            return None
        return request

    @staticmethod
    def _prepared(verifier: Verifier, request: VerifyRequest) -> Judge:
        try:
            return verifier.prepare(request)
        except RefitError as exc:
            skip(f"the verifier refuses a request with another reference: {exc.message}")

    @staticmethod
    def _is_accepted(judge: Judge, module: OpenedModule) -> bool:
        """Whether a module is accepted. An exception rejects it: refitkit rolls back then, too."""
        try:
            return judge(module).ok
        except Exception:  # noqa: BLE001 - of any kind
            return False

    def _require_rejection(self, judge: Judge, module: OpenedModule, what: str) -> None:
        if self._is_accepted(judge, module):
            advice = "Compare structure, shape and values; NaN and infinity are never right."
            raise Breach(_JUDGE, f"it accepted {what}.", advice)

    @staticmethod
    def _values(request: VerifyRequest) -> dict[Key, torch.Tensor]:
        return {key: value.load() for key, value in request.values.items()}

    @staticmethod
    def _judged(judge: Judge, module: OpenedModule) -> VerificationResult:
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


def _ambient_state() -> dict[str, oracles.Bits]:
    """The state of torch that a verifier could leave behind."""
    state = {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.is_autocast_enabled()": torch.is_autocast_enabled("cpu"),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled()": (
            torch.are_deterministic_algorithms_enabled()
        ),
        # The seed, not the state: a reference of the user may draw random numbers.
        "torch.initial_seed()": torch.initial_seed(),
    }
    return {
        name: oracles.bits(torch.tensor(list(str(value).encode()), device="cpu"))
        for name, value in state.items()
    }


@contextmanager
def _usual_torch() -> Iterator[None]:
    """Start from torch's usual state, and restore the present one afterwards.

    An earlier check may have left the state as the verifier leaves it.
    """
    grad, dtype, threads = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


@contextmanager
def _changed_outputs(module: Any, change: Change) -> Iterator[list[tuple[str, Any]]]:
    """Have calls of a module return changed outputs.

    Yields a list of the calls: the name of the called method, and what the module returned.
    """
    calls: list[tuple[str, Any]] = []
    depth = [0]

    def changing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                found = call(*args, **kwargs)
            finally:
                depth[0] -= 1
            if depth[0]:  # run, which probe calls: change once
                return found
            calls.append((name, found))
            return change(found)

        return changed

    attributes: dict[str, Any] | None = getattr(module, "__dict__", None)
    if attributes is None:
        skip("the module has fixed attributes, so its outputs cannot be replaced")
    before = dict(attributes)
    names = [name for name in ("run", "probe", "probe_from") if hasattr(module, name)]
    # Past __setattr__, which a module may refuse.
    attributes.update({name: changing(name, getattr(module, name)) for name in names})
    try:
        yield calls
    finally:
        for name in names:
            attributes.pop(name, None)
            attributes.update({name: before[name]} if name in before else {})


def _wrong_changes(outputs: Any) -> Iterator[tuple[str, Change]]:
    """Functions that spoil outputs like these, with what they do."""
    for n, leaf in enumerate(pytree.tree_leaves(outputs)):
        if isinstance(leaf, torch.Tensor) and _can_be_nan(leaf):
            for number in (float("nan"), float("inf")):
                spoil = partial(_ending, last=number)
                yield f"with {number} in output {n}", partial(_with_leaf, number=n, change=spoil)
        if isinstance(leaf, torch.Tensor):
            reshape = partial(torch.unsqueeze, dim=0)
            what = f"that returns output {n} in another shape"
            yield what, partial(_with_leaf, number=n, change=reshape)
    yield "that returns another number of outputs", _of_other_number


def _hidden_faults(outputs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Right outputs, wrong ones that a careless comparison takes for equal, and what is wrong."""
    leaves, spec = pytree.tree_flatten(outputs)
    floats = [
        n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and _can_be_nan(leaf)
    ]
    for n in floats:
        zero, nan = ([*leaves], [*leaves])
        zero[n], nan[n] = _ending(leaves[n], 0.0), _ending(leaves[n], float("nan"))
        what = f"with NaN in output {n}, where the reference is 0"
        yield what, pytree.tree_unflatten(zero, spec), pytree.tree_unflatten(nan, spec)
    for n in floats:
        large = [leaf * _SCALE if m in floats and m != n else leaf for m, leaf in enumerate(leaves)]
        is_finite = all(bool(torch.isfinite(large[m]).all()) for m in floats)
        if len(floats) > 1 and is_finite and _size(leaves[n]) >= _LEAST:
            wrong = [-leaf if m == n else leaf for m, leaf in enumerate(large)]
            what = f"that returns output {n} with the wrong sign, beside larger ones"
            yield what, pytree.tree_unflatten(large, spec), pytree.tree_unflatten(wrong, spec)


def _of_other_number(outputs: Any) -> Any:
    """Outputs without the last one; two of them if there is only one."""
    if isinstance(outputs, dict) and outputs:
        return dict(list(outputs.items())[:-1])
    return outputs[:-1] if type(outputs) in (list, tuple) and outputs else (outputs, outputs)


def _with_leaf(outputs: Any, number: int, change: Change) -> Any:
    leaves, spec = pytree.tree_flatten(outputs)
    leaves[number] = change(leaves[number])
    return pytree.tree_unflatten(leaves, spec)


def _ending(tensor: torch.Tensor, last: float) -> torch.Tensor:
    """A copy with another last element, if it can be NaN."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if _can_be_nan(tensor):
        copy.view(-1)[-1] = last
    return copy


def _can_be_nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.numel()) and (tensor.is_floating_point() or tensor.is_complex())


def _same(outputs: Any) -> Any:
    return outputs


def _replaced(_: Any, by: Any) -> Any:
    return _copied(by)


def _copied(outputs: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.detach().clone(), outputs)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _negated_all(outputs: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, _negated, outputs)


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor if tensor.is_floating_point() or tensor.is_complex() else tensor


def _size(tensor: torch.Tensor) -> float:
    """The largest absolute value that ``_negated`` changes."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(tensor.detach().abs().float().nan_to_num(0.0).max())
