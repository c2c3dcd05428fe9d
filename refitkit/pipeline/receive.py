"""Receive: one refit whose weights arrive in buckets, while the old weights serve.

``receive`` is ``refit.run`` with one step more: between the checks and the stage it stages each
value as soon as the entries that it follows from have arrived. Read it in this order:

- ``Part`` is one module of an update, and ``receive`` takes all of them through one transaction.
- ``ReceivingTask`` is the refit of one part. It fills the engines that can be filled gradually.
- ``Arrivals`` are the weights of one part, as a source. Nearly everything before the stage reads
  names and headers only. What reads data waits for it, and buckets before it are kept meanwhile.

The memory of an entry is free once all slots that follow from it are staged. An entry is kept until
the commit if it is not the value of a slot that can be read back and something may still read it: a
verifier, or an engine that takes all values at once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from refitkit.errors import EngineError, Problem, SourceError, WeightMismatchError, raised_as
from refitkit.model import TensorInfo
from refitkit.offered import received
from refitkit.pipeline.checks import judging_engines
from refitkit.pipeline.delta import digest_of_tensor
from refitkit.pipeline.gate import in_lock_order, inside_all
from refitkit.pipeline.module import alone
from refitkit.pipeline.refit import RefitRequest, RefitTask, each
from refitkit.pipeline.transaction import ModuleTransaction, Transaction
from refitkit.pipeline.verify import NONE, as_inputs, choose, verification
from refitkit.processes import quick_turns
from refitkit.protocols import (
    Filling,
    MadeOf,
    ShowsStaged,
    SlotValue,
    StagedRefit,
    StagesGradually,
)
from refitkit.recipe.plan import is_entry
from refitkit.recipe.reads import reads_of
from refitkit.recipe.sources import describe_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from refitkit.model import SlotKey
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.mapping import SlotMapping
    from refitkit.pipeline.module import CompiledModule
    from refitkit.pipeline.report import ReportDraft
    from refitkit.pipeline.transaction import Prepared
    from refitkit.pipeline.verify import Judge
    from refitkit.protocols import WeightSource
    from refitkit.recipe import RefitPlan


@dataclass(frozen=True)
class Part:
    """One module of an update.

    Attributes:
        compiled: The module.
        label: Name of the module in the update; empty for a single module.
        announced: Headers of its entries by name without the prefix; None if nobody has announced
            them: they are those that the module's program reads.
    """

    compiled: CompiledModule
    label: str = ""
    announced: Mapping[str, TensorInfo] | None = None

    @property
    def prefix(self) -> str:
        """What the names of its weights begin with in the update."""
        return f"{self.label}." if self.label else ""


@dataclass(frozen=True)
class Delivery:
    """How the weights of an update come.

    Attributes:
        buckets: Gives the buckets: tensors by name. It ends when all have arrived, and raises if
            the update is given up. When the next bucket is asked for, each tensor was staged or
            copied, and its memory may be used again.
        description: Description of the weights, for reports and errors.
        label: The caller's name of these weights.
        at_start: Called once no other refit of the modules runs. It may raise to give up.
        before_commit: Called once all is verified that can be. It may raise to give up.
        on_held: Called with the number of bytes that are kept, each time it changes.
    """

    buckets: Iterator[Mapping[str, torch.Tensor]]
    description: str
    label: str = ""
    at_start: Callable[[], None] = lambda: None
    before_commit: Callable[[], None] = lambda: None
    on_held: Callable[[int], None] = lambda _: None


def receive(
    context: Context, parts: Sequence[Part], delivery: Delivery, **options: object
) -> list[ReportDraft]:
    """Carry out one update of some modules, in one transaction.

    Args:
        context: Plugins and settings.
        parts: The modules.
        delivery: How the weights come.
        options: How to verify: ``inputs``, ``reference``, ``verify``.

    Returns:
        The facts for the report of each part, in their order.

    Raises:
        WeightMismatchError: Entries are missing, unknown, given twice with other values, or of
            another dtype or shape; lists them.
        RefitError: Refused or failed. Unless it is a ``ModuleLostError``, all modules answer as
            before.
    """
    gates = in_lock_order(part.compiled.gate for part in parts)
    passages = [*(gate.refit for gate in gates), *alone(part.compiled for part in parts)]
    router = _Router(delivery)
    tasks = [ReceivingTask(context, part, router, delivery, options) for part in parts]
    with quick_turns():
        return inside_all(passages, lambda: _receive(context, tasks, router, delivery))


def _receive(
    context: Context, tasks: Sequence[ReceivingTask], router: _Router, delivery: Delivery
) -> list[ReportDraft]:
    names = [task.part.label or task.compiled.name for task in tasks]
    modules: list[ModuleTransaction] = []
    try:
        delivery.at_start()
        # of all modules first: a bucket may have weights of any of them
        each(names, [task.expect for task in tasks])
        prepared = each(names, [task.prepare for task in tasks])
        modules += [
            ModuleTransaction(context, task.compiled, one, name if len(tasks) > 1 else "")
            for task, one, name in zip(tasks, prepared, names, strict=True)
        ]
        for module in modules:
            module.settle()  # an interrupt may have ended the last refit before its commit
        each(names, [task.begin for task in tasks])
        is_open = True
        while is_open:
            each(names, [task.take for task in tasks])
            is_open = router.pump()
        each(names, [task.require_complete for task in tasks])
        each(names, [module.stage for module in modules])
        each(names, [module.verify_staged for module in modules])
        delivery.before_commit()
        Transaction(modules).run()
    finally:
        for module in modules:
            module.discard()
        for task in tasks:
            task.discard()
    return [module.draft for module in modules]


# -- weights that arrive --------------------------------------------------------------------------


class _Router:
    """Gives the entries of each bucket to the part that they belong to."""

    def __init__(self, delivery: Delivery) -> None:
        self._buckets, self._on_held = delivery.buckets, delivery.on_held
        self._arrivals: list[tuple[str, Arrivals]] = []

    def add(self, prefix: str, arrivals: Arrivals) -> None:
        """Give entries with this prefix to a part."""
        self._arrivals.append((prefix, arrivals))
        self._arrivals.sort(key=lambda item: -len(item[0]))  # the longest prefix that fits

    def pump(self) -> bool:
        """Wait for the next bucket, and hand it out; return whether there was one."""
        for _, arrivals in self._arrivals:
            arrivals.copy_borrowed()
        self.tell_held()
        bucket = next(self._buckets, None)
        if bucket is None:
            return False
        problems: list[Problem] = []
        for name, tensor in bucket.items():
            for prefix, arrivals in self._arrivals:
                if name.startswith(prefix):
                    problems += arrivals.put(name.removeprefix(prefix), tensor, name)
                    break
            else:
                problems.append(Problem(name, "unexpected", hint=self._on_unknown()))
        if problems:
            raise WeightMismatchError("A bucket does not fit.", problems=problems)
        self.tell_held()
        return True

    def tell_held(self) -> None:
        """Report how many bytes are kept now."""
        self._on_held(sum(arrivals.nbytes for _, arrivals in self._arrivals))

    def _on_unknown(self) -> str:
        prefixes = ", ".join(repr(prefix) for prefix, _ in self._arrivals)
        return f"names begin with the label of a module: {prefixes}"


class Arrivals:
    """The weights of one part, as a source of which some entries have not arrived yet.

    Attributes:
        description: Description of the weights, for reports and errors.
        arrived: Names of the entries that have arrived.
        nbytes: Bytes of the entries that are kept now.
    """

    def __init__(
        self,
        description: str,
        infos: Mapping[str, TensorInfo],
        also: Mapping[str, str],
        pump: Callable[[], bool],
        *,
        with_digests: bool,
    ) -> None:
        """Expect entries.

        Args:
            description: Description of the weights.
            infos: Their headers, by name.
            also: Other names that may arrive: for a tied name the name in ``infos`` that it stands
                for, and an empty text for a tensor that no slot needs.
            pump: Waits for the next bucket; returns False if there is none.
            with_digests: Whether to note digests of the bits, and to compare entries with them that
                are read back.
        """
        self.description, self._infos, self._also = description, infos, also
        self._pump, self._with_digests = pump, with_digests
        self.arrived: set[str] = set()
        self.nbytes = 0
        self._held: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self._new: list[str] = []
        self._borrowed: set[str] = set()  # held, in memory of the sender
        self._tied = frozenset(first for first in also.values() if first)

    def names(self) -> Collection[str]:
        """Names of all entries, arrived or not."""
        return self._infos.keys()

    def info(self, fqn: str) -> TensorInfo:
        """Header of an entry.

        Raises:
            KeyError: There is no such entry.
        """
        return self._infos[fqn]

    def get(self, fqn: str) -> torch.Tensor:
        """An entry, once it has arrived; waits for it.

        Raises:
            KeyError: There is no such entry.
            SourceError: It did not arrive, or is not what it was when it arrived.
        """
        info = self._infos[fqn]
        while fqn not in self.arrived:
            if not self._pump():
                raise SourceError(f"{fqn!r} did not arrive.")
        if fqn in self._held:
            return self._held[fqn]
        if fqn not in self._readers:
            raise SourceError(f"{fqn!r} arrived, is staged, and cannot be read any more.")
        found = self._readers[fqn]().reshape(info.shape)
        if fqn in self._digests and digest_of_tensor(found) != self._digests[fqn]:
            raise SourceError(f"{fqn!r} was changed after it had arrived.")
        return found

    def put(self, fqn: str, tensor: torch.Tensor, shown: str) -> list[Problem]:
        """Take an entry, and return what is wrong with it.

        Args:
            fqn: Its name.
            tensor: Its value.
            shown: Its name in the update, for problems.
        """
        name = self._also.get(fqn, fqn)
        if not name:
            return []
        if name not in self._infos:
            hint = "it is neither announced nor one that the model has"
            return [Problem(shown, "unexpected", hint=hint)]
        wanted, found = self._infos[name], describe_tensor(tensor)
        if found.unusable:
            return [Problem(shown, "unusable", found.unusable)]
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            texts = (f"{one.dtype} {one.shape}" for one in (found, wanted))
            return [Problem(shown, "header", *texts)]
        if name in self.arrived:
            return self._again(name, tensor, shown)
        self._held[name] = tensor
        self._borrowed.add(name)
        self.nbytes += tensor.nbytes
        self.arrived.add(name)
        self._new.append(name)
        if self._with_digests or self._is_tied(name):
            self._digests[name] = digest_of_tensor(tensor)
        return []

    def _again(self, name: str, tensor: torch.Tensor, shown: str) -> list[Problem]:
        """What is wrong with a tensor that has arrived before, perhaps under a tied name."""
        if not self._is_tied(name):
            return [Problem(shown, "given twice")]
        if self._digests[name] == digest_of_tensor(tensor):
            return []
        return [Problem(shown, "tied", hint=f"it is one tensor with {name!r}, of other values")]

    def _is_tied(self, name: str) -> bool:
        return name in self._tied

    def take_new(self) -> list[str]:
        """Names of the entries that have arrived since the last time."""
        new, self._new = self._new, []
        return new

    def missing(self) -> list[str]:
        """Names of the entries that have not arrived, in order."""
        return [name for name in self._infos if name not in self.arrived]

    def free(self, fqn: str) -> None:
        """Keep the tensor of an entry no longer."""
        tensor = self._held.pop(fqn, None)
        if tensor is not None:
            self.nbytes -= tensor.nbytes

    def copy_borrowed(self) -> None:
        """Copy the entries that stay: their memory belongs to the sender, who may use it again."""
        stay = self._borrowed & self._held.keys()
        for name in stay:
            self._held[name] = self._held[name].detach().clone()
        for device in {self._held[name].device for name in stay}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._borrowed = set()

    def forget(self) -> None:
        """Drop all tensors. Else a circle of references would keep them for the collector."""
        self._held, self._readers, self.nbytes = {}, {}, 0

    def read_back(self, readers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Read entries that are not kept from where they are staged.

        Args:
            readers: Returns a tensor with the entry's elements and dtype, by its name.
        """
        self._readers.update(readers)


def _expected(part: Part, plan: RefitPlan) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Headers of the entries of a part, and the other names that may arrive; see ``Arrivals``."""
    if part.announced is not None:
        return dict(part.announced), {}
    reads = reads_of(plan)
    needed = {**reads.demands, **_checked_views(plan)}
    infos = {name: _info_of(plan, name) for name in needed}
    also = {leaf.fqn: "" for leaf in plan.data.leaves}
    also |= {tied: first for first, names in reads.demands.items() for tied in names}
    return infos, {name: first for name, first in also.items() if name not in infos}


def _checked_views(plan: RefitPlan) -> dict[str, set[str]]:
    """Entries that a state_dict has and that are views of others: they must agree with those."""
    views = reads_of(plan).views
    found = [leaf for leaf in plan.data.leaves if leaf.view is not None and leaf.persistent]
    return {leaf.fqn: {leaf.fqn} for leaf in found} if views else {}


def _info_of(plan: RefitPlan, name: str) -> TensorInfo:
    leaf = reads_of(plan).leaves[name]
    return TensorInfo(dtype=leaf.dtype, shape=leaf.shape)


# -- one module -----------------------------------------------------------------------------------


@dataclass
class _Progress:
    """What the slots of one module still wait for.

    Attributes:
        values: Values that have to be staged gradually, by slot.
        waits: Entries that have not arrived, by slot.
        users: Slots that follow from an entry, by its name.
        unstaged: Number of slots of an entry that are not staged yet, by its name.
        added: Slots whose values were staged.
    """

    values: dict[SlotKey, SlotValue] = field(default_factory=dict)
    waits: dict[SlotKey, set[str]] = field(default_factory=dict)
    users: defaultdict[str, list[SlotKey]] = field(default_factory=lambda: defaultdict(list))
    unstaged: dict[str, int] = field(default_factory=dict)
    added: set[SlotKey] = field(default_factory=set)


class ReceivingTask(RefitTask):
    """One refit to weights that arrive.

    Attributes:
        part: The module, and what is known of its weights.
    """

    def __init__(
        self,
        context: Context,
        part: Part,
        router: _Router,
        delivery: Delivery,
        options: Mapping[str, object],
    ) -> None:
        """Touch nothing yet."""
        self.part = part
        self._options = options
        self._arrivals: Arrivals | None = None
        self._router, self._delivery = router, delivery
        self._fillings: dict[str, Filling] = {}
        self._staged_refits: dict[str, StagedRefit] = {}
        self._progress = _Progress()
        self._is_complete, self._verifier = False, NONE
        self._recoverable: dict[str, SlotValue] = {}
        request = RefitRequest(weights=None, label=delivery.label, **options)  # type: ignore[arg-type]
        super().__init__(context, part.compiled, request)

    def expect(self) -> None:
        """Take entries from now on.

        Raises:
            PlanMismatchError: The module has no plan.
            ConfigError: The result cannot be verified in this way.
        """
        plan, self._verifier = self._bound_plan(), self._chosen()
        infos, also = _expected(self.part, plan)
        self._arrivals = Arrivals(
            self._delivery.description,
            infos,
            also,
            self._router.pump,
            # other verifiers than ``outputs`` may compare entries with what is staged
            with_digests=self._verifier not in {NONE, "outputs"},
        )
        self._router.add(self.part.prefix, self._arrivals)

    def _open(self) -> WeightSource:
        return self._own()

    def _chosen(self) -> str:
        """Name of the verifier; ``none`` if nothing is verified."""
        request = self._request
        verifier = choose(
            self._context.host,
            request.verify,
            self._module,
            with_inputs=as_inputs(request.inputs) is not None,
        )
        return NONE if verifier is None else verifier.name

    @property
    def _for_checks(self) -> Context:
        # before the weights have arrived, only names and headers can be checked
        if self._is_complete:
            return self._context
        return self._context.with_settings(check_finite=False)

    def _deferred(self, _mapping: SlotMapping) -> frozenset[str]:
        """All entries, as nothing has arrived yet; see ``require_complete``."""
        return frozenset(self._source.names())

    def _judge(self, plan: RefitPlan, source: WeightSource, mapping: SlotMapping) -> Judge | None:
        """A judge that prepares when it is asked: before that the weights have not arrived."""
        if self._verifier == NONE:
            return None

        def judge(module: object) -> object:
            prepared = verification(
                self._context,
                self.compiled,
                self._request,
                verb="refit",
                plan=plan,
                source=source,
                values=lambda: mapping.values,
            )
            assert prepared is not None  # noqa: S101 - there is a verifier
            return prepared(module)  # type: ignore[arg-type]

        return judge  # type: ignore[return-value]

    def prepare(self) -> Prepared:
        """Map and check the announced names and headers; see the base class."""
        prepared = super().prepare()
        mapping = prepared.draft.mapping
        if mapping is None:
            raise RuntimeError("a refit is mapped once it is prepared")
        self._mapping = mapping
        # the entries of a staged value cannot be read again, so an error names slots
        return replace(prepared, received=self._finish, name_weights=lambda: None)

    # -- staging as entries arrive -----------------------------------------------------------

    def begin(self) -> None:
        """Open a filling in each engine that can be filled gradually.

        Raises:
            EngineError: An engine failed; names it.
        """
        progress, by_engine = self._progress, defaultdict[str, list[str]](list)
        for key, value in self._mapping.values.items():
            engine = self._module.engines[key[0]]
            # values of the others are checked for finiteness once all have arrived
            if isinstance(engine, StagesGradually) and key[0] in self._judging:
                by_engine[key[0]].append(key[1])
                progress.values[key] = value
            self._note(key, value)
        for name, slots in by_engine.items():
            engine = self._module.engines[name]
            with raised_as(EngineError, f"The engine {name!r} failed to stage"):
                if isinstance(engine, StagesGradually):
                    filling: Any = engine.begin_staging(slots)
                    self._fillings[name] = received(filling, Filling, f"The engine {name!r}")  # type: ignore[type-abstract]
        self._add(key for key, waits in progress.waits.items() if not waits)

    def _note(self, key: SlotKey, value: SlotValue) -> None:
        progress = self._progress
        whole = not value.sources and not value.pinned
        names = set(self._own_names() if whole else self._given(value.sources))
        for name in names:
            progress.users[name].append(key)
            progress.unstaged[name] = progress.unstaged.get(name, 0) + 1
        if key in progress.values:
            progress.waits[key] = names - self._own().arrived
            if is_entry(value) and names == set(value.sources):
                self._recoverable[value.sources[0]] = value

    def _own(self) -> Arrivals:
        if self._arrivals is None:
            raise RuntimeError("nothing is expected before the task is prepared")
        return self._arrivals

    def _own_names(self) -> Collection[str]:
        return self._own().names()

    def _given(self, names: Iterable[str]) -> Iterable[str]:
        """Names of the arriving entries that entries after all transforms are made from."""
        source: WeightSource = self._source
        while isinstance(source, MadeOf):
            names = [one for name in names for one in source.made_from(name)]
            source = source.given
        return names

    def take(self) -> None:
        """Stage what has become complete since the last time, and free what is no longer needed.

        Raises:
            EngineError: An engine failed; names it.
            WeightMismatchError: A value does not fit its slot.
        """
        ready: list[SlotKey] = []
        new = self._own().take_new()
        for name in new:
            for key in self._progress.users.get(name, ()):
                waits = self._progress.waits.get(key)
                if waits is not None:
                    waits.discard(name)
                    if not waits:
                        ready.append(key)
        self._add(ready)
        for name in new:
            if name not in self._progress.users and not self._is_read_later:
                self._own().free(name)

    def _add(self, keys: Iterable[SlotKey]) -> None:
        progress, by_engine = self._progress, defaultdict[str, list[SlotValue]](list)
        # what arrived before ``begin`` is complete there, and is new to ``take``
        done = [key for key in dict.fromkeys(keys) if key not in progress.added]
        progress.added.update(done)
        for key in done:
            by_engine[key[0]].append(progress.values[key])
        for name, values in by_engine.items():
            with raised_as(EngineError, f"The engine {name!r} failed to stage"):
                self._fillings[name].add(values)
        for key in done:
            value = progress.values[key]
            for name in set(self._given(value.sources)):
                progress.unstaged[name] -= 1
                if not progress.unstaged[name] and self._may_free(name):
                    self._own().free(name)

    @property
    def _is_read_later(self) -> bool:
        """Whether a verifier may read entries."""
        return self._verifier != NONE

    def _may_free(self, name: str) -> bool:
        return not self._is_read_later or name in self._recoverable

    @property
    def _judging(self) -> frozenset[str]:
        """Engines that check their values where they are staged."""
        return judging_engines(self._module, overwrite=False)

    def require_complete(self) -> None:
        """Raise unless all entries have arrived, and are finite where engines do not check that.

        Raises:
            WeightMismatchError: Entries are missing, or not finite; lists them.
        """
        missing = self._own().missing()
        if missing:
            message = "The update is not complete; nothing was changed."
            hint = "send it before finish_weight_update()"
            problems = [Problem(f"{self.part.prefix}{n}", "missing", hint=hint) for n in missing]
            raise WeightMismatchError(message, problems=problems)
        self._is_complete = True
        judging = self._judging
        others = {key: v for key, v in self._mapping.values.items() if key[0] not in judging}
        if others:
            names = {name for value in others.values() for name in value.sources}
            checked = frozenset(self._source.names()) - names
            self._check_weights(self._bound_plan(), self._source, checked)

    def _finish(self) -> Mapping[str, StagedRefit]:
        """The staged refits of the engines that were filled gradually, by name."""
        for name, filling in self._fillings.items():
            with raised_as(EngineError, f"The engine {name!r} failed to stage"):
                staged: Any = filling.finish()
                self._staged_refits[name] = received(staged, StagedRefit, f"The engine {name!r}")  # type: ignore[type-abstract]
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for fqn, value in self._recoverable.items():
            refit = self._staged_refits[value.slot.engine]
            if isinstance(refit, ShowsStaged):
                readers[fqn] = partial(refit.staged, value.slot.name)
        self._own().read_back(readers)
        found, self._staged_refits, self._fillings = self._staged_refits, {}, {}
        return found

    def discard(self) -> None:
        """Drop what is staged and was not handed out."""
        staged: list[StagedRefit | Filling] = [
            *self._staged_refits.values(),
            *self._fillings.values(),
        ]
        self._staged_refits, self._fillings = {}, {}
        for one in staged:
            try:
                one.discard()
            except Exception:  # noqa: BLE001, S112 - the others must be tried; no weights changed
                continue
        self._progress, self._recoverable = _Progress(), {}
        if self._arrivals is not None:
            self._arrivals.forget()
