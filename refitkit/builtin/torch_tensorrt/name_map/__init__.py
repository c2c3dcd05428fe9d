"""The strategy ``name-map``: the map that torch-tensorrt 2.11 and 2.12 cache in their modules.

While it compiles, ``TRTInterpreter._save_weight_mapping`` writes down for each engine weight which
entry of the state_dict it takes it for (``dynamo/conversion/_TRTInterpreter.py``). It guesses:
first from the weight's name, then by looking for the first tensor that is equal within 0.01. The
guess is wrong for 12 slots of swin_t and 4 of gpt2. So an entry is a claim here, and is used only
with a proof.

What is no proof
    *Equal values.* Fresh biases are all zeros; a matrix of small numbers is "equal" to its own
    transpose; ``weight * scale`` equals ``weight`` as long as ``scale`` is 1, and no longer.
    *Names and sizes.* A convolution that standardizes its weight has an engine weight, an FQN, a
    dtype and a count that all agree, and another value.

What is a proof
    The program that was compiled (its graph fingerprint is the plan's), whose nodes tell which
    operands each operation has, and in which module it runs. An entry is proved when all of this
    holds:

    1. The engine weight's own name says in which module, by which operation and as which operand
       it is used, in one of the forms of ``uses.py``: those whose converters pass the operand on
       as it is.
    2. In that module the program has one operand of that operation and role with the slot's dtype
       and count, or the same one in several calls, and none in the modules inside it (upstream's
       ``get_node_name`` takes an item off the module stack whenever it is called, so a name can be
       an outer module's).
    3. That operand is a parameter or buffer itself, not computed from one, and never changed.
    4. No more slots, of all engines, than calls have this module, operation, role, dtype and count.
       An operand that is a parameter always makes a slot of that name: the slot is the operand's.
    5. The cached entry names that parameter (or one that is tied to it), and the slot's dtype.

    Slots of folded batch norms need all of this of weight, bias, running mean and running variance,
    and take the epsilon of the program's own node; upstream's map has none, and uses 1e-5.

Everything else is declined, with the reason: what lowering computed (``_frozen_param0``), slices of
complex buffers, constants of which the map has the old value alone. Values are never cast: an
operand whose dtype was changed on its way into the engine is a computed one. The map is only read;
upstream's own reader takes an entry out of it.
"""

from __future__ import annotations

from refitkit.builtin.torch_tensorrt.name_map.proof import HasNameMap
from refitkit.builtin.torch_tensorrt.name_map.strategy import NameMapStrategy

__all__ = ["HasNameMap", "NameMapStrategy"]
