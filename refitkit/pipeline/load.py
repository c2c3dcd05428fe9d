"""The stage ``load``: targets into compiled modules, weights into sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from refitkit.errors import (
    RefitError,
    ResourceError,
    SourceError,
    UnsupportedTargetError,
    raised_as,
)
from refitkit.files.file_state import stat_of
from refitkit.pipeline.backends import plan_in
from refitkit.pipeline.clock import StageClock
from refitkit.pipeline.needs import missing_needs
from refitkit.pipeline.origin import LoadOrigin
from refitkit.pipeline.saved import handle_on
from refitkit.pipeline.tools import tools_for
from refitkit.pipeline.unopened import file_type
from refitkit.protocols import KeepsMade, MadeOf, MayChange, WeightSource
from refitkit.recipe.sources import require_reread

if TYPE_CHECKING:
    from refitkit.config import Config
    from refitkit.host import Host
    from refitkit.pipeline.compiled import CompiledModule
    from refitkit.pipeline.pipeline import Pipeline
    from refitkit.protocols import OpenedModule, Tools


def load_module(pipeline: Pipeline, target: object, *, warm: bool) -> CompiledModule:
    """A handle on a target, which remembers where it came from; see ``Pipeline.load``."""
    host, config = pipeline.host, pipeline.config
    with StageClock(host, "load").stage("open"):
        tools = tools_for(host, config, "load", "open")
        origin = LoadOrigin.of(target)
        try:
            opened = open_target(host, target, config, tools)
        except ResourceError:
            raise
        except RefitError as exc:
            named = _naming_plugins(pipeline, target, exc)
            if named is None:
                raise
            raise named from exc
        compiled = handle_on(opened, pipeline.open_weights, pipeline)
        compiled.origin = origin
        compiled.target = None if isinstance(target, str | Path) else target
    if warm:
        with StageClock(host, "load").stage("warm"):
            compiled.warm(tools_for(host, config, "load", "warm").progress)
    return compiled


def _naming_plugins(pipeline: Pipeline, target: object, exc: RefitError) -> RefitError | None:
    """The error again, after the plugins that the plan of a saved module needs and that lack.

    None where none lacks, or nobody can read a plan there.
    """
    path = _as_path(target)
    if not isinstance(path, Path):
        return None
    try:
        data = plan_in(pipeline.backends, path, pipeline.open_weights).data
        problems = list(missing_needs(pipeline.host, pipeline.config, data))
    except RefitError:
        return None
    if not problems:
        return None
    hint = f"Plugins that its plan needs are not in use here. {exc.hint}".strip()
    return type(exc)(exc.message, problems=[*problems, *exc.problems], hint=hint)


def open_target(host: Host, target: object, config: Config, tools: Tools) -> OpenedModule:
    """Open a target with the first plugin that can.

    Raises:
        UnsupportedTargetError: It is missing, or no plugin can.
    """
    target = _as_path(target)
    opened: OpenedModule | None = host.call(
        "refitkit_load_module", target=target, config=config, tools=tools
    )
    if opened is None and _is_missing_file(target):
        raise UnsupportedTargetError(f"There is no file {str(target)!r}.")
    if opened is None:
        kind = file_type(target)
        if kind and kind.as_module:
            message = f"{_shown(target)} is {kind.what}."
            raise UnsupportedTargetError(_capital(message), hint=kind.as_module)
        raise UnsupportedTargetError(
            f"No plugin can open {_shown(target)}.",
            hint="`refitkit plugins` lists them; `refitkit doctor` says what is possible here.",
        )
    return opened


def open_weights(host: Host, weights: object, config: Config) -> WeightSource:
    """Open anything that a user calls weights with the first plugin that can.

    Raises:
        SourceError: It is missing, or no plugin can.
    """
    if isinstance(weights, WeightSource):
        return weights
    weights = _as_path(weights)

    def opener(others: object) -> WeightSource:
        return open_weights(host, others, config)

    source: WeightSource | None = host.call(
        "refitkit_load_weights", source=weights, config=config, open_weights=opener
    )
    if source is None and _is_missing_file(weights):
        raise SourceError(f"There is no file {str(weights)!r}.")
    if source is None:
        kind = file_type(weights)
        if kind and kind.as_weights:
            message = f"{_shown(weights)} is {kind.what}, and no weights."
            raise SourceError(_capital(message), hint=kind.as_weights)
        raise SourceError(
            f"No plugin can read weights from {_shown(weights)}.", hint=_what_is_read(weights)
        )
    return source


def for_one_refit(host: Host, weights: object, config: Config, *, rollback: bool) -> WeightSource:
    """Weights that are looked at several times and then forgotten; see ``open_weights``.

    What is computed for the first look is kept for the others, up to ``Config.keep_limit``. Not
    without a way back: who gives that up has no memory for another set of weights.
    """
    source = open_weights(host, weights, config)
    if rollback and isinstance(source, KeepsMade):
        return source.keeping(config.keep_limit)
    return source


def require_unchanged(source: WeightSource, *, reread: bool = False) -> None:
    """Check that all that a source gave is of one version of the weights.

    Args:
        source: The weights.
        reread: Whether all that was read from files is read a second time; see ``Config.reread``.

    Raises:
        SourceError: Files were written to since they were opened, or it cannot tell.
    """
    with raised_as(SourceError, f"{source.description} cannot be read"):
        if isinstance(source, MayChange):
            source.require_unchanged()
        if reread and not isinstance(source, MadeOf):
            require_reread(source)
    if isinstance(source, MadeOf):
        require_unchanged(source.given, reread=reread)


def _what_is_read(weights: object) -> str:
    """What the built-in readers would have opened in place of this."""
    if not isinstance(weights, Path):
        return (
            "Pass a state_dict, an nn.Module, an ExportedProgram, or the path of a .safetensors or "
            "torch.save file."
        )
    if weights.is_dir():
        return (
            "A folder needs model, diffusion_pytorch_model or pytorch_model with the ending "
            ".safetensors or .bin, or the index of such shards (.index.json after it), or "
            ".metadata of a distributed checkpoint. Or pass the file that is meant."
        )
    return (
        "Files are known by how their names end: .safetensors, .index.json of shards, and .pt, "
        ".pth, .bin or .ckpt of torch.save. Rename it, or link to it under such a name."
    )


def _as_path(thing: Any) -> Any:
    """A string that names a file, as a path. Others are left as they are: a plugin's own names."""
    return Path(thing) if isinstance(thing, str) and _exists(thing) else thing


def _is_missing_file(thing: object) -> bool:
    return isinstance(thing, str | Path) and not _exists(thing)


def _exists(name: str | Path) -> bool:
    return stat_of(Path(name)) is not None


def _capital(message: str) -> str:
    return f"{message[0].upper()}{message[1:]}"


def _shown(thing: object) -> str:
    return repr(str(thing)) if isinstance(thing, str | Path) else f"a {type(thing).__name__}"
