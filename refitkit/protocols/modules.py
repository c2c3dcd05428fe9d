"""Opened targets: compiled modules that can be called, refitted and saved.

``Backend.compile`` and the hook ``refitkit_load_module`` return an :class:`OpenedModule`. The other
protocols are optional: refitkit checks for their members, so no base class is inherited.

Several threads may call a module. A gate lets calls through until a refit commits. During the
commit, the verification and a rollback, all other calls wait ("behind the closed gate").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from refitkit.protocols.ability import Ability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from refitkit.model import SlotKey
    from refitkit.protocols.engines import Engine, StagedRefit
    from refitkit.protocols.tools import Tools

T = TypeVar("T")


class OpenedModule(Protocol, metaclass=Ability):
    """A compiled module with one or more engines."""

    @property
    def backend(self) -> str:
        """Name of the backend."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """All engines by their own names; at least one. Never changes."""

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """Data that was saved beside the engines, by name; empty for a new module."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the outputs for some inputs, in the structure that the program returns.

        Called for each call of the user, from any thread, while the gate is open. Also called from
        the hook ``refitkit_weights_changed``, behind the closed gate. The outputs belong to the
        caller: later calls and refits do not change them.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.

        Raises:
            InputMismatchError: The module was not compiled for these inputs.
        """

    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the outputs like ``run``, and leave every weight and buffer unchanged.

        Verifiers call this after the commit, behind the closed gate. Buffers that the model writes
        are restored before it returns or raises.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.

        Raises:
            InputMismatchError: The module was not compiled for these inputs.
        """

    def synchronize(self) -> None:
        """Wait until all work that earlier calls left pending on a device has ended.

        Called before each commit, after the gate has closed. If it raises, nothing is committed.
        """

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        """Write the module with its present weights.

        ``compiled.save`` calls this. Calls may run meanwhile, and no refit commits. Write to a
        temporary name beside ``path`` and rename it, so that an interrupted save leaves the old
        file.

        Args:
            path: File or folder to write.
            attachments: Data to store beside the engines, by name. ``Backend.attachments`` and
                ``attachments`` of the loaded module return the same bytes.
        """

    def reopen(self) -> OpenedModule:
        """Return a second, independent module with the same present weights.

        Called for ``refitkit.refit(..., copy=True)`` and for proofs by trial; no refit commits
        meanwhile. A refit of one module must not change the other.
        """


@runtime_checkable
class OpensStaged(Protocol, metaclass=Ability):
    """An opened module that serves its old weights until new ones take their place at once.

    A refit of it verifies the staged values before they are live, and no call waits for the commit.
    A call that runs ends on the weights that it began with. ``Engine.stage_over`` is the exception:
    it writes over live weights, behind the closed gate.

    Asked by: each refit, before it stages.
    Gain: calls never wait for a refit, and weights that fail the verification never become live.
    """

    @property
    def publishes(self) -> bool:
        """Whether the module can do so now: it has one engine, and no call writes its weights.

        If True, ``StagedRefit.commit`` and ``rollback`` are called while calls run. Each has to
        take effect by a single assignment.
        """

    def with_staged(self, staged: Mapping[str, StagedRefit]) -> OpenedModule:
        """Return a module of the same code that has staged values as its weights.

        Called before the commit, if ``publishes``. The verifier reads it and calls it; calls of
        other threads use the live weights meanwhile.

        Args:
            staged: What the engines have staged, by engine name. Empty: the present weights.
        """


@runtime_checkable
class OrdersCalls(Protocol, metaclass=Ability):
    """An opened module whose calls return before their work is done, on streams of a device.

    The device itself keeps calls and commits in order, so that no thread of the host waits for
    work. In a refit refitkit calls ``OpenedModule.synchronize`` before the gate closes, for work
    that was launched past the gate. Behind the closed gate come ``order``, the commits of all
    engines and ``committed``, then ``settle`` once the gate is open again. So
    ``StagedRefit.commit`` need not wait for its own work, but ``StagedRefit.rollback`` has to.

    Asked by: each call and each commit.
    Gain: no thread of the host waits for the device while the gate is closed.
    """

    def ordered(self, do: Callable[[], T]) -> T:
        """Return the result of a function that launches work as a call of the module does.

        Called inside the open gate, for ``compiled.run_as_call``.
        """

    def order(self) -> None:
        """Have what follows on the current streams wait for all calls so far."""

    def committed(self) -> None:
        """Have all later calls wait for what was launched on the current streams so far."""

    def settle(self) -> None:
        """Wait until the last commit has ended on the device.

        If it raises, the module is lost: it refuses all further calls.
        """


@runtime_checkable
class ServesSideBySide(Protocol, metaclass=Ability):
    """An opened module that can run several calls at once.

    Asked by: ``refitkit.load(num_models=...)``.
    Gain: several calls run at once.
    """

    def serve(self, models: int) -> None:
        """Run so many calls side by side from now on; the others wait for their turn.

        Called right after loading, for ``refitkit.load(num_models=...)``.

        Args:
            models: How many; 1 or more.

        Raises:
            ConfigError: The module cannot; says why.
        """


class SharedMemory(Protocol, metaclass=Ability):
    """Weights in memory that several processes serve from."""

    @property
    def version(self) -> int:
        """Version of the live weights. A commit of any process adds one, a rollback takes it."""

    @property
    def key(self) -> int:
        """Number that orders different memory in the same way in all processes."""

    def refit(self, do: Callable[[], T]) -> T:
        """Return the result of a function, run while no other process refits.

        Called for each refit, inside the gate, with all its stages from the first to the last.
        """


@runtime_checkable
class SharesWeights(Protocol, metaclass=Ability):
    """An opened module whose weights several processes can share.

    A commit in one process makes the new weights live in all of them. Gates close in the process
    of the refit only, so ``OpensStaged.publishes`` has to be True while weights are shared.

    If ``Tools.shared`` is set, ``refitkit_load_module`` returns a module that serves from there,
    or raises ``ConfigError``, or ``WeightMismatchError`` if that memory has other slots.

    Asked by: ``compiled.share()`` and ``refitkit.load(shared=...)``.
    Gain: processes share one set of weights, and a commit in one is a commit in all.
    """

    @property
    def shared(self) -> SharedMemory | None:
        """The memory that the module shares; None if its weights are its own."""

    def share(self, version: int) -> SharedMemory:
        """Move the present weights to memory that other processes can serve from.

        Called for ``compiled.share()``; no refit runs meanwhile, but calls may. Returns the same
        object if the weights are shared already.

        Args:
            version: Version of the present weights.

        Raises:
            ConfigError: The module cannot; says why.
        """


@runtime_checkable
class ProbesFromState(Protocol, metaclass=Ability):
    """An opened module that can be probed from another state than its present one.

    Asked by: the verifier ``outputs``, for modules whose calls write slots.
    Gain: the outputs are compared from the same state, although calls have written it since.
    """

    def probe_from(
        self,
        state: Mapping[SlotKey, torch.Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Return the outputs like ``OpenedModule.probe``, but start from the given state.

        Verifiers call this after the commit, behind the closed gate. They computed the reference
        from a copy of the state before the commit, and calls have written the state since then.

        Args:
            state: Values by ``(engine, slot)``, for slots that calls write (``Slot.mutable``).
                Each has the dtype and shape of its slot.
            args: Positional inputs.
            kwargs: Keyword inputs.

        Raises:
            InputMismatchError: The module was not compiled for these inputs.
        """


@runtime_checkable
class Rebuilds(Protocol, metaclass=Ability):
    """An opened module whose slot values can be found by converting a program again.

    Asked by: the strategy ``rebuild``, and a failed proof by trial.
    Gain: slots that no recipe knows are refitted; an error names the slots that are wrong.
    """

    def rebuilt(
        self, program: torch.export.ExportedProgram, tools: Tools
    ) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return the values that the slots would have if this program had been compiled.

        The strategy ``rebuild`` calls this before the commit. A failed proof by trial calls it too,
        to name the slots that are wrong. It does not change the module.

        Args:
            program: Program with the new weights.
            tools: Services of the pipeline.

        Returns:
            Tensors by engine name, then by slot name: the dtype of the slot, one dimension, any
            device.

        Raises:
            PlanMismatchError: The program would be compiled into other engines.
        """


@runtime_checkable
class Offline(Protocol, metaclass=Ability):
    """An opened module that cannot be called on this machine, but can be refitted.

    Asked by: verification, and the proof by trial of ``compile``.
    Gain: the proof uses ``verifier``, and errors say why the module cannot be called.
    """

    @property
    def offline(self) -> str:
        """Why it cannot be called, and what to do instead: text for errors and reports."""

    @property
    def verifier(self) -> str:
        """Name of the verifier that can check the module without a call."""


@runtime_checkable
class LowersPrecision(Protocol, metaclass=Ability):
    """An opened module that computes some dtypes in a lower precision than their own.

    Asked by: verification, for the default tolerances.
    Gain: outputs are judged by the precision in which they were computed.
    """

    @property
    def precision(self) -> Mapping[str, str]:
        """The dtype whose precision outputs have, by dtype of the output.

        TF32 has the precision of float16: ``{"float32": "float16"}``. The verifier ``outputs`` then
        uses the default tolerance of that dtype, unless the user set one.
        """
