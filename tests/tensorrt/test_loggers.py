"""Garbage that is collected while TensorRT calls our logger does not stop the process."""

from __future__ import annotations

import subprocess
import sys

from tests.tensorrt.helpers import needs_torch_tensorrt

pytestmark = needs_torch_tensorrt

SCRIPT = """
import gc, importlib, sys

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.refitter import DeserializedEngine
from refitkit.errors import EngineError

upstream.import_headless()
trt = importlib.import_module("tensorrt")

class Box:
    pass

def collect(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "log":
        gc.set_threshold(1, 1, 1)
        for _ in range(100):
            [[] for _ in range(10)]

gc.collect()
gc.set_threshold(0)
box = Box()
box.itself, box.logger = box, trt.Logger(trt.Logger.ERROR)
box.runtime = trt.Runtime(box.logger)
del box
sys.setprofile(collect)
try:
    DeserializedEngine(b"no engine", trt)
except EngineError:
    print("refused")
"""


def test_a_runtime_that_is_garbage_is_not_freed_inside_a_logger() -> None:
    """It once was: its destructor then waited for the lock that its own thread held."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "refused\n", done.stderr[-2000:]
