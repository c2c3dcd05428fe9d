"""Checkpoints that are broken, hostile or wrong: one typed error that lists everything, no change.

One module, compiled once, is tried with all of them. After each it has the slots, outputs and
version that it had, and takes good weights.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from aoti_helpers import digest, slots_of
from aoti_models import CASES
from safetensors.torch import save_file

import refitkit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, torch.Tensor]
CASE = CASES["small"]
FILES = {
    "one": ("a.weight",),
    "two": ("a.bias", "b.weight"),
    "three": ("b.bias", "scale"),
}
"""Names in each shard."""
PROOF = "proof that code was run"


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Checkpoint:
    """A good checkpoint in several files, to be spoilt."""

    def __init__(self, folder: Path, kind: str = "safetensors") -> None:
        self.folder, self.kind = folder / "checkpoint", kind
        self.folder.mkdir()
        self.outside = folder
        self.state: State = {n: v.clone() for n, v in CASE.model(1).state_dict().items()}
        for stem, names in FILES.items():
            self.save(stem, {name: self.state[name] for name in names})
        self.home = {n: self.file(stem).name for stem, names in FILES.items() for n in names}
        self.index()

    def file(self, stem: str) -> Path:
        return self.folder / f"{stem}.{self.kind}"

    def save(self, stem: str, tensors: Any) -> None:
        save = save_file if self.kind == "safetensors" else torch.save
        save(tensors, self.file(stem))

    def index(self, **home: str) -> None:
        self.home |= home
        name = "model.safetensors" if self.kind == "safetensors" else "pytorch_model.bin"
        (self.folder / f"{name}.index.json").write_text(json.dumps({"weight_map": self.home}))

    def change(self, stem: str, **tensors: torch.Tensor) -> None:
        """Write a shard anew; names have two underscores for a dot."""
        new = {name.replace("__", "."): value for name, value in tensors.items()}
        self.save(stem, {name: self.state[name] for name in FILES[stem]} | new)


@dataclass(frozen=True)
class Bad:
    """Something wrong, and what has to be said of it.

    Attributes:
        spoil: Spoils a good checkpoint; returns what to refit from if it is not the folder.
        error: The type of the error.
        problems: All that it lists: subject and kind.
        kind: Kind of the files.
        says: What is in the message.
    """

    spoil: Callable[[Checkpoint], object]
    error: type[refitkit.RefitError]
    problems: set[tuple[str, str]]
    kind: str = "safetensors"
    says: str = ""


def cut(point: Checkpoint, stem: str, by: int) -> None:
    content = point.file(stem).read_bytes()
    point.file(stem).write_bytes(content[:-by])


def move_out(point: Checkpoint, name: str) -> None:
    """Have the index name a file that is really there, but not beside it."""
    point.file("one").rename(point.outside / "one.safetensors")
    point.index(**{"a.weight": name.format(folder=point.outside)})


def nan(shape: tuple[int, ...], at: tuple[int, ...]) -> torch.Tensor:
    value = torch.ones(shape)
    value[at] = torch.nan
    return value


def twice(point: Checkpoint) -> None:
    point.change("one", b__bias=torch.zeros(8))


def everything(point: Checkpoint) -> None:
    """Two shards missing; of the third a name too few and one too many; and one in no file."""
    point.file("one").unlink()
    point.file("three").unlink()
    point.save("two", {"a.bias": point.state["a.bias"], "b.wieght": point.state["b.weight"]})


def all_readable_faults(point: Checkpoint) -> None:
    """Every shard is whole, and each has something that is not the model's."""
    point.change("one", a__weight=torch.zeros(24, 15))
    point.change("two", b__weight=nan((8, 24), (2, 3)), a__bias=torch.zeros(24).half())
    point.save("three", {"scale": torch.full((8,), torch.inf), "b.bais": torch.zeros(8)})
    del point.home["b.bias"]
    point.index(**{"b.bais": point.file("three").name})


def file_of(content: Callable[[Checkpoint], Any]) -> Callable[[Checkpoint], object]:
    """A single file that ``torch.save`` wrote of something."""

    def spoil(point: Checkpoint) -> object:
        path = point.outside / "weights.pt"
        torch.save(content(point), path)
        return path

    return spoil


def bare_pickle(point: Checkpoint) -> object:
    path = point.outside / "weights.pt"
    path.write_bytes(pickle.dumps(Bomb(point.outside / PROOF)))
    return path


def bomb_in_a_shard(point: Checkpoint) -> None:
    torch.save({**point.state, "x": Bomb(point.outside / PROOF)}, point.file("one"))


def half_merged(point: Checkpoint) -> object:
    """As parts of a merge: a broken shard and a shape are told in one error."""
    cut(point, "two", 4)
    other = {**point.state, "scale": torch.ones(9)}
    return refitkit.WeightedAverage([(point.state, 1), (point.folder, 1), (other, 1)])


SOURCE, MISMATCH = refitkit.SourceError, refitkit.WeightMismatchError
TRAVERSAL = {"../one.safetensors", "{folder}/one.safetensors", "x/../../one.safetensors"}

BAD: dict[str, Bad] = {
    "a missing shard": Bad(
        lambda p: p.file("two").unlink(), SOURCE, {("two.safetensors", "missing")}
    ),
    "two missing shards": Bad(
        lambda p: (p.file("two").unlink(), p.file("one").unlink()),
        SOURCE,
        {("two.safetensors", "missing"), ("one.safetensors", "missing")},
    ),
    "a folder instead of a shard": Bad(
        lambda p: (p.file("two").unlink(), p.file("two").mkdir()),
        SOURCE,
        {("two.safetensors", "missing")},
    ),
    "a link to nothing": Bad(
        lambda p: (p.file("two").unlink(), p.file("two").symlink_to("gone")),
        SOURCE,
        {("two.safetensors", "missing")},
    ),
    "a truncated shard": Bad(
        lambda p: cut(p, "two", 1), SOURCE, {("two.safetensors", "unreadable")}
    ),
    "a truncated header": Bad(
        lambda p: p.file("two").write_bytes(p.file("two").read_bytes()[:20]),
        SOURCE,
        {("two.safetensors", "unreadable")},
    ),
    "an empty shard": Bad(
        lambda p: p.file("two").write_bytes(b""), SOURCE, {("two.safetensors", "unreadable")}
    ),
    "two truncated shards and a missing one": Bad(
        lambda p: (cut(p, "one", 9), cut(p, "two", 9), p.file("three").unlink()),
        SOURCE,
        {
            ("one.safetensors", "unreadable"),
            ("two.safetensors", "unreadable"),
            ("three.safetensors", "missing"),
        },
    ),
    "a truncated shard of torch.save": Bad(
        lambda p: cut(p, "two", 30), SOURCE, {("two.bin", "unreadable")}, kind="bin"
    ),
    "a wrong shape": Bad(
        lambda p: p.change("two", b__weight=torch.zeros(8, 25)), MISMATCH, {("b.weight", "shape")}
    ),
    "wrong shapes in two shards": Bad(
        lambda p: (
            p.change("two", b__weight=torch.zeros(24, 8)),
            p.change("three", scale=torch.zeros(())),
        ),
        MISMATCH,
        {("b.weight", "shape"), ("scale", "shape")},
    ),
    "NaN": Bad(
        lambda p: p.change("three", scale=nan((8,), (5,))),
        MISMATCH,
        {("scale", "non-finite")},
        says="1 of 8 elements, the first at (5,)",
    ),
    "a dtype that torch lacks": Bad(
        lambda p: p.file("one").write_bytes(p.file("one").read_bytes().replace(b'"F32"', b'"XYZ"')),
        SOURCE,
        {("one.safetensors", "unreadable")},
    ),
    "all at once, in whole shards": Bad(
        all_readable_faults,
        MISMATCH,
        {
            ("a.weight", "shape"),
            ("a.bias", "dtype"),
            ("b.weight", "non-finite"),
            ("scale", "non-finite"),
            ("b.bais", "unexpected"),
            ("b.bias", "missing"),
        },
        says="did you mean 'b.bias'?",
    ),
    "a tensor that its shard lacks": Bad(
        lambda p: p.index(**{"a.weight": "two.safetensors"}),
        SOURCE,
        {("a.weight", "missing")},
        says="in 'two.safetensors', as the index says",
    ),
    "a tensor that no shard has": Bad(
        lambda p: p.index(**{"c.weight": "two.safetensors"}), SOURCE, {("c.weight", "missing")}
    ),
    "a tensor that the index does not know": Bad(
        lambda p: p.change("one", c__weight=torch.zeros(1)), SOURCE, {("c.weight", "unexpected")}
    ),
    "a name in two shards": Bad(
        twice, SOURCE, {("b.bias", "unexpected")}, says="in 'three.safetensors', as the index says"
    ),
    "all at once, in the index": Bad(
        everything,
        SOURCE,
        {
            ("one.safetensors", "missing"),
            ("three.safetensors", "missing"),
            ("b.weight", "missing"),
            ("b.wieght", "unexpected"),
        },
    ),
    "a missing shard and a wrong shape: first the files": Bad(
        lambda p: (p.file("two").unlink(), p.change("one", a__weight=torch.zeros(1))),
        SOURCE,
        {("two.safetensors", "missing")},
    ),
    **{
        f"an index that points to {name}": Bad(
            lambda p, name=name: move_out(p, name),  # type: ignore[misc]
            SOURCE,
            {(name, "not beside the index")},
            says="not beside the index",
        )
        for name in sorted(TRAVERSAL)
    },
    "an index that points to two places outside": Bad(
        lambda p: p.index(**{"a.weight": "../x.safetensors", "scale": "/etc/passwd"}),
        SOURCE,
        {("'../x.safetensors'", "not beside the index"), ("'/etc/passwd'", "not beside the index")},
    ),
    "no tensor": Bad(file_of(lambda _: [1, 2]), SOURCE, set(), says="a list"),
    "numbers among tensors": Bad(
        file_of(lambda p: {**p.state, "epoch": 3, "lr": 0.1}),
        SOURCE,
        {("epoch", "not a tensor"), ("lr", "not a tensor")},
    ),
    "a trainer's checkpoint": Bad(
        file_of(lambda p: {"student": p.state, "teacher": p.state, "optimizer": {}}),
        MISMATCH,
        {("student.", "a subtree has all names"), ("teacher.", "a subtree has all names")},
        says="rules.subtree",
    ),
    "a whole module": Bad(
        file_of(lambda _: CASE.model(1)), SOURCE, set(), says="runs no code from files"
    ),
    "a hostile object among tensors": Bad(
        file_of(lambda p: {**p.state, "x": Bomb(p.outside / PROOF)}),
        SOURCE,
        set(),
        says="runs no code from files",
    ),
    "a hostile pickle": Bad(bare_pickle, SOURCE, set(), says="runs no code from files"),
    "a hostile shard": Bad(
        bomb_in_a_shard, SOURCE, {("one.bin", "unreadable")}, kind="bin", says="runs no code"
    ),
    "broken parts of a merge": Bad(
        half_merged,
        SOURCE,
        {("part 2", "unreadable"), ("two.safetensors", "unreadable"), ("scale", "shape")},
    ),
}


@pytest.fixture(scope="module")
def compiled(saved: Callable[[str], Path]) -> refitkit.CompiledModule:
    return refitkit.load(saved("small"))


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused_and_nothing_has_changed(
    case: str, compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    bad = BAD[case]
    point = Checkpoint(tmp_path, bad.kind)
    made = bad.spoil(point)
    weights = made if isinstance(made, os.PathLike | refitkit.WeightedAverage) else point.folder
    before, slots = digest(compiled(*CASE.args())), slots_of(compiled)
    version = compiled.version

    with pytest.raises(refitkit.RefitError) as info:
        refitkit.refit(compiled, weights)

    assert type(info.value) is bad.error
    found = {(problem.subject.strip("'"), problem.kind) for problem in info.value.problems}
    wanted = {(subject.format(folder=tmp_path).strip("'"), kind) for subject, kind in bad.problems}
    assert found == wanted
    assert bad.says in str(info.value)
    assert all(subject in str(info.value) for subject, _ in wanted)
    assert not (tmp_path / PROOF).exists()
    assert digest(compiled(*CASE.args())) == before
    assert (slots_of(compiled), compiled.version) == (slots, version)

    good = CASE.model(2 + version % 2).state_dict()
    refitkit.refit(compiled, good, inputs=CASE.args())
    assert compiled.version == version + 1
    assert all(torch.equal(compiled.read(name), value) for name, value in good.items())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_same_checkpoint_unspoilt_is_taken(
    kind: str, compiled: refitkit.CompiledModule, tmp_path: Path
) -> None:
    """So that what is refused above is refused for what was done to it."""
    point = Checkpoint(tmp_path, kind)
    refitkit.refit(compiled, point.folder, inputs=CASE.args())
    assert all(torch.equal(compiled.read(name), value) for name, value in point.state.items())


def test_the_bomb_is_a_bomb(tmp_path: Path) -> None:
    """Otherwise nothing is shown by its silence."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / PROOF)))  # noqa: S301 - made here
    assert (tmp_path / PROOF).exists()


def test_links_are_followed(compiled: refitkit.CompiledModule, tmp_path: Path) -> None:
    """A cache of the Hugging Face hub has nothing but links in a model's folder.

    ``snapshots/REVISION/NAME`` is a link to ``../../blobs/HASH``: "Understand caching" in the
    documentation of huggingface_hub. Who can make links in a folder could as well copy files to it.
    """
    point = Checkpoint(tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(point.folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    refitkit.refit(compiled, snapshot)
    assert all(torch.equal(compiled.read(name), value) for name, value in point.state.items())
