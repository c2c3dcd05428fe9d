"""Four processes train a model for a step, sharded in several ways, and save it each time.

usage: train_distributed.py FOLDER PORT

FOLDER/HOW is a distributed checkpoint of ``{"model": ..., "optim": ..., "step": ...}``,
FOLDER/HOW-flat one of the model alone, FOLDER/HOW.pt the plain state_dict of the same model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from aoti_models import Small
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD = 4
HIDDEN = 22
"""Rows and columns do not go evenly into shards of shards."""


def model(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small(HIDDEN)


def fully_sharded(net: Any) -> None:
    """FSDP2 over all processes: rows of everything."""
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))


def replicated(net: Any) -> None:
    """FSDP2 over two processes, twice: sharded and replicated."""
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))


def in_two_dimensions(net: Any) -> None:
    """Tensor parallel over two, each half sharded by FSDP2 over two: shards of shards, of both
    dimensions of a matrix, and of a bias that is sharded in one and replicated in the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])


HOW: dict[str, Callable[[Any], None]] = {
    "fully-sharded": fully_sharded,
    "replicated": replicated,
    "two-dimensions": in_two_dimensions,
}


def main(rank: int, folder: str, port: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, (how, shard) in enumerate(HOW.items(), 1):
        net = model(number)
        shard(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        net(torch.ones(3, 16)).square().sum().backward()
        optimizer.step()
        weights, moments = get_state_dict(net, optimizer)
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in weights.items()
        }
        if rank == 0:
            torch.save(whole, Path(folder, f"{how}.pt"))
        state = {"model": weights, "optim": moments, "step": 1}
        dcp.save(state, checkpoint_id=Path(folder, how))
        dcp.save(weights, checkpoint_id=Path(folder, f"{how}-flat"))
    dist.barrier()  # or one process may be gone while the other still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(main, tuple(sys.argv[1:]), nprocs=WORLD, start_method="fork")  # type: ignore[no-untyped-call] # torch's
