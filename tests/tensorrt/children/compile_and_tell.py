"""Compiles a module, tells its processes, and ends or waits for the end as it is told."""

from __future__ import annotations

import sys
import time

import torch

import refitkit
from refitkit.builtin.torch_tensorrt.worker.client import SERVER
from tests.tensorrt.helpers import sessions

program = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),))
options = {"min_block_size": 1}
compiled = refitkit.compile(program, "tensorrt_network", options, prove=False)
assert SERVER._process is not None
sys.stdout.write(f"{SERVER._process.pid} {min(sessions())}\n")
sys.stdout.flush()
if sys.argv[1] == "wait":
    time.sleep(600)
