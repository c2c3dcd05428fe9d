"""Two processes refit a module each from one state_dict, whose tensors are spread over both.

usage: python refit_from_dtensors.py PORT FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from refitkit.pipeline import Pipeline
from tests.fakes import FakePlugin, make_module, same_state, weights_for

WORLD = 2


def main(rank: int, port: str, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,))
    module = make_module(3)
    weights = weights_for(module, 4.0)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) for name, value in weights.items()}
    placed = {
        "e0.weight": distribute_tensor(weights["e0.weight"], mesh, [Shard(0)]),
        "e1.weight": distribute_tensor(weights["e1.weight"], mesh, [Shard(1)]),
        "e2.bias": distribute_tensor(weights["e2.bias"], mesh, [Replicate()]),
    }
    pipeline = Pipeline(plugins=[FakePlugin()])
    source = pipeline.open_weights({**weights, **placed})
    assert source.info("e0.weight").shape == (2, 3)
    assert source.info("e0.weight").unusable == ""
    pipeline.refit(module, {**weights, **placed}, verify="weights", delta=True)
    held = module.by_slot()
    assert same_state(held, weights)
    (Path(folder) / f"rank {rank}").touch()
    dist.barrier()  # or one process may be gone while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, sys.argv[1:], nprocs=WORLD)  # type: ignore[no-untyped-call] # torch's
