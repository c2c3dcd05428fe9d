"""Writing weights straight into an engine's memory, past TensorRT's refitter.

Reading order: ``layout`` (where each weight lies), ``learning`` (how that is found out),
``proving`` (why it can be trusted), ``engines`` (how an engine's memory is known), ``route`` (all
of it for one engine, and one refit). NVIDIA documents none of this. So nothing is written to an
engine whose layout was not proved on an engine of the same bytes.
"""
