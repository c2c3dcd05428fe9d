"""The process that imports torch_tensorrt once and forks a session for whoever asks.

It makes no network and builds nothing itself: what is forked from it starts clean.
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
from refitkit.builtin.torch_tensorrt.worker import messages as programs
from refitkit.builtin.torch_tensorrt.worker import messages as recordings
from refitkit.builtin.torch_tensorrt.worker import messages as wire
from refitkit.builtin.torch_tensorrt.worker.messages import Region
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
    """Serve on the socket whose descriptor is the first argument, until its other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # sessions that end leave no zombies
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = wire.receive(channel)
    try:
        with _quietly():
            upstream.import_headless()
            with contextlib.suppress(Exception):  # sessions will fail alike, and tell it
                warm_up()
    except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
        wire.send(channel, {"error": wire.pack_error(exc)})
        return
    gc.collect()
    gc.freeze()  # or the first collection in each session would copy all of torch's objects
    wire.send(channel, {"ready": os.getpid()})
    while True:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            channel.close()
            _serve(descriptors[0])
        os.close(descriptors[0])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what libraries print, which all warn that there is no GPU, unless they fail."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(kept, aside.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _serve(descriptor: int) -> None:
    """Be a session, and never return."""
    code = 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with socket.socket(fileno=descriptor) as channel, contextlib.suppress(EOFError, OSError):
            WorkerSession(channel).serve()
        code = 0
    finally:
        os._exit(code)


# MERGED session: What a session does: it reads a program, holds its networks, gives values and
# builds engines.

_LOG_LINES = 5


class WorkerSession:
    """One program, in a process of its own. Every public method can be called from outside."""

    def __init__(self, channel: socket.socket) -> None:
        """Serve one client."""
        self._channel = channel
        self._holders: Mapping[str, Network | TorchTensors] = {}

    def serve(self) -> None:
        """Answer until the client is gone."""
        while True:
            request = wire.receive(self._channel)
            try:
                method = getattr(self, request["method"])
                answer = {"result": method(**request["arguments"])}
            except EOFError:
                raise
            except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
                answer = {"error": wire.pack_error(exc)}
            wire.send(self._channel, answer)

    def _tell(self, text: str) -> None:
        wire.send(self._channel, {"tell": text})

    def open(
        self,
        folder: str,
        options: Mapping[str, Any],
        layer_types: list[Mapping[str, Any]],
        imports: list[str],
        places: list[str],
        record: bool,  # noqa: FBT001 - passed by name, through JSON
    ) -> dict[str, Any]:
        """Read a program, cut it into parts, and make networks of them.

        Args:
            folder: Where ``programs.write_program`` has put the program.
            options: The backend's options.
            layer_types: Layer types that hold weights, as plain data.
            imports: Modules to import first, because they register ops or converters.
            places: Where the user's process looks for modules by now.
            record: Whether to write down how weights follow from those of the program.

        Returns:
            Structures and slots of all parts, settings, versions, layer types that hold weights,
            and recipes, as plain data.
        """
        sys.path += [place for place in places if place and place not in sys.path]
        for name in imports:
            with raised_as(ConfigError, f"The option 'imports' names {name!r}"):
                importlib.import_module(name)
        types = {one.name: one for one in map(LayerType.model_validate, layer_types)}
        settings = settings_from_options(options)
        program = programs.read_program(Path(folder))
        found = interpret_parts(program, settings, types, self._tell, record=record)
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
            "recorded": None
            if recorded is None
            else recordings.write_recording(recorded, Path(folder)),
        }

    def values(self, folder: str) -> None:
        """Write the values of all slots: a region for each part, in a file of its name."""
        for name in self._holders:
            self.copy(name, str(Path(folder) / name))

    def copy(self, engine: str, path: str) -> None:
        """Write the values of the slots of one part, as a region."""
        holder = self._holders[engine]
        region = Region.create(Path(path), holder.slots)
        for name, value in holder.scanned.items():
            region.views[name].copy_(value)

    def build(self, engine: str, path: str, weights: str | None = None) -> int:
        """Build a part and write the engine bytes; returns their number.

        In a process of its own: one in which a build failed cannot build again. So nothing that a
        build does stays here, and a session is as good after any call as when it was new.

        Args:
            engine: Name of the part.
            path: Where the engine bytes go.
            weights: The region with its values; those of the program where None.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._build_and_exit(engine, path, weights, writer)
        os.close(writer)
        try:
            said = self._awaited(reader)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.close(reader)
            _, status = os.waitpid(child, 0)
        if not said:
            raise CompileError(
                f"The process that built {engine!r} died ({_end(status)}).",
                hint="Memory may have run out, or TensorRT crashed: its log says more.",
            )
        answer = json.loads(said)
        if "error" in answer:
            raise wire.unpack_error(answer["error"])
        return int(answer["result"])

    def _awaited(self, reader: int) -> bytes:
        """What comes through a pipe until it is closed.

        Raises:
            EOFError: The client is gone meanwhile.
        """
        said, ends = b"", [reader, self._channel.fileno()]
        while True:
            ready, _, _ = select.select(ends, [], [])
            if reader not in ready:
                raise EOFError  # a client that waits for an answer sends nothing but its end
            part = os.read(reader, 1 << 16)
            if not part:
                return said
            said += part

    def _build_and_exit(self, engine: str, path: str, weights: str | None, writer: int) -> None:
        try:
            _end_with_parent()
            self._channel.close()  # or the client would not see that the session died
            os.write(writer, json.dumps(self._built(engine, path, weights)).encode())
        finally:
            os._exit(0)

    def _built(self, engine: str, path: str, weights: str | None) -> dict[str, Any]:
        log = _Log()
        logging.getLogger().addHandler(log)  # its loggers are no children of one another
        try:
            holder = self._holders[engine]
            if weights is not None:
                holder.point(Region.open(Path(weights), holder.slots).views)
            content = holder.build() if isinstance(holder, Network) else b""
            Path(path).write_bytes(content)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            packed = wire.pack_error(exc)
            packed["hint"] = "\n".join([*log.lines[-_LOG_LINES:], packed["hint"]]).strip()
            return {"error": packed}
        return {"result": len(content)}


def _end_with_parent() -> None:
    """Have the kernel end this process when the session dies: nobody would want the result."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Log(logging.Handler):
    """Keeps what TensorRT logs as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


# MERGED warmup: What every session would do first, done once in the process that sessions are
# forked from.
#
# The first program that a process reads, lowers and cuts costs a third of a second more than the
# second: modules are imported, tables made, type hints looked up. No network is made and nothing
# is built, so no library starts a thread, and what is forked afterwards starts clean.


class _Small(torch.nn.Module):
    """A little of what most models have; too small for any library to want threads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Of one small image."""
        x = torch.relu(self.norm(self.conv(image)))
        result: torch.Tensor = self.linear(x.mean((2, 3)))
        return result


def warm_up() -> None:
    """Read, lower and cut one small program, as a session does, while a tape watches."""
    _no_monitor()
    program = _handed_over(torch.export.export(_Small().eval(), (torch.zeros(1, 1, 4, 4),)))
    settings = settings_from_options({"min_block_size": 1})
    with Tape(tensors_of(program)):
        partition_program(lower(program, settings), settings, inlined=False)


def _no_monitor() -> None:
    """Have no thread watch progress bars: a fork while it holds their lock would never get it.

    ``torch/fx/interpreter.py`` makes bars, the first of which starts the thread.
    """
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # noqa: PLC0415 - torch_tensorrt brings it, or nothing does

        tqdm.monitor_interval = 0


def _handed_over(program: ExportedProgram) -> ExportedProgram:
    """The same, written and read again."""
    kept = KeptProgram.of(program)
    if kept is None:
        return program
    values = {name: tensor.detach() for name, tensor in tensors_of(program).items()}
    return kept.restore(TensorMap(values), values.__getitem__)


if __name__ == "__main__":
    main()
