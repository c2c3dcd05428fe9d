"""The server process: imports torch_tensorrt once, and forks a session for each request.

Run it with ``python -m``. ``main`` serves requests and forks; each fork runs a
:class:`WorkerSession`, whose public methods are the requests of a ``client.SessionClient``. The
server itself creates no network and builds nothing. So no library has started a thread in it, and
forks start in a clean state.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refitkit.builtin.torch_tensorrt import upstream
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.parts import lower, partition_program
from refitkit.builtin.torch_tensorrt.recording import interpret_parts
from refitkit.builtin.torch_tensorrt.settings import settings_from_options, settings_text, versions
from refitkit.builtin.torch_tensorrt.worker.messages import (
    Region,
    pack_error,
    read_program,
    receive,
    send,
    unpack_error,
    write_recording,
)
from refitkit.errors import CompileError, ConfigError, raised_as
from refitkit.model import LayerType
from refitkit.program import KeptProgram
from refitkit.program.facts import tensors_of
from refitkit.recipe import Tape, TensorMap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.builtin.torch_tensorrt.networks import TorchTensors


def main() -> None:
    """Serve requests until the client closes its end of the socket.

    The first command-line argument is the file descriptor of the socket.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended sessions leave no zombies
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = receive(channel)
    try:
        with _stderr_captured():
            upstream.import_headless()
            with contextlib.suppress(Exception):  # sessions will report the error
                warm_up()
    except Exception as exc:  # noqa: BLE001 - the client gets every error
        send(channel, {"error": pack_error(exc)})
        return
    gc.collect()
    # a collection in a session writes to all objects, and so would copy the memory of torch's
    gc.freeze()
    send(channel, {"ready": os.getpid()})
    while True:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            channel.close()  # only the server reads requests for sessions
            _run_session(descriptors[0])
        os.close(descriptors[0])


@contextlib.contextmanager
def _stderr_captured() -> Iterator[None]:
    """Hide what libraries print to stderr, unless they fail.

    Several of them warn that there is no GPU, which is expected here.
    """
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(original, captured.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _run_session(descriptor: int) -> None:
    """Run a session on a socket, and exit the process."""
    code = 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with socket.socket(fileno=descriptor) as channel, contextlib.suppress(EOFError, OSError):
            WorkerSession(channel).serve()
        code = 0
    finally:
        os._exit(code)  # without the exit handlers of the server


# -- sessions ------------------------------------------------------------------------------------

_LOG_LINES = 5


class WorkerSession:
    """One program, in a process of its own. The client can call every public method.

    A method's arguments and result are JSON data.
    """

    def __init__(self, channel: socket.socket) -> None:
        """Create a session for the client at the other end of the socket."""
        self._channel = channel
        self._holders: Mapping[str, Network | TorchTensors] = {}

    def serve(self) -> None:
        """Answer requests until the client closes its end."""
        while True:
            request = receive(self._channel)
            try:
                method = getattr(self, request["method"])
                answer = {"result": method(**request["arguments"])}
            except EOFError:
                raise
            except Exception as exc:  # noqa: BLE001 - the client gets every error
                answer = {"error": pack_error(exc)}
            send(self._channel, answer)

    def _report_progress(self, text: str) -> None:
        send(self._channel, {"progress": text})

    def open(
        self,
        folder: str,
        options: Mapping[str, Any],
        layer_types: list[Mapping[str, Any]],
        imports: list[str],
        import_paths: list[str],
        record: bool,  # noqa: FBT001 - passed by name, through JSON
    ) -> dict[str, Any]:
        """Read a program, partition it, and create networks of its parts.

        Args:
            folder: Folder where ``messages.write_program`` has stored the program.
            options: Options of the backend, without ``imports``.
            layer_types: Layer types with weights, as plain data.
            imports: Modules to import first, because they register ops or converters.
            import_paths: ``sys.path`` of the user's process, to find the modules.
            record: Whether to write recipes that compute the weights from those of the program.

        Returns:
            Structures and slots of all parts, settings, versions, names of layer types with
            weights, and recipes, as plain data.
        """
        sys.path += [path for path in import_paths if path and path not in sys.path]
        for name in imports:
            with raised_as(ConfigError, f"The option 'imports' names {name!r}"):
                importlib.import_module(name)
        types = {one.name: one for one in map(LayerType.model_validate, layer_types)}
        settings = settings_from_options(options)
        program = read_program(Path(folder))
        found = interpret_parts(program, settings, types, self._report_progress, record=record)
        self._holders = found.holders
        recorded = found.recorded
        return {
            "structures": [part.structure.model_dump() for part in found.partitioned.parts],
            "slots": {
                name: [slot.model_dump() for slot in holder.slots]
                for name, holder in self._holders.items()
            },
            "settings": settings_text(settings),
            "versions": versions(),
            "layer_types": sorted(
                {name for holder in self._holders.values() for name in holder.layer_types}
            ),
            "recorded": None if recorded is None else write_recording(recorded, Path(folder)),
        }

    def values(self, folder: str) -> None:
        """Write the values of each part as a region, to a file with the part's name."""
        for name in self._holders:
            self.copy(name, str(Path(folder) / name))

    def copy(self, engine: str, path: str) -> None:
        """Write the values of one part as a region."""
        holder = self._holders[engine]
        region = Region.create(Path(path), holder.slots)
        for name, value in holder.scanned.items():
            region.views[name].copy_(value)

    def build(self, engine: str, path: str, weights: str | None = None) -> int:
        """Build a part, write the engine bytes, and return their number.

        The build runs in a process of its own, because a process in which a build failed cannot
        build again. So a build changes nothing in the session.

        Args:
            engine: Name of the part.
            path: File for the engine bytes.
            weights: Region with the values; None for those of the program.

        Raises:
            CompileError: TensorRT refuses the network, or the build process died.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._build_and_exit(engine, path, weights, writer)
        os.close(writer)
        try:
            output = self._read_to_end(reader)
        except BaseException:
            os.kill(child, signal.SIGKILL)  # without the client, the result has no use
            raise
        finally:
            os.close(reader)
            _, status = os.waitpid(child, 0)
        if not output:
            raise CompileError(
                f"The process that built {engine!r} died ({_exit_text(status)}).",
                hint="Memory may have run out, or TensorRT crashed; see its log.",
            )
        answer = json.loads(output)
        if "error" in answer:
            raise unpack_error(answer["error"])
        return int(answer["result"])

    def _read_to_end(self, reader: int) -> bytes:
        """Read from a pipe until its other end is closed.

        Raises:
            EOFError: The client closed its socket before.
        """
        output, ends = b"", [reader, self._channel.fileno()]
        while True:
            ready, _, _ = select.select(ends, [], [])
            if reader not in ready:
                # the client waits for an answer, so its socket is readable only when it closes
                raise EOFError
            part = os.read(reader, 1 << 16)
            if not part:
                return output
            output += part

    def _build_and_exit(self, engine: str, path: str, weights: str | None, writer: int) -> None:
        try:
            _die_with_parent()
            self._channel.close()  # otherwise the client would not notice the session's death
            os.write(writer, json.dumps(self._build(engine, path, weights)).encode())
        finally:
            os._exit(0)

    def _build(self, engine: str, path: str, weights: str | None) -> dict[str, Any]:
        log = _ErrorLog()
        logging.getLogger().addHandler(log)  # TensorRT's loggers have no other common parent
        try:
            holder = self._holders[engine]
            if weights is not None:
                holder.point(Region.open(Path(weights), holder.slots).views)
            content = holder.build() if isinstance(holder, Network) else b""
            Path(path).write_bytes(content)
        except Exception as exc:  # noqa: BLE001 - the client gets every error
            packed = pack_error(exc)
            packed["hint"] = "\n".join([*log.lines[-_LOG_LINES:], packed["hint"]]).strip()
            return {"error": packed}
        return {"result": len(content)}


def _die_with_parent() -> None:
    """Make the kernel kill this process when the session dies: the result would have no use."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def _exit_text(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _ErrorLog(logging.Handler):
    """Collects the messages that TensorRT logs as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store a message."""
        self.lines.append(record.getMessage())


# -- warm-up -------------------------------------------------------------------------------------


class _SmallModel(torch.nn.Module):
    """A model with the most common layers, too small for any library to start threads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Run on images of shape (N, 1, H, W) with H and W of at least 3."""
        x = torch.relu(self.norm(self.conv(image)))
        result: torch.Tensor = self.linear(x.mean((2, 3)))
        return result


def warm_up() -> None:
    """Read, lower and partition a small program under a tape, as each session does first.

    The first program in a process takes a third of a second longer than the second one: modules are
    imported, tables built, type hints resolved. Here this happens once for all sessions.
    """
    _disable_tqdm_monitor()
    program = _round_trip(torch.export.export(_SmallModel().eval(), (torch.zeros(1, 1, 4, 4),)))
    settings = settings_from_options({"min_block_size": 1})
    with Tape(tensors_of(program)):
        partition_program(lower(program, settings), settings, inlined=False)


def _disable_tqdm_monitor() -> None:
    """Prevent tqdm from starting its monitor thread.

    ``torch/fx/interpreter.py`` creates progress bars, and the first bar starts the thread. A
    process that is forked while the thread holds its lock never gets the lock.
    """
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # noqa: PLC0415 - only torch_tensorrt depends on it

        tqdm.monitor_interval = 0


def _round_trip(program: ExportedProgram) -> ExportedProgram:
    """The program, written and read again as for a session."""
    original = KeptProgram.of(program)
    if original is None:
        return program
    values = {name: tensor.detach() for name, tensor in tensors_of(program).items()}
    return original.restore(TensorMap(values), values.__getitem__)


if __name__ == "__main__":
    main()
