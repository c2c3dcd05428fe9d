"""Four processes save one state_dict, sharded in several ways.

usage: python save_distributed.py FOLDER PORT
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WORLD = 4


def whole() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "rows.weight": torch.randn(10, 6),
        "columns.weight": torch.randn(6, 10),
        "grid.weight": torch.randn(5, 7).half(),
        "same.bias": torch.randn(7).bfloat16(),
        "plain.steps": torch.arange(3),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "few.weight": torch.randn(2, 3),
        "none": torch.ones(0, 4),
    }


def main(rank: int, folder: str, port: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    dist.init_process_group("gloo")
    line = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, 2))
    state = whole()
    placed = {
        **state,
        "rows.weight": distribute_tensor(state["rows.weight"], line, [Shard(0)]),
        "columns.weight": distribute_tensor(state["columns.weight"], line, [Shard(1)]),
        "grid.weight": distribute_tensor(state["grid.weight"], square, [Shard(0), Shard(1)]),
        "same.bias": distribute_tensor(state["same.bias"], line, [Replicate()]),
        "few.weight": distribute_tensor(state["few.weight"], line, [Shard(0)]),
    }
    dcp.save({"model": placed, "step": 5, "optimizer": {"lr": 0.1}}, checkpoint_id=folder)
    dist.barrier()  # or one process may be gone while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, sys.argv[1:], nprocs=WORLD)  # type: ignore[no-untyped-call] # torch's
