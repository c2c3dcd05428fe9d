"""Writing weights straight into an engine's memory, past TensorRT's refitter.

Reading order: ``places`` and ``layout`` (where each weight lies), ``folds`` (batch norms),
``learning`` (how that is found out), ``proving`` (why it can be trusted), ``known`` (what was
proved before), ``engines`` (how an engine's memory is known), ``arena`` (values that lie as in the
engine), ``moves`` and ``kernels`` (how they get there), ``route`` (all of it for one engine, and
one commit).

NVIDIA documents none of this. So nothing is written to an engine whose layout was not proved on an
engine of the same bytes.
"""
