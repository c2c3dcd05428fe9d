"""``refitkit doctor``: what is possible on this machine, and what to install otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from refitkit import __version__
from refitkit.cli import machine
from refitkit.cli.known import IN_USE, all_plugins
from refitkit.cli.machine import Finding
from refitkit.cli.options import common_options
from refitkit.cli.session import Session
from refitkit.cli.tables import table

if TYPE_CHECKING:
    from rich.console import Console

_AOTINDUCTOR, _TORCH_TENSORRT, _NETWORK = "aotinductor", "torch_tensorrt", "tensorrt_network"
_ABILITIES = ("compile", "load", "refit")
_EXTRAS = "pip install 'refitkit[rtx]' (TensorRT-RTX) or 'refitkit[tensorrt]' (TensorRT)"


@dataclass(frozen=True)
class _Backend:
    """What one backend can do here; None where its plugin alone could tell.

    Attributes:
        name: Its name.
        compile: Whether it can compile.
        load: Whether it can open what was compiled elsewhere.
        refit: Whether it can refit that.
        hint: What to do about what it cannot.
    """

    name: str
    compile: bool | None = None
    load: bool | None = None
    refit: bool | None = None
    hint: str = "its plugin does not tell"


@click.command("doctor", short_help="Tell what is possible on this machine.")
@common_options
@click.pass_context
def doctor_command(ctx: click.Context) -> None:
    """Tell what is possible on this machine, and what to install for the rest.

    Exits with 0 if refitting is possible with any backend.
    """
    session = ctx.ensure_object(Session)
    session.progress.say("looking around")
    findings = _findings()
    backends = _backends(session, {one.name: one for one in findings})
    possible = any(backend.refit is not False for backend in backends)
    plugins = all_plugins(session)
    data = {
        "ok": possible,
        "machine": [asdict(one) for one in findings],
        "backends": [asdict(one) for one in backends],
        "plugins": [
            {"name": one.name, "origin": one.origin, "state": one.state} for one in plugins
        ],
    }
    names = [f"{one.name} ({one.origin if one.state == IN_USE else one.state})" for one in plugins]
    session.result(data, lambda console: _print(console, findings, backends, names))
    ctx.exit(0 if possible else 1)


def _findings() -> list[Finding]:
    return [
        Finding("refitkit", __version__),
        machine.system(),
        machine.torch_here(),
        machine.gpu(),
        machine.driver(),
        machine.compiler(),
        machine.openssl(),
        machine.temporary_folder(),
        machine.package("TensorRT", "tensorrt"),
        machine.package("TensorRT-RTX", "tensorrt_rtx"),
        machine.package("Torch-TensorRT", "torch_tensorrt"),
        machine.runtime_flavour(),
    ]


def _backends(session: Session, found: dict[str, Finding]) -> list[_Backend]:
    if not found["torch"].ok:
        return []
    try:
        names = list(session.pipeline().backends)
    except Exception as exc:  # noqa: BLE001 - whatever a plugin does, the rest is still told
        return [_Backend("?", False, False, False, f"cannot be listed: {exc}")]  # noqa: FBT003
    known = {
        _AOTINDUCTOR: _aotinductor,
        _TORCH_TENSORRT: _torch_tensorrt,
        _NETWORK: _tensorrt_network,
    }
    return [known[name](found) if name in known else _Backend(name) for name in names]


def _aotinductor(found: dict[str, Finding]) -> _Backend:
    """AOTInductor compiles C++; to load and refit what it made takes torch alone."""
    runs = found["temporary folder"]
    needed = [found["C++ compiler"], found["openssl"], runs]
    hints = [one.hint for one in needed if not one.ok]
    if not found["CUDA device"].ok:
        hints.append("CPU modules only: no CUDA device")
    return _Backend(
        _AOTINDUCTOR,
        compile=all(one.ok for one in needed),
        load=runs.ok,
        refit=runs.ok,
        hint="\n".join(hints),
    )


def _torch_tensorrt(found: dict[str, Finding]) -> _Backend:
    """Its engines run, and take weights, on a GPU only."""
    able = found["Torch-TensorRT"].ok and found["CUDA device"].ok
    hints = [] if found["Torch-TensorRT"].ok else [_EXTRAS]
    if not found["CUDA device"].ok:
        hints.append("needs a CUDA device; 'tensorrt_network' plans and builds without one")
    return _Backend(_TORCH_TENSORRT, able, able, able, "\n".join(hints))


def _tensorrt_network(found: dict[str, Finding]) -> _Backend:
    """It builds without a GPU, which TensorRT-RTX alone can do."""
    able = found["Torch-TensorRT"].ok and found["TensorRT-RTX"].ok
    return _Backend(_NETWORK, able, able, able, "" if able else _EXTRAS)


def _print(
    console: Console, findings: list[Finding], backends: list[_Backend], plugins: list[str]
) -> None:
    rows = [(one.name, one.found, "" if one.ok else one.hint) for one in findings]
    console.print(table(("what", "found", "to do"), rows, "machine"))
    can = {True: "yes", False: "no", None: "?"}
    abilities = [
        (one.name, *(can[getattr(one, ability)] for ability in _ABILITIES), one.hint)
        for one in backends
    ]
    console.print(table(("backend", *_ABILITIES, "to do"), abilities, "backends"))
    console.print(f"plugins: {', '.join(plugins)}")
