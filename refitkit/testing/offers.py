"""The suite that runs against every plugin: it needs no factory, only the plugin's hooks.

It checks what hooks return, and that the plugin ignores targets, weights and modules of others.
:mod:`refitkit.testing.check` makes a subclass for each plugin.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import weakref
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file

from refitkit.config import TOLERANCES, Config
from refitkit.errors import PluginError, Problem, RefitError, SourceError
from refitkit.model import (
    Finished,
    LedgerRow,
    RefitReport,
    SlotState,
    StageFinished,
    StageStarted,
    Started,
    Step,
    VerificationResult,
)
from refitkit.offered import OFFERS
from refitkit.protocols import (
    MapRequest,
    Tools,
    TransformRequest,
    VerifyRequest,
)
from refitkit.recipe import TensorMap
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import EngineScene, make_plan, plan_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.host import Host
    from refitkit.protocols import WeightSource

_LOOKS, _BETWEEN_LOOKS = 20, 0.05  # seconds


class OfferSuite:
    """Checks of a registered plugin's hooks.

    Attributes:
        plugin: Name of the plugin.
        host: Host in which it is registered.
    """

    plugin: ClassVar[str]
    host: ClassVar[Host]

    def test_offers_keep_their_protocols(self) -> None:
        """Each offered object has a name and all members of its protocol."""
        for hook, (kind, protocol) in OFFERS.items():
            for offer in self._offers(hook):
                name = getattr(offer, "name", None)
                if not isinstance(name, str) or not name:
                    raise Breach(hook, f"{offer!r} has no name.", "Set a name: users choose by it.")
                if not isinstance(offer, protocol):
                    found = f"the {kind} {name!r} lacks members of {protocol.__name__}."
                    raise Breach(hook, found, "Implement all members: see refitkit.protocols.")

    def test_offers_are_the_same_each_time(self) -> None:
        """Two calls of a hook return the same names in the same order."""
        for hook in OFFERS:
            # Two calls in a row: a hook that returns an iterator or counts calls shows here.
            first, second = ([offer.name for offer in self._offers(hook)] for _ in range(2))
            if first != second:
                found = f"it returned {first}, and then {second}."
                raise Breach(hook, found, "Return the same each time: every refit calls it.")

    # -- hooks whose first result counts: None passes the call on ------------------------------

    def test_foreign_targets_are_left_to_others(self) -> None:
        """``refitkit_load_module`` returns None for an object of unknown type."""
        self._require_none("refitkit_load_module", target=object(), config=Config(), tools=Tools())

    def test_foreign_weights_are_left_to_others(self) -> None:
        """``refitkit_load_weights`` returns None for unknown objects, and for built-in formats."""
        self._require_hook("refitkit_load_weights")
        more: dict[str, Any] = {"config": Config(), "open_weights": _refuse_to_open}
        self._require_none("refitkit_load_weights", source=object(), **more)
        origins = {info.name: info.origin for info in self.host.plugins()}
        if origins.get(self.plugin) == "built-in":
            return
        with TemporaryDirectory(prefix="refitkit-") as folder:
            for path in _files_of_weights(Path(folder)):
                what = f"a {path.suffix} file" if path.is_file() else "a folder of weights"
                self._require_none("refitkit_load_weights", what=what, source=path, **more)

    def test_parts_for_other_backends_are_left_to_others(self) -> None:
        """``refitkit_partition`` returns None for a backend of another plugin."""
        self._require_hook("refitkit_partition")
        arguments = _to_partition(_program(), "no such backend")
        self._require_none("refitkit_partition", "a backend of another plugin", **arguments)

    def _require_none(
        self, hook: str, what: str = "an argument of unknown type", **arguments: Any
    ) -> None:
        self._require_hook(hook)
        advice = "Return None: the host then asks the next plugin."
        try:
            result = self.host.call_one(self.plugin, hook, **arguments)
        except Exception as exc:
            found = f"it raised {type(exc).__name__} for {what}: {exc}"
            raise Breach(hook, found, advice) from exc
        if result is not None:
            found = f"it returned a {type(result).__name__} for {what}."
            raise Breach(hook, found, advice)

    def test_partitioning_leaves_the_program_alone(self) -> None:
        """``refitkit_partition`` changes neither tensors nor the graph, whichever the backend."""
        self._require_hook("refitkit_partition")
        for backend in self._backends():
            program = _program()
            before = oracles.parts_of_program(program)
            # It may need a module. Only the program matters here.
            with suppress(RefitError):
                self.host.call_one(
                    self.plugin, "refitkit_partition", **_to_partition(program, backend)
                )
            wrong = oracles.differing(oracles.parts_of_program(program), before)
            if wrong:
                found = f"for the backend {backend!r} it changed the program: "
                found += f"{oracles.quoted(wrong)}."
                advice = "Cut a copy: the program belongs to the caller."
                raise Breach("refitkit_partition", found, advice)

    def _backends(self) -> list[str]:
        """Names of the backends of all plugins: one may make parts for the backend of another."""
        found: list[Any] = []
        for info in self.host.plugins():
            hook = "refitkit_register_backends"
            if hook in info.hooks:
                with suppress(RefitError):
                    self.host.call_one(info.name, hook, register=found.append)
        return [backend.name for backend in found]

    # -- offers with modules and weights of others ---------------------------------------------

    def test_strategies_decline_what_they_do_not_know(self) -> None:
        """Strategies return no values for a plan without recipes and a source without weights."""
        module = _module()
        rows = [
            LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason="not recorded")
            for slot in module.engines["e"].slots.values()
        ]
        plan = make_plan(rows, leaves=())
        request = MapRequest(plan, module, TensorMap({}), plan.ledger)
        for strategy in self._offered("refitkit_mapping_strategies"):
            with _no_exception(f"{strategy.name}.map"):
                mapped = strategy.map(request)
            if mapped.values:
                found = f"the strategy {strategy.name!r} returned values from an empty source."
                raise Breach("MappingStrategy.map", found, "Decline such rows instead of guessing.")

    def test_transforms_leave_plain_weights_alone(self) -> None:
        """Transforms return no groups for a source that has leaves of the program, all or some."""
        plan = plan_for(_module())
        requests = [TransformRequest(plan, TensorMap(_weights()))]
        for name, value in _weights().items():
            requests.append(TransformRequest(plan, TensorMap({name: value}), partial=True))
        offered = self._offered("refitkit_weight_transforms")
        for transform, request in product(offered, requests):
            with _no_exception(f"{transform.name}.groups"):
                groups = list(transform.groups(request))
            if groups:
                names = list(groups[0].gives)
                found = f"the transform {transform.name!r} makes {names}, which the source has."
                advice = "Return no group for weights that the program reads unchanged."
                raise Breach("WeightTransform.groups", found, advice)

    def test_verifiers_refuse_or_judge(self) -> None:
        """Verifiers refuse a module in memory in ``prepare``, or return the right verdict.

        Once without inputs, and once with inputs and a torch module as the reference. The old
        weights are the new ones with the wrong sign. The module and the reference stay unchanged.
        """
        for verifier in self._offered("refitkit_verifiers"):
            self._require_verdicts(verifier, None)
            self._require_verdicts(verifier, ((torch.tensor(2.0),), {}))

    def _require_verdicts(self, verifier: Any, inputs: Any) -> None:
        module = _module({name: -value for name, value in _weights().items()})
        source, plan = TensorMap(_weights()), plan_for(module)
        values: Any = plan.values_of(plan.ledger, source)
        reference = None if inputs is None else _Reference()
        more = (inputs, reference, None, TOLERANCES)
        request = VerifyRequest(plan, module, source, values, *more)
        # A refusal is right. _no_exception has turned all other exceptions into breaches.
        with suppress(RefitError):
            for ok in (False, True):
                if ok:
                    module.engines["e"].stage(list(values.values())).commit()
                before = module.holds()
                if not ok:
                    with _no_exception(f"{verifier.name}.prepare"):
                        judge = verifier.prepare(request)
                self._require_verdict(verifier.name, judge(module), ok=ok)
                changed = [n for n, value in module.holds().items() if not value.equal(before[n])]
                if reference is not None and not reference.training:
                    changed.append("reference.training")
                if changed:
                    found = f"the verifier {verifier.name!r} changed {changed}."
                    raise Breach("Verifier.prepare", found, "Only read: the module is in use.")

    @staticmethod
    def _require_verdict(name: str, result: VerificationResult, *, ok: bool) -> None:
        if result.ok is not ok:
            weights = "the new weights" if ok else "other weights"
            found = f"{name!r} returned ok={result.ok} for a module with {weights}."
            advice = "Compare values with their signs. Refuse in prepare if it cannot be decided."
            raise Breach("Verifier.prepare", found, advice)

    def test_checks_give_problems(self) -> None:
        """``refitkit_check`` returns only ``Problem`` objects, and writes to no weights."""
        self._require_hook("refitkit_check")
        # Negative weights and a NaN, because a check may correct what it finds.
        module, new = _module(), {name: -value for name, value in _weights().items()}
        new["w"][0, 0] = float("nan")
        tensors = {"new weights": new, "the module": dict(module.engines["e"].live)}
        before = {of: oracles.snapshot(held) for of, held in tensors.items()}
        arguments = {"plan": plan_for(module), "module": module, "source": TensorMap(new)}
        none = frozenset[str]()
        more = {"partial": False, "unchanged": none, "deferred": none, "config": Config()}
        for same in (False, True):
            given = {**arguments, **more, "same_headers": same}
            for problems in self._call_hook("refitkit_check", **given):
                wrong = [problem for problem in problems if not isinstance(problem, Problem)]
                if wrong:
                    found = f"it returned {wrong[0]!r}."
                    raise Breach("refitkit_check", found, "Return refitkit.errors.Problem objects.")
        for of, held in tensors.items():
            wrong = oracles.differing(oracles.snapshot(held), before[of])
            if wrong:
                found = f"it changed {of}: {oracles.quoted(wrong)}."
                raise Breach(
                    "refitkit_check", found, "Only read: the user's tensors are not copied."
                )

    # -- notifications -------------------------------------------------------------------------

    def test_news_of_other_modules_do_no_harm(self) -> None:
        """``refitkit_event`` and ``refitkit_weights_changed`` accept modules of other plugins."""
        report = RefitReport(outcome="committed", backend="fake", source="a state_dict", version=1)
        notifications: dict[str, Mapping[str, Any]] = {
            "refitkit_event": {"event": Step("refit", "stage", "half of it")},
            "refitkit_weights_changed": {"module": _module(), "report": report},
        }
        if not any(self._has(hook) for hook in notifications):
            skip("the plugin implements no notification hook")
        for hook, arguments in notifications.items():
            if self._has(hook):
                with _no_exception(hook):
                    self._call_hook(hook, **arguments)

    def test_listeners_keep_no_modules(self) -> None:
        """After the events of an operation, the plugin does not keep its module alive."""
        self._require_hook("refitkit_event")
        gone = self._tell_of_a_load()
        for _ in range(_LOOKS):
            # Events may wait in a queue of the plugin for a moment.
            gc.collect()
            if gone() is None:
                return
            time.sleep(_BETWEEN_LOOKS)
        found = "the module of Finished.result is still alive after the operation."
        raise Breach("refitkit_event", found, "Copy what you need: keep no event and no module.")

    def _tell_of_a_load(self) -> weakref.ref[Any]:
        compiled = EngineScene(OpenEngine("e", _weights())).compiled
        of: Any = {"id": "conformance", "module": "conformance"}
        for event in (
            Started("load", **of),
            StageStarted("load", "open", **of),
            StageFinished("load", "open", 0.5, **of),
            Finished("load", compiled, **of),
        ):
            with _no_exception("refitkit_event"):
                self._call_hook("refitkit_event", event=event)
        return weakref.ref(compiled)

    # -- calling hooks -------------------------------------------------------------------------

    def _has(self, hook: str) -> bool:
        return any(hook in info.hooks for info in self.host.plugins() if info.name == self.plugin)

    def _require_hook(self, hook: str) -> None:
        if not self._has(hook):
            skip(f"the plugin does not implement {hook}")

    def _call_hook(self, hook: str, **arguments: Any) -> list[Any]:
        results: list[Any] = self.host.call_one(self.plugin, hook, **arguments)
        return results

    def _offered(self, hook: str) -> list[Any]:
        self._require_hook(hook)
        return self._offers(hook)

    def _offers(self, hook: str) -> list[Any]:
        if not self._has(hook):
            return []
        # Backends are registered through a callback; the other hooks return lists.
        if hook == "refitkit_register_backends":
            registered: list[Any] = []
            self._call_hook(hook, register=registered.append)
            return registered
        arguments = {} if hook == "refitkit_layer_types" else {"config": Config()}
        # The host returns one list for each implementation of the hook.
        return [offer for listed in self._call_hook(hook, **arguments) for offer in listed]


@contextmanager
def _no_exception(contract: str) -> Iterator[None]:
    """Raise a breach for an exception that is not a deliberate refusal of the plugin."""
    try:
        yield
    except Exception as exc:
        # The host wraps other exceptions of a hook in PluginError, which is thus not a refusal.
        if isinstance(exc, RefitError) and not isinstance(exc, PluginError):
            raise
        found = f"it raised {type(exc).__name__} for a module or weights of others: {exc}."
        raise Breach(contract, found, "Check arguments before using them.") from exc


def _refuse_to_open(weights: object) -> WeightSource:
    raise SourceError(f"No plugin can read weights from a {type(weights).__name__}.")


def _to_partition(program: ExportedProgram, backend: str) -> dict[str, Any]:
    """Arguments of ``refitkit_partition``, as for a plan without a module."""
    arguments = {"program": program, "module": None, "backend": backend}
    return {**arguments, "options": {}, "config": Config(), "tools": Tools()}


@cache
def _exported() -> ExportedProgram:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    return torch.export.export(net.eval(), (torch.ones(4, 3),))


def _program() -> ExportedProgram:
    """A program of its own, whose parameters require grad."""
    return copy.deepcopy(_exported())


def _module(weights: Mapping[str, torch.Tensor] | None = None) -> FakeModule:
    zeros = {name: torch.zeros_like(value) for name, value in _weights().items()}
    return FakeModule([OpenEngine("e", zeros if weights is None else weights)])


def _weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(1.0, 7.0).reshape(2, 3), "b": torch.ones(2)}


def _files_of_weights(folder: Path) -> list[Path]:
    """Files and a folder that the built-in plugins read."""
    inner = folder / "model"
    inner.mkdir()
    paths = [folder / "one.safetensors", inner / "model.safetensors"]
    for path in paths:
        save_file(_weights(), path)
    for path in (folder / "one.pt", folder / "one.pth", folder / "one.bin"):
        torch.save(_weights(), path)
        paths.append(path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(_weights(), "one.safetensors")}))
    return [*paths, index, inner]


class _Reference(torch.nn.Module):
    """The outputs of ``_module`` with the new weights."""

    def forward(self, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"e/{name}": value * factor for name, value in _weights().items()}
