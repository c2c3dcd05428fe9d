"""Facts about a ``torch.export.ExportedProgram``, and programs stored without weights.

The package uses torch and knows no engine. :mod:`~refitkit.program.facts` lists the tensors of a
program, with the help of :mod:`~refitkit.program.liveness` and :mod:`~refitkit.program.views`.
:mod:`~refitkit.program.keep` stores programs. :mod:`~refitkit.program.bits`,
:mod:`~refitkit.program.distance` and :mod:`~refitkit.program.dtypes` are about single tensors.
:mod:`~refitkit.program.ambient` isolates verbs from the modes of their callers.
"""

from refitkit.program.facts import ProgramFacts, facts_of
from refitkit.program.keep import KeptProgram

__all__ = ["KeptProgram", "ProgramFacts", "facts_of"]
