"""Open each file that is named in a process of its own, and tell what happened to each as JSON.

usage: open_files.py PATH...
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

from aoti_helpers import digest, each_in_a_process, slots_of
from aoti_models import CASES

import refitkit


def outcome(path: str) -> dict[str, Any]:
    """Load it, refit it with verified outputs, and call it."""
    case = CASES["small"]
    try:
        compiled = refitkit.load(path)
        loaded = digest(compiled(*case.args())), slots_of(compiled)
        refitkit.refit(compiled, case.model(1).state_dict(), inputs=case.args())
    except refitkit.RefitError as exc:
        return {"error": type(exc).__name__, "message": str(exc)}
    return {"error": None, "outputs": loaded[0], "slots": sorted(loaded[1])}


if __name__ == "__main__":
    told = each_in_a_process({path: functools.partial(outcome, path) for path in sys.argv[1:]})
    sys.stdout.write(json.dumps(told) + "\n")
