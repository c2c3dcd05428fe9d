"""The stage ``load``: compiled modules from targets, and weight sources from weights.

If no plugin can open a target or weights, ``file_type`` examines them, so that the error can name
the type of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.export import ExportedProgram

from refitkit.errors import (
    ConfigError,
    PlanMismatchError,
    PluginError,
    RefitError,
    ResourceError,
    SourceError,
    UnsupportedTargetError,
    raise_if_resource,
    raised_as,
)
from refitkit.files.archive import saying_why
from refitkit.files.file_state import stat_of
from refitkit.offered import received, received_bytes, received_module
from refitkit.pipeline.history import LoadOrigin, WeightState
from refitkit.pipeline.mapping import decode_overridden, encode_overridden
from refitkit.pipeline.module import CompiledModule
from refitkit.pipeline.needs import describe_need, missing_needs
from refitkit.pipeline.stage import publishes
from refitkit.pipeline.transform import transformed
from refitkit.program import KeptProgram
from refitkit.program.ambient import verb
from refitkit.protocols import (
    KeepsMade,
    MadeOf,
    MayChange,
    OpenedModule,
    ServesSideBySide,
    SharesWeights,
    WeightSource,
)
from refitkit.recipe import Archive, ArchiveError, RefitPlan
from refitkit.recipe.foreign import require_source
from refitkit.recipe.sources import TensorMap, require_reread

if TYPE_CHECKING:
    from refitkit.pipeline.context import Context
    from refitkit.pipeline.module import Verbs
    from refitkit.protocols import Backend
    from refitkit.recipe.plan import Opener


# -- modules ----------------------------------------------------------------------------------


def load_module(
    context: Context,
    target: object,
    verbs: Verbs,
    *,
    warm: bool,
    num_models: int,
    shared: object = None,
) -> CompiledModule:
    """A handle on a target, which remembers where it came from; see ``Pipeline.load``."""
    _require_count(num_models)
    name = Path(target).name if isinstance(target, str | Path) else ""
    clock = context.clock("load", name)
    with clock.stage("open"):
        # taken before the file is read: a change while it is opened must be noticed
        origin = LoadOrigin.of(target)
        try:
            opened = open_target(context, target, shared=shared)
        # a missing plugin is a better reason than the damage that its absence looks like
        except ResourceError:
            raise
        except RefitError as exc:
            named = _with_missing_plugins(context, target, exc)
            if named is None:
                raise
            raise named from exc
        compiled = _handle_on(context, opened, verbs)
        compiled.name = name or compiled.name
        compiled.origin = origin
        # a path is no identity: each load of it opens another module
        compiled.target = None if isinstance(target, str | Path) else target
        if shared is not None:
            # The weights of the file are others, so no version of them is one of those.
            compiled.origin, compiled.state = None, replace(compiled.state, version=-1)
        if num_models > 1:
            _serve(opened, num_models)
    if warm:
        with clock.stage("warm"):
            compiled.warm(context.tools("load", "warm").progress)
    return compiled


MOST_MODELS = 1024
"""More than machines have cores. Each needs memory of its own."""

_ON_COUNT = "num_models is the number of calls that run side by side; leave it out."


_ON_SHARE = "Save the module that shares its weights with refitkit, and load that file."


def _require_count(num_models: object) -> None:
    is_number = isinstance(num_models, int) and not isinstance(num_models, bool)
    if not is_number or num_models not in range(1, MOST_MODELS + 1):
        raise ConfigError(
            f"num_models is {num_models!r}, not a number from 1 to {MOST_MODELS}.", hint=_ON_COUNT
        )


def _serve(opened: OpenedModule, num_models: int) -> None:
    if not isinstance(opened, ServesSideBySide):
        raise ConfigError(f"Modules of {opened.backend!r} take no num_models.", hint=_ON_COUNT)
    opened.serve(num_models)


def open_target(
    context: Context, target: object, during: str = "load", shared: object = None
) -> OpenedModule:
    """The opened module that the first able plugin makes of a target.

    Raises:
        ConfigError: It does not serve from the shared weights.
        UnsupportedTargetError: The target is missing, or no plugin can open it.
    """
    target = _as_path(target)
    plugin, found = context.host.first(
        "refitkit_load_module",
        OpenedModule,
        target=target,
        config=context.config,
        tools=context.tools(during, "open", shared),
    )
    if found is not None:
        opened = received_module(found, f"The plugin {plugin!r} (refitkit_load_module)")
        served = opened.shared if isinstance(opened, SharesWeights) else None
        if shared is not None and served is not shared:
            raise ConfigError(f"{_shown(target)} cannot serve from shared weights.", hint=_ON_SHARE)
        return opened
    kind = _require_there(target, UnsupportedTargetError)
    if kind and kind.as_module:
        message = f"{_shown(target)} is {kind.what}."
        raise UnsupportedTargetError(_capital(message), hint=kind.as_module)
    raise UnsupportedTargetError(
        f"No plugin can open {_shown(target)}.",
        hint="`refitkit plugins` lists the plugins; `refitkit doctor` says what is possible here.",
    )


def _with_missing_plugins(context: Context, target: object, exc: RefitError) -> RefitError | None:
    """The error again, after the plugins that the plan of a saved module needs and that lack.

    None if none lacks, or no plan can be read there.
    """
    path = _as_path(target)
    if not isinstance(path, Path):
        return None
    try:
        problems = list(missing_needs(context, plan_in(context, path).data))
    except RefitError:
        return None
    if not problems:
        return None
    hint = f"Plugins that its plan needs are not in use here. {exc.hint}".strip()
    return type(exc)(exc.message, problems=[*problems, *exc.problems], hint=hint)


# -- saved modules ----------------------------------------------------------------------------

PLAN_MEMBER = "plan.refitplan"
PROGRAM_MEMBER = "program.json"
OVERRIDDEN_MEMBER = "overridden.json"
LABEL_MEMBER = "label.txt"
MAX_LABEL = 256
"""Largest number of characters of a label."""


def save_module(context: Context, compiled: CompiledModule, path: str | Path) -> None:
    """Write a module with its plan and program; see ``Pipeline.save``."""
    path = Path(path)
    with context.clock("save", compiled.name).stage("save"), saying_why(path):
        # no commit may come between what is known of the weights and the weights; the commit of a
        # module that publishes does not wait for calls
        gate, opened = compiled.gate, compiled.opened
        passage = gate.hold if publishes(opened) else gate.call
        passage(lambda: opened.save(path, _attachments_of(compiled)))


def _attachments_of(compiled: CompiledModule) -> dict[str, bytes]:
    attachments: dict[str, bytes] = {}
    if compiled.plan is not None:
        attachments[PLAN_MEMBER] = compiled.plan.to_bytes()
    if compiled.program is not None:
        attachments[PROGRAM_MEMBER] = compiled.program.to_bytes()
    if compiled.state.overridden:
        attachments[OVERRIDDEN_MEMBER] = encode_overridden(compiled.state.overridden)
    if compiled.label:
        attachments[LABEL_MEMBER] = compiled.label.encode()
    return attachments


def _label_in(attached: Mapping[str, bytes]) -> str:
    """The label of the weights of a saved module.

    Raises:
        PlanMismatchError: It is no line of text, or too long.
    """
    try:
        label = bytes(attached.get(LABEL_MEMBER, b"")).decode()
    except UnicodeDecodeError:
        label = "\n"
    if problem := wrong_label(label):
        raise PlanMismatchError(f"The label of the module's weights cannot be read: {problem}.")
    return label


def wrong_label(label: object) -> str:
    """What is wrong with a label; empty if nothing is."""
    if not isinstance(label, str):
        return f"it is a {type(label).__name__}, no text"
    if len(label) > MAX_LABEL:
        return f"it has {len(label)} characters, and may have {MAX_LABEL}"
    return "" if label.isprintable() else "it is not one line of printable text"


def _handle_on(context: Context, opened: OpenedModule, verbs: Verbs) -> CompiledModule:
    """A handle on an opened module, with the plan and program that were saved with it.

    Raises:
        PlanMismatchError: An attachment is damaged.
    """
    attached = received_bytes(opened.attachments, lambda: f"{context.whose(opened)}: attachments")
    if PLAN_MEMBER not in attached:
        compiled = CompiledModule(opened, None, None, verbs)
        compiled.state = WeightState.first(frozenset(), _label_in(attached))
        return compiled
    opener = weight_opener(context)
    plan = RefitPlan.from_bytes(attached[PLAN_MEMBER], "the plan of this module", opener)
    program = None
    if PROGRAM_MEMBER in attached:
        program = KeptProgram(attached[PROGRAM_MEMBER], plan.data.leaves, plan.data.ties)
    compiled = CompiledModule(opened, plan, program, verbs)
    overridden = decode_overridden(attached.get(OVERRIDDEN_MEMBER, b"[]"))
    compiled.state = WeightState.first(overridden, _label_in(attached))
    return compiled


def reopened(context: Context, opened: OpenedModule) -> OpenedModule:
    """A second module with the same weights.

    Raises:
        RefitError: The backend cannot open it a second time; says why.
        PluginError: The backend failed, or gave something else; names its plugin.
    """

    def who() -> str:
        return f"{context.whose(opened)}: reopen()"

    doing = "The module cannot be copied"
    with raised_as(PluginError, lambda: f"{who()} failed", doing=doing):
        found = opened.reopen()
    return received_module(found, who)


def copy_of(context: Context, compiled: CompiledModule, verbs: Verbs) -> CompiledModule:
    """A handle on a second module with the same weights, plan and program."""
    gate = compiled.gate
    opened = gate.refit(lambda: gate.call(lambda: reopened(context, compiled.opened)))
    copy = CompiledModule(opened, compiled.plan, compiled.program, verbs)
    copy.name = compiled.name
    copy.state = WeightState.first(compiled.state.overridden, compiled.label)
    return copy


def describe(context: Context, path: str | Path) -> Mapping[str, Any]:
    """The facts about a saved module, by the backend that saved it; see ``Pipeline.describe``."""
    path = Path(path)
    if not path.exists():
        raise UnsupportedTargetError(f"There is no file {str(path)!r}.")
    for name, backend in context.backends.items():
        who = f"{context.who_made(name)}: describe()"
        doing = "The module cannot be described"
        with raised_as(UnsupportedTargetError, f"{who} failed", doing=doing):
            found = backend.describe(path)
        if found is not None:
            facts: Mapping[str, Any] = received(found, Mapping, who)  # type: ignore[type-abstract]
            return {**facts, **_described_plan(context, backend, path)}
    raise UnsupportedTargetError(f"{str(path)!r} is not a saved module of any backend.")


def _attached(context: Context, backend: Backend, path: Path) -> Mapping[str, bytes]:
    """The data that a backend finds beside saved engines."""
    who = f"{context.who_made(backend.name)}: attachments()"
    doing = "The plan cannot be read"
    with raised_as(UnsupportedTargetError, f"{who} failed", doing=doing):
        return received_bytes(backend.attachments(path), who)


def _described_plan(context: Context, backend: Backend, path: Path) -> Mapping[str, Any]:
    """The label of a saved module, and what its plan needs, does not reach and has not seen."""
    attached = _attached(context, backend, path)
    label = {"label": _label_in(attached)} if LABEL_MEMBER in attached else {}
    if PLAN_MEMBER not in attached:
        return label
    data = RefitPlan.from_bytes(attached[PLAN_MEMBER], f"the plan of {str(path)!r}").data
    needs = [f"{need.kind} {need.name} of {describe_need(need)}" for need in data.needs]
    facts = {"needs": needs, "without_slot": dict(data.unreached), "unseen": data.unseen}
    return {**label, **{name: value for name, value in facts.items() if value}}


def plan_in(context: Context, path: str | Path) -> RefitPlan:
    """The plan in a plan file or in a saved module; see ``Pipeline.read_plan``."""
    path = Path(path)
    for backend in context.backends.values() if path.exists() else ():
        attached = _attached(context, backend, path)
        if PLAN_MEMBER in attached:
            opener = weight_opener(context)
            return RefitPlan.from_bytes(attached[PLAN_MEMBER], f"the plan of {str(path)!r}", opener)
    return RefitPlan.load(path)


# -- weights ----------------------------------------------------------------------------------


def open_weights(context: Context, weights: object) -> WeightSource:
    """The source that the first able plugin makes of weights.

    Raises:
        SourceError: The weights are missing, or no plugin can read them.
    """
    if isinstance(weights, WeightSource):
        require_source(weights)
        return weights
    weights = _as_path(weights)

    def opener(others: object) -> WeightSource:
        return open_weights(context, others)

    plugin, source = context.host.first(
        "refitkit_load_weights",
        WeightSource,
        source=weights,
        config=context.config,
        open_weights=opener,
    )
    if source is not None:
        opened: WeightSource = source
        require_source(opened, plugin)
        return opened
    kind = _require_there(weights, SourceError)
    if kind and kind.as_weights:
        message = f"{_shown(weights)} is {kind.what}, not weights."
        raise SourceError(_capital(message), hint=kind.as_weights)
    raise SourceError(
        f"No plugin can read weights from {_shown(weights)}.", hint=_what_is_read(weights)
    )


def weight_opener(context: Context) -> Opener:
    """A function that opens weights for a plan: as the plan's program reads them."""

    @verb("The weights cannot be opened")
    def opener(weights: object, plan: RefitPlan) -> WeightSource:
        return transformed(context, plan, open_weights(context, weights))

    return opener


def for_one_refit(
    context: Context, weights: object, *, rollback: bool, donate: bool = False
) -> WeightSource:
    """A source that is read several times and then forgotten; see ``open_weights``.

    Computed entries are kept from the first time to the last, up to ``Config.keep_limit`` bytes.
    They are not kept without rollback, because then there is no memory for a second set of weights.
    """
    source = open_weights(context, weights)
    if donate:
        if not isinstance(source, TensorMap):
            raise ConfigError(
                f"donate=True is for tensors in memory, and {source.description} is not one.",
                hint="Pass a state_dict or a module, or leave donate out: files are read straight "
                "into memory that serves.",
            )
        source.donate()
    if rollback and isinstance(source, KeepsMade):
        return source.keeping(context.config.keep_limit)
    return source


def require_unchanged(source: WeightSource, *, reread: bool = False) -> None:
    """Check that everything that a source gave belongs to one version of the weights.

    Args:
        source: The weights.
        reread: Whether to read everything from files a second time; see ``Config.reread``.

    Raises:
        SourceError: Files were written to since they were opened, or the source cannot find out.
    """
    with raised_as(SourceError, f"{source.description} cannot be read"):
        if isinstance(source, MayChange):
            source.require_unchanged()
        if reread and not isinstance(source, MadeOf):
            require_reread(source)
    if isinstance(source, MadeOf):
        require_unchanged(source.given, reread=reread)


def _what_is_read(weights: object) -> str:
    """A hint: the files that the built-in readers open."""
    if not isinstance(weights, Path):
        return (
            "Pass a state_dict, an nn.Module, an ExportedProgram, or the path of a .safetensors or "
            "torch.save file."
        )
    if weights.is_dir():
        return (
            "A folder needs model, diffusion_pytorch_model or pytorch_model with the ending "
            ".safetensors or .bin, or the index of such shards (.index.json after it), or "
            ".metadata of a distributed checkpoint. Or pass the file itself."
        )
    return (
        "Files are known by how their names end: .safetensors, .index.json of shards, and .pt, "
        ".pth, .bin or .ckpt of torch.save. Rename it, or link to it under such a name."
    )


def _as_path(thing: Any) -> Any:
    """A string that names a file, as a path. Anything else may be a plugin's own name."""
    return Path(thing) if isinstance(thing, str) and _exists(thing) else thing


def _require_there(thing: object, error: type[RefitError]) -> FileType | None:
    """The kind of a thing that no plugin can open; raises the error if it is a missing file."""
    if isinstance(thing, str | Path) and not _exists(thing):
        raise error(f"There is no file {str(thing)!r}.")
    return file_type(thing)


def _exists(name: str | Path) -> bool:
    return stat_of(Path(name)) is not None


def _capital(message: str) -> str:
    return f"{message[0].upper()}{message[1:]}"


def _shown(thing: object) -> str:
    return repr(str(thing)) if isinstance(thing, str | Path) else f"a {type(thing).__name__}"


# -- things that no plugin can open -------------------------------------------------------------
#
# Files are recognized by their first bytes, and archives by the names of their members. Nothing in
# them is unpickled, run, or read whole, because they come from outside.

_HEAD = 16
_HEADER_LIMIT = 100_000_000  # of safetensors, as its own reader has it
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
_SAVED = "refitkit/manifest.json"


class FileType(NamedTuple):
    """A kind of file or object, and hints for users who passed it.

    Attributes:
        what: Noun phrase, to follow "is".
        as_module: Hint if it was passed as a module.
        as_weights: Hint if it was passed as weights; empty if that is not wrong.
    """

    what: str
    as_module: str
    as_weights: str = ""


_SECOND = "Weights go second: refit MODULE WEIGHTS."
_FIRST = "Modules go first: refit MODULE WEIGHTS."
_COMPILE = "Compile it first: refitkit.compile(program), or `refitkit compile`."

EMPTY = FileType(
    "empty", "Write it again, or fetch it again.", "Write it again, or fetch it again."
)
WEIGHTS = FileType("a file of weights, not a compiled module", _SECOND)
FOLDER = FileType("a folder of weights, not a compiled module", _SECOND)
TORCH_SAVE = FileType("a file of torch.save, as weights are, not a compiled module", _SECOND)
STATE = FileType("weights, not a compiled module", _SECOND)
PROGRAM = FileType("a program of torch.export, which is not compiled yet", _COMPILE)
SCRIPT = FileType(
    "a program of TorchScript",
    "Export the model with torch.export.export(model, inputs) instead, and compile that.",
)
ENGINE = FileType(
    "a lone engine of TensorRT, which says nothing of the program that it was built from",
    "Save the compiled module to a path that does not end in '.engine', and load that.",
    "The weights in it cannot be read: pass those that it was built from.",
)
GGUF = FileType(
    "a GGUF file, with names and formats of llama.cpp",
    "Compile the model that it was converted from.",
    "Pass the checkpoint that it was converted from: a .safetensors or torch.save file.",
)
PLAN = FileType(
    "a plan, not a compiled module",
    "Pass it beside the module: plan=refitkit.RefitPlan.load(path), or --plan.",
    "Pass it beside the weights: plan=refitkit.RefitPlan.load(path), or --plan.",
)
SAVED = FileType("a compiled module", "", _FIRST)
COMPILED = FileType(
    "a compiled module", "It is open already: refitkit.refit takes it as it is.", _FIRST
)
EAGER = FileType(
    "an eager module, which is not compiled yet",
    "Export and compile it first: refitkit.compile(torch.export.export(model, inputs)).",
)


def file_type(thing: object) -> FileType | None:
    """The kind of a file or object; None if it is unknown or obvious."""
    if isinstance(thing, Path):
        try:
            return _of_folder(thing) if thing.is_dir() else _of_file(thing)
        except (OSError, ValueError, ArchiveError) as exc:
            raise_if_resource(exc, f"{str(thing)!r} cannot be read")
            return None
    return next((kind for types, kind in _OBJECTS if isinstance(thing, types)), None)


_OBJECTS: tuple[tuple[type, FileType], ...] = (
    (CompiledModule, COMPILED),
    (ExportedProgram, PROGRAM),
    (torch.nn.Module, EAGER),
    (Mapping, STATE),
)

_MAGIC: tuple[tuple[bytes, FileType], ...] = (
    (b"ftrt", ENGINE),  # of TensorRT
    (b"vtrt", ENGINE),  # of TensorRT-RTX
    (b"GGUF", GGUF),
    (b"\x80\x02", TORCH_SAVE),  # a bare pickle, as before torch 1.6
)

_MEMBERS: tuple[tuple[frozenset[str], FileType], ...] = (
    (frozenset({"pinned.safetensors", "manifest.json"}), PLAN),
    (frozenset({"archive_format"}), PROGRAM),
    (frozenset({"serialized_exported_program.json"}), PROGRAM),  # of torch before 2.8
    (frozenset({"constants.pkl", "data.pkl"}), SCRIPT),
    (frozenset({"data.pkl"}), TORCH_SAVE),
)
"""Kinds of archives by members; the first kind counts whose members are all there."""


def _of_folder(path: Path) -> FileType | None:
    return FOLDER if any(one.name.endswith(_SUFFIXES) for one in path.iterdir()) else None


def _of_file(path: Path) -> FileType | None:
    if not path.is_file():  # reading a pipe would wait for its writer
        return None
    if not path.stat().st_size:
        return EMPTY
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK"):
        return _of_archive(path)
    if path.name.endswith(".index.json") or _is_safetensors(head):
        return WEIGHTS
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON header, and then that header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= _HEADER_LIMIT


def _of_archive(path: Path) -> FileType | None:
    with Archive(path) as archive:
        members = set(archive.names())
    if _SAVED in members:
        return SAVED
    names = {PurePosixPath(member).name for member in members}
    return next((kind for wanted, kind in _MEMBERS if wanted <= names), None)
