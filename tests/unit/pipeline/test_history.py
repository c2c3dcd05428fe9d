"""The way back: undo, restore, what keeping it costs, and refits that give it up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from refitkit.errors import (
    ConfigError,
    EngineError,
    ModuleLostError,
    NotRefittableError,
    RefitError,
    SourceError,
    VerificationError,
    WeightMismatchError,
)
from refitkit.hookspecs import hookimpl
from refitkit.model import KeptWeights
from refitkit.pipeline import CompiledModule, Pipeline
from tests.fakes import (
    END,
    FakeEngine,
    FakeModule,
    FakePlugin,
    Loaded,
    OpenEngine,
    Tripping,
    TrippingPlugin,
    Tripwire,
    make_module,
    same_state,
    weights_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from refitkit.pipeline.history import History

ENGINE = 8 * 4  # bytes of the two slots of an engine


class Scene(Loaded):
    """A module of engines that can be read, and what it held at each version."""

    def __init__(self, engines: int = 2, module: FakeModule | None = None, **settings: Any) -> None:
        super().__init__(module or make_module(engines), **{"keep_base": True, **settings})
        self.held = [self.module.holds()]

    def refit(self, fill: float, *names: str, **how: Any) -> Any:
        """Refit all slots, or those of these names."""
        weights = weights_for(self.module, fill)
        if names:
            weights = {name: weights[name] for name in names}
        result = self.pipeline.refit(self.compiled, weights, partial=bool(names), **how)
        self.held.append(self.module.holds())
        return result

    def require(self, version: int) -> None:
        """Bits are those that were live under this number."""
        assert same_state(self.module.holds(), self.held[version])


def test_a_refit_is_undone() -> None:
    scene = Scene()
    undone = scene.refit(10.0).undo()
    scene.require(0)
    assert undone.module is scene.compiled
    assert undone.report.version == scene.compiled.version == 2
    assert undone.report.source == "version 0: as compiled or loaded"
    assert undone.report.verification is not None
    assert undone.report.verification.ok
    assert {row.strategy for row in undone.report.ledger} == {"kept"}


def test_the_reason_for_lost_first_weights_is_the_one_that_holds() -> None:
    for settings, reason in (({}, "compiled.base"), ({"keep_base": False}, "keep_base=True would")):
        scene = Scene(keep_versions=0, **settings)
        scene.compiled.base = {n.partition("/")[2]: v for n, v in scene.held[0].items()}
        scene.refit(10.0)
        scene.compiled.base = None
        with pytest.raises(NotRefittableError) as info:
            scene.compiled.restore()
        assert reason in info.value.problems[0].hint


def test_an_undoing_is_undone() -> None:
    scene = Scene()
    scene.refit(10.0).undo().undo()
    scene.require(1)
    assert scene.compiled.version == 3


def test_undoing_the_last_costs_no_copies_but_of_what_came_first() -> None:
    scene = Scene()
    kept = scene.refit(10.0).report.kept
    assert kept == (KeptWeights(version=0, source="as compiled or loaded", bytes=64, where="host"),)
    report = scene.refit(20.0).report
    assert report.kept == scene.compiled.kept
    assert [(row.version, row.bytes, row.where) for row in report.kept] == [
        (0, 64, "host"),
        (1, 0, "engine"),
    ]


def test_the_first_weights_are_copied_slot_by_slot() -> None:
    """Weights that touch a few slots cost those: an adapter, and another, and both taken away."""
    scene = Scene()
    scene.refit(10.0, "e0.bias")
    assert sum(row.bytes for row in scene.compiled.kept) == 8
    scene.refit(20.0, "e0.bias", "e1.bias")
    assert sum(row.bytes for row in scene.compiled.kept) == 16
    report = scene.compiled.restore().report
    scene.require(0)
    assert report.slots_written == 2
    assert {row.slot for row in report.ledger if row.strategy} == {"e0.bias", "e1.bias"}


def test_restoring_a_module_that_was_never_refitted_changes_nothing() -> None:
    scene = Scene()
    report = scene.compiled.restore().report
    assert (report.changed, report.slots_written, report.version) == (False, 0, 1)
    scene.require(0)


def test_any_refit_that_is_held_is_undone() -> None:
    scene = Scene(keep_versions=3, keep_base=False)
    results = [scene.refit(10.0), scene.refit(20.0, "e0.bias"), scene.refit(30.0, "e1.weight")]
    results.append(scene.refit(40.0, "e0.bias", "e1.bias"))
    assert [row.version for row in scene.compiled.kept] == [1, 2, 3]
    results[1].undo()
    scene.require(1)
    scene.compiled.restore(4)
    scene.require(4)


def test_what_is_not_held_is_refused_with_what_is() -> None:
    scene = Scene(keep_versions=2, keep_base=False)
    first = scene.refit(10.0)
    scene.refit(20.0)
    scene.refit(30.0)
    for action in (
        first.undo,
        lambda: scene.compiled.restore(7),
        lambda: scene.compiled.restore(-1),
    ):
        with pytest.raises(NotRefittableError, match="keep_versions") as info:
            action()
        problems = [(p.subject, p.kind) for p in info.value.problems]
        assert problems == [
            ("version 1", "held"),
            ("version 2", "held"),
            ("version 0", "not held"),
        ]
    scene.require(3)
    assert scene.compiled.version == 3


def assert_lists_kept(error: RefitError, compiled: CompiledModule) -> None:
    """What an error says is held is what ``kept`` lists, and all of that can be restored."""
    held = [p.subject for p in error.problems if p.kind == "held"]
    assert held == [f"version {row.version}" for row in compiled.kept]
    assert not {p.subject for p in error.problems if p.kind == "not held"} & set(held)


def refused(scene: Scene, version: int = 99) -> NotRefittableError:
    with pytest.raises(NotRefittableError) as info:
        scene.compiled.restore(version)
    assert_lists_kept(info.value, scene.compiled)
    return info.value


def rows(compiled: CompiledModule) -> list[tuple[int, str]]:
    return [(row.version, row.where) for row in compiled.kept]


def test_a_refusal_lists_the_file_and_named_weights(path: Path) -> None:
    """They are other ways to version 0 than copies."""
    scene = FromFile(path)
    scene.refit(10.0)
    scene.refit(20.0)
    assert rows(scene.compiled) == [(0, "file"), (1, "engine")]
    refused(scene)
    named = Scene()
    named.compiled.base = {n.partition("/")[2]: v for n, v in named.held[0].items()}
    named.refit(10.0)
    assert named.refit(20.0).report.kept == named.compiled.kept
    assert rows(named.compiled) == [(0, "base"), (1, "engine")]
    refused(named)
    named.compiled.restore()
    named.require(0)


def test_a_file_that_is_no_way_back_is_not_listed(path: Path) -> None:
    mute = FromFile(path, FakeEngine)
    mute.refit(10.0)
    assert rows(mute.compiled) == []
    refused(mute)
    refused(mute, 0)
    scene = FromFile(path)
    scene.refit(10.0)
    scene.refit(20.0)
    path.unlink()
    assert rows(scene.compiled) == [(1, "engine")]
    refused(scene)
    refused(scene, 0)


def test_what_lies_behind_freed_weights_is_not_listed() -> None:
    """Older weights are reached by undoing the newest refit first."""
    scene = Scene(keep_versions=3, keep_base=False)
    scene.refit(10.0)
    scene.refit(20.0)
    scene.compiled.state = replace(
        scene.compiled.state, history=without_copies_of_the_newest(scene.compiled.state.history)
    )
    assert [row.version for row in scene.compiled.kept] == [0, 1]
    scene.compiled.free_spare()
    assert scene.compiled.kept == ()
    refused(scene)
    refused(scene, 0)
    refused(scene, 1)


def without_copies_of_the_newest(history: History) -> History:
    *older, newest = history.records
    return replace(history, records=(*older, replace(newest, kept={}, in_engines=True)))


def test_all_that_is_kept_can_be_restored() -> None:
    for settings in (
        {},
        {"keep_versions": 3},
        {"keep_versions": 3, "keep_base": False},
        {"keep_versions": 0},
        {"keep_versions": 9, "keep_limit": 3 * 2 * ENGINE},
    ):
        for number in range(4):
            scene = Scene(**settings)
            for fill in (10.0, 20.0, 30.0):
                scene.refit(fill)
            kept = [row.version for row in scene.compiled.kept]
            refused(scene)
            if number in kept or number == scene.compiled.version:
                scene.compiled.restore(number)
                scene.require(number)
            else:
                refused(scene, number)


def test_what_was_asked_for_is_not_told() -> None:
    scene = Scene(keep_base=False)
    assert not any("no longer kept" in note for note in scene.refit(10.0).report.notes)
    scene = Scene()
    assert not any("no longer" in n for n in scene.refit(10.0, rollback=False).report.notes)


class Files:
    """Opens files of the name of a module, each time a new one with the first weights."""

    name = "files"

    def __init__(self, kind: type[FakeEngine] = OpenEngine) -> None:
        self.opened: list[FakeModule] = []
        self.kind = kind

    @hookimpl
    def refitkit_load_module(self, target: object) -> FakeModule | None:
        if not isinstance(target, Path):
            return None
        self.opened.append(make_module(2, kind=self.kind))
        return self.opened[-1]


class FromFile(Scene):
    """A module that was loaded from a file or a folder."""

    def __init__(self, path: Path, kind: type[FakeEngine] = OpenEngine, **settings: Any) -> None:
        self.files = Files(kind)
        settings = {"keep_base": True, **settings}
        self.pipeline = Pipeline(settings, plugins=[FakePlugin(), self.files])
        self.compiled = self.pipeline.load(path)
        self.module = self.files.opened[0]
        self.held = [self.module.holds()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "module").write_text("weights")
    return tmp_path / "module"


def test_the_file_that_a_module_was_loaded_from_is_opened_again(path: Path) -> None:
    scene = FromFile(path)
    scene.refit(10.0)
    kept = scene.refit(20.0).report.kept
    assert [(row.version, row.bytes, row.where) for row in kept] == [
        (0, 0, "file"),
        (1, 0, "engine"),
    ]
    report = scene.compiled.restore().report
    scene.require(0)
    assert report.source == "version 0: as compiled or loaded"
    assert len(scene.files.opened) == 2


def test_it_is_not_opened_where_the_engines_have_the_values(path: Path) -> None:
    scene = FromFile(path)
    scene.refit(10.0).undo()
    scene.require(0)
    assert len(scene.files.opened) == 1


def test_only_slots_that_were_written_come_from_it(path: Path) -> None:
    """What calls change of others stays."""
    scene = FromFile(path)
    scene.refit(10.0, "e0.bias")
    scene.refit(20.0, "e0.bias")
    scene.module.engines["e1"].live["e1.bias"] = torch.tensor([7.0, 7.0])
    report = scene.compiled.restore().report
    assert report.slots_written == 1
    assert torch.equal(scene.module.holds()["e1/e1.bias"], torch.tensor([7.0, 7.0]))
    assert torch.equal(scene.module.holds()["e0/e0.bias"], scene.held[0]["e0/e0.bias"])


@pytest.mark.parametrize("how", ["written", "rewritten", "longer", "another", "gone"])
def test_a_file_that_has_changed_is_refused(path: Path, how: str) -> None:
    scene = FromFile(path)
    scene.refit(10.0)
    scene.refit(20.0)
    if how == "written":
        os.utime(path, ns=(1, 1))
    elif how == "rewritten":
        facts = path.stat()
        path.write_text(path.read_text().swapcase())
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    elif how == "longer":
        facts = path.stat()
        path.write_text("more weights")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    elif how == "another":
        facts = path.stat()
        path.rename(path.with_name("old"))
        path.write_text("weights")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    else:
        path.unlink()
    with pytest.raises(NotRefittableError, match="not held any more") as info:
        scene.compiled.restore()
    problems = [(p.subject, p.kind) for p in info.value.problems]
    assert problems == [("version 1", "held"), (str(path), "changed since the module was loaded")]
    assert_lists_kept(info.value, scene.compiled)
    scene.require(2)


def test_a_file_that_changes_while_it_is_opened_is_refused(path: Path) -> None:
    scene = FromFile(path)
    scene.refit(10.0)
    scene.refit(20.0)
    opening = scene.files.kind

    def replacing(*args: Any) -> FakeEngine:
        path.write_text("other weights")
        return opening(*args)

    scene.files.kind = replacing  # type: ignore[assignment]
    with pytest.raises(NotRefittableError, match="not held any more"):
        scene.compiled.restore()
    scene.require(2)


def test_a_folder_is_looked_at_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "module/parts").mkdir(parents=True)
    part = tmp_path / "module/parts/weights"
    part.write_text("weights")
    scene = FromFile(tmp_path / "module")
    scene.refit(10.0)
    scene.refit(20.0)
    scene.compiled.restore()
    scene.require(0)
    (tmp_path / "module/parts/more").write_text("more")
    scene.refit(30.0)
    with pytest.raises(NotRefittableError):
        scene.compiled.restore()


def test_engines_that_cannot_be_read_are_not_read_off_a_file(path: Path) -> None:
    scene = FromFile(path, FakeEngine)
    scene.refit(10.0)
    with pytest.raises(NotRefittableError, match="e0: no readback"):
        scene.compiled.restore()
    scene.require(1)


def test_a_refit_that_gives_up_leaves_the_file(path: Path) -> None:
    scene = FromFile(path)
    scene.refit(10.0, rollback=False)
    scene.compiled.restore()
    scene.require(0)


def test_no_refit_is_undone_where_none_is_kept() -> None:
    scene = Scene(keep_versions=0)
    first = scene.refit(10.0)
    second = scene.refit(20.0)
    with pytest.raises(NotRefittableError):
        second.undo()
    first.undo()  # to version 0, of which there are copies
    scene.require(0)


def test_a_limit_is_kept_the_oldest_goes_first() -> None:
    scene = Scene(keep_versions=9, keep_limit=3 * 2 * ENGINE)
    for fill in (10.0, 20.0, 30.0, 40.0):
        scene.refit(fill)
        assert sum(row.bytes for row in scene.compiled.kept) <= 3 * 2 * ENGINE
    assert [row.version for row in scene.compiled.kept] == [0, 2, 3]
    scene.compiled.restore(2)
    scene.require(2)
    scene.compiled.restore(0)
    scene.require(0)


def test_first_weights_that_are_too_large_are_not_kept_and_that_is_told() -> None:
    scene = Scene(keep_limit=63)
    result = scene.refit(10.0)
    told = [note for note in result.report.notes if "no longer kept" in note]
    assert told
    assert "64 bytes" in told[0]
    assert "keep_limit" in told[0]
    assert not any("no longer kept" in note for note in scene.refit(20.0).report.notes)
    with pytest.raises(NotRefittableError, match="keep_limit is 63"):
        scene.compiled.restore()
    scene.compiled.restore(1)  # which the engines have
    scene.require(1)


def test_the_last_is_kept_by_copies_where_engines_do_not() -> None:
    class Forgetful(OpenEngine):
        previous = None  # type: ignore[assignment]

    del Forgetful.previous

    class Short(FakeEngine):
        """Readable, refitted in part, and that is all."""

        read = OpenEngine.read
        stage_partial = OpenEngine.stage_partial

    scene = Scene(module=make_module(2, kind=Short), keep_base=False)
    scene.refit(10.0)
    assert [(row.version, row.bytes, row.where) for row in scene.compiled.kept] == [(0, 64, "host")]
    result = scene.refit(20.0)
    assert [row.version for row in scene.compiled.kept] == [1]
    result.undo()
    scene.require(1)


def test_engines_that_cannot_tell_what_they_held_have_no_way_back() -> None:
    scene = Scene(module=make_module(2, kind=FakeEngine))
    result = scene.refit(10.0)
    assert any("cannot report what it held" in note for note in result.report.notes)
    assert result.report.kept == ()
    for action in (result.undo, scene.compiled.restore):
        with pytest.raises(NotRefittableError, match="'e0' cannot report"):
            action()
    scene.require(1)


def test_what_an_engine_knows_is_enough() -> None:
    class Knowing(FakeEngine):
        """It keeps what was given to it, and takes all weights at once."""

        def remembered(self, slot: str) -> torch.Tensor:
            return self.live[slot]

    scene = Scene(module=make_module(2, kind=Knowing))
    scene.refit(10.0)
    scene.refit(20.0)
    scene.compiled.restore()
    scene.require(0)


def test_freeing_the_spare_buffer_gives_the_last_refit_up() -> None:
    scene = Scene()
    scene.refit(10.0)
    result = scene.refit(20.0)
    scene.compiled.free_spare()
    with pytest.raises(NotRefittableError):
        result.undo()
    scene.require(2)
    scene.compiled.restore()
    scene.require(0)


def test_forgetting_frees_the_copies() -> None:
    scene = Scene(keep_versions=2)
    scene.refit(10.0)
    scene.refit(20.0)
    assert scene.compiled.forget() == 64 + 64
    assert scene.compiled.kept == ()
    with pytest.raises(NotRefittableError, match="forget"):
        scene.compiled.restore()
    scene.require(2)


def test_a_refit_after_another_pipelines_keeps_no_gap() -> None:
    """Copies of older refits are worth nothing once the engines alone had those of a newer one."""
    scene = Scene(keep_versions=3, keep_base=False)
    scene.refit(10.0)
    scene.refit(20.0)
    scene.pipeline = Pipeline({"keep_base": False}, plugins=[FakePlugin()])
    scene.refit(30.0)
    scene.pipeline = Pipeline({"keep_versions": 3, "keep_base": False}, plugins=[FakePlugin()])
    scene.refit(40.0)
    assert [row.version for row in scene.compiled.kept] == [3]
    scene.compiled.restore(3)
    scene.require(3)


def test_a_failed_refit_leaves_all_that_is_known() -> None:
    scene = Scene(keep_versions=3)
    scene.refit(10.0)
    held = scene.compiled.state
    wrong: Any = {"verify": "outputs", "reference": {}, "inputs": (torch.ones(()),)}
    with pytest.raises(VerificationError):
        scene.refit(20.0, **wrong)
    assert scene.compiled.state is held
    scene.compiled.restore()
    scene.require(0)


def test_a_copy_begins_with_what_it_was_copied_with() -> None:
    scene = Scene()
    scene.refit(10.0)
    copy = scene.pipeline.copy(scene.compiled)
    held = copy.opened.holds()  # type: ignore[attr-defined]
    scene.pipeline.refit(copy, weights_for(scene.module, 20.0))
    copy.restore()
    assert same_state(copy.opened.holds(), held)  # type: ignore[attr-defined]
    scene.require(1)


def test_what_calls_change_is_kept_as_it_was_at_the_commit() -> None:
    scene = Scene(1, keep_versions=2, keep_base=False)
    engine = scene.module.engines["e0"]
    engine.slots["e0.bias"] = engine.slots["e0.bias"].model_copy(update={"mutable": True})
    changed = torch.tensor([7.0, 8.0])

    def synchronize() -> None:
        engine.live["e0.bias"] = changed

    scene.module.synchronize = synchronize  # type: ignore[method-assign]
    result = scene.refit(10.0)
    scene.module.synchronize = lambda: None  # type: ignore[method-assign]
    result.undo()
    assert torch.equal(engine.live["e0.bias"], changed)


def test_what_is_known_by_digest_is_known_again() -> None:
    scene = Scene()
    scene.refit(10.0, delta=True)
    scene.refit(20.0, delta=True).undo()
    report = scene.pipeline.refit(
        scene.compiled, weights_for(scene.module, 10.0), delta=True
    ).report
    assert (report.slots_written, report.slots_unchanged) == (0, 4)
    scene.compiled.restore()
    report = scene.pipeline.refit(
        scene.compiled, weights_for(scene.module, 10.0), delta=True
    ).report
    assert report.slots_written == 4


# -- named weights ----------------------------------------------------------------------------


def test_named_weights_are_read_and_no_copies_are_made() -> None:
    scene = Scene()
    base = {name.partition("/")[2]: value for name, value in scene.held[0].items()}
    scene.compiled.base = base
    result = scene.refit(10.0)
    assert [(row.version, row.bytes) for row in result.report.kept] == [(0, 0)]
    scene.refit(20.0)
    scene.compiled.restore()
    scene.require(0)
    result = scene.refit(30.0)
    scene.compiled.base = {"e0.weight": base["e0.weight"]}
    with pytest.raises(WeightMismatchError):
        scene.compiled.restore()
    scene.compiled.base = "no/such/file.safetensors"
    with pytest.raises(SourceError):
        scene.compiled.restore()


def test_undoing_what_began_with_named_weights() -> None:
    scene = Scene()
    scene.compiled.base = {n.partition("/")[2]: v for n, v in scene.held[0].items()}
    first = scene.refit(10.0)
    scene.refit(20.0)
    first.undo()
    scene.require(0)


# -- faults -----------------------------------------------------------------------------------


class Faulty(Loaded):
    """A module that was refitted once, and a pipeline that fails when told to."""

    def __init__(self) -> None:
        self.wire = Tripwire()
        self.plugin = TrippingPlugin(self.wire)
        super().__init__(make_module(2, wire=self.wire), self.plugin, keep_base=True)
        self.before = self.module.holds()
        weights = Tripping(weights_for(self.module, 100.0))
        self.result = self.pipeline.refit(self.compiled, weights, verify="tripping-verifier")
        self.after = self.module.holds()

    def undo(self, faults: Mapping[int, BaseException] | None = None) -> None:
        self.wire.arm(faults)
        self.result.undo(verify="tripping-verifier")


def undo_faults() -> Iterator[Any]:
    scene = Faulty()
    scene.undo()
    for number, label in enumerate(scene.wire.calls):
        yield pytest.param(number, label, id=f"{number}-{label}".replace(" ", "-"))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("number", "label"), list(undo_faults()))
def test_a_fault_anywhere_on_the_way_back(
    number: int, label: str, kind: type[BaseException]
) -> None:
    scene = Faulty()
    if label.startswith("refitkit_event") and kind is RuntimeError:
        scene.undo({number: kind("on purpose")})  # a listener is nobody's business
        assert same_state(scene.module.holds(), scene.before)
        return
    with pytest.raises((RefitError, KeyboardInterrupt)):
        scene.undo({number: kind("on purpose")})
    scene.wire.arm()
    if label == END:
        assert same_state(scene.module.holds(), scene.before)
        assert scene.compiled.version == 2
        return
    assert not scene.compiled.gate.lost
    assert same_state(scene.module.holds(), scene.after)
    assert scene.compiled.version == 1
    scene.compiled.restore()
    assert same_state(scene.module.holds(), scene.before)


# -- without a way back -----------------------------------------------------------------------


def test_what_is_given_up_is_written_over() -> None:
    scene = Scene()
    report = scene.refit(10.0, rollback=False).report
    assert same_state(
        scene.module.holds(),
        {f"{name[:2]}/{name}": value for name, value in weights_for(scene.module, 10.0).items()},
    )
    assert [(row.kind, row.bytes) for row in report.memory] == [("none", 0), ("none", 0)]
    assert report.kept == ()
    assert report.verification is not None
    assert report.verification.ok
    assert not any(engine.staged for engine in scene.module.engines.values())


def test_nothing_is_undone_after_it() -> None:
    scene = Scene(keep_versions=5)
    scene.refit(5.0)
    result = scene.refit(10.0, rollback=False)
    for action in (result.undo, scene.compiled.restore):
        with pytest.raises(NotRefittableError, match="rollback=False wrote over them"):
            action()
    scene.refit(20.0).undo()
    scene.require(2)


def test_a_setting_gives_up_by_default() -> None:
    scene = Scene(rollback=False, rollback_limit=0)
    assert scene.refit(10.0).report.memory[0].kind == "none"
    with pytest.raises(NotRefittableError, match="rollback=False"):
        scene.refit(20.0, rollback=True)


def test_engines_that_cannot_keep_their_way_back() -> None:
    scene = Scene(module=make_module(2, kind=FakeEngine))
    report = scene.refit(10.0, rollback=False).report
    assert [(row.kind, row.bytes) for row in report.memory] == [("device", 32), ("device", 32)]
    with pytest.raises(NotRefittableError, match="rollback_limit"):
        Pipeline({"rollback_limit": 0}, plugins=[FakePlugin()]).refit(
            scene.compiled, weights_for(scene.module, 20.0), rollback=False
        )


def test_in_part_and_only_what_changed() -> None:
    scene = Scene()
    scene.refit(10.0, rollback=False, delta=True)
    report = scene.refit(30.0, "e0.bias", rollback=False).report
    assert report.slots_written == 1
    held = scene.module.holds()
    assert torch.equal(held["e0/e0.weight"], scene.held[1]["e0/e0.weight"])
    assert held["e0/e0.bias"][0] == 31.0


def test_what_is_refused_before_anything_is_written_loses_nothing() -> None:
    scene = Scene()
    weights = weights_for(scene.module, 10.0)
    with pytest.raises(WeightMismatchError):
        scene.pipeline.refit(scene.compiled, {**weights, "e0.bias": torch.zeros(9)}, rollback=False)
    with pytest.raises(ConfigError):
        scene.pipeline.refit(scene.compiled, weights, rollback=False, verify="no such")
    scene.module.engines["e0"].wire.arm({})
    scene.require(0)
    assert scene.compiled() is not None


def test_a_fault_loses_the_module_from_the_first_write_on() -> None:
    """And not before: a dry run tells where that is."""

    def refit(
        faults: Mapping[int, BaseException] | None = None, *, is_heard: bool = True
    ) -> tuple[Tripwire, CompiledModule]:
        wire = Tripwire()
        module = make_module(2, wire=wire)
        pipeline = Pipeline(plugins=[FakePlugin(), TrippingPlugin(wire)])
        compiled = pipeline.load(module)
        before = module.holds()
        wire.arm(faults)
        weights = Tripping(weights_for(module, 100.0))
        how: Any = {"verify": "tripping-verifier", "rollback": False}
        if not faults or not is_heard:
            pipeline.refit(compiled, weights, **how)
            return wire, compiled
        with pytest.raises(RefitError) as info:
            pipeline.refit(compiled, weights, **how)
        lost = isinstance(info.value, ModuleLostError)
        assert isinstance(info.value.__cause__, EngineError) or not lost
        if lost:
            with pytest.raises(ModuleLostError):
                compiled()
            return wire, compiled
        assert same_state(module.holds(), before)
        wire.arm()
        assert same_state(compiled(), before)
        return wire, compiled

    wire, _ = refit()
    first = next(number for number, label in enumerate(wire.calls) if ".over-" in label)
    for number, label in enumerate(wire.calls):
        heard = not label.startswith("refitkit_event")
        _, compiled = refit({number: RuntimeError("on purpose")}, is_heard=heard)
        assert compiled.gate.lost == (number >= first and heard), label


# -- what is told of it -----------------------------------------------------------------------


def test_what_engines_have_no_more_is_not_told() -> None:
    scene = Scene(keep_base=False)
    result = scene.refit(10.0)
    assert [row.version for row in scene.compiled.kept] == [0]
    scene.compiled.free_spare()
    assert scene.compiled.kept == ()
    with pytest.raises(NotRefittableError) as info:
        result.undo()
    assert [(p.subject, p.kind) for p in info.value.problems] == [("version 0", "not held")]


def test_a_refit_that_failed_has_used_it_up() -> None:
    scene = Scene(keep_base=False)
    scene.refit(10.0)
    wrong: Any = {"verify": "outputs", "reference": {}, "inputs": (torch.ones(()),)}
    with pytest.raises(VerificationError) as info:
        scene.refit(20.0, **wrong)
    assert scene.compiled.kept == ()
    assert info.value.report is not None
    assert info.value.report.kept == ()


@pytest.mark.parametrize("kind", [FakeEngine, None])
def test_what_engines_never_had_is_not_told(kind: type[FakeEngine] | None) -> None:
    class Unknowing(FakeEngine):
        """It keeps what was given to it, and was not given what it held at first."""

        def remembered(self, slot: str) -> torch.Tensor | None:
            return None

        def previous(self) -> dict[str, torch.Tensor]:
            return {}

    scene = Scene(module=make_module(2, kind=kind or Unknowing))
    assert scene.refit(10.0).report.kept == scene.compiled.kept == ()


def test_forgetting_before_there_is_anything_to_forget() -> None:
    scene = Scene()
    assert scene.compiled.forget() == 0
    scene.refit(10.0)
    scene.refit(20.0)
    scene.compiled.restore()
    scene.require(0)


def test_a_refit_that_failed_has_not_given_the_first_weights_up() -> None:
    scene = Scene(keep_limit=0)
    wrong: Any = {"verify": "outputs", "reference": {}, "inputs": (torch.ones(()),)}
    with pytest.raises(VerificationError) as info:
        scene.refit(20.0, **wrong)
    assert info.value.report is not None
    assert not any("no longer kept" in note for note in info.value.report.notes)
