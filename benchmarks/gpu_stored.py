"""First refits of a module of stored engines on a GPU, in a process that did not compile it.

The first process compiles a model, refits it, and stores engine, plan and layout in a folder. Each
later one makes a module of the stored engine, warms it up, and refits it.

usage: python benchmarks/gpu_stored.py MODEL FOLDER {make|warm|cold} [FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import MODELS, exported, state_on
from gpu_raw import seconds

import refitkit
from refitkit.builtin.torch_tensorrt import upstream

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS = {"min_block_size": 1, "use_python_runtime": True}


class Stored:
    """A folder with the engine of one model."""

    def __init__(self, model: str, folder: Path) -> None:
        """Read nothing yet.

        Args:
            model: Name of the model.
            folder: The folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, kind = folder, MODELS[model]
        self.inputs = kind.inputs(torch.float32)
        self.modules = [kind.new(seed, torch.float32) for seed in (0, 1, 2)]
        self.states = [state_on(module, "cuda") for module in self.modules]
        self.pipeline = refitkit.Pipeline({"plan_cache": str(folder / "cache")})

    def make(self) -> dict[str, Any]:
        """Compile the model, and store what other processes need."""
        program = exported(self.modules[0], self.inputs)
        compiled = self.pipeline.compile(program, "torch_tensorrt", OPTIONS, prove=False)
        found = {"first_refit_ms": _ms(lambda: self.pipeline.refit(compiled, self.states[1]))}
        torch.save(compiled(*self.inputs).cpu(), self.folder / "wanted.pt")
        self.pipeline.refit(compiled, self.states[0])
        assert compiled.plan
        compiled.plan.save(self.folder / "plan")
        ((name, engine),) = (one for one in compiled.engines.items() if hasattr(one[1], "handle"))
        child = engine.handle.child
        torch.save(
            {
                "name": name,
                "serialized_engine": engine.handle.engine_bytes(),
                "input_binding_names": list(child.input_names),
                "output_binding_names": list(child.output_names),
                "settings": child.settings,
            },
            self.folder / "engine.pt",
        )
        return found

    def first_refits(self, *, warm: bool) -> dict[str, Any]:
        """Time the first refits of the stored engine."""
        upstream.torch_tensorrt()
        from torch_tensorrt.dynamo import runtime

        # its own file
        parts = torch.load(self.folder / "engine.pt", weights_only=False)
        name = parts["name"]
        child = runtime.PythonTorchTensorRTModule(**parts)
        graph = torch.fx.Graph()
        graph.output(graph.call_module(name, tuple(map(graph.placeholder, "x"))))
        root = torch.nn.Module()
        root.add_module(name, child)
        module = torch.fx.GraphModule(root, graph)
        found: dict[str, Any] = {}
        compiled = self.pipeline.load(module)
        compiled.plan = refitkit.RefitPlan.load(self.folder / "plan")
        if warm:
            steps: list[str] = []
            found["warm_ms"] = _ms(lambda: compiled.warm(steps.append))
            found["warm"] = steps[-1]
        compiled(*self.inputs)
        results: list[Any] = []
        found["refits_ms"] = [
            round(_ms(lambda n=n: results.append(self.pipeline.refit(compiled, self.states[n]))), 2)
            for n in (2, 1, 2, 1)
        ]
        found["routes"] = [[one.name, one.why] for one in results[0].report.routes]
        found["stages_ms"] = {
            one.stage: round(1e3 * one.seconds, 2) for one in results[0].report.stages
        }
        wanted = torch.load(self.folder / "wanted.pt")
        found["equal"] = torch.equal(compiled(*self.inputs).cpu(), wanted)
        return found


def _ms(do: Callable[[], Any]) -> float:
    return 1e3 * seconds(do)


def main() -> None:
    """Do one step and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=["make", "warm", "cold"])
    parser.add_argument("file", type=Path, nargs="?")
    given = parser.parse_args()
    stored = Stored(given.model, given.folder)
    make = given.step == "make"
    found = stored.make() if make else stored.first_refits(warm=given.step == "warm")
    text = json.dumps({"model": given.model, "step": given.step, **found})
    print(text)
    if given.file:
        given.file.write_text(text)


if __name__ == "__main__":
    main()
