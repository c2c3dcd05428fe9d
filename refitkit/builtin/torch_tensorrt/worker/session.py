"""What a session does: it reads a program, holds its networks, gives values and builds engines."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.builtin.torch_tensorrt.lowering import lower
from refitkit.builtin.torch_tensorrt.networks import Network
from refitkit.builtin.torch_tensorrt.options import settings_from, versions
from refitkit.builtin.torch_tensorrt.parts import cut
from refitkit.builtin.torch_tensorrt.settings import settings_text
from refitkit.builtin.torch_tensorrt.torch_tensors import TorchTensors
from refitkit.builtin.torch_tensorrt.worker import programs, wire
from refitkit.builtin.torch_tensorrt.worker.regions import Region
from refitkit.errors import CompileError
from refitkit.model import LayerType

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from refitkit.builtin.torch_tensorrt.parts import Part

_LOG_LINES = 5


class Session:
    """One program, in a process of its own. Every public method can be called from outside."""

    def __init__(self, channel: socket.socket) -> None:
        """Serve one client."""
        self._channel = channel
        self._parts: tuple[Part, ...] = ()
        self._holders: dict[str, Network | TorchTensors] = {}
        self._regions: dict[str, Region] = {}

    def serve(self) -> None:
        """Answer until the client is gone."""
        while True:
            request = wire.receive(self._channel)
            try:
                method = getattr(self, request["method"])
                answer = {"result": method(**request["arguments"])}
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
    ) -> dict[str, Any]:
        """Read a program, cut it into parts, and make networks of them.

        Args:
            folder: Where ``programs.write`` has put the program.
            options: The backend's options.
            layer_types: Layer types that hold weights, as plain data.
            imports: Modules to import first, because they register ops or converters.

        Returns:
            Structures and slots of all parts, settings and versions, as plain data.
        """
        for name in imports:
            importlib.import_module(name)
        types = {one.name: one for one in map(LayerType.model_validate, layer_types)}
        settings = settings_from(options)
        self._tell("lowering the program")
        lowered = lower(programs.read(Path(folder)), settings)
        self._tell("cutting the program into parts")
        self._parts = cut(lowered, settings).parts
        for part in self._parts:
            self._tell(f"reading the weights of {part.name}")
            self._holders[part.name] = (
                Network(part, settings, types)
                if part.structure.accelerated
                else TorchTensors(part.name, part.module)
            )
        return {
            "structures": [part.structure.model_dump() for part in self._parts],
            "slots": {
                name: [slot.model_dump() for slot in holder.slots]
                for name, holder in self._holders.items()
            },
            "settings": settings_text(settings),
            "versions": versions(),
        }

    def values(self, folder: str) -> None:
        """Write the values of all slots: a region for each part, in a file of its name."""
        for name, holder in self._holders.items():
            self._copied(holder, Path(folder) / name)

    def _copied(self, holder: Network | TorchTensors, path: Path) -> Region:
        region = Region.create(path, holder.slots)
        for name, value in holder.scanned.items():
            region.views[name].copy_(value)
        return region

    def settle(self, engine: str, path: str) -> None:
        """Move the values of a part into a file, and have its layers read them there."""
        self._point(engine, self._copied(self._holders[engine], Path(path)))

    def point(self, engine: str, path: str) -> None:
        """Have the layers of a part read their values from a file."""
        self._point(engine, Region.open(Path(path), self._holders[engine].slots))

    def _point(self, engine: str, region: Region) -> None:
        self._holders[engine].point(region.views)
        self._regions[engine] = region  # keeps the memory mapped

    def build(self, engine: str, path: str) -> int:
        """Build a part with its present values and write the engine bytes; returns their number.

        In a process of its own: one in which a build failed cannot build again.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._build_and_exit(engine, path, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        if not said:
            raise CompileError(
                f"The process that built {engine!r} died (status {status}).",
                hint="Memory may have run out, or TensorRT crashed: its log says more.",
            )
        answer = json.loads(said)
        if "error" in answer:
            raise wire.unpack_error(answer["error"])
        return int(answer["result"])

    def _build_and_exit(self, engine: str, path: str, writer: int) -> None:
        log = _Log()
        logging.getLogger("torch_tensorrt").addHandler(log)
        try:
            holder = self._holders[engine]
            content = holder.build() if isinstance(holder, Network) else b""
            Path(path).write_bytes(content)
            answer: dict[str, Any] = {"result": len(content)}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            packed = wire.pack_error(exc)
            packed["hint"] = "\n".join([*log.lines[-_LOG_LINES:], packed["hint"]]).strip()
            answer = {"error": packed}
        try:
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)


class _Log(logging.Handler):
    """Keeps what TensorRT logs as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())
