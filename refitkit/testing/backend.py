"""The suite for backends: compiling, the compiled module, planning, saving."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from refitkit.errors import ConfigError, InputMismatchError, RefitError
from refitkit.files.temporary import TemporaryFolder
from refitkit.protocols import (
    Backend,
    HoldsValues,
    Offline,
    PlanDraft,
    ProbesFromState,
    SteadyValues,
    Tools,
)
from refitkit.testing import oracles
from refitkit.testing.breach import Breach, skip
from refitkit.testing.scenes import drafted_values, open_with_plugins

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from refitkit.protocols import OpenedModule

_COMPILE = "Backend.compile"
_DRAFT = "Backend.draft"
_SAVE = "OpenedModule.save"
_ATTACHMENTS = {"note.txt": bytes(range(256)), "empty": b""}


class BackendSuite:
    """Every contract of :class:`refitkit.protocols.Backend` and of the modules that it compiles.

    Write ``make_backend``, ``make_program``, ``inputs``, ``make_parts`` and ``held``. If compiling
    is slow, override ``make_module`` to compile once and return copies. Engines have a suite of
    their own.

    Attributes:
        options: Options to compile with.
        tolerance: Largest absolute difference between outputs of the module and the program.
        tools: Tools that the pipeline would pass.
    """

    options: Mapping[str, Any] = {}
    tolerance: float = 1e-5
    tools: Tools = Tools()

    def make_backend(self) -> Backend:
        """A new backend."""
        raise NotImplementedError("Write make_backend: it returns a new backend.")

    def make_program(self) -> ExportedProgram:
        """A small program with weights; equal values on each call."""
        raise NotImplementedError("Write make_program: it returns an ExportedProgram.")

    def inputs(self) -> tuple[Any, ...]:
        """Positional inputs of the program."""
        raise NotImplementedError("Write inputs: a tuple of positional inputs.")

    def make_parts(self, program: ExportedProgram, module: Any) -> Mapping[str, Any]:
        """The result of the plugin's ``refitkit_partition`` for the program."""
        raise NotImplementedError("Write make_parts: it returns what refitkit_partition returns.")

    def held(self, module: Any) -> Mapping[str, torch.Tensor]:
        """The live weights of all engines, by any unique names, *read without their code*."""
        raise NotImplementedError("Write held: it reads the live weights past the engines.")

    def make_module(self) -> OpenedModule:
        """A new module that is compiled from ``make_program()``."""
        return self.make_backend().compile(self.make_program(), self.options, self.tools)

    def open_saved(self, path: Path) -> OpenedModule | None:
        """The module that ``refitkit_load_module`` of the plugin returns for a saved file.

        By default all installed plugins are asked. Write it if yours has no entry point; None skips
        the check.
        """
        return open_with_plugins(path)

    # -- compiling --------------------------------------------------------------------------

    def test_it_has_a_name(self) -> None:
        """``name`` is a constant text, because users write it in ``backend=``."""
        one: Any = self.make_backend()
        if not isinstance(one, Backend):
            found = f"{type(one).__name__} lacks members."
            advice = "Implement all members of refitkit.protocols.Backend."
            raise Breach("Backend", found, advice)
        # Read it twice: a property may change.
        names = {one.name, one.name, self.make_backend().name}
        if len(names) > 1 or not isinstance(one.name, str) or not one.name:
            raise Breach("Backend.name", f"it returned {names!r}.", "Return one constant name.")

    def test_unknown_options_are_refused(self) -> None:
        """An unknown option raises ``ConfigError``, so that typos do not go unnoticed."""
        options = {**self.options, "no_such_option_of_any_backend": 1}
        try:
            self.make_backend().compile(self.make_program(), options, self.tools)
        except ConfigError:
            return
        except Exception as exc:
            found = f"an unknown option raised {type(exc).__name__}: {exc}."
            raise Breach(_COMPILE, found, "Raise ConfigError, and name the option.") from exc
        raise Breach(_COMPILE, "an unknown option was accepted.", "Raise ConfigError.")

    def test_compiling_leaves_the_program_alone(self) -> None:
        """``compile`` changes neither the tensors nor the graph, and the module shares no memory.

        So a refit does not change the program, and writes to the program do not change the module.
        """
        # Compilers may fold constants or rewrite the graph in place.
        program = self.make_program()
        before = oracles.parts_of_program(program)
        module = self.make_backend().compile(program, self.options, self.tools)
        advice = "Compile a copy: the program belongs to the caller."
        self._require_same_program(program, before, _COMPILE, "it changed the program", advice)
        live = oracles.snapshot(self.held(module))
        with _other_weights(program):
            wrong = oracles.differing(oracles.snapshot(self.held(module)), live)
        if wrong:
            found = f"writes to the program changed the module: {oracles.quoted(wrong)}."
            raise Breach(_COMPILE, found, "Copy all weights: users train on with theirs.")
        _refit_with_random_values(module)
        what = "a refit of the module changed the program"
        self._require_same_program(program, before, _COMPILE, what, advice)

    @staticmethod
    def _require_same_program(
        program: ExportedProgram, before: Any, contract: str, what: str, advice: str
    ) -> None:
        wrong = oracles.differing(oracles.parts_of_program(program), before)
        if wrong:
            raise Breach(contract, f"{what}: {oracles.quoted(wrong)}.", advice)

    def test_each_program_is_compiled_with_its_own_weights(self) -> None:
        """A program whose weights differ in their last elements alone is another program."""
        backend, program = self.make_backend(), self.make_program()
        module = backend.compile(program, self.options, self.tools)
        _require_callable(module)
        with _other_weights(program, last=True):
            module = backend.compile(program, self.options, self.tools)
            with torch.no_grad():
                wanted = program.module()(*self.inputs())
            if not self._is_close(module.probe(self.inputs(), {}), wanted, scaled=True):
                found = "a program that is compiled after one with other weights answers otherwise."
                advice = "Compile anew, or compare all bits of the weights: a backend keeps no "
                advice += "state of a single module."
                raise Breach(_COMPILE, found, advice)

    # -- the compiled module ----------------------------------------------------------------

    def test_the_module_is_of_the_backend(self) -> None:
        """The module has the backend's name, and engines under their own names."""
        module, backend = self.make_module(), self.make_backend()
        if module.backend != backend.name:
            found = f"it is {module.backend!r}, but the backend is {backend.name!r}."
            raise Breach("OpenedModule.backend", found, "Return the name of the backend.")
        if not module.engines:
            raise Breach("OpenedModule.engines", "it is empty.", "Return at least one engine.")
        wrong = [name for name, engine in module.engines.items() if engine.name != name]
        if wrong:
            found = f"the keys {wrong} are not the names of their engines."
            raise Breach("OpenedModule.engines", found, "Return engines by their own names.")

    def test_it_answers_like_the_program(self) -> None:
        """``run`` and ``probe`` return the program's outputs, within the tolerance.

        Outputs of different calls share no memory.
        """
        module = self._callable_module()
        # A program of its own: calls may change the program's buffers.
        with torch.no_grad():
            wanted = self.make_program().module()(*self.inputs())
        for call in ("probe", "run"):  # probe first: run may change buffers
            found = getattr(module, call)(self.inputs(), {})
            if not self._is_close(found, wanted):
                text = "outputs differ from the program's."
                advice = "Return the outputs of the program, in the same structure."
                raise Breach(f"OpenedModule.{call}", text, advice)
            self._require_own_outputs(module, call)

    def _require_own_outputs(self, module: OpenedModule, call: str) -> None:
        # Keep all inputs and outputs alive, so that no memory is used again. Inputs are copied,
        # because a program may return them.
        inputs = [pytree.tree_map_only(torch.Tensor, torch.clone, self.inputs()) for _ in range(3)]
        answers = [pytree.tree_leaves(getattr(module, call)(args, {})) for args in inputs]
        for one, other in combinations(answers, 2):
            if any(oracles.overlap(a, b) for a, b in product(one, other)):
                found = "outputs of two calls share memory: a later call changes earlier outputs."
                advice = "Copy the outputs, or allocate them in each call."
                raise Breach(f"OpenedModule.{call}", found, advice)
        if any(isinstance(a, torch.Tensor) and a.is_inference() for a in answers[0]):
            found = "outputs are inference tensors, which callers cannot write to."
            raise Breach(f"OpenedModule.{call}", found, "Use torch.no_grad instead.")

    def _is_close(self, found: Any, wanted: Any, *, scaled: bool = False) -> bool:
        """Whether outputs are equal; ``scaled``: within a tolerance relative to the largest."""
        found_leaves, found_structure = pytree.tree_flatten(found)
        wanted_leaves, wanted_structure = pytree.tree_flatten(wanted)
        return found_structure == wanted_structure and all(
            a.shape == b.shape and a.dtype == b.dtype and self._is_near(a, b, scaled=scaled)
            for a, b in zip(found_leaves, wanted_leaves, strict=True)
        )

    def _is_near(self, found: torch.Tensor, wanted: torch.Tensor, *, scaled: bool) -> bool:
        a, b = found.cpu().double(), wanted.cpu().double()
        size = float(b.abs().nan_to_num(0.0, 0.0).max()) if scaled and b.numel() else 1.0
        limit = self.tolerance * max(size, 1.0)
        return torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=scaled)

    def test_wrong_inputs_are_refused(self) -> None:
        """Inputs of another shape, and of another dtype, raise ``InputMismatchError``."""
        module = self._callable_module()
        for what, wrong, why in self._wrong_inputs():
            try:
                module.run(wrong, {})
            except InputMismatchError:
                continue
            except Exception as exc:
                found = f"{what} raised {type(exc).__name__}: {exc}."
                raise Breach("OpenedModule.run", found, "Raise InputMismatchError.") from exc
            raise Breach("OpenedModule.run", f"{what} were accepted.", f"Check inputs: {why}.")

    def _wrong_inputs(self) -> Iterator[tuple[str, Any, str]]:
        """Inputs to refuse: a description, the inputs, and the reason."""
        # Change both the rank and the size, so that no broadcasting can hide it.
        wrong = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.cat([t, t]).unsqueeze(0), self.inputs()
        )
        yield "inputs of another shape", wrong, "engines may read past their end"
        leaves, structure = pytree.tree_flatten(self.inputs())
        for number, leaf in enumerate(leaves):
            for other in oracles.other_dtypes(leaf) if isinstance(leaf, torch.Tensor) else ():
                one = [*leaves[:number], other, *leaves[number + 1 :]]
                what = f"inputs of another dtype ({other.dtype} for {leaf.dtype})"
                why = "engines take the bytes for those of their own dtype"
                yield what, pytree.tree_unflatten(one, structure), why

    def test_probing_changes_nothing(self) -> None:
        """``probe`` and ``probe_from`` leave every weight and buffer as it was."""
        module = self._callable_module()
        before = oracles.snapshot(self.held(module))
        module.probe(self.inputs(), {})
        self._require_unchanged(module, before, "OpenedModule.probe")
        if isinstance(module, ProbesFromState):
            slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
            # Integers may be indices, for which only the current value is known to be valid.
            written = [
                s for s in slots if s.mutable and oracles.dtype_of(s.dtype).is_floating_point
            ]
            values = oracles.random_values(written, 1)
            state = {slot.key: values[slot.name] for slot in written}
            module.probe_from(state, self.inputs(), {})
            self._require_unchanged(module, before, "ProbesFromState.probe_from")

    def _require_unchanged(self, module: OpenedModule, before: Any, contract: str) -> None:
        wrong = oracles.differing(oracles.snapshot(self.held(module)), before)
        if wrong:
            found = f"it changed {oracles.quoted(wrong)}."
            raise Breach(contract, found, "Restore the buffers that the model writes to.")

    def test_a_second_module_is_independent(self) -> None:
        """``reopen`` returns a module with equal weights, whose refits leave the first alone."""
        module = self.make_module()
        before = oracles.snapshot(self.held(module))
        second = module.reopen()
        wrong = oracles.differing(oracles.snapshot(self.held(second)), before)
        if wrong:
            found = f"the second module has other weights: {oracles.quoted(wrong)}."
            raise Breach("OpenedModule.reopen", found, "Copy the live weights.")
        # Commit in every engine of the second module, then look at the first.
        _refit_with_random_values(second)
        wrong = oracles.differing(oracles.snapshot(self.held(module)), before)
        if wrong:
            found = f"a refit of the second module changed the first: {oracles.quoted(wrong)}."
            raise Breach("OpenedModule.reopen", found, "Share no memory that a refit writes.")

    # -- planning ---------------------------------------------------------------------------

    def test_every_slot_is_planned_once(self) -> None:
        """``draft`` returns exactly one row for each slot of each engine."""
        module, program = self.make_module(), self.make_program()
        draft = self._drafted(program, module)
        rows = [row.slot.key for row in draft.rows]
        slots = {slot.key: slot for e in module.engines.values() for slot in e.slots.values()}
        wrong = sorted("/".join(key) for key in {*rows, *slots} if rows.count(key) != 1)
        wrong += ["/".join(key) for key in rows if key not in slots]
        if wrong:
            found = f"it did not plan {oracles.quoted(wrong)} exactly once."
            raise Breach(_DRAFT, found, "Return one row for every slot, also for unmapped ones.")

    def test_planning_leaves_the_program_alone(self) -> None:
        """``refitkit_partition`` and ``draft`` change neither tensors nor the graph."""
        module, program = self.make_module(), self.make_program()
        before = oracles.parts_of_program(program)
        parts, what = self.make_parts(program, module), "it changed the program"
        advice = "Plan on a copy: the program belongs to the caller."
        self._require_same_program(program, before, "refitkit_partition", what, advice)
        self.make_backend().draft(parts, module, self.tools)
        self._require_same_program(program, before, _DRAFT, what, advice)

    def test_rows_name_weights_of_the_program(self) -> None:
        """Rows of ``draft`` name sources by the FQNs of the program's weights and buffers."""
        module, program = self.make_module(), self.make_program()
        draft = self._drafted(program, module)
        names = {*program.state_dict, *program.constants, *draft.pinned}
        for row in draft.rows:
            unknown = [name for name in row.sources if name not in names]
            if unknown:
                found = f"the row of {'/'.join(row.slot.key)!r} names {oracles.quoted(unknown)}, "
                found += "which the program does not have."
                advice = "Use the FQNs of program.state_dict: sources have weights by these names."
                raise Breach(_DRAFT, found, advice)

    def test_a_refit_by_the_plan_answers_like_the_program(self) -> None:
        """A refit with the values of the drafted rows answers like the program with new weights."""
        module = self._callable_module()
        draft, program = self._drafted(self.make_program(), module), self.make_program()
        with _other_weights(program):
            self._require_refit_like(module, draft, program)

    def _require_refit_like(
        self, module: OpenedModule, draft: PlanDraft, program: ExportedProgram
    ) -> None:
        values = drafted_values(draft, program.state_dict)
        if isinstance(values, str):
            skip(f"the drafted rows alone do not give every value: {values}")
        for name, engine in module.engines.items():
            mine = SteadyValues(value for (of, _), value in values.items() if of == name)
            engine.stage(mine).commit()
        with torch.no_grad():
            wanted = program.module()(*self.inputs())
        if not self._is_close(module.probe(self.inputs(), {}), wanted, scaled=True):
            found = "after a refit with the values of its rows, outputs differ from those of the "
            found += "program with the same weights."
            advice = "Give each slot the weight that the compiled code reads there: slots of equal "
            advice += "shape may be crossed, here or in the engine."
            raise Breach(_DRAFT, found, advice)

    def test_drafted_values_are_those_of_the_parts(self) -> None:
        """Drafted rows give the values that parts of a program with other weights hold."""
        module, program = self.make_module(), self.make_program()
        with _other_weights(program):
            self._require_values_of_parts(module, program)

    def _require_values_of_parts(self, module: OpenedModule, program: ExportedProgram) -> None:
        draft = self._drafted(program, module)
        part = next(iter(self.make_parts(program, module).values()))
        if not isinstance(part, HoldsValues):
            skip("the parts hold no values")
        values = drafted_values(draft, program.state_dict)
        if isinstance(values, str):
            skip(f"the drafted rows alone do not give every value: {values}")
        held = {
            (of, slot): one for of, slots in part.values().items() for slot, one in slots.items()
        }
        drafted = {"/".join(key): oracles.bits(value.load()) for key, value in values.items()}
        wanted = {"/".join(key): oracles.bits(value) for key, value in held.items()}
        wrong = oracles.differing(drafted, wanted)
        if wrong:
            found = "with other weights, its rows and HoldsValues.values of the parts give other "
            found += f"bits for {oracles.quoted(wrong)}."
            advice = "Give each slot the weight that its engine would get: slots may be crossed."
            raise Breach(_DRAFT, found, advice)

    def _drafted(self, program: ExportedProgram, module: OpenedModule) -> PlanDraft:
        return self.make_backend().draft(self.make_parts(program, module), module, self.tools)

    # -- saving -----------------------------------------------------------------------------

    def test_a_saved_module_is_opened_as_it_was(self) -> None:
        """A saved module that is opened again has the same weights, answers and attachments.

        Also if a refitted module is saved over the file that was opened before.
        """
        module = self.make_module()
        with TemporaryFolder() as folder:
            path = folder.path / "saved"
            self._require_saved(module, path, "a new module", answers=True)
            _refit_with_random_values(module)
            slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
            # Random integers may not be valid indices, so the model may not accept them.
            answers = all(oracles.dtype_of(slot.dtype).is_floating_point for slot in slots)
            self._require_saved(module, path, "a refitted module", answers=answers)

    def _require_saved(
        self, module: OpenedModule, path: Path, which: str, *, answers: bool
    ) -> None:
        module.save(path, _ATTACHMENTS)
        try:
            opened = self.open_saved(path)
        except RefitError as exc:
            found = f"the file of {which} cannot be opened: {exc.message}"
            raise Breach(_SAVE, found, "Write what refitkit_load_module opens.") from exc
        if opened is None:
            skip("open_saved() returned None: no installed plugin opens the saved file")
        wrong = oracles.differing(
            oracles.snapshot(self.held(opened)), oracles.snapshot(self.held(module))
        )
        if wrong:
            found = f"{which} was saved, and opened with other weights: {oracles.quoted(wrong)}."
            advice = "Save the live weights, not those of the compilation, and read the file anew "
            advice += "each time."
            raise Breach(_SAVE, found, advice)
        if dict(opened.attachments) != _ATTACHMENTS:
            found = f"a file saved with {sorted(_ATTACHMENTS)} opened with "
            found += f"{sorted(opened.attachments)}, or other contents."
            raise Breach("OpenedModule.attachments", found, "Read what save has written.")
        if answers and not isinstance(opened, Offline):
            found_, wanted = (one.probe(self.inputs(), {}) for one in (opened, module))
            if not self._is_close(found_, wanted, scaled=True):
                found = f"the file of {which} was opened, and answers otherwise."
                raise Breach(_SAVE, found, "Save all that answers depend on.")

    def test_saving_leaves_the_old_file_whole(self) -> None:
        """``save`` over a file replaces it: whoever has the old file open reads its old bytes.

        A save that fails or is killed half-way then leaves the old file.
        """
        module = self.make_module()
        with TemporaryFolder() as folder, ExitStack() as stack:
            path = folder.path / "saved"
            module.save(path, _ATTACHMENTS)
            files = [file for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
            handles = {file: stack.enter_context(file.open("rb")) for file in files}
            before = {file: file.read_bytes() for file in files}
            # Other weights and attachments: equal bytes would hide the writes.
            _refit_with_random_values(module)
            module.save(path, {})
            wrong = [file.name for file in files if handles[file].read() != before[file]]
            if wrong:
                found = f"it wrote into the old file that it replaces: {oracles.quoted(wrong)}."
                advice = "Write to a temporary name beside it, and rename it when it is complete "
                advice += "(refitkit.files.replacing)."
                raise Breach(_SAVE, found, advice)

    def test_what_is_saved_is_told(self) -> None:
        """``describe`` knows a saved file, and ``attachments`` returns its attachments."""
        module, backend = self.make_module(), self.make_backend()
        with TemporaryFolder() as folder:
            path = folder.path / "saved"
            module.save(path, _ATTACHMENTS)
            if backend.describe(path) is None:
                found = "it returned None for a file of this backend."
                raise Breach("Backend.describe", found, "Describe files that save has written.")
            attached: Any = backend.attachments(path)
            if dict(attached) != _ATTACHMENTS:
                found = f"a file saved with {sorted(_ATTACHMENTS)} returned {sorted(attached)}"
                found += ", or other contents."
                advice = "Return the attachments byte for byte."
                raise Breach("Backend.attachments", found, advice)

    def test_foreign_files_are_not_its_own(self) -> None:
        """For a file of another format ``describe`` is None, and ``attachments`` is empty."""
        backend = self.make_backend()
        with TemporaryFolder() as folder:
            path = folder.path / "foreign"
            path.write_bytes(b"something else")
            description: Any = backend.describe(path)
            if description is not None or dict(backend.attachments(path)):
                found = f"a file of no backend returned {description!r}, or attachments."
                raise Breach("Backend.describe", found, "Return None for files of other formats.")

    def _callable_module(self) -> OpenedModule:
        module = self.make_module()
        _require_callable(module)
        return module


def _require_callable(module: OpenedModule) -> None:
    if isinstance(module, Offline):
        skip(f"the module cannot be called on this machine: {module.offline}")


def _refit_with_random_values(module: OpenedModule) -> None:
    for engine in module.engines.values():
        values = oracles.random_values(engine.slots.values(), 1)
        engine.stage(oracles.slot_values(engine.slots, values)).commit()


@contextmanager
def _other_weights(program: ExportedProgram, *, last: bool = False) -> Iterator[None]:
    """Other floats in a program, the same in tied tensors; integers may be indices.

    The old values return at the end, because the author's program may be the same object each time.

    Args:
        program: Program to write to.
        last: Whether only the last element of each tensor is another one.
    """
    generator = torch.Generator().manual_seed(1)
    floats = {t.data_ptr(): t for t in program.state_dict.values() if t.is_floating_point()}
    before = {key: tensor.detach().clone() for key, tensor in floats.items()}
    with torch.no_grad():
        for tensor in floats.values():
            # Positive values stay positive, because a variance has to. No zero stays one.
            factor, offset = torch.rand((2, *tensor.shape), generator=generator) / 2 + 0.25
            other = tensor.cpu() * (factor + 0.5) + offset
            if last and tensor.numel():
                kept = tensor.cpu().reshape(-1)[:-1]
                other.view(-1)[:-1] = kept
            tensor.copy_(other)
    try:
        yield
    finally:
        with torch.no_grad():
            for key, tensor in floats.items():
                tensor.copy_(before[key])
