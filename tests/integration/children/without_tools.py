"""What is possible where no compiler and no openssl are on PATH: told as JSON.

usage: without_tools.py MODULE
"""

from __future__ import annotations

import json
import shutil
import sys

import torch
from aoti_helpers import max_error
from aoti_models import CASES

import refitkit

if __name__ == "__main__":
    case = CASES["small"]
    b = case.model(1)
    told = {"tools": [tool for tool in ("g++", "c++", "cc", "openssl") if shutil.which(tool)]}
    compiled = refitkit.load(sys.argv[1])
    refitkit.refit(compiled, b.state_dict(), inputs=case.inputs())
    with torch.no_grad():
        told["error"] = max_error(compiled(*case.args()), b(*case.args()))
    try:
        refitkit.compile(case.program(0))
    except refitkit.ToolchainError as exc:
        told["message"] = str(exc)
    sys.stdout.write(json.dumps(told) + "\n")
