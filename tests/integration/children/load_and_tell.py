"""Load a saved module in this process and tell its outputs and slots as JSON.

usage: load_and_tell.py MODULE MODEL
"""

from __future__ import annotations

import hashlib
import json
import sys

from aoti_helpers import digest, slots_of
from aoti_models import CASES

import refitkit

if __name__ == "__main__":
    path, name = sys.argv[1:]
    case = CASES[name]
    compiled = refitkit.load(path)
    slots = {n: hashlib.sha256(held).hexdigest() for n, held in slots_of(compiled).items()}
    outputs = digest(compiled(*case.args(), **case.kwargs()))
    refitkit.refit(compiled, case.model(2), inputs=case.inputs())
    refitted = digest(compiled(*case.args(), **case.kwargs()))
    told = {"outputs": outputs, "slots": slots, "refitted": refitted}
    sys.stdout.write(json.dumps(told) + "\n")
