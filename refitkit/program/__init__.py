"""What refitkit needs to know of a ``torch.export.ExportedProgram``. Knows torch, no engine."""

from refitkit.program.facts import ProgramFacts, facts_of
from refitkit.program.keep import KeptProgram

__all__ = ["KeptProgram", "ProgramFacts", "facts_of"]
