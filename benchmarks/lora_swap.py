"""Swaps of LoRA adapters of rank 16 on a transformer encoder, against a memmove and a full refit.

usage: python benchmarks/lora_swap.py [THREADS] [--device cuda] [--backend torch_tensorrt]
                                      [--memory host ...]     (refitkit-peft has to be importable)

Each turn does everything once, so that what else the machine does falls on all of it alike. Each
row has a module of its own, which nothing else refits; on TensorRT, which would compile a refitter
for each, they share one, which is refitted to what the row had before whenever its turn comes.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refitkit_peft
import torch
from refitkit_peft import Lora

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable

TURNS = 15
RANK = 16
LAYERS, WIDTH, INNER = 8, 768, 3072
"""56.7 M parameters, all of them of the encoder's layers."""
OPTIONS = {"torch_tensorrt": {"min_block_size": 1, "use_python_runtime": True}}

ALL = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
KINDS = {"all matrices": ALL, "a quarter of them": ("in_proj_weight",)}
STAGES = ("load", "compare", "map", "check", "stage", "commit")


class Encoder(torch.nn.Module):
    """Layers of attention and a feed-forward part, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 12, INNER, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers make of it."""
        found: torch.Tensor = self.layers(x)
        return found


def adapter(model: torch.nn.Module, seed: int, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Factors for all matrices whose names end so, by peft's keys."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in model.named_parameters():
        module = name.rpartition(".")[0]
        if weight.dim() == 2 and name.endswith(kinds):
            rows, columns = weight.shape
            found[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / 50
            found[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 50
    return found


@dataclass
class Modules:
    """Modules of one program.

    Attributes:
        file: Where they are opened from.
        shared: The one that all share instead.
    """

    file: Path
    shared: refitkit.CompiledModule | None = None

    def one(self) -> refitkit.CompiledModule:
        """One."""
        return self.shared or refitkit.load(self.file)


class Row:
    """One way to refit, and a module that only it refits.

    Attributes:
        name: What it is called.
        seconds: Of each turn.
        reports: Likewise.
    """

    def __init__(
        self, name: str, modules: Modules, weights: Callable[[int], Any], *, delta: bool
    ) -> None:
        self.name, self.seconds, self.reports = name, list[float](), list[Any]()
        self._compiled, self._shared = modules.one(), modules.shared is not None
        self._weights, self._delta = weights, delta

    def turn(self, number: int, pipeline: refitkit.Pipeline) -> None:
        """Refit to the weights of one turn."""
        if self._shared:
            before = self._weights(number - 1)
            pipeline.refit(self._compiled, before, verify="none", delta=self._delta)
        weights = self._weights(number)
        wait()
        began = time.perf_counter()
        result = pipeline.refit(self._compiled, weights, verify="none", delta=self._delta)
        wait()
        self.seconds.append(time.perf_counter() - began)
        self.reports.append(result.report)

    def forget(self) -> None:
        """Begin to count."""
        self.seconds, self.reports = [], []


def wait() -> None:
    """Until a GPU, if there is one, has done all of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def scaled(of: refitkit_peft.Base, number: int) -> Lora:
    return Lora(of, {str(number % 3): 0.7})


def rows_of(
    modules: Modules, state: dict[str, Any], adapters: list[dict[str, Any]], kinds: list[Any]
) -> list[Row]:
    def base(keep: int, kind: Any) -> refitkit_peft.Base:
        made = refitkit_peft.Base(state, kind, keep=keep)
        for number, tensors in enumerate(adapters):
            made.add(str(number), tensors, alpha="rank")
        return made

    def merged(number: int) -> dict[str, torch.Tensor]:
        source = refitkit.Pipeline().open_weights(scaled(base(1, "given"), number))
        return {name: source.get(name) for name in source.names()}

    merges = [merged(number) for number in range(3)]
    rows = []
    for kind in kinds:
        rows += rows_of_one(modules, kind, [base(keep, kind) for keep in (0, 2, 3)])
    full = "full refit from merged weights"
    return [
        *rows,
        Row(full, modules, lambda n: merges[n % 3], delta=False),
        Row("the same with delta", modules, lambda n: merges[n % 3], delta=True),
    ]


def rows_of_one(modules: Modules, kind: str, bases: list[refitkit_peft.Base]) -> list[Row]:
    """Rows of a base in one kind of memory, which keeps none, too few, or all of three sets."""
    none, two, three = bases
    return [
        Row(f"{kind}: swap, ready sets", modules, lambda n: scaled(three, n), delta=True),
        Row(f"{kind}: swap, computed, kept", modules, lambda n: scaled(two, n), delta=True),
        Row(f"{kind}: swap, computed, not kept", modules, lambda n: scaled(none, n), delta=True),
        Row(
            f"{kind}: on and off, ready sets",
            modules,
            lambda n: scaled(three, 0) if n % 2 else three,
            delta=True,
        ),
    ]


def copier(nbytes: int, device: str) -> Callable[[], float]:
    """A copy of so many bytes, into memory that was touched before; its seconds."""
    if device == "cpu":
        return memmove(nbytes)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def copy() -> float:
        wait()
        began = time.perf_counter()
        target.copy_(source)
        wait()
        return time.perf_counter() - began

    return copy


def memmove(nbytes: int) -> Callable[[], float]:
    """The same on the host, by one thread."""
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)

    def copy() -> float:
        began = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
        return time.perf_counter() - began

    return copy


def table(rows: list[Row], copies: list[float], written: int) -> None:
    copy = statistics.median(copies)
    heads = ["what", "slots", "MB", "median ms", "quartiles", "over a copy"]
    print("| " + " | ".join([*heads, *(f"{stage} ms" for stage in STAGES)]) + " |")
    print("|---" * (len(heads) + len(STAGES)) + "|")
    print(line("a copy, in one piece", "", written, copies, copy) + " |" * len(STAGES))
    for row in rows:
        last = row.reports[-1]
        cells = line(row.name, str(last.slots_written), last.bytes_written, row.seconds, copy)
        for stage in STAGES:
            spent = [sum(s.seconds for s in r.stages if s.stage == stage) for r in row.reports]
            cells += f" {statistics.median(spent) * 1e3:.1f} |"
        print(cells, flush=True)


def line(name: str, slots: str, nbytes: int, seconds: list[float], copy: float) -> str:
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    times = f"{middle:.1f} | {low:.1f} to {high:.1f} | {middle / copy / 1e3:.2f}"
    return f"| {name} | {slots} | {nbytes / 1e6:.1f} | {times} |"


def measure(rows: list[Row], pipeline: refitkit.Pipeline, device: str) -> None:
    for number in range(4):  # then both sets of weights of each module are in steady use
        for row in rows:
            row.turn(number, pipeline)
    written = rows[0].reports[-1].bytes_written
    copy, copies = copier(written, device), list[float]()
    for row in rows:
        row.forget()
    for number in range(4, 4 + TURNS):
        for row in rows:
            row.turn(number, pipeline)
        copies.append(copy())
    table(rows, copies, written)


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("threads", nargs="?", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="aotinductor")
    parser.add_argument("--memory", nargs="+", default=["host"])
    return parser.parse_args()


def main() -> None:
    given = asked()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = Encoder().eval().to(given.device)
    state = dict(model.state_dict())
    program = torch.export.export(model, (torch.randn(1, 8, WIDTH, device=given.device),))
    options = OPTIONS.get(given.backend, {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.refitkit"
        compiled = refitkit.compile(program, given.backend, options, prove=False)
        modules = Modules(file, compiled if given.backend == "torch_tensorrt" else None)
        if not modules.shared:
            compiled.save(file)
        print(f"{given.backend}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        for what, kinds in KINDS.items():
            adapters = [adapter(model, seed, kinds) for seed in range(3)]
            rows = rows_of(modules, state, adapters, given.memory)
            for finite in (True, False):
                print(f"\n{what}, check_finite={finite}\n")
                measure(rows, refitkit.Pipeline({"check_finite": finite}), given.device)


if __name__ == "__main__":
    main()
