"""Plan a small program with a folder for plans, and tell what was done as JSON.

usage: plan_and_tell.py FOLDER
"""

from __future__ import annotations

import json
import sys

import torch

from refitkit.pipeline import Pipeline
from tests.fakes import BACKEND, KeyedPlugin

if __name__ == "__main__":
    torch.manual_seed(0)
    program = torch.export.export(torch.nn.Linear(3, 4).eval(), (torch.zeros(2, 3),))
    plugin = KeyedPlugin()
    plan = Pipeline({"plan_cache": sys.argv[1]}, plugins=[plugin]).plan(program, backend=BACKEND)
    told = {"drafts": plugin.keyed.drafts, "slots": [row.slot.name for row in plan.ledger]}
    sys.stdout.write(json.dumps(told) + "\n")
