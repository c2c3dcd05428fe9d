"""Broken backends, at least one for each check of ``BackendSuite``."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from refitkit.errors import ConfigError, InputMismatchError, UnsupportedTargetError
from refitkit.protocols import PlanDraft
from refitkit.testing import BackendSuite
from refitkit.testing.fakes import FakeModule, OpenEngine
from refitkit.testing.scenes import recipe_row
from tests.conformance.bites import Bite

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.shift = torch.nn.Parameter(torch.randn(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.relu(self.linear(x)) - self.shift}


@cache
def exported() -> Any:
    torch.manual_seed(0)
    return torch.export.export(Net().eval(), (torch.ones(4, 3),))


class Module(FakeModule):
    """A correct module that runs the eager program with its engine's weights."""

    backend = "plain"

    def run(self, args: Any, kwargs: Any) -> Any:
        if [(tuple(arg.shape), arg.dtype) for arg in args] != [((4, 3), torch.float32)]:
            raise InputMismatchError("It takes one input of 4 x 3, float32.")
        with torch.no_grad():
            return torch.func.functional_call(exported().module(), self.weights(), args)

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.engines["all"].live)

    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        notes = {name: content.hex() for name, content in attachments.items()}
        values = {name: value.tolist() for name, value in self.saved().items()}
        self.write(path, json.dumps({"of": "plain", "notes": notes, "values": values}))

    def write(self, path: Path, text: str) -> None:
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)

    def saved(self) -> dict[str, torch.Tensor]:
        return self.weights()

    @classmethod
    def load(cls, path: Path) -> Any:
        found = json.loads(path.read_text())
        values = {name: torch.tensor(value) for name, value in found["values"].items()}
        notes = {name: bytes.fromhex(text) for name, text in found["notes"].items()}
        return cls([OpenEngine("all", values)], notes)


class Plain:
    """A correct backend."""

    name: Any = "plain"
    module: Any = Module

    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        if options:
            raise ConfigError(f"There are no options {sorted(options)}.")
        return self.module([OpenEngine("all", dict(program.state_dict))])

    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        return PlanDraft(tuple(recipe_row(slot) for slot in module.engines["all"].slots.values()))

    def _read(self, path: Path) -> Any:
        try:
            found = json.loads(path.read_text())
        except ValueError:
            return None
        return found if found.pop("of", "") == "plain" else None

    def describe(self, path: Path) -> Any:
        found = self._read(path)
        return None if found is None else {"backend": "plain"}

    def attachments(self, path: Path) -> Any:
        notes = (self._read(path) or {"notes": {}})["notes"]
        return {name: bytes.fromhex(text) for name, text in notes.items()}


class Part:
    """A part that knows the values of its engine."""

    def __init__(self, program: Any) -> None:
        self.state_dict = program.state_dict

    def values(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"all": {name: value.reshape(-1) for name, value in self.state_dict.items()}}


class Good(BackendSuite):
    backend: type[Plain] = Plain

    def make_backend(self) -> Any:
        return self.backend()

    def make_program(self) -> Any:
        return copy.deepcopy(exported())

    def inputs(self) -> Any:
        return (torch.arange(12.0).reshape(4, 3),)

    def make_parts(self, program: Any, module: Any) -> Any:
        return {"all": Part(program)}

    def held(self, module: Any) -> Any:
        return dict(module.engines["all"].live)

    def open_saved(self, path: Path) -> Any:
        return self.backend.module.load(path)


BITES: list[Bite] = []


def breaks(check: str, says: str) -> Any:
    def note(thing: type) -> type:
        kind = (
            type(thing.__name__, (Plain,), {"module": thing}) if thing in _modules(thing) else thing
        )
        suite = type(thing.__name__, (Good,), {"backend": kind})
        BITES.append(Bite(f"test_{check}", suite, says, Good))
        return thing

    return note


def _modules(thing: type) -> list[type]:
    return [thing] if issubclass(thing, FakeModule) else []


@breaks("it_has_a_name", "Backend.name: it returned {''}")
class Nameless(Plain):
    name = ""


@breaks("it_has_a_name", "Backend: Undescribed lacks members")
class Undescribed(Plain):
    describe = property(lambda _: (_ for _ in ()).throw(AttributeError()))  # type: ignore[assignment]


@breaks("unknown_options_are_refused", "an unknown option was accepted")
class Ignores(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        return super().compile(program, {}, tools)


@breaks("unknown_options_are_refused", "an unknown option raised TypeError")
class Stumbles(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        return super().compile(program, dict(**options) and sum(options), tools)


@breaks("compiling_leaves_the_program_alone", "it changed the program: 'calls'")
class Counts(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        program.state_dict["calls"].add_(1)
        return super().compile(program, options, tools)


@breaks("compiling_leaves_the_program_alone", "it changed the program: 'linear.bias.requires_grad'")
class Freezes(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        program.state_dict["linear.bias"].requires_grad_(False)
        return super().compile(program, options, tools)


@breaks("compiling_leaves_the_program_alone", "it changed the program: 'the graph'")
class CutsGraph(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        next(iter(program.graph.nodes)).name = "renamed"
        return super().compile(program, options, tools)


class _Sharing(OpenEngine):
    """An engine on the memory that it is given."""

    def __init__(self, name: str, values: Any, wire: Any = None) -> None:
        super().__init__(name, values, wire)
        self.live = dict(values)


@breaks(
    "compiling_leaves_the_program_alone", "writes to the program changed the module: 'calls'|'l"
)
class Shares(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        super().compile(program, options, tools)
        return self.module([_Sharing("all", program.state_dict)])


class _WritesBack(OpenEngine):
    """An engine whose refits write to the tensors that it was made from."""

    def __init__(self, name: str, values: Any, wire: Any = None) -> None:
        super().__init__(name, values, wire)
        self.given = values

    def stage(self, values: Any) -> Any:
        for value in values:
            self.given[value.slot.name].data.copy_(value.load())
        return super().stage(values)


@breaks("compiling_leaves_the_program_alone", "a refit of the module changed the program: 'calls'")
class WritesBack(Plain):
    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        super().compile(program, options, tools)
        return self.module([_WritesBack("all", program.state_dict)])


@breaks(
    "each_program_is_compiled_with_its_own_weights", "after one with other weights answers other"
)
class KnowsPrograms(Plain):
    """Caches modules by the beginnings of their weights."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def compile(self, program: Any, options: Any, tools: Any) -> Any:
        key = str([t.view(-1)[:-1].tolist() for t in program.state_dict.values()])
        compiled = super().compile(program, options, tools)
        return self.known.setdefault(key, compiled)


@breaks("the_module_is_of_the_backend", "it is 'other', but the backend is 'plain'")
class OfOther(Module):
    backend = "other"


@breaks("the_module_is_of_the_backend", r"the keys \['0'\] are not the names of their engines")
class Numbers(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.engines = {str(n): e for n, e in enumerate(self.engines.values())}


@breaks("it_answers_like_the_program", "OpenedModule.run: outputs differ from the program's")
class Negates(Module):
    probe = Module.run

    def run(self, args: Any, kwargs: Any) -> Any:
        return {"y": -super().run(args, kwargs)["y"] - 1}


@breaks("it_answers_like_the_program", "OpenedModule.probe: outputs differ from the program's")
class Unwraps(Module):
    def probe(self, args: Any, kwargs: Any) -> Any:
        return self.run(args, kwargs)["y"]


@breaks("it_answers_like_the_program", "OpenedModule.probe: outputs of two calls share memory")
class LendsMemory(Module):
    """Returns its own memory, of which it has two pieces that it uses in turn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.room = [torch.empty(4, 2), torch.empty(4, 2)]

    def run(self, args: Any, kwargs: Any) -> Any:
        self.room.reverse()
        return {"y": self.room[0].copy_(super().run(args, kwargs)["y"])}


@breaks("it_answers_like_the_program", "OpenedModule.probe: outputs are inference tensors")
class Infers(Module):
    def run(self, args: Any, kwargs: Any) -> Any:
        with torch.inference_mode():
            return super().run(args, kwargs)


@breaks("wrong_inputs_are_refused", "inputs of another shape were accepted")
class TakesAny(Module):
    def run(self, args: Any, kwargs: Any) -> Any:
        return super().run((args[0].reshape(-1)[:12].reshape(4, 3),), kwargs)


@breaks(
    "wrong_inputs_are_refused", "inputs of another dtype .torch.float16 for torch.float32. were"
)
class CastsInputs(Module):
    def run(self, args: Any, kwargs: Any) -> Any:
        return super().run((args[0].float(),), kwargs)


@breaks("wrong_inputs_are_refused", "inputs of another dtype .* raised RuntimeError")
class LetsTorchSayDtypes(Module):
    def run(self, args: Any, kwargs: Any) -> Any:
        return {"y": super().run((args[0].float(),), kwargs)["y"] - 0 * (args[0] @ torch.ones(3))}


@breaks("wrong_inputs_are_refused", "inputs of another shape raised RuntimeError")
class LetsTorchSay(Module):
    def run(self, args: Any, kwargs: Any) -> Any:
        return super().run((args[0].view(4, 3),), kwargs)


@breaks("probing_changes_nothing", "it changed 'calls'")
class CountsProbes(Module):
    def probe(self, args: Any, kwargs: Any) -> Any:
        self.engines["all"].live["calls"] += 1
        return self.run(args, kwargs)


@breaks("probing_changes_nothing", "ProbesFromState.probe_from: it changed 'calls'")
class LeavesState(Module):
    def probe_from(self, state: Any, args: Any, kwargs: Any) -> Any:
        self.engines["all"].live["calls"] += 1
        return self.run(args, kwargs)


@breaks("a_second_module_is_independent", "a refit of the second module changed the first")
class SharesEngines(Module):
    def reopen(self) -> Any:
        return type(self)(list(self.engines.values()))


@breaks(
    "a_second_module_is_independent",
    "the second module has other weights: 'linear.bias', 'linear.w",
)
class FromScratch(Module):
    def reopen(self) -> Any:
        live = self.engines["all"].live
        return type(self)([OpenEngine("all", {n: torch.zeros_like(v) for n, v in live.items()})])


@breaks("every_slot_is_planned_once", "it did not plan 'all/calls' exactly once")
class LeavesOut(Plain):
    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        rows = super().draft(parts, module, tools).rows
        return PlanDraft(tuple(row for row in rows if row.slot.name != "calls"))


@breaks(
    "every_slot_is_planned_once",
    "it did not plan 'all/calls', 'all/linear.bias', 'all/linear.weight' and 1 more exactly",
)
class PlansTwice(Plain):
    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        return PlanDraft(super().draft(parts, module, tools).rows * 2)


@breaks("planning_leaves_the_program_alone", "it changed the program: 'linear.bias'")
class Zeroes(Plain):
    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        bias = parts["all"].state_dict["linear.bias"]
        bias.data = bias.data * 1.5
        return super().draft(parts, module, tools)


class _FreezingSuite(Good):
    def make_parts(self, program: Any, module: Any) -> Any:
        program.state_dict["linear.bias"].requires_grad_(False)
        return super().make_parts(program, module)


BITES.append(
    Bite(
        "test_planning_leaves_the_program_alone",
        _FreezingSuite,
        "refitkit_partition: it changed the program: 'linear.bias.requires_grad'",
        Good,
    )
)


class _Crossed(Plain):
    """Gives two slots of equal shape each other's weights."""

    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        other = {"shift": "linear.bias", "linear.bias": "shift"}
        slots = module.engines["all"].slots.values()
        return PlanDraft(tuple(recipe_row(slot, other.get(slot.name, slot.name)) for slot in slots))


breaks("a_refit_by_the_plan_answers_like_the_program", "outputs differ from those of the program")(
    _Crossed
)


breaks(
    "drafted_values_are_those_of_the_parts", "give other bits for 'all/linear.bias', 'all/shift'"
)(_Crossed)


@breaks("a_refit_by_the_plan_answers_like_the_program", "outputs differ from those of the program")
class ReadsCrossed(Module):
    """Knows its slots under each other's names since it was compiled."""

    def weights(self) -> dict[str, torch.Tensor]:
        live = super().weights()
        if live["shift"].equal(exported().state_dict["shift"]):
            return live
        return {**live, "shift": live["linear.bias"], "linear.bias": live["shift"]}


@breaks(
    "rows_name_weights_of_the_program",
    "the row of 'all/linear.weight' names 'p_linear_weight', which the program does not have",
)
class NamesPlaceholders(Plain):
    def draft(self, parts: Any, module: Any, tools: Any) -> Any:
        slots = module.engines["all"].slots.values()
        names = {"linear.weight": "p_linear_weight"}
        return PlanDraft(tuple(recipe_row(slot, names.get(slot.name, slot.name)) for slot in slots))


@breaks(
    "a_saved_module_is_opened_as_it_was",
    "a refitted module was saved, and opened with other weights: 'calls', 'linear.bias', 'linear.w",
)
class SavesCompiled(Module):
    def saved(self) -> dict[str, torch.Tensor]:
        return dict(exported().state_dict)


@breaks("a_saved_module_is_opened_as_it_was", "a refitted module was saved, and opened with other")
class KnowsFiles(Module):
    """Opens a file of a known name and size from memory."""

    known: ClassVar[dict[Any, str]] = {}

    @classmethod
    def load(cls, path: Path) -> Any:
        text = cls.known.setdefault(path, path.read_text())
        again = path.with_name("again")
        again.write_text(text)
        return super().load(again)


@breaks("a_saved_module_is_opened_as_it_was", "or other contents")
class TextNotes(Module):
    """Stores attachments as text."""

    @classmethod
    def load(cls, path: Path) -> Any:
        module = super().load(path)
        notes = module.attachments.items()
        module.attachments = {name: v.decode("utf-8", "replace").encode() for name, v in notes}
        return module


@breaks("saving_leaves_the_old_file_whole", "it wrote into the old file that it replaces: 'saved'")
class WritesInPlace(Module):
    def write(self, path: Path, text: str) -> None:
        path.write_text(text)


@breaks("a_saved_module_is_opened_as_it_was", "the file of a new module was opened, and answers")
class SavesHalf(Module):
    """Saves its weights, but not that answers are scaled."""

    def __init__(self, engines: Any, attachments: Any = None, *more: Any) -> None:
        super().__init__(engines, attachments, *more)
        self.scale = 1 if attachments is None else 2

    def run(self, args: Any, kwargs: Any) -> Any:
        return {"y": super().run(args, kwargs)["y"] * self.scale}


@breaks(
    "a_saved_module_is_opened_as_it_was", r"saved with \['empty', 'note.txt'\] opened with \[\]"
)
class OpensWithoutNotes(Module):
    @classmethod
    def load(cls, path: Path) -> Any:
        return cls(list(super().load(path).engines.values()))


@breaks("a_saved_module_is_opened_as_it_was", "the file of a new module cannot be opened: No")
class CannotOpen(Module):
    @classmethod
    def load(cls, path: Path) -> Any:
        raise UnsupportedTargetError("No.")


@breaks("what_is_saved_is_told", "it returned None for a file of this backend")
class Forgets(Plain):
    def describe(self, path: Path) -> Any:
        return None


@breaks("what_is_saved_is_told", r"saved with \['empty', 'note.txt'\] returned \[\]")
class LosesNotes(Module):
    def save(self, path: Path, attachments: Mapping[str, bytes]) -> None:
        super().save(path, {})


@breaks("foreign_files_are_not_its_own", "a file of no backend returned {'backend': 'plain'}")
class KnowsAll(Plain):
    def describe(self, path: Path) -> Any:
        return {"backend": "plain"}
