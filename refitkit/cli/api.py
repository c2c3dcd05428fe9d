"""The public API for commands of plugins; docs/guides/writing-plugins.md shows a command.

Everything else in :mod:`refitkit.cli` is internal and may change. Importing this module does not
import torch.
"""

from refitkit.cli.files import check_output, check_readable, load_inputs, load_plan
from refitkit.cli.main import main
from refitkit.cli.options import (
    common_options,
    config_options,
    file_argument,
    file_option,
    weight_options,
)
from refitkit.cli.refit import RefitOptions, refit_options, run_refit
from refitkit.cli.session import Session, plain

__all__ = [
    "RefitOptions",
    "Session",
    "check_output",
    "check_readable",
    "common_options",
    "config_options",
    "file_argument",
    "file_option",
    "load_inputs",
    "load_plan",
    "main",
    "plain",
    "refit_options",
    "run_refit",
    "weight_options",
]
