"""Plans and builds in separate processes, which need no GPU.

One process (``server.main``) imports torch_tensorrt, which takes seconds, and then only forks. Each
fork (``server.WorkerSession``) plans one program and has its networks. A session forks again for
each build, because a process in which a build failed cannot build again. ``client`` is the
interface for the user's process.
"""
