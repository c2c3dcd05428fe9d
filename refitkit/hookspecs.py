"""Every hook that a plugin can implement.

A plugin is a module or an object. Its hooks are functions or methods that are marked with
``@refitkit.hookimpl`` and have the names below. A hook takes the arguments that it needs, by name.
refitkit finds installed plugins in the entry-point group ``refitkit``. Pass others explicitly:
``refitkit.Pipeline(plugins=[MyPlugin()])``. An explicit plugin replaces an installed one that is
the same module or an object of the same class.

Two kinds of hooks:

* *first*: implementations are called one after another until one returns something that is not
  None. Third parties come before built-ins, and the plugin that was registered last comes first;
* *all*: every implementation is called.

No hook is called once per tensor.

A plugin that implements a hook of another version of refitkit marks it with
``@refitkit.hookimpl(optionalhook=True)``. A refitkit that does not have the hook ignores it. An
unknown hook without the mark is refused, because its name may be misspelt.

Any release may add arguments to a hook, because an implementation names only those that it needs.
An argument is removed only after a release in which it was deprecated. Its specification then names
the replacement and the release that removes it (``@hookspec(warn_on_impl_args={"old":
DeprecationWarning("take 'new'; it goes in 0.4")})``). A deprecated argument is still passed. A
plugin that takes it causes a ``DeprecationWarning`` that names the plugin and the argument. The
warning appears when the plugin is registered, and ``refitkit plugins check`` reports it. Hooks and
their return types are deprecated in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

# For annotations only: importing the hooks must not import torch, pydantic models or click.
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    import click
    import torch

    from refitkit.config import Config
    from refitkit.errors import Problem
    from refitkit.model import Event, LayerType, RefitReport
    from refitkit.protocols import (
        Backend,
        MappingStrategy,
        OpenedModule,
        Plan,
        Tools,
        Verifier,
        WeightSource,
        WeightTransform,
        WeightTransport,
    )

PROJECT = "refitkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Arguments have no defaults, because refitkit passes all of them and pluggy selects by name.


@hookspec
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register backends. Kind: all.

    Called by a pipeline when it first needs a backend, once for each pipeline.

    Args:
        register: Function to call with each backend. Two backends of one name raise
            a ``PluginError`` that names both plugins. Import heavy packages inside the backend, on
            first use.
    """


@hookspec(firstresult=True)
def refitkit_load_module(target: object, config: Config, tools: Tools) -> OpenedModule | None:
    """Open a compiled module. Kind: first.

    Called by ``refitkit.load``, and by every verb that gets a target that is not open yet. The
    verb works on the module that the first implementation returns.

    Args:
        target: Target as the user passed it, of any type: for example a ``GraphModule`` or an
            ``ExportedProgram``. A string that names an existing file or folder is passed as
            ``pathlib.Path``, any other string unchanged.
        config: Settings of the pipeline.
        tools: Layer types of all plugins, and a function that reports progress.

    Returns:
        The opened module; None when the target does not belong to this plugin.

    Raises:
        UnsupportedTargetError: The target belongs to this plugin, and is broken.
        NotRefittableError: The target belongs to this plugin, and cannot be refitted.
    """


@hookspec(firstresult=True)
def refitkit_load_weights(
    source: object, config: Config, open_weights: Callable[[object], WeightSource]
) -> WeightSource | None:
    """Open a source of weights. Kind: first.

    Called once for each refit, before anything is checked, and by every other verb that reads
    weights. The verb reads them from the source that the first implementation returns. A source
    should be lazy: read headers now, and data on demand.

    Args:
        source: Weights as the user passed them, of any type: for example a mapping, a module or a
            program. A string that names an existing file or folder is passed as
            ``pathlib.Path``, any other string unchanged.
        config: Settings of the pipeline.
        open_weights: Function that opens weights of any kind with the first plugin that can. Use it
            for weights that are made from other weights, such as a base and an adapter.

    Returns:
        The source; None when the weights do not belong to this plugin.

    Raises:
        SourceError: The weights belong to this plugin, and cannot be read.
    """


@hookspec(firstresult=True)
def refitkit_partition(
    program: torch.export.ExportedProgram,
    module: OpenedModule | None,
    backend: str,
    options: Mapping[str, Any],
    config: Config,
    tools: Tools,
) -> Mapping[str, Any] | None:
    """Cut a program into parts that match a module's engines. Kind: first.

    Called by the planner, each time it makes or proves a plan. The backend then drafts the plan
    from the parts that the first implementation returns.

    Args:
        program: The program; do not change it.
        module: The opened target; None when planning offline.
        backend: Name of the backend that the parts are for.
        options: The backend's options when planning offline; a module knows its own.
        config: Settings of the pipeline.
        tools: Layer types of all plugins, and a function that reports progress.

    Returns:
        One part for each engine, by the engine's name, in the form that the backend's ``draft``
        understands; None when the backend does not belong to this plugin.
        ``docs/reference/parts.md`` has the form of built-in backends.

    Raises:
        PlanMismatchError: The parts do not match the engines. The message says what differs.
    """


@hookspec
def refitkit_mapping_strategies(config: Config) -> Iterable[MappingStrategy]:
    """Return mapping strategies. Kind: all.

    Called once for each pipeline, when slots are first mapped. A refit tries the strategies in the
    order of ``Config.strategies``, or by priority if that is empty. Two strategies of one name
    raise a ``PluginError`` that names both plugins.

    Args:
        config: Settings of the pipeline; a plugin finds its own in ``config.plugin_settings``.

    Returns:
        The strategies.

    Raises:
        ConfigError: The plugin's settings cannot be used.
    """


@hookspec
def refitkit_layer_types() -> Iterable[LayerType]:
    """Return the types of TensorRT network layers that hold weights. Kind: all.

    Called once for each pipeline, before a verb first passes ``tools`` to backends, strategies and
    openers. Two types of one name raise a ``PluginError`` that names both plugins. SCALE,
    CONVOLUTION, DECONVOLUTION and CONSTANT are built in.

    Returns:
        The layer types.
    """


@hookspec
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """Return transforms from entries of a checkpoint to entries of a program. Kind: all.

    Called once for each refit, before names are mapped, and by every other verb that applies
    weights to a plan. Entries that depend on each other, such as a quantized weight and its scale,
    form one group: the refit computes all of them or none. Two transforms of one name, and two that
    produce the same entry, raise a ``PluginError`` that names both plugins.

    Args:
        config: Settings of the pipeline; a plugin finds its own in ``config.plugin_settings``.

    Returns:
        The transforms.

    Raises:
        ConfigError: The plugin's settings cannot be used.
    """


@hookspec
def refitkit_weight_transports(config: Config) -> Iterable[WeightTransport]:
    """Return transports, by which the weights of live updates reach this process. Kind: all.

    Called once for each pipeline, when a receiver opens a transport. ``init_info`` names one. Two
    transports of one name raise a ``PluginError`` that names both plugins.

    Args:
        config: Settings of the pipeline; a plugin finds its own in ``config.plugin_settings``.

    Returns:
        The transports.

    Raises:
        ConfigError: The plugin's settings cannot be used.
    """


@hookspec
def refitkit_check(
    plan: Plan,
    module: OpenedModule,
    source: WeightSource,
    partial: bool,  # noqa: FBT001 - hook arguments have no defaults and are passed by name
    unchanged: Collection[str],
    deferred: Collection[str],
    same_headers: bool,  # noqa: FBT001 - as above
    config: Config,
) -> Iterable[Problem]:
    """Find problems that forbid a refit. Kind: all.

    Called once for each refit, after mapping and before anything is staged. The refit reports the
    problems of all implementations at once, in one ``WeightMismatchError``. It goes on only if
    there are none.

    Args:
        plan: The plan, bound to the module.
        module: The opened target, with its present weights.
        source: The new weights.
        partial: Whether slots without an entry in the source keep their present values.
        unchanged: Names of entries that have the same bits as those from which the live slots were
            computed. They need no second check. Only a refit with ``delta`` knows them; otherwise
            the collection is empty.
        deferred: Names of entries that the refit checks for finiteness when it stages them, before
            the commit. So a file is read once, and the checked bytes are the written ones. A check
            of finiteness skips these entries, unless the refit is refused anyway.
        same_headers: Whether the entries have the names, dtypes, shapes and strides of this
            module's last refit with this plan, which passed all checks. Checks of these alone can
            be skipped.
        config: Settings of the pipeline.

    Returns:
        All problems; an empty iterable if there are none.
    """


@hookspec
def refitkit_verifiers(config: Config) -> Iterable[Verifier]:
    """Return verifiers of refitted modules. Kind: all.

    Called once for each pipeline, when a result is first verified. The user chooses one by name
    with ``verify=``. Two verifiers of one name raise a ``PluginError`` that names both plugins.

    Args:
        config: Settings of the pipeline; a plugin finds its own in ``config.plugin_settings``.

    Returns:
        The verifiers.

    Raises:
        ConfigError: The plugin's settings cannot be used.
    """


@hookspec
def refitkit_weights_changed(module: OpenedModule, report: RefitReport) -> None:
    """Drop data that was derived from old weights: captured CUDA graphs, KV caches. Kind: all.

    Called by a refit inside its transaction, after every commit and after every rollback of a
    commit. New calls of the module by other threads wait until it returns, so the time that it
    takes is part of ``RefitReport.pause_seconds``. Calls that began before the commit may still
    run if the module publishes (:class:`~refitkit.protocols.OpensStaged`); they end on the old
    weights. Calls of the module by the hook itself go through.

    Args:
        module: The opened target; its live weights have just changed.
        report: The report so far; ``outcome`` says whether this is a commit or a rollback. With
            ``trial``, the weights are not the user's: refitkit proves a plan with them.

    Raises:
        Exception: After a commit, any exception rolls it back. After a rollback, an exception makes
            the module refuse calls: data derived from the rejected weights may still be in use.
    """


@hookspec
def refitkit_event(event: Event) -> None:
    """Receive a progress event. Kind: all.

    Called by every verb when it starts and ends, and when a stage of it starts, advances and ends;
    :mod:`refitkit.model.events` lists the events and their order. Each ``Started`` has exactly one
    end: ``Finished``, ``Failed`` or ``Aborted``, with the same ``id``. Use the hook for progress
    bars, logs and metrics, and leave out events with ``trial``: they are not about the user's
    weights. An exception is logged once (logger ``refitkit``), and changes nothing else.

    Args:
        event: An instance of one of the classes in :mod:`refitkit.model.events`.
    """


@hookspec
def refitkit_register_commands(cli: click.Group) -> None:
    """Add commands to the command line. Kind: all.

    Called once, when the command line starts. Import packages inside the commands, so that
    ``refitkit --help`` stays fast.

    Args:
        cli: The group ``refitkit``. A command whose name is taken raises a ``PluginError``.
    """
