"""The strategy ``name-map``: uses the map that torch-tensorrt 2.11 and 2.12 cache in their modules.

During compilation, ``TRTInterpreter._save_weight_mapping``
(``dynamo/conversion/_TRTInterpreter.py``) stores for each engine weight the entry of the state_dict
that it seems to come from. It guesses: first by the weight's name, then by the first tensor that is
equal within 0.01. The guess is wrong for 12 slots of swin_t and for 4 of gpt2. So this strategy
treats an entry as a claim, and uses it only with a proof.

These facts prove nothing:

* *Equal values.* Fresh biases are all zeros. A matrix of small numbers is "equal" to its
  transpose. ``weight * scale`` equals ``weight`` only while ``scale`` is 1.
* *Equal names and sizes.* A convolution that standardizes its weight can have a matching engine
  weight name, FQN, dtype and count, but another value.

The proof uses the compiled program, which has the graph fingerprint of the plan. Its nodes show the
operands of each operation, and the module in which the operation runs. An entry is proved if
all of these conditions hold:

1. The engine weight's name states the module, the operation and the operand's role. The name has a
   form of ``proof.use_of``, whose converters pass the operand on unchanged.
2. In that module the program has exactly one operand of that operation and role with the slot's
   dtype and count; it can be used in several calls. Modules inside that module have no such
   operand, because the name can be that of an outer module: upstream's ``get_node_name`` removes
   an item from the module stack in every call.
3. That operand is a parameter or buffer. It is not computed, and the program never changes it.
4. All engines together have at most as many slots with this module, operation, role, dtype and
   count as the program has calls. A parameter as operand always creates a slot with that name, so
   the slot belongs to the operand.
5. The cached entry names that parameter, or one that is tied to it, and the slot's dtype.

A slot of a folded batch norm needs this proof for weight, bias, running mean and running
variance. Its epsilon is that of the program's node; upstream's map does not store it and uses 1e-5.

All other slots are declined with a reason, for example results of lowering (``_frozen_param0``),
slices of complex buffers, and constants that the map stores only as old values. Values are never
cast: an operand whose dtype changed on its way into the engine is computed. The map is only read,
although upstream's own reader removes an entry from it.
"""

from __future__ import annotations

from refitkit.builtin.torch_tensorrt.name_map.proof import HasNameMap
from refitkit.builtin.torch_tensorrt.name_map.strategy import NameMapStrategy

__all__ = ["HasNameMap", "NameMapStrategy"]
