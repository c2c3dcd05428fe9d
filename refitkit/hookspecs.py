"""Every hook that a plugin can implement.

A plugin is a module or an object with methods that are marked with ``@refitkit.hookimpl`` and have
the names below. A method takes as many of the arguments as it needs, by name. It is found
by the entry-point group ``refitkit``, or given: ``refitkit.Pipeline(plugins=[MyPlugin()])``.

Two kinds of hooks:

* *first*: implementations are asked one after another, third parties before built-ins, the latest
  registered first, until one returns something that is not None;
* *all*: every implementation is called.

No hook is called once per tensor.

Arguments may be added to a hook in any release: an implementation names those that it needs. An
argument goes only after a release in which it was deprecated. Its specification then says what to
take instead, and until when it is there (``@hookspec(warn_on_impl_args={"old": DeprecationWarning(
"take 'new'; it goes in 0.4")})``); it still comes, and whoever takes it is told so by a
``DeprecationWarning`` that names the plugin and the argument, when the plugin is registered and by
``refitkit plugins check``. Hooks themselves go the same way, as does what they may return.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

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
    )

PROJECT = "refitkit"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def refitkit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register backends. Kind: all.

    Called once for each host, when a backend is first needed.

    Args:
        register: Call it with each backend. Two backends of one name are a ``PluginError``
            that names both plugins. Import heavy packages inside the backend, on first use.
    """


@hookspec(firstresult=True)
def refitkit_load_module(target: object, config: Config, tools: Tools) -> OpenedModule | None:
    """Open what a user has compiled. Kind: first.

    Called by ``refitkit.load`` and wherever a target is given that is not open yet.

    Args:
        target: A file or folder that exists (``pathlib.Path``), any other string as it was given,
            a ``GraphModule``, an ``ExportedProgram``: anything.
        config: Settings of the pipeline.
        tools: What the pipeline lends: layer types, and a way to tell of progress.

    Returns:
        The opened module; None when the target is not this plugin's.

    Raises:
        UnsupportedTargetError: The target is this plugin's, and broken.
        NotRefittableError: The target is this plugin's, and cannot be refitted.
    """


@hookspec(firstresult=True)
def refitkit_load_weights(
    source: object, config: Config, open_weights: Callable[[object], WeightSource]
) -> WeightSource | None:
    """Open what a user calls weights. Kind: first.

    Called once for each refit, before anything is checked. Read lazily: headers now, data on
    demand.

    Args:
        source: A file or folder that exists (``pathlib.Path``), any other string as it was given,
            a mapping, a module, a program: anything.
        config: Settings of the pipeline.
        open_weights: Opens anything that a user calls weights with the first plugin that can: for
            weights that are made of others, such as a base and an adapter.

    Returns:
        The source; None when it is not this plugin's.

    Raises:
        SourceError: It is this plugin's, and cannot be read.
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

    Called when a plan is made.

    Args:
        program: The program; not to be changed.
        module: The opened target; None when planning offline.
        backend: Name of the backend that the parts are for.
        options: The backend's options when planning offline; a module knows its own.
        config: Settings of the pipeline.
        tools: What the pipeline lends: layer types, and a way to tell of progress.

    Returns:
        A part for each engine, by the engine's name, in the form that the backend's ``draft``
        understands; None when the backend is not this plugin's.

    Raises:
        PlanMismatchError: The parts do not match the engines; says what differs.
    """


@hookspec
def refitkit_mapping_strategies() -> Iterable[MappingStrategy]:
    """Offer mapping strategies. Kind: all.

    Called once for each refit. Strategies are tried in the order of ``Config.strategies``, or by
    priority. Two of one name are a ``PluginError`` that names both plugins.

    Returns:
        The strategies.
    """


@hookspec
def refitkit_layer_types() -> Iterable[LayerType]:
    """Tell which types of TensorRT network layers hold weights. Kind: all.

    Called once for each verb. Two of one name are a ``PluginError`` that names both plugins. Built
    in are SCALE, CONVOLUTION, DECONVOLUTION and CONSTANT.

    Returns:
        The layer types.
    """


@hookspec
def refitkit_weight_transforms(config: Config) -> Iterable[WeightTransform]:
    """Offer ways to make what a program reads from what a checkpoint has. Kind: all.

    Called wherever weights meet a plan: once for each refit, before names are mapped. What is made
    together, a quantized weight and its scale, is one group: all of it is made or none. Two of one
    name, and two that make the same entry, are a ``PluginError`` that names both plugins.

    Args:
        config: Settings of the pipeline; a plugin finds its own in ``config.plugin_settings``.

    Returns:
        The transforms.

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
    config: Config,
) -> Iterable[Problem]:
    """Find what forbids a refit. Kind: all.

    Called once for each refit, after mapping and before anything is staged. All problems of all
    implementations are reported at once, in one ``WeightMismatchError``.

    Args:
        plan: The plan, bound to the module.
        module: The opened target, with its present weights.
        source: The new weights.
        partial: Whether slots that the source has nothing for keep their present values.
        unchanged: Names of entries with the very bits that the live slots were computed from, as a
            refit with ``delta`` knows; empty where nobody knows. They need no second look.
        deferred: Names of entries that the refit judges where they are staged, before the commit:
            the bytes that are found finite are those that are written, and a file is read once. A
            check of finiteness leaves them out, unless the refit is refused anyway.
        config: Settings of the pipeline.

    Returns:
        Every problem; nothing when all is well.
    """


@hookspec
def refitkit_verifiers() -> Iterable[Verifier]:
    """Offer ways to judge a refitted module. Kind: all.

    Called once for each refit. Two of one name are a ``PluginError`` that names both plugins.

    Returns:
        The verifiers; users choose one by name with ``verify=``.
    """


@hookspec
def refitkit_weights_changed(module: OpenedModule, report: RefitReport) -> None:
    """Drop what was derived from old weights: captured CUDA graphs, KV caches. Kind: all.

    Called inside the transaction, after every commit and after every rollback of a commit, before
    any other thread's call is let in again. Calls of the module from here go through.

    Args:
        module: The opened target; its live weights have just changed.
        report: What is known so far; ``outcome`` tells commit from rollback.

    Raises:
        Exception: After a commit, any exception rolls it back. After a rollback it makes the
            module refuse calls: what was derived from the rejected weights may still be in use.
    """


@hookspec
def refitkit_event(event: Event) -> None:
    """Hear of progress. Kind: all.

    Called when a stage starts, advances and ends. Hang progress bars, logs and metrics here.

    Args:
        event: One of the classes in :mod:`refitkit.model.report`.
    """


@hookspec
def refitkit_register_commands(cli: click.Group) -> None:
    """Add commands to the command line. Kind: all.

    Called once, when the command line starts. Keep imports inside the commands: ``--help`` is
    fast.

    Args:
        cli: The group ``refitkit``. A command of a name that is taken is a ``PluginError``.
    """
