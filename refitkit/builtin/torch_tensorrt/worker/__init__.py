"""Planning and building in processes of their own, which need no GPU.

One process (``server``) imports torch_tensorrt, which takes seconds, and then only forks. Each fork
(``session``) plans one program and holds its networks; it forks again for each build, because a
process in which a build failed cannot build any more. ``client`` is what the user's process sees.
"""
