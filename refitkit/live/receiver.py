"""The receiver of live updates: its calls are those of vLLM's weight transfer, and two more.

Read ``WeightReceiver`` first. Each update is one refit (``pipeline/receive.py``), which runs in a
thread of its own from ``start_weight_update`` to the commit. The receiver's calls hand it buckets,
and wait until each is staged (``update.py``). So an update holds the module as any refit does:
another refit of the module waits for its end, and calls go on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from pydantic import ValidationError

from refitkit.errors import (
    ConfigError,
    PluginError,
    Problem,
    UpdateStateError,
    WeightMismatchError,
    raised_as,
)
from refitkit.live.update import Update
from refitkit.model import TensorInfo, UpdateManifest
from refitkit.offered import owned, received
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.receive import Part
from refitkit.pipeline.targets import wrong_label
from refitkit.protocols import TransportConnection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refitkit.live.update import State
    from refitkit.pipeline import Pipeline, RefitResults
    from refitkit.protocols import WeightTransport

_HOOK = "refitkit_weight_transports"
_END = object()
Modules: TypeAlias = "CompiledModule | Mapping[str, CompiledModule]"


@dataclass(frozen=True)
class ReceiverStatus:
    """What a receiver does, as plain facts.

    Attributes:
        state: ``idle``; ``staging``: an update has begun; ``committing``: it can no longer be
            aborted; ``lost``: a module refuses calls.
        live: Label of the live weights of each module, by the module's label.
        revisions: Version number of the live weights of each module.
        update: Identifier of the update that runs; empty if none does.
        version: Label that this update will bring.
        transport: Name of the open transport; empty if there is none.
        entries: Number of entries that have arrived.
        bytes: Their size in bytes.
        held_bytes: Bytes of entries that are kept now, because they are not staged yet, or are
            still needed.
        peak_held_bytes: Largest value of that in this update, or in the last one.
        last_failure: Text of the last error that ended an update; empty if none did.
    """

    state: State
    live: Mapping[str, str]
    revisions: Mapping[str, int]
    update: str = ""
    version: str = ""
    transport: str = ""
    entries: int = 0
    bytes: int = 0
    held_bytes: int = 0
    peak_held_bytes: int = 0
    last_failure: str = ""


class WeightReceiver:
    """Receives new weights for modules that serve.

    One update is ``start_weight_update``, any number of ``update_weights``, and
    ``finish_weight_update``. Each bucket is checked and staged at once, while calls go on. Nothing
    becomes live before ``finish_weight_update``: that refuses an incomplete set, verifies, and
    commits. If anything fails, the update is over and the old weights are live.

    The names of the four methods and the forms of their arguments are those of vLLM
    (``vllm/distributed/weight_transfer``), so a trainer that speaks to it can speak to this.

    Methods may be called from any thread. A call that does not fit the state is refused with an
    ``UpdateStateError``, and changes nothing.
    """

    def __init__(
        self,
        modules: Modules,
        *,
        inputs: Any = None,
        reference: Any = None,
        verify: str | None = None,
        transport: str = "stream",
        timeout: float = 600.0,
    ) -> None:
        """Receive for one module, or for several as one.

        Args:
            modules: A compiled module; or several by label. The names of the weights of a labelled
                module begin with its label and a dot in updates: ``decoder.layers.0.weight``.
            inputs: Inputs for the verifier ``outputs``, as for :func:`refitkit.refit`.
            reference: What to compare outputs with, as for :func:`refitkit.refit`.
            verify: Name of the verifier, as for :func:`refitkit.refit`.
            transport: Name of the transport if ``init_info`` names none.
            timeout: An update ends if nothing arrives for so long, in seconds: the trainer may have
                died.

        Raises:
            ConfigError: An argument is wrong.
        """
        self._modules = _labelled(modules)
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX:
            hint = f"It must be from 0 to {threading.TIMEOUT_MAX:.0f}."
            raise ConfigError(f"timeout={timeout!r} is no number of seconds.", hint=hint)
        self._pipeline = cast("Pipeline", next(iter(self._modules.values())).pipeline)
        self._options = {"inputs": inputs, "reference": reference, "verify": verify}
        self._transport, self._timeout = transport, timeout
        self._lock = threading.RLock()  # guards the fields below
        self._connection: tuple[str, TransportConnection] | None = None
        self._update: Update | None = None
        self._last_failure = ""
        self._peak = 0

    # -- the four calls of the protocol ------------------------------------------------------

    def init_weight_transfer_engine(self, request: object = None) -> None:
        """Open a transport. It stays open for all updates, until another one is opened.

        Args:
            request: ``{"init_info": {...}}``, or an object with that attribute. ``backend`` names
                the transport: ``stream``, ``disk``, or one of a plugin. The other fields are the
                transport's.

        Raises:
            UpdateStateError: An update is running.
            ConfigError: There is no such transport, or it refuses a field.
        """
        info = dict(_field(request, "init_info", {}))
        name = info.pop("backend", self._transport)
        self._require_outside("init_weight_transfer_engine")
        with self._lock:
            self._require_idle("init_weight_transfer_engine")
            transport, who = self._find(name)
            doing = f"The transport {name!r} cannot be opened"
            with raised_as(PluginError, f"{who} failed", doing=doing):
                opened: Any = transport.open(info, self._pipeline.open_weights)
            connection: TransportConnection = received(opened, TransportConnection, who)  # type: ignore[type-abstract]
            self._close()
            self._connection = (name, connection)

    def start_weight_update(
        self,
        version: str = "",
        *,
        manifest: UpdateManifest | Mapping[str, Any] | None = None,
        supersede: bool = False,
        is_checkpoint_format: bool = True,
    ) -> str:
        """Begin an update. Returns once it may receive: other refits of the modules have ended.

        Args:
            version: Label of the weights that will arrive: ``step-42``. It becomes
                ``CompiledModule.label`` with the commit.
            manifest: What will arrive. It is needed if the names are not those that the programs
                read, because transforms rename them. None: all weights of the modules, by the names
                that their programs read.
            supersede: Whether to abort an update that is running. Otherwise this call is refused.
            is_checkpoint_format: An argument of vLLM's. False, weights in the form of its kernels,
                is refused.

        Returns:
            Identifier of the update.

        Raises:
            UpdateStateError: An update is running, or a module is lost.
            ConfigError: The label or the manifest is wrong.
            WeightMismatchError: The manifest is for other models, or for other live weights.
        """
        plan = _as_manifest(manifest)
        if not is_checkpoint_format:
            raise ConfigError("is_checkpoint_format=False: weights must be as in a checkpoint.")
        label = version or (plan.version if plan else "")
        if problem := wrong_label(label):
            raise ConfigError(f"The version of an update is wrong: {problem}.")
        self._require_outside("start_weight_update")
        with self._lock:
            if self._update is not None and supersede:
                self.abort_weight_update()
            self._require_idle("start_weight_update")
            self._require_not_lost()
            if self._connection is None:
                self.init_weight_transfer_engine({})
            parts = self._parts(plan)

            def fits() -> None:
                if plan is not None:
                    self._require_fitting(plan)

            fits()  # and again once no other refit of the modules runs
            update = Update(self._pipeline, parts, label, plan, self._options, self._timeout, fits)
            self._update = update
            self._peak = 0
            update.start()
        try:
            update.wait_until_ready()
        except BaseException as exc:
            self._give_up(update, exc)
            raise
        return update.id

    def update_weights(self, request: object = None, /, **fields: Any) -> None:
        """Receive one bucket, or all buckets of one announcement, and stage them.

        Args:
            request: ``{"update_info": {...}}``, or an object with that attribute; the fields are
                the transport's.
            **fields: The fields of ``update_info`` instead.

        Raises:
            UpdateStateError: No update has begun.
            ConfigError: The transport refuses a field.
            WeightMismatchError: A tensor does not fit.
            RefitError: The update failed. Whatever the error is, the update is over, and the old
                weights are live.
        """
        info = dict(_field(request, "update_info", fields))
        update, (name, opened) = self._running("update_weights")
        with update.sending:
            try:
                for bucket in self._received(name, opened, info):
                    update.send(bucket)
            except BaseException as exc:
                self._give_up(update, exc)
                raise

    def finish_weight_update(self) -> RefitResults:
        """Verify what has arrived, and make it live: in all modules, or in none.

        Returns:
            One result for each module, in their order: reports with the pause, and ``undo``.

        Raises:
            UpdateStateError: No update has begun.
            WeightMismatchError: The update is incomplete; lists what is missing.
            VerificationError: The verdict is bad.
            RefitError: The update failed. Unless it is a ``ModuleLostError``, the old weights are
                live.
        """
        update, _ = self._running("finish_weight_update")
        with update.sending:
            try:
                result = update.finish()
            except BaseException as exc:
                self._give_up(update, exc)
                raise
            with self._lock:
                self._end(update)
            return result

    # -- beside the protocol -----------------------------------------------------------------

    def abort_weight_update(self) -> bool:
        """Give the running update up. Nothing that arrived becomes live.

        If the commit has begun, this waits for its end.

        Returns:
            Whether an update was given up: False if none was running, or it was too late.
        """
        self._require_outside("abort_weight_update")
        with self._lock:
            update = self._update
        if update is None:
            return False
        was_aborted = update.abort()
        with self._lock:
            self._end(update)
        return was_aborted

    def status(self) -> ReceiverStatus:
        """What the receiver does now. It waits for nothing."""
        update = self._update
        facts: dict[str, Any] = {} if update is None else update.facts()
        # an update that has ended by itself, because its trainer died, is over
        state: State = "idle" if update is None or update.is_over else update.state
        last_failure = self._last_failure
        if update is not None and update.is_over and not update.has_succeeded:
            last_failure = _text_of(update.error())
        # a gate counts as lost from the first commit to the verdict
        if state != "committing" and any(one.gate.lost for one in self._modules.values()):
            state = "lost"
        self._peak = max(self._peak, facts.get("peak_held_bytes", 0))
        connection = self._connection
        return ReceiverStatus(
            state=state,
            live={label: one.label for label, one in self._modules.items()},
            revisions={label: one.version for label, one in self._modules.items()},
            transport="" if connection is None else connection[0],
            last_failure=last_failure,
            **{**facts, "peak_held_bytes": self._peak},
        )

    def close(self) -> None:
        """Abort a running update and close the transport. The receiver can be used again."""
        self.abort_weight_update()
        with self._lock:
            self._close()

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection[1].close()
            except Exception:  # noqa: BLE001 - what it did is over; nothing depends on it
                return

    # -- states ------------------------------------------------------------------------------

    def _require_outside(self, call: str) -> None:
        """Raise if a hook or verifier calls the receiver from inside an update: it would hang."""
        update = self._update
        if update is not None and update.is_this_thread:
            raise UpdateStateError(f"{call}() was called from inside of the update itself.")

    def _running(self, call: str) -> tuple[Update, tuple[str, TransportConnection]]:
        self._require_outside(call)
        with self._lock:
            is_done = self._update is not None and self._update.has_succeeded
            if self._update is None or is_done or self._connection is None:
                raise UpdateStateError(
                    f"{call}() was called, and no update has begun.",
                    hint=self._on_idle(),
                )
            return self._update, self._connection

    def _on_idle(self) -> str:
        last = f" The last update failed: {self._last_failure}" if self._last_failure else ""
        return f"Call start_weight_update() first.{last}"

    def _require_idle(self, call: str) -> None:
        update = self._update
        if update is not None and update.is_over:
            self._note_failure(update, update.error())
            self._end(update)
        if self._update is not None:
            raise UpdateStateError(
                f"{call}() was called while an update is {self._update.state}.",
                hint="Finish it with finish_weight_update(), give it up with "
                "abort_weight_update(), or begin with start_weight_update(supersede=True).",
            )

    def _require_not_lost(self) -> None:
        for compiled in self._modules.values():
            compiled.gate.check()

    def _give_up(self, update: Update, exc: BaseException) -> None:
        """End an update that failed in one of the receiver's calls."""
        update.abort()
        if update.has_succeeded:
            exc.add_note("The update was complete: its weights are live.")
        with self._lock:
            if self._update is update:
                self._note_failure(update, exc)
            self._end(update)

    def _note_failure(self, update: Update, exc: BaseException) -> None:
        self._last_failure = "" if update.has_succeeded else _text_of(exc)

    def _end(self, update: Update) -> None:
        self._peak = max(self._peak, update.facts()["peak_held_bytes"])
        if self._update is update:
            self._update = None

    # -- what comes from outside -------------------------------------------------------------

    def _find(self, name: object) -> tuple[WeightTransport, str]:
        offers = self._pipeline.host.offers(_HOOK)
        if not isinstance(name, str) or name not in offers:
            hint = f"There are: {', '.join(sorted(offers))}."
            raise ConfigError(f"There is no weight transport {name!r}.", hint=hint)
        return offers[name].item, owned(_HOOK, name, offers[name].plugin)

    def _received(
        self, name: str, connection: TransportConnection, info: Mapping[str, Any]
    ) -> Iterator[Mapping[str, torch.Tensor]]:
        """The buckets of a transport, checked."""
        who = self._find(name)[1]
        doing = "The weights cannot be received"
        with raised_as(PluginError, f"{who} failed", doing=doing):
            buckets: Any = connection.receive(info)
            iterator = iter(received(buckets, Iterable, who))  # type: ignore[type-abstract]
        while True:
            with raised_as(PluginError, f"{who} failed", doing=doing):
                bucket = next(iterator, _END)
            if bucket is _END:
                return
            yield _checked_bucket(bucket, who)

    def _require_fitting(self, manifest: UpdateManifest) -> None:
        """Raise WeightMismatchError if a manifest is for other models or other live weights."""
        problems = []
        for label, wanted in manifest.models.items():
            shown, compiled = label or "the module", self._modules.get(label)
            if compiled is None:
                problems.append(Problem(shown, "no such module", hint=_labels(self._modules)))
            elif compiled.plan is None or compiled.plan.data.fingerprint.graph != wanted:
                problems.append(Problem(shown, "another model", hint="its program differs"))
        base = manifest.base_version
        for label, compiled in self._modules.items():
            if base is not None and compiled.label != base:
                found = compiled.label or "without a label"
                problems.append(Problem(label or "the module", "another base", found, base))
        if problems:
            message = "The update is not for these modules, as they are now."
            raise WeightMismatchError(message, problems=problems)

    def _parts(self, manifest: UpdateManifest | None) -> list[Part]:
        prefixes = {label: f"{label}." if label else "" for label in self._modules}
        announced: dict[str, dict[str, TensorInfo]] | None = None
        if manifest is not None and manifest.entries:
            announced = {label: {} for label in self._modules}
            problems = []
            for entry in manifest.entries:
                label = _label_of(entry.name, prefixes)
                if label is None:
                    problems.append(Problem(entry.name, "no such module"))
                    continue
                name = entry.name.removeprefix(prefixes[label])
                if name in announced[label]:
                    problems.append(Problem(entry.name, "announced twice"))
                announced[label][name] = TensorInfo(dtype=entry.dtype, shape=entry.shape)
            if problems:
                raise ConfigError("The manifest cannot be used.", problems=problems)
        return [
            Part(compiled, label, None if announced is None else announced[label])
            for label, compiled in self._modules.items()
        ]


def _text_of(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__


def _checked_bucket(bucket: object, who: str) -> Mapping[str, torch.Tensor]:
    found: Mapping[str, torch.Tensor] = received(bucket, Mapping, who)  # type: ignore[type-abstract]
    for name, tensor in found.items():
        received(name, str, f"{who}: the name of a tensor")
        received(tensor, torch.Tensor, f"{who}: the tensor {name!r}")
    return found


def _field(request: object, name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """A field of a request of vLLM's protocol, from a dict or an object."""
    found: Any = default
    if isinstance(request, Mapping):
        found = request.get(name, default)
    elif request is not None:
        found = getattr(request, name, default)
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ConfigError(f"{name} is a {kind}.", hint=f'Pass {{"{name}": {{...}}}}.')
    return found


def _as_manifest(manifest: UpdateManifest | Mapping[str, Any] | None) -> UpdateManifest | None:
    if manifest is None or isinstance(manifest, UpdateManifest):
        return manifest
    try:
        return UpdateManifest.model_validate(manifest)
    except ValidationError as exc:
        problems = [
            Problem(".".join(map(str, one["loc"])) or "manifest", one["type"], hint=one["msg"])
            for one in exc.errors()
        ]
        raise ConfigError("The manifest cannot be used.", problems=problems) from exc


def _labelled(modules: Modules) -> dict[str, CompiledModule]:
    found = dict(modules) if isinstance(modules, Mapping) else {"": modules}
    wrong = [
        Problem(repr(label), "not a module", type(one).__name__)
        for label, one in found.items()
        if not isinstance(one, CompiledModule)
    ]
    wrong += [
        Problem(repr(label), "no label", hint="a label is text, not empty")
        for label in found
        if isinstance(modules, Mapping) and (not isinstance(label, str) or not label)
    ]
    if wrong or not found:
        hint = 'Pass a compiled module, or several by label: {"decoder": compiled}.'
        raise ConfigError("A receiver needs compiled modules.", problems=wrong, hint=hint)
    if len({id(one) for one in found.values()}) < len(found):
        raise ConfigError("A module is in the receiver twice.")
    return found


def _label_of(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The label of the module that a name belongs to: the longest that fits."""
    fitting = [label for label, prefix in prefixes.items() if name.startswith(prefix)]
    return max(fitting, key=len, default=None)


def _labels(modules: Mapping[str, CompiledModule]) -> str:
    return f"there are: {', '.join(map(repr, modules))}"
