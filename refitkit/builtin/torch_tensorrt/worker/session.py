"""What a session does: it reads a program, holds its networks, gives values and builds engines."""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.options import settings_from_options, versions
from refitkit.builtin.torch_tensorrt.recording import read
from refitkit.builtin.torch_tensorrt.settings import settings_text
from refitkit.builtin.torch_tensorrt.worker import programs, recordings, wire
from refitkit.builtin.torch_tensorrt.worker.regions import Region
from refitkit.errors import CompileError, ConfigError, raised_as
from refitkit.model import LayerType

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from refitkit.builtin.torch_tensorrt.torch_tensors import TorchTensors

_LOG_LINES = 5


class Session:
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
        found = read(program, settings, types, self._tell, record=record)
        self._holders = found.holders
        recorded = found.recorded
        return {
            "structures": [part.structure.model_dump() for part in found.cut.parts],
            "slots": {
                name: [slot.model_dump() for slot in holder.slots]
                for name, holder in self._holders.items()
            },
            "settings": settings_text(settings),
            "versions": versions(),
            "layer_types": sorted(
                {name for holder in self._holders.values() for name in holder.layer_types}
            ),
            "recorded": None if recorded is None else recordings.write_recording(recorded, Path(folder)),
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
