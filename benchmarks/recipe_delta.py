"""Refits of one block of a vision transformer: what is computed and written, and how long it takes.

usage: python benchmarks/recipe_delta.py
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torchvision.models.vision_transformer import VisionTransformer

import refitkit

if TYPE_CHECKING:
    from refitkit.model import RefitReport

LAYERS, RUNS = 8, 7
STAGES = ("load", "compare", "map", "check", "stage", "commit")


def model(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    made = VisionTransformer(
        image_size=64, patch_size=16, num_layers=LAYERS, num_heads=8, hidden_dim=512, mlp_dim=2048
    )
    return made.eval()


def seconds(report: RefitReport, stage: str) -> float:
    return sum(one.seconds for one in report.stages if one.stage == stage)


def row(name: str, reports: list[RefitReport]) -> str:
    times = [statistics.median(seconds(r, stage) for r in reports) * 1e3 for stage in STAGES]
    whole = statistics.median(r.seconds for r in reports) * 1e3
    last = reports[-1]
    cells = [name, str(last.slots_written), f"{last.bytes_written / 1e6:.1f}", f"{whole:.1f}"]
    return "| " + " | ".join(cells + [f"{value:.1f}" for value in times]) + " |"


def main() -> None:
    x = (torch.randn(1, 3, 64, 64),)
    compiled = refitkit.compile(torch.export.export(model(0), x), prove=False)
    base = model(0).state_dict()
    other = model(1).state_dict()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(compiled.slots)} slots"
    )
    print("| changed | slots written | MB | whole refit ms | " + " ms | ".join(STAGES) + " ms |")
    print("|---" * (4 + len(STAGES)) + "|")
    for finite in (True, False):
        pipeline = refitkit.Pipeline({"check_finite": finite})
        checked = "" if finite else ", check_finite=False"
        for blocks in (0, 1, 2, 4, LAYERS):
            names = tuple(f"encoder.layers.encoder_layer_{number}." for number in range(blocks))
            mixed = {n: other[n] if n.startswith(names) and names else v for n, v in base.items()}
            reports = []
            pipeline.refit(compiled, base, verify="none", delta=True)
            for number in range(RUNS):
                new = base if number % 2 else mixed
                reports.append(pipeline.refit(compiled, new, verify="none", delta=True).report)
            print(row(f"{blocks} of {LAYERS} blocks{checked}", reports), flush=True)
        full = [
            pipeline.refit(compiled, (other, base)[n % 2], verify="none").report
            for n in range(RUNS)
        ]
        print(row(f"all, without delta{checked}", full), flush=True)


if __name__ == "__main__":
    main()
