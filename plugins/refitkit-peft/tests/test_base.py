"""The base: its memory, revisions, ready sets and memory use."""

from __future__ import annotations

import copy
import gc
import json
import os
import threading
from pathlib import Path

import pytest
import refitkit
import torch
from peft_models import make_net, open_weights, same, weights_of
from refitkit.errors import ConfigError, ResourceError, SourceError, WeightMismatchError
from refitkit.recipe import TensorMap
from refitkit.testing.oracles import ReadRecorder
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from refitkit_peft import Base, Lora

pytest.importorskip("peft")

MODULES = ["lin", "two", "emb"]
COPIES = ["host", "mapped", "device"]


@pytest.fixture
def x(adapter):
    return adapter(1, target_modules=MODULES)


@pytest.fixture
def y(adapter):
    return adapter(2, target_modules=["lin"])


def kept_in(memory, weights, **settings):
    return Base(weights, memory, device="cpu", **settings)


# -- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["given", *COPIES])
def test_sums_are_the_same_wherever_the_base_is(memory, net, x):
    base = kept_in(memory, net)
    given = weights_of(open_weights(Lora(net, {str(x.path): 0.7})))
    assert same(weights_of(open_weights(Lora(base, {str(x.path): 0.7}))), given)
    assert same(weights_of(open_weights(base)), net.state_dict())
    assert base.memory.kind == memory


@pytest.mark.parametrize("memory", ["given", *COPIES])
@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_modes_of_torch_do_not_reach_what_is_kept(memory, mode, net, x):
    lora = Lora(Base(net), {"x": 0.7})
    lora.base.add("x", str(x.path))
    wanted = weights_of(open_weights(lora))
    with mode():
        base = kept_in(memory, net)
        base.add("x", str(x.path))
        base.prepare({"x": 0.7})
    found = open_weights(Lora(base, {"x": 0.7}))
    assert same(weights_of(found), wanted)
    assert not any(found.get(name).is_inference() for name in found.names())


@pytest.mark.parametrize("memory", COPIES)
def test_a_copy_does_not_follow_the_model(memory, x):
    net = make_net(4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    base = kept_in(memory, net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert same(weights_of(open_weights(base)), before)
    given = Base(net)
    assert same(weights_of(open_weights(given)), net.state_dict())


@pytest.mark.parametrize("memory", ["given", *COPIES])
def test_hooks_of_the_model_do_not_rename_what_adapters_are_for(memory, net, x):
    """torchtune's fusion layers rename entries to fit checkpoints from before the fusion."""
    given = weights_of(open_weights(Lora(net, {str(x.path): 0.7})))

    def rename(module, state, prefix, _):
        for name in [name for name in state if name.startswith(f"{prefix}lin.")]:
            state[prefix + name.removeprefix(f"{prefix}lin.")] = state.pop(name)

    hooked = copy.deepcopy(net)
    hooked._register_state_dict_hook(rename)
    assert "lin.weight" not in hooked.state_dict()
    found = weights_of(open_weights(Lora(kept_in(memory, hooked), {str(x.path): 0.7})))
    assert same(found, given)


def test_a_mapped_copy_leaves_no_file_behind(net, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base = Base(net, "mapped")
    assert list(tmp_path.iterdir()) == []
    assert same(weights_of(open_weights(base)), net.state_dict())
    for name in net.state_dict():
        assert base.source(Lora(base)).get(name).data_ptr() % 64 == 0


def test_no_room_for_a_mapped_copy_is_a_typed_error(net, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match="cannot be copied to a temporary file"):
        Base(net, "mapped")


@pytest.mark.parametrize("memory", COPIES)
def test_odd_tensors_are_copied_as_they_are(memory):
    given = {
        "half": torch.randn(3, 5).half(),
        "turned": torch.randn(4, 6).t(),
        "sliced": torch.randn(10)[3:7],
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "odd": torch.tensor([-0.0, float("nan"), float("inf")]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "grad": torch.nn.Parameter(torch.ones(3)),
    }
    found = weights_of(open_weights(kept_in(memory, given)))
    assert same(found, {name: value.detach() for name, value in given.items()})
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("memory", COPIES)
def test_names_of_one_tensor_have_one_copy(memory):
    weight = torch.randn(64, 64)
    given = {"a": weight, "b": weight, "rows": weight[:32], "turned": weight.t()}
    base = kept_in(memory, given)
    source = open_weights(base)
    assert source.get("a").data_ptr() == source.get("b").data_ptr()
    assert base.memory.base == weight.nbytes * 2 + weight.nbytes // 2
    assert same(weights_of(source), given)


def test_memory_is_told_in_bytes(net, x, y):
    base = Base(net, "host")
    size = sum(value.nbytes for value in net.state_dict().values())
    assert (base.memory.base, base.memory.adapters, dict(base.memory.ready)) == (size, 0, {})
    assert Base(net).memory.total == 0
    base.add("x", x.path)
    assert base.adapters == ("x",)
    saved = sum(p.nbytes for n, p in x.model.named_parameters() if "lora_" in n)
    assert base.memory.adapters == saved
    base.prepare({"x": 0.5})
    touched = net.lin.weight.nbytes + net.two.weight.nbytes + net.emb.weight.nbytes
    assert dict(base.memory.ready) == {"base a live Net + 0.5 of 'x'": touched}
    assert base.memory.total == size + saved + touched
    assert repr(base) == f"Base(a live Net, host: {size} bytes of it, 1 ready sets)"
    base.remove("x")
    assert (base.memory.adapters, dict(base.memory.ready)) == (0, {})
    with pytest.raises(ConfigError, match="x: unknown"):
        base.remove("x")


# -- ready sets -----------------------------------------------------------------------------


def test_the_sets_that_were_used_last_are_kept(net, x):
    base = Base(net, "host", keep=2)
    base.add("x", x.path)
    first = open_weights(Lora(base, {"x": 1.0})).get("lin.weight")
    for scale in (0.5, 1.0, 0.25):  # 1 was used after 0.5, so 0.5 goes
        base.prepare({"x": scale})
    assert [text.split(" + ")[1] for text in base.memory.ready] == ["1 of 'x'", "0.25 of 'x'"]
    again = open_weights(Lora(base, {"x": 1.0})).get("lin.weight")
    assert again.data_ptr() == first.data_ptr()
    recomputed = open_weights(Lora(base, {"x": 0.5})).get("lin.weight")
    assert recomputed.data_ptr() != first.data_ptr()


def test_sets_are_known_by_what_is_in_adapters_not_by_their_names(net, x, y):
    base = Base(net, "host")
    base.add("a", x.path)
    base.add("b", x.path)
    one, two = (open_weights(Lora(base, {name: 1.0})).get("lin.weight") for name in "ab")
    assert one.data_ptr() == two.data_ptr()
    base.add("a", y.path)  # another adapter of the same name
    assert not torch.equal(open_weights(Lora(base, {"a": 1.0})).get("lin.weight"), one)


@pytest.mark.parametrize(("memory", "keep"), [("host", 0), ("given", 2)])
def test_nothing_is_kept_where_that_was_asked_for_or_cannot_be_trusted(memory, keep, x):
    net = make_net(5)
    base = Base(net, memory, keep=keep)
    base.add("x", x.path)
    base.prepare({"x": 1.0})
    assert dict(base.memory.ready) == {}
    before = open_weights(Lora(base, {"x": 1.0})).get("lin.weight").clone()
    with torch.no_grad():
        net.lin.weight.add_(1)
    after = open_weights(Lora(base, {"x": 1.0})).get("lin.weight")
    assert torch.equal(after, before) is (memory == "host")


def test_within_one_refit_sums_are_made_once(net, x):
    source = open_weights(Lora(net, {str(x.path): 1.0}))
    assert source.get("lin.weight") is source.get("lin.weight")
    unkept = Base(net, keep=0)
    source = open_weights(Lora(unkept, {str(x.path): 1.0}))
    assert source.get("lin.weight") is not source.get("lin.weight")


def test_what_was_given_out_stays_as_it_is(net, x):
    base = Base(net, "host", keep=1)
    base.add("x", x.path)
    held = weights_of(open_weights(Lora(base, {"x": 1.0})))
    source = open_weights(Lora(base, {"x": 1.0}))
    tensors = {name: source.get(name) for name in source.names()}
    for scale in (0.1, 0.2, 0.3):
        base.prepare({"x": scale})
    gc.collect()
    assert same(tensors, held)


def test_threads_may_share_a_base(net, x, y):
    base = Base(net, "host", keep=1)
    base.add("x", x.path)
    base.add("y", y.path)
    wanted = {name: weights_of(open_weights(Lora(base, {name: 1.0}))) for name in "xy"}
    wrong = []

    def work(name):
        found = (weights_of(base.source(Lora(base, {name: 1.0}))) for _ in range(20))
        wrong.extend(name for one in found if not same(one, wanted[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyxy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- revisions ------------------------------------------------------------------------------


def revisions(weights):
    source = open_weights(weights)
    return {name: source.revision(name) for name in source.names()}


def test_live_tensors_have_no_revisions(net, x):
    assert set(revisions(Lora(net, {str(x.path): 1.0})).values()) == {None}


@pytest.mark.parametrize("memory", COPIES)
def test_revisions_are_those_of_the_base_and_of_what_is_added(memory, net, x, y):
    base = kept_in(memory, net)
    base.add("x", x.path)
    base.add("y", y.path)
    plain, with_x = revisions(base), revisions(Lora(base, {"x": 1.0}))
    assert None not in plain.values()
    assert len(set(plain.values())) == len(plain)
    touched = {"lin.weight", "two.weight", "emb.weight"}
    assert {name for name in plain if plain[name] != with_x[name]} == touched
    assert revisions(Lora(base, {"x": 1.0})) == with_x
    assert revisions(Lora(base, {"x": 0.5}))["lin.weight"] != with_x["lin.weight"]
    both = revisions(Lora(base, {"y": 0.5, "x": 1.0}))
    assert both["two.weight"] == with_x["two.weight"]  # y does not change it
    assert both["lin.weight"] != with_x["lin.weight"]
    assert both == revisions(Lora(base, {"x": 1.0, "y": 0.5}))
    other = revisions(kept_in(memory, net))
    assert not set(other.values()) & set(plain.values())


def test_the_same_file_has_the_same_revisions(net, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({name: value.clone() for name, value in net.state_dict().items()}, path)
    assert revisions(Base(path)) == revisions(Base(str(path), "mapped")) == revisions(Lora(path))
    assert not set(revisions(Base(path)).values()) & set(revisions(Base(path, "host")).values())


@pytest.mark.parametrize("change", ["touch", "rewrite", "replace", "remove"])
@pytest.mark.parametrize("memory", ["given", "mapped"])
def test_a_file_that_was_changed_is_told(memory, change, net, tmp_path):
    path = tmp_path / "base.safetensors"
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(tensors, path)
    base, copy = Base(path, memory), Base(path, "host")
    open_weights(base)
    found = path.stat()
    if change == "touch":
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    elif change == "rewrite":
        with path.open("ab") as file:
            file.write(b"x")
    elif change == "replace":
        save_file(tensors, tmp_path / "new")
        os.utime(tmp_path / "new", ns=(found.st_atime_ns, found.st_mtime_ns))
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    with pytest.raises(SourceError, match="is not the base that was opened") as caught:
        open_weights(base)
    assert [problem.subject for problem in caught.value.problems] == [str(path)]
    assert same(weights_of(open_weights(copy)), tensors)


def test_a_folder_is_all_of_its_files(net, tmp_path):
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    base = Base(tmp_path)
    assert None not in revisions(base).values()
    (tmp_path / "notes.txt").write_text("no weights")
    open_weights(base)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match="is not the base that was opened"):
        open_weights(base)


def test_an_adapter_that_was_added_stays_as_it_was(net, x):
    base = Base(net, "host", keep=0)
    path = x.path / "adapter_model.safetensors"
    tensors = load_file(path)
    config = json.loads((x.path / "adapter_config.json").read_text())
    base.add("file", x.path)
    base.add("tensors", tensors, config)
    wanted = weights_of(open_weights(Lora(base, {"file": 1.0})))
    for value in tensors.values():
        value.zero_()
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: mappings of the file see the write
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    for name in ("file", "tensors"):
        assert same(weights_of(open_weights(Lora(base, {name: 1.0}))), wanted)


def test_an_adapter_that_was_saved_anew_is_read_anew(net, x, y):
    base = Base(net, "host")
    path = x.path / "adapter_model.safetensors"
    before = revisions(Lora(base, {str(x.path): 1.0}))
    first = open_weights(Lora(base, {str(x.path): 1.0})).get("lin.weight").clone()
    content = (y.path / "adapter_model.safetensors").read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    after = open_weights(Lora(base, {str(x.path): 1.0}))
    assert not torch.equal(after.get("lin.weight"), first)
    assert after.revision("lin.weight") != before["lin.weight"]
    assert "two.weight" not in after.touched


def test_adapters_by_path_are_read_once_and_not_kept_forever(net, adapter, monkeypatch):
    from refitkit_peft import reading

    reads = []
    read = reading.read
    monkeypatch.setattr(reading, "read", lambda *a, **k: reads.append(a[0]) or read(*a, **k))
    base = Base(net, "host")
    made = [adapter(seed, target_modules=["lin"], r=1) for seed in range(10)]
    for _ in range(2):
        open_weights(Lora(base, {str(made[0].path): 1.0}))
    assert len(reads) == 1
    for one in made:
        open_weights(Lora(base, {str(one.path): 1.0}))
    assert base.memory.adapters == 8 * (12 + 20) * 4
    assert len(reads) == 10


# -- lazy -----------------------------------------------------------------------------------


def test_a_base_that_has_to_be_read_is_read_entry_by_entry(net, x):
    watched = ReadRecorder(TensorMap(net.state_dict()))
    source = open_weights(Lora(watched, {str(x.path): 1.0}))
    for name in source.names():
        source.info(name)
        source.revision(name)
    assert watched.read == []
    source.get("lin.weight")
    assert watched.read == ["lin.weight"]


def test_a_delta_reads_nothing_that_has_a_revision(net, x):
    class Named(TensorMap):
        def revision(self, fqn):
            return "mine", fqn

    watched = ReadRecorder(Named(net.state_dict()))
    program = torch.export.export(net, (torch.zeros(2, 4, dtype=torch.long),))
    compiled = refitkit.compile(program, prove=False)
    base = Base(watched, keep=1)
    base.add("x", x.path)
    refitkit.refit(compiled, Lora(base, {"x": 1.0}), delta=True, verify="none")
    watched.read.clear()
    refitkit.refit(compiled, base, delta=True, verify="none")
    assert set(watched.read) == {"lin.weight", "two.weight", "emb.weight"}
    watched.read.clear()
    report = refitkit.refit(compiled, base, delta=True, verify="none").report
    assert (watched.read, report.slots_written) == ([], 0)


def test_a_base_of_adapters_can_have_adapters(net, x, y):
    inner = Base(net, "host")
    inner.add("x", x.path)
    outer = Lora(Lora(inner, {"x": 0.5}), {str(y.path): 2.0})
    found = weights_of(open_weights(outer))
    assert outer.adapters == {str(y.path): 2.0}
    wanted = weights_of(open_weights(Lora(net, {str(x.path): 0.5, str(y.path): 2.0})))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    assert None not in revisions(outer).values()


def test_a_name_beats_a_path(net, x, y, monkeypatch):
    base = Base(net, "host")
    base.add("x", y.path)
    monkeypatch.chdir(x.path.parent)
    Path("x").symlink_to(x.path)
    assert set(open_weights(Lora(base, {"x": 1.0})).touched) == {"lin.weight"}
    with pytest.raises(SourceError, match="no adapter, file or folder with the name 'z'"):
        open_weights(Lora(base, {"z": 1.0}))


def test_an_adapter_that_does_not_fit_is_told_when_it_is_used(net):
    base = Base(net)
    wrong = {"nowhere.lora_A.weight": torch.ones(2, 3), "nowhere.lora_B.weight": torch.ones(3, 2)}
    base.add("wrong", wrong)
    with pytest.raises(WeightMismatchError, match="wrong: nowhere: unknown module"):
        base.prepare({"wrong": 1.0})


def test_wrappers_inside_a_base_are_no_part_of_the_adapters_names(net, x):
    """``torch.compile`` of single layers, checkpointing and sharding leave such names."""
    given = weights_of(open_weights(Lora(net, {str(x.path): 0.7})))
    wrapped = copy.deepcopy(net)
    for name in MODULES:
        setattr(wrapped, name, torch.compile(getattr(wrapped, name)))
    found = weights_of(open_weights(Lora(wrapped, {str(x.path): 0.7})))
    assert any("_orig_mod" in name for name in found)
    assert same({name.replace("_orig_mod.", ""): value for name, value in found.items()}, given)
    twice = {**wrapped.state_dict(), "module.lin.weight": net.lin.weight.detach()}
    with pytest.raises(WeightMismatchError, match="unknown module"):
        open_weights(Lora(twice, {str(x.path): 0.7}))
