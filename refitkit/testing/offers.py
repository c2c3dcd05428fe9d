"""The suite that every plugin can be run against: what it offers by its hooks, and to whom."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from refitkit.config import Config
from refitkit.errors import PluginError, Problem, RefitError, SourceError
from refitkit.model import LayerType, LedgerRow, RefitReport, SlotState, Step, VerificationResult
from refitkit.protocols import (
    Backend,
    MappingStrategy,
    MapRequest,
    Tools,
    TransformRequest,
    Verifier,
    VerifyRequest,
    WeightTransform,
)
from refitkit.recipe import TensorMap
from refitkit.testing.breach import Breach, skip
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import make_plan, plan_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.host import Host
    from refitkit.protocols import WeightSource

_OFFERS: dict[str, tuple[str, type]] = {
    "refitkit_mapping_strategies": ("strategy", MappingStrategy),
    "refitkit_verifiers": ("verifier", Verifier),
    "refitkit_weight_transforms": ("transform", WeightTransform),
    "refitkit_layer_types": ("layer type", LayerType),
    "refitkit_register_backends": ("backend", Backend),
}


class OfferSuite:
    """What needs no factory: names and protocols, and that foreign things are left alone.

    Attributes:
        plugin: Name of the plugin.
        host: Where it is registered.
    """

    plugin: ClassVar[str]
    host: ClassVar[Host]

    def test_offers_keep_their_protocols(self) -> None:
        """Each offer has a name, and all members of its protocol."""
        for hook, (kind, protocol) in _OFFERS.items():
            for offer in self._offers(hook):
                name = getattr(offer, "name", None)
                if not isinstance(name, str) or not name:
                    raise Breach(hook, f"{offer!r} has no name.", "Users choose offers by name.")
                if not isinstance(offer, protocol):
                    found = f"the {kind} {name!r} lacks members of {protocol.__name__}."
                    raise Breach(hook, found, "See refitkit.protocols.")

    def test_offers_are_the_same_each_time(self) -> None:
        """Asked twice, the same names in the same order."""
        for hook in _OFFERS:
            first, second = ([offer.name for offer in self._offers(hook)] for _ in range(2))
            if first != second:
                found = f"it offers {first}, and then {second}."
                raise Breach(hook, found, "Offer the same each time: it is asked at every refit.")

    # -- first hooks: what is not the plugin's is the next one's -------------------------------

    def test_foreign_targets_are_left_to_others(self) -> None:
        """``refitkit_load_module`` answers None for an object that it cannot know."""
        self._require_none("refitkit_load_module", target=object(), config=Config(), tools=Tools())

    def test_foreign_weights_are_left_to_others(self) -> None:
        """``refitkit_load_weights`` answers None for an object that it cannot know."""
        self._require_none(
            "refitkit_load_weights",
            source=object(),
            config=Config(),
            open_weights=_nothing_to_open,
        )

    def test_parts_for_other_backends_are_left_to_others(self) -> None:
        """``refitkit_partition`` answers None for a backend that is not the plugin's."""
        arguments = {"program": None, "module": None, "backend": "no such backend"}
        more = {"options": {}, "config": Config(), "tools": Tools()}
        self._require_none("refitkit_partition", **arguments, **more)

    def _require_none(self, hook: str, **arguments: Any) -> None:
        self._require_hook(hook)
        try:
            answer = self.host.call_one(self.plugin, hook, **arguments)
        except Exception as exc:
            found = f"what is not the plugin's is answered with {type(exc).__name__}: {exc}"
            raise Breach(hook, found, "Return None: the next plugin is asked.") from exc
        if answer is not None:
            found = f"what is not the plugin's is answered with a {type(answer).__name__}."
            raise Breach(hook, found, "Return None: the next plugin is asked.")

    # -- offers before things that they do not know --------------------------------------------

    def test_strategies_decline_what_they_do_not_know(self) -> None:
        """A plan without recipes, a source without weights: no values, no exception."""
        module = _module()
        rows = [
            LedgerRow(slot=slot, state=SlotState.UNMAPPED, reason="nobody saw it")
            for slot in module.engines["e"].slots.values()
        ]
        plan = make_plan(rows, leaves=())
        request = MapRequest(plan, module, TensorMap({}), plan.ledger)
        for strategy in self._offered("refitkit_mapping_strategies"):
            with _no_exception(f"{strategy.name}.map"):
                mapped = strategy.map(request)
            if mapped.values:
                found = f"the strategy {strategy.name!r} makes values of nothing."
                raise Breach("MappingStrategy.map", found, "Decline; never guess.")

    def test_transforms_leave_plain_weights_alone(self) -> None:
        """A source with what the program reads: no groups."""
        module = _module()
        request = TransformRequest(plan_for(module), TensorMap(_weights()))
        for transform in self._offered("refitkit_weight_transforms"):
            with _no_exception(f"{transform.name}.groups"):
                groups = list(transform.groups(request))
            if groups:
                found = f"the transform {transform.name!r} makes {list(groups[0].gives)} anew."
                advice = "Leave alone what a program reads as it is."
                raise Breach("WeightTransform.groups", found, advice)

    def test_verifiers_refuse_or_judge(self) -> None:
        """Of a module in memory, without inputs: a refusal in ``prepare``, or a right verdict."""
        for verifier in self._offered("refitkit_verifiers"):
            module, source = _module(), TensorMap(_weights())
            plan = plan_for(module)
            values: Any = plan.values_of(plan.ledger, source)
            request = VerifyRequest(plan, module, source, values, None, None, None, {})
            with suppress(RefitError):
                with _no_exception(f"{verifier.name}.prepare"):
                    judge = verifier.prepare(request)
                self._require_verdict(verifier.name, judge(module), ok=False)
                module.engines["e"].stage(list(values.values())).commit()
                self._require_verdict(verifier.name, judge(module), ok=True)

    @staticmethod
    def _require_verdict(name: str, result: VerificationResult, *, ok: bool) -> None:
        if result.ok is not ok:
            holds = "its new" if ok else "other"
            found = f"{name!r} says {result.ok} of a module that holds {holds} weights."
            raise Breach("Verifier.prepare", found, "Refuse in prepare what you cannot judge.")

    def test_checks_give_problems(self) -> None:
        """``refitkit_check`` gives ``Problem`` objects, or nothing."""
        self._require_hook("refitkit_check")
        module = _module()
        arguments = {"plan": plan_for(module), "module": module, "source": TensorMap(_weights())}
        none = frozenset[str]()
        more = {"partial": False, "unchanged": none, "deferred": none, "config": Config()}
        for given in self._asked("refitkit_check", **arguments, **more):
            odd = [problem for problem in given if not isinstance(problem, Problem)]
            if odd:
                found = f"it gives {odd[0]!r}."
                raise Breach("refitkit_check", found, "Give refitkit.errors.Problem.")

    # -- hooks that are only told --------------------------------------------------------------

    def test_news_of_other_modules_do_no_harm(self) -> None:
        """``refitkit_event`` and ``refitkit_weights_changed`` of a module that it does not know."""
        report = RefitReport(outcome="committed", backend="fake", source="a state_dict", version=1)
        news: dict[str, Mapping[str, Any]] = {
            "refitkit_event": {"event": Step("refit", "stage", "half of it")},
            "refitkit_weights_changed": {"module": _module(), "report": report},
        }
        if not any(self._has(hook) for hook in news):
            skip("the plugin does not listen")
        for hook, arguments in news.items():
            if self._has(hook):
                with _no_exception(hook):
                    self._asked(hook, **arguments)

    # -- asking ---------------------------------------------------------------------------------

    def _has(self, hook: str) -> bool:
        return any(hook in info.hooks for info in self.host.plugins() if info.name == self.plugin)

    def _require_hook(self, hook: str) -> None:
        if not self._has(hook):
            skip(f"the plugin does not implement {hook}")

    def _asked(self, hook: str, **arguments: Any) -> list[Any]:
        answers: list[Any] = self.host.call_one(self.plugin, hook, **arguments)
        return answers

    def _offered(self, hook: str) -> list[Any]:
        self._require_hook(hook)
        return self._offers(hook)

    def _offers(self, hook: str) -> list[Any]:
        if not self._has(hook):
            return []
        if hook == "refitkit_register_backends":
            given: list[Any] = []
            self._asked(hook, register=given.append)
            return given
        arguments = {"config": Config()} if hook == "refitkit_weight_transforms" else {}
        return [offer for listed in self._asked(hook, **arguments) for offer in listed]


@contextmanager
def _no_exception(contract: str) -> Iterator[None]:
    """Turn what is raised, and is no error of refitkit's, into a breach."""
    try:
        yield
    except Exception as exc:
        if isinstance(exc, RefitError) and not isinstance(exc, PluginError):
            raise
        found = f"what it does not know is answered with {type(exc).__name__}: {exc}."
        raise Breach(contract, found, "Look at what is given before using it.") from exc


def _nothing_to_open(weights: object) -> WeightSource:
    raise SourceError(f"No plugin can read weights from a {type(weights).__name__}.")


def _module() -> FakeModule:
    return FakeModule([OpenEngine("e", {"w": torch.zeros(2, 3), "b": torch.zeros(2)})])


def _weights() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(1.0, 7.0).reshape(2, 3), "b": torch.ones(2)}
