"""The suite for backends: compiling, what was compiled, planning, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.errors import ConfigError, InputMismatchError
from refitkit.files.temporary import TemporaryFolder
from refitkit.program.dtypes import dtype_of
from refitkit.protocols import Backend, Offline, ProbesFromState, Tools
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.protocols import OpenedModule

_COMPILE = "Backend.compile"
_DRAFT = "Backend.draft"
_ATTACHMENTS = {"note.txt": b"conformance"}


class BackendSuite:
    """Every contract of :class:`refitkit.protocols.Backend` and of what it compiles.

    Engines have a suite of their own. Write ``make_backend``, ``make_program``, ``inputs``,
    ``make_parts`` and ``held``. Where compiling is slow, override ``make_module`` to compile once
    and give copies.

    Attributes:
        options: Options to compile with.
        tolerance: How far outputs may be from the program's, absolute.
        tools: What the pipeline would lend.
    """

    options: Mapping[str, Any] = {}
    tolerance: float = 1e-5
    tools: Tools = Tools()

    def make_backend(self) -> Backend:
        """A new backend."""
        raise NotImplementedError("Write make_backend: it returns a new backend.")

    def make_program(self) -> ExportedProgram:
        """A small program with weights; the same values each time."""
        raise NotImplementedError("Write make_program: it returns an ExportedProgram.")

    def inputs(self) -> tuple[Any, ...]:
        """Positional inputs of the program."""
        raise NotImplementedError("Write inputs: a tuple of positional inputs.")

    def make_parts(self, program: ExportedProgram, module: Any) -> Mapping[str, Any]:
        """What the plugin's ``refitkit_partition`` makes of the program."""
        raise NotImplementedError("Write make_parts: what refitkit_partition makes.")

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        """What all engines of a module hold, by any names, *found without their code*."""
        raise NotImplementedError("Write held: what the engines of a module hold.")

    def make_module(self) -> OpenedModule:
        """A module of its own, compiled from ``make_program()``."""
        return self.make_backend().compile(self.make_program(), self.options, self.tools)

    # -- compiling --------------------------------------------------------------------------

    def test_it_has_a_name(self) -> None:
        """The same each time: users write it in ``backend=``."""
        one: Any = self.make_backend()
        if not isinstance(one, Backend):
            found = f"{type(one).__name__} lacks members."
            raise Breach("Backend", found, "Give it all members of refitkit.protocols.Backend.")
        names = {one.name, one.name, self.make_backend().name}
        if len(names) > 1 or not isinstance(one.name, str) or not one.name:
            raise Breach("Backend.name", f"it is {names!r}.", "Give one name, always.")

    def test_unknown_options_are_refused(self) -> None:
        """A typo in an option is a ``ConfigError``, not something that does nothing."""
        options = {**self.options, "no_such_option_of_any_backend": 1}
        try:
            self.make_backend().compile(self.make_program(), options, self.tools)
        except ConfigError:
            return
        except Exception as exc:
            found = f"an unknown option is answered with {type(exc).__name__}: {exc}."
            raise Breach(_COMPILE, found, "Raise ConfigError, and name the option.") from exc
        raise Breach(_COMPILE, "an unknown option is accepted.", "Raise ConfigError.")

    def test_compiling_leaves_the_program_alone(self) -> None:
        """Its tensors and its graph are as before."""
        program = self.make_program()
        before, code = oracles.snapshot(program.state_dict), program.graph_module.code
        self.make_backend().compile(program, self.options, self.tools)
        wrong = oracles.differing(oracles.snapshot(program.state_dict), before)
        if wrong or program.graph_module.code != code:
            found = f"it changed the program: {oracles.shown(wrong) or 'its graph'}."
            raise Breach(_COMPILE, found, "Compile a copy: the program is the caller's.")

    # -- what was compiled ------------------------------------------------------------------

    def test_the_module_is_of_the_backend(self) -> None:
        """It has the backend's name, and at least one engine, under the engine's own name."""
        module, backend = self.make_module(), self.make_backend()
        if module.backend != backend.name:
            found = f"it is {module.backend!r}, and the backend is {backend.name!r}."
            raise Breach("OpenedModule.backend", found, "Give the backend's name.")
        wrong = [name for name, engine in module.engines.items() if engine.name != name]
        if wrong or not module.engines:
            found = f"engines stand under other names: {wrong}, of {list(module.engines)}."
            raise Breach("OpenedModule.engines", found, "Give engines by their own names.")

    def test_it_answers_like_the_program(self) -> None:
        """``run`` and ``probe`` give the program's outputs, within the tolerance."""
        module = self._callable_module()
        with torch.no_grad():
            wanted = self.make_program().module()(*self.inputs())
        for call in ("probe", "run"):  # a call may change buffers
            found = getattr(module, call)(self.inputs(), {})
            if not self._is_close(found, wanted):
                text = "outputs are not the program's."
                advice = "Give the outputs of the program, in its structure."
                raise Breach(f"OpenedModule.{call}", text, advice)

    def _is_close(self, found: Any, wanted: Any) -> bool:
        mine, spec = pytree.tree_flatten(found)
        theirs, other = pytree.tree_flatten(wanted)
        return spec == other and all(
            a.shape == b.shape
            and a.dtype == b.dtype
            and bool(((a.double() - b.double()).abs() <= self.tolerance).all())
            for a, b in zip(mine, theirs, strict=True)
        )

    def test_wrong_inputs_are_refused(self) -> None:
        """Inputs of another shape: an ``InputMismatchError``, and the module is unharmed."""
        module = self._callable_module()
        wrong = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.cat([t, t]).unsqueeze(0), self.inputs()
        )
        try:
            module.run(wrong, {})
        except InputMismatchError:
            return
        except Exception as exc:
            found = f"inputs of another shape are answered with {type(exc).__name__}: {exc}."
            raise Breach("OpenedModule.run", found, "Raise InputMismatchError.") from exc
        found = "inputs of another shape are accepted."
        raise Breach("OpenedModule.run", found, "Check inputs: engines read past them.")

    def test_probing_changes_nothing(self) -> None:
        """After ``probe`` every weight and buffer is as before, and after ``probe_from``."""
        module = self._callable_module()
        before = oracles.snapshot(self.held(module))
        module.probe(self.inputs(), {})
        self._require_held(module, before, "OpenedModule.probe")
        if isinstance(module, ProbesFromState):
            slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
            # integers may be indices: no value but the present one is sure to be a good one
            written = [s for s in slots if s.mutable and dtype_of(s.dtype).is_floating_point]
            values = oracles.random_values(written, 1)
            state = {slot.key: values[slot.name] for slot in written}
            module.probe_from(state, self.inputs(), {})
            self._require_held(module, before, "ProbesFromState.probe_from")

    def _require_held(self, module: OpenedModule, before: Any, contract: str) -> None:
        wrong = oracles.differing(oracles.snapshot(self.held(module)), before)
        if wrong:
            found = f"it changed {oracles.shown(wrong)}."
            raise Breach(contract, found, "Put buffers back that the model writes to.")

    def test_a_second_module_is_independent(self) -> None:
        """``reopen`` has the present weights; refitting it leaves the first alone."""
        module = self.make_module()
        before = oracles.snapshot(self.held(module))
        second = module.reopen()
        wrong = oracles.differing(oracles.snapshot(self.held(second)), before)
        if wrong:
            found = f"the second has other weights: {oracles.shown(wrong)}."
            raise Breach("OpenedModule.reopen", found, "Bring the present weights along.")
        for engine in second.engines.values():
            values = oracles.random_values(engine.slots.values(), 1)
            engine.stage(oracles.slot_values(engine.slots, values)).commit()
        wrong = oracles.differing(oracles.snapshot(self.held(module)), before)
        if wrong:
            found = f"a refit of the second changed the first: {oracles.shown(wrong)}."
            raise Breach("OpenedModule.reopen", found, "Share nothing that a refit writes.")

    # -- planning ---------------------------------------------------------------------------

    def test_every_slot_is_planned_once(self) -> None:
        """``draft`` gives one row for each slot of each engine, with the engine's own slot."""
        module, program = self.make_module(), self.make_program()
        draft = self.make_backend().draft(self.make_parts(program, module), module, self.tools)
        rows = [row.slot.key for row in draft.rows]
        slots = {slot.key: slot for e in module.engines.values() for slot in e.slots.values()}
        wrong = sorted("/".join(key) for key in {*rows, *slots} if rows.count(key) != 1)
        wrong += ["/".join(key) for key in rows if key not in slots]
        if wrong:
            found = f"not planned exactly once: {oracles.shown(wrong)}."
            raise Breach(_DRAFT, found, "Give one row for every slot, unmapped ones included.")

    def test_planning_leaves_the_program_alone(self) -> None:
        """Its tensors are as before."""
        module, program = self.make_module(), self.make_program()
        before = oracles.snapshot(program.state_dict)
        self.make_backend().draft(self.make_parts(program, module), module, self.tools)
        wrong = oracles.differing(oracles.snapshot(program.state_dict), before)
        if wrong:
            found = f"it changed the program: {oracles.shown(wrong)}."
            raise Breach(_DRAFT, found, "Plan on a copy: the program is the caller's.")

    # -- saving -----------------------------------------------------------------------------

    def test_what_is_saved_is_told(self) -> None:
        """``describe`` knows the file; ``attachments`` gives back what was saved beside it."""
        module, backend = self.make_module(), self.make_backend()
        with TemporaryFolder() as folder:
            path = folder.path / "saved"
            module.save(path, _ATTACHMENTS)
            if backend.describe(path) is None:
                advice = "Know what save has written."
                raise Breach("Backend.describe", "it does not know its own file.", advice)
            found: Any = backend.attachments(path)
            if dict(found) != _ATTACHMENTS:
                text = f"saved with {sorted(_ATTACHMENTS)}, it gives {sorted(found)}."
                raise Breach("Backend.attachments", text, "Give what was saved, byte for byte.")

    def test_foreign_files_are_not_its_own(self) -> None:
        """Of another's file ``describe`` gives None, and ``attachments`` nothing."""
        backend = self.make_backend()
        with TemporaryFolder() as folder:
            path = folder.path / "foreign"
            path.write_bytes(b"something else")
            told: Any = backend.describe(path)
            if told is not None or dict(backend.attachments(path)):
                found = f"of a file of no backend it says {told!r}."
                raise Breach("Backend.describe", found, "Give None for what is not yours.")

    def _callable_module(self) -> OpenedModule:
        module = self.make_module()
        if isinstance(module, Offline):
            skip(f"the module cannot be called here: {module.offline}")
        return module
