"""The backend ``tensorrt_network``: engines of TensorRT-RTX, built ahead of time without a GPU.

``planning`` opens a session for a program, ``engine`` and ``module`` refit and build its parts,
``saving`` writes and reads files, and ``backend`` connects them to the plugin protocols.
"""
