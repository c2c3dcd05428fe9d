"""Call a compiled library through its C interface, without the GIL and without copies of weights.

Torch's binding holds the GIL for a whole call, and its swap of weights waits for all calls. The C
interface (``torch/csrc/inductor/aoti_runtime/interface.h``, 2.14) has neither limit: ``ctypes``
releases the GIL around each function, and a container takes tensors of its caller as its weights.

Read ``Container`` first. It serves calls from one set of tensors that never changes, so new weights
are a new container. A ``Library`` is the code that all containers of a model share.

The interface validates nothing. The module hides what that takes:

- A container has all weights, under the library's own names: one that lacks a weight would crash.
- A container that is given tensors makes handles of its own for them and never deletes those
  (``MaybeOwningAtenTensorHandle``, ``utils.h``). ``Library`` deletes them.
- After a failed call, a waiting one might wait in the container forever (``get_available_model``).
  So ``Turns`` lets in no more calls than the container has models.
- Containers are filled while nobody calls them, and are used again. Creating one copies weights
  that are inside the library, or reports on stderr.
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import os
import sys
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from refitkit.errors import EngineError
from refitkit.processes import ForkedLock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")
Answer: TypeAlias = "tuple[list[torch.Tensor], str]"
"""Outputs of a call, and the text of an error; one of them is empty."""

ALIGNMENT = 64
"""Alignment in bytes of each weight (``AOTI_CONST_ALIGNMENT``, ``model_base.h``)."""

SWITCH = "REFITKIT_AOTI_BINDING"
"""Environment variable: any value makes refitkit use torch's binding everywhere."""

PROXY = "the model has operators that only torch's binding can call"
_PREFIX = "AOTInductorModelContainer"
_NEEDED = (
    "CreateWithDevice",
    "Delete",
    "Run",
    "GetNumConstants",
    "GetConstantName",
    "GetConstantOriginalFQN",
    "GetConstantFromFolded",
    "GetConstantDataSize",
    "GetNumInputs",
    "GetNumOutputs",
    "GetCallSpec",
    "ExtractConstantsMapEntries",
    "UpdateUserManagedConstantBufferPairs",
    "SwapConstantBuffer",
    "FreeInactiveConstantBuffer",
)
_ALL_NEEDED = (*(_PREFIX + name for name in _NEEDED), "AOTInductorGetLastError")
_SWITCHED_OFF = f"the environment variable {SWITCH} is set"
_IDLE = 2  # containers without weights that a library keeps for the next set

_aoti: Any = torch._C._aoti  # noqa: SLF001 - no public API
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype = ctypes.py_object
_capsule_of.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Entry(ctypes.Structure):
    """``AOTInductorConstantMapEntry``: a name, and a handle of a tensor."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


# -- the library ------------------------------------------------------------------------------


class Library:
    """A loaded library: its C interface, its names, and containers that wait for weights.

    Attributes:
        names: The library's own name of each weight, by FQN.
        sizes: Bytes of each weight, by FQN.
        in_spec: Structure of the inputs, as torch writes it.
        out_spec: Structure of the outputs.
    """

    def __init__(self, path: Path, device: str) -> None:
        """Load a library; ``opened`` calls this. This runs code of the library.

        Args:
            path: Path of the shared library; its kernels are in the same folder.
            device: Device that it was compiled for.

        Raises:
            UnsuitableError: It has to be called through torch's binding.
            EngineError: It cannot make a container.
        """
        self._device, self._folder = device, path.parent
        self._idle: list[tuple[int, int]] = []  # handles, and how many models each has
        self._filled: dict[_Filled, None] = {}  # a set, in which deleting says who was first
        self._unused: list[int] = []  # handles of tensors, to be deleted
        self._on_end = _reaper(weakref.ref(self))
        self._code = _Code(path)
        first = self._created(1)
        self._idle.append((first, 1))
        self.sizes: dict[str, int] = {}
        self.names = self._names_of(first)
        self.inputs = self._number("GetNumInputs", first)
        self.outputs = self._number("GetNumOutputs", first)
        spec, out = ctypes.c_char_p(), ctypes.c_char_p()
        self._code.call("GetCallSpec", first, ctypes.byref(spec), ctypes.byref(out))
        self.in_spec, self.out_spec = (spec.value or b"").decode(), (out.value or b"").decode()
        self._entries = _Entry * len(self.names)
        self._handles_in = ctypes.c_void_p * self.inputs
        self._handles_out = ctypes.c_void_p * self.outputs
        self._run = self._code.function("Run")

    def _names_of(self, handle: int) -> dict[str, bytes]:
        names: dict[str, bytes] = {}
        folded = ctypes.c_bool()
        for number in range(self._number("GetNumConstants", handle)):
            place = ctypes.c_size_t(number)
            self._code.call("GetConstantFromFolded", handle, place, ctypes.byref(folded))
            if folded.value:
                raise UnsuitableError("the model computes constants from its weights at run time")
            fqn = self._text("GetConstantOriginalFQN", handle, number).decode()
            if fqn in names:
                raise UnsuitableError(f"the library has two weights of the name {fqn!r}")
            names[fqn] = self._text("GetConstantName", handle, number)
            size = ctypes.c_size_t()
            self._code.call("GetConstantDataSize", handle, place, ctypes.byref(size))
            self.sizes[fqn] = size.value
        return names

    def _number(self, function: str, handle: int) -> int:
        found = ctypes.c_size_t()
        self._code.call(function, handle, ctypes.byref(found))
        return found.value

    def _text(self, function: str, handle: int, number: int) -> bytes:
        found = ctypes.c_char_p()
        self._code.call(function, handle, ctypes.c_size_t(number), ctypes.byref(found))
        return found.value or b""

    # -- containers ---------------------------------------------------------------------------

    def _created(self, models: int) -> int:
        found = ctypes.c_void_p()
        self._code.call(
            "CreateWithDevice",
            ctypes.byref(found),
            ctypes.c_size_t(models),
            self._device.encode(),
            os.fsencode(self._folder),
        )
        return found.value or 0

    def filled(self, owner: Container) -> int:
        """Return a container that has the tensors of its owner as its weights, as they are.

        Raises:
            EngineError: The library refused.
        """
        self.reap()
        handle = self._take_idle(owner.models) or self._created(owner.models)
        aliases = [tensor.detach() for tensor in owner.tensors.values()]
        given: list[int] = []
        try:
            given = _handles_of(aliases)
            pairs = zip(owner.tensors, given, strict=True)
            entries = self._entries(*[_Entry(self.names[fqn], one) for fqn, one in pairs])
            count = ctypes.c_size_t(len(given))
            yes = ctypes.c_bool(True)  # noqa: FBT003 - C
            self._code.call(
                "UpdateUserManagedConstantBufferPairs", handle, entries, count, yes, yes
            )
            self._code.call("SwapConstantBuffer", handle)
            # weights that came with the library, and are not used any more
            self._code.call("FreeInactiveConstantBuffer", handle)
            end = weakref.ref(owner, self._on_end)
            one = _Filled(handle, end, owner.models, owner.tensors, owner.events, _process)
            self._filled[one] = None
        except BaseException:
            # The container may have handles that nobody can delete now. So their memory is freed.
            for alias in aliases:
                alias.set_()  # type: ignore[call-overload]  # as documented
            self._code.call("Delete", handle)
            raise
        finally:
            # the container has made handles of its own
            self._unused += given
            self._delete_unused()
        return handle

    def _take_idle(self, models: int) -> int:
        """Return an emptied container with so many models; 0 if there is none."""
        while self._idle:
            try:
                handle, found = self._idle.pop()
            except IndexError:  # another thread has taken it
                return 0
            if found == models:
                return handle
            self._code.call("Delete", handle)
        return 0

    def run(self, handle: int, tensors: Sequence[torch.Tensor], stream: int | None) -> Answer:
        """Call a container, without the GIL.

        Returns:
            The outputs and the text of the library's error, of which one is empty. An error that is
            raised here would keep the container alive as long as its traceback.
        """
        inputs = self._handles_in(*_handles_of(tensors))
        outputs = self._handles_out()
        # The container owns the input handles now, and frees them also if it fails.
        failed = self._run(handle, inputs, self.inputs, outputs, self.outputs, stream, None)
        return ([], self._code.last_error()) if failed else (_tensors_of(outputs), "")

    def reap(self) -> None:
        """Empty the containers whose owners are gone, once their last calls have ended.

        This runs when an owner goes. Where an interrupt ends it, the next time does the rest:
        CPython raises one in a call or behind it, and never between two plain assignments.
        """
        for one in list(self._filled):
            if one.owner() is not None or not all(event.query() for event in one.events.values()):
                continue
            try:
                del self._filled[one]
                unused = self._pointers_in(one.handle)
            except KeyError:  # another thread has taken it
                continue
            except BaseException:
                self._filled[one] = None
                raise
            self._unused += unused
            self._put_back(one)
        self._delete_unused()

    def busy(self) -> list[Mapping[str, torch.Tensor]]:
        """Return sets of weights without an owner that a GPU may still read."""
        return [one.tensors for one in list(self._filled) if one.owner() is None]

    def _pointers_in(self, handle: int) -> list[int]:
        """Return a container's handles of its weights, which nothing else deletes.

        The container keeps them and never follows them: it is filled or deleted next.
        """
        return [entry.handle for entry in self._entries_of(handle)]

    def _put_back(self, one: _Filled) -> None:
        """Keep an emptied container for other weights, or delete it."""
        if one.process is not _process:
            return  # its locks may be held forever
        if len(self._idle) < _IDLE:
            self._idle.append((one.handle, one.models))
        else:
            self._code.call("Delete", one.handle)

    def _delete_unused(self) -> None:
        # All of it runs in C, so no interrupt comes between taking a handle and deleting it.
        with suppress(IndexError):
            deque(map(self._code.delete_tensor, iter(self._unused.pop, None)), 0)

    def _entries_of(self, handle: int) -> list[_Entry]:
        """Return the weights of a container. They are valid until it is asked again."""
        entries, count = ctypes.POINTER(_Entry)(), ctypes.c_size_t()
        no = ctypes.c_bool(False)  # noqa: FBT003 - C
        self._code.call(
            "ExtractConstantsMapEntries", handle, ctypes.byref(entries), ctypes.byref(count), no
        )
        return [entries[number] for number in range(count.value)]

    def held(self, handle: int) -> dict[str, torch.Tensor]:
        """Return aliases of the weights that a container has, by FQN: asked of the container."""
        entries = self._entries_of(handle)
        names = [entry.name.decode() for entry in entries]
        copies = [self._code.new_handle(entry.handle) for entry in entries]
        return dict(zip(names, _tensors_of(copies), strict=True))

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_exiting() or not hasattr(self, "_code"):
            return
        # no container has an owner any more: owners keep the library
        for one in self._filled:
            for event in one.events.values():
                event.synchronize()
        with suppress(EngineError):
            self.reap()
        for handle, _ in self._idle:
            with suppress(EngineError):
                self._code.call("Delete", handle)


@dataclass(frozen=True, eq=False)
class _Filled:
    """A container with weights.

    Attributes:
        handle: The container. It is used again, with other weights and another owner.
        owner: Refers to the ``Container``, as long as calls can use it.
        models: How many calls it serves side by side.
        tensors: The weights.
        events: The last event of each stream of a GPU that has called it.
        process: The process that filled it.
    """

    handle: int
    owner: weakref.ref[Container]
    models: int
    tensors: Mapping[str, torch.Tensor]
    events: Mapping[int, Any]
    process: object


def _reaper(
    library: weakref.ref[Library], is_exiting: Callable[[], bool] = sys.is_finalizing
) -> Callable[[object], None]:
    """Return what is called when an owner goes."""

    def reap(_: object) -> None:
        found = None if is_exiting() else library()
        if found is not None:
            found.reap()

    return reap


class _Code:
    """The functions of one loaded library. The library is unloaded with this object.

    Attributes:
        delete_tensor: Deletes a handle of a tensor.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as exc:
            raise UnsuitableError(f"the library cannot be loaded: {exc}") from exc
        missing = [name for name in _ALL_NEEDED if not hasattr(self._functions, name)]
        if missing:
            raise UnsuitableError(f"it was compiled by a version of torch without {missing[0]}")
        torch_library = _torch_library()
        self.delete_tensor = torch_library.aoti_torch_delete_tensor_object
        self.delete_tensor.argtypes = [ctypes.c_void_p]
        self._new = torch_library.aoti_torch_new_tensor_handle
        self._new.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def function(self, name: str) -> Any:
        """Return a function that takes a container first. It returns 0 unless it failed."""
        found = getattr(self._functions, _PREFIX + name)
        if name == "Run":
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            found.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        return found

    def call(self, name: str, handle: Any, *args: Any) -> None:
        """Call a function.

        Raises:
            EngineError: It failed; with the text of the library.
        """
        first = ctypes.c_void_p(handle) if isinstance(handle, int) else handle
        if self.function(name)(first, *args):
            raise EngineError(f"The compiled library failed in {name}: {self.last_error()}")

    def last_error(self) -> str:
        """Return the text of the last failure in this thread."""
        text = ctypes.c_char_p()
        self._functions.AOTInductorGetLastError(ctypes.byref(text))
        return (text.value or b"no reason given").decode(errors="replace")

    def new_handle(self, handle: int) -> int:
        """Return another handle of a tensor."""
        found = ctypes.c_void_p()
        self._new(handle, ctypes.byref(found))
        return found.value or 0

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_functions"):
            _ctypes.dlclose(self._functions._handle)  # noqa: SLF001 - ctypes has no public one


def _torch_library() -> Any:
    """Return torch's C functions for handles of tensors; the process has loaded them."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _handles_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return a new handle of each tensor; whoever gets it deletes it."""
    capsules = _aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    return [_pointer_of(capsule, None) for capsule in capsules]


def _tensors_of(handles: Any) -> list[Any]:
    """Return the tensors of handles, and delete the handles. Null is the output None."""
    # the function for a single tensor (2.14) does not delete its handle
    capsules = [_capsule_of(handle, None, None) for handle in handles if handle]
    found: list[Any] = _aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    if len(found) == len(handles):
        return found
    tensors = iter(found)
    return [next(tensors) if handle else None for handle in handles]


class UnsuitableError(Exception):
    """A library has to be called through torch's binding; says why."""


def opened(path: Path, device: str) -> Library | str:
    """Load a library, or return why it has to be called through torch's binding.

    This runs code of the library.

    Args:
        path: Path of the shared library.
        device: Device that it was compiled for.
    """
    if os.environ.get(SWITCH):
        return _SWITCHED_OFF
    if not hasattr(_aoti, "alloc_tensors_by_stealing_from_void_ptrs"):
        return "this version of torch gives no handles of tensors"
    if _needs_proxy_executor(path):
        return PROXY
    try:
        return Library(path, device)
    except UnsuitableError as exc:
        return str(exc)
    except EngineError as exc:
        return f"it cannot make a container: {exc.message}"


def _needs_proxy_executor(path: Path) -> bool:
    described = path.with_suffix(".json")
    return described.exists() and has_proxy_nodes(described.read_bytes())


def has_proxy_nodes(described: bytes) -> bool:
    """Return whether a library calls operators through a proxy executor of the binding.

    Args:
        described: The file of its name and the ending ``.json`` (``AOTIModelContainerRunner``).
    """
    return bool(json.loads(described).get("nodes"))


def lacking_in(text: bytes) -> str:
    """Return the first function of the C interface that a text does not name; empty if none.

    Args:
        text: A library that was not loaded, or torch's header of the interface.
    """
    return next((name for name in _ALL_NEEDED if name.encode() not in text), "")


def lacking_here() -> str:
    """Return why libraries that are compiled here need torch's binding; empty if they do not."""
    if os.environ.get(SWITCH):
        return _SWITCHED_OFF
    header = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_runtime/interface.h"
    lacking = lacking_in(header.read_bytes()) if header.exists() else ""
    return f"this version of torch has no {lacking}" if lacking else ""


# -- one set of weights -----------------------------------------------------------------------


class Container:
    """Serves calls from one set of tensors, until its last reference goes.

    Attributes:
        tensors: The weights by FQN, which are used as they are and never change.
        models: How many calls it serves side by side.
        events: The last event of each stream of a GPU that has called it, by the stream.
    """

    def __init__(
        self,
        library: Library,
        tensors: Mapping[str, torch.Tensor],
        models: int = 1,
    ) -> None:
        """Make a container; nobody calls it yet.

        Args:
            library: The model's library.
            tensors: All weights, each as the library lays it out, aligned to ``ALIGNMENT``.
            models: See the attribute.

        Raises:
            EngineError: The library refused.
        """
        self.tensors, self.models = tensors, models
        self.events: dict[int, Any] = {}
        gpus = (t.device for t in tensors.values() if t.device.type == "cuda")
        self._gpu = next(gpus, None)
        self._library, self._process = library, _process
        self._handle = library.filled(self)

    def run(self, inputs: Sequence[torch.Tensor]) -> Answer:
        """Return the outputs of a call, or an error; see ``Library.run``.

        On a GPU, the call is launched on the current stream.
        """
        if self._process is not _process:
            self._renew()
        if self._gpu is None:
            return self._library.run(self._handle, inputs, None)
        stream = torch.cuda.current_stream(self._gpu)
        answer = self._library.run(self._handle, inputs, stream.cuda_stream)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        event.record(stream)
        # the last call of each stream: its event comes after those of all earlier ones
        self.events[stream.cuda_stream] = event
        return answer

    def _renew(self) -> None:
        """Use another container of the library in a forked child.

        Another thread of the parent may have been in a call. Here that call never ends, and it
        keeps a model and a lock of its container. Threads that do this together do no harm.
        """
        self._handle = self._library.filled(self)
        self._process = _process

    def held(self) -> dict[str, torch.Tensor]:
        """Return the weights that the container itself has; see ``Library.held``."""
        return self._library.held(self._handle)


_process = object()
"""Stands for this process."""


def _after_fork_in_child() -> None:
    global _process  # noqa: PLW0603 - it is a fact of the process
    _process = object()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Turns:
    """Lets as many calls in at once as a container has models; the others wait.

    Each model has a lock. A call queues for the one that the fewest calls queue for. ``with``
    enters and leaves a lock in C, so an interrupt never leaves one held.
    """

    def __init__(self, models: int) -> None:
        """Start with all models free."""
        self._queues: list[dict[object, None]] = [{} for _ in range(models)]
        # a forked child lacks the threads that queue for a lock of another thread
        self._locks = [ForkedLock(queue.clear) for queue in self._queues]

    def take(self, do: Callable[[], T]) -> T:
        """Return the result of a function, run in a turn."""
        if len(self._locks) == 1:
            with self._locks[0].held:
                return do()
        shortest = min(range(len(self._locks)), key=lambda number: len(self._queues[number]))
        queue, me = self._queues[shortest], object()
        try:
            queue[me] = None
            with self._locks[shortest].held:
                return do()
        finally:
            queue.pop(me, None)
