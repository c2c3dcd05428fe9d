"""The stage ``partition``: a program cut into parts that match the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refitkit.errors import PlanMismatchError, PluginError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.protocols import OpenedModule, Tools


def partition(
    host: Host,
    program: ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    config: Config,
    tools: Tools,
) -> Mapping[str, Any]:
    """One part for each engine.

    Raises:
        PlanMismatchError: The parts are not those of the module's engines.
        PluginError: No plugin can cut programs for this backend.
    """
    parts: Mapping[str, Any] | None = host.call(
        "refitkit_partition",
        program=program,
        module=module,
        backend=backend,
        options=options,
        config=config,
        tools=tools,
    )
    if parts is None:
        raise PluginError(f"No plugin cuts programs into parts for the backend {backend!r}.")
    engines = module.engines.keys() if module else parts.keys()
    problems = [Problem(name, "no part for this engine") for name in engines - parts.keys()]
    problems += [Problem(name, "no engine for this part") for name in parts.keys() - engines]
    if problems:
        raise PlanMismatchError(
            "The program is cut into other parts than those that were compiled.", problems=problems
        )
    return parts
