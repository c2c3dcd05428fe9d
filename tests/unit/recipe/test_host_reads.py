"""Values that leave a recording become guards; values that come back are recognized."""

from __future__ import annotations

import ctypes
import io
import math
import mmap
import pickle
import struct
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from refitkit.recipe import Tape
from refitkit.recipe.origins import Literal
from tests.unit.recipe.recorder import REFUSED, agree, like, record, truth

if TYPE_CHECKING:
    from collections.abc import Callable

Function = Any


def leaves() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(4, 6, generator=generator),
        "b": torch.randn(6, generator=generator),
        "i": torch.tensor([2, 0, 1, 0]),
    }


def assigned(array: Any, where: Any, value: Any) -> Any:
    array[where] = value
    return array


HOST_READS: dict[str, Function] = {
    "item": lambda w, b, i: w * b[0].item(),
    "bool": lambda w, b, i: w * 2 if (b[0] > 0) else w * 3,
    "int": lambda w, b, i: w * int(i[0]),
    "float": lambda w, b, i: w * float(b[0]),
    "complex": lambda w, b, i: w * complex(b[0]).real,
    "index": lambda w, b, i: w[i[0]],
    "range": lambda w, b, i: w * len(range(i[0])),
    "slice": lambda w, b, i: w[: i[0]],
    "tolist": lambda w, b, i: torch.tensor(b.tolist()),
    "iteration": lambda w, b, i: torch.tensor([float(x) for x in b]),
    "list of tensors": lambda w, b, i: torch.tensor([b[0], b[1]]),
    "new_tensor": lambda w, b, i: w.new_tensor([b[0], 3.0]),
    "equal": lambda w, b, i: w * (2 if torch.equal(b, b * 1.5) else 3),
    "allclose": lambda w, b, i: w * (2 if torch.allclose(b, b * 1.5) else 3),
    "nonzero": lambda w, b, i: w * torch.nonzero(b > 0).shape[0],
    "masked_select": lambda w, b, i: w * torch.masked_select(b, b > 0).shape[0],
    "boolean index": lambda w, b, i: w * b[b > 0].shape[0],
    "unique": lambda w, b, i: w * torch.unique(i).shape[0],
    "sorted": lambda w, b, i: torch.stack(sorted(b)),
    "format": lambda w, b, i: w * float(f"{b[0]:.3f}"),
    "repr": lambda w, b, i: w * len(repr(b[0])),
    "full": lambda w, b, i: torch.full((3,), b[0].item()),
    "alpha": lambda w, b, i: torch.add(w, b, alpha=b[0].item()),
    "assigned number": lambda w, b, i: assigned(w * 1, (0, 0), b[0].item()),
    "numpy max": lambda w, b, i: w * float(w.numpy().max()),
    "numpy mean": lambda w, b, i: w * float(w.numpy().mean()),
    "numpy std": lambda w, b, i: w * float(b.numpy().std()),
    "numpy argmax": lambda w, b, i: w * int(b.numpy().argmax()),
    "numpy any": lambda w, b, i: w * (2 if b.numpy().any() else 3),
    "numpy index": lambda w, b, i: w * float(b.numpy()[0]),
    "numpy iteration": lambda w, b, i: w * float(sum(b.numpy())),
    "numpy of rows": lambda w, b, i: w * float(sum(row[0] for row in w.numpy())),
    "numpy append": lambda w, b, i: torch.from_numpy(np.append(b.numpy(), np.float32(1))),
    "numpy concatenate": lambda w, b, i: torch.from_numpy(np.concatenate([b.numpy()] * 2)),
    "numpy stack": lambda w, b, i: torch.from_numpy(np.stack([b.numpy(), b.numpy()])),
    "numpy where": lambda w, b, i: torch.from_numpy(np.where(b.numpy() > 0, b.numpy(), 0)),
    "numpy astype": lambda w, b, i: torch.from_numpy(b.numpy().astype(np.float64)),
    "numpy copy": lambda w, b, i: torch.from_numpy(b.numpy().copy()),
    "numpy copy, written": lambda w, b, i: torch.from_numpy(assigned(b.numpy().copy(), 0, 1)),
    "np.copy": lambda w, b, i: torch.from_numpy(np.copy(b.numpy())),
    "np.array, written": lambda w, b, i: torch.from_numpy(assigned(np.array(b.numpy()), 0, 1)),
    "np.array of a list": lambda w, b, i: torch.from_numpy(np.array([b.numpy(), b.numpy()])),
    "np.array of tensors": lambda w, b, i: torch.from_numpy(np.array([b[0], b[1]])),
    "np.full": lambda w, b, i: torch.from_numpy(np.full((6,), b.numpy())),
    "np.copyto": lambda w, b, i: torch.from_numpy(copied(b.numpy())),
    "np.fromiter": lambda w, b, i: torch.from_numpy(np.fromiter(b.numpy(), np.float32)),
    "np.frombuffer": lambda w, b, i: w * float(np.frombuffer(b.numpy(), np.float32)[0]),
    "np.asarray": lambda w, b, i: w * float(np.asarray(b).max()),
    "np.asarray of an array": lambda w, b, i: w * float(np.asarray(b.numpy()).max()),
    "np.array": lambda w, b, i: w * float(np.array(b).max()),
    "np.ascontiguousarray": lambda w, b, i: w * float(np.ascontiguousarray(w.numpy().T).max()),
    "ravel that copies": lambda w, b, i: torch.from_numpy(w.numpy().T.ravel()),
    "flatten": lambda w, b, i: torch.from_numpy(w.numpy().flatten()),
    "flat": lambda w, b, i: w * float(w.numpy().flat[1]),
    "data": lambda w, b, i: w * b.numpy().data[0],
    "ctypes": lambda w, b, i: w * (b.numpy().ctypes.data and 2),
    "array interface": lambda w, b, i: w * len(b.numpy().__array_interface__["shape"]),
    "base": lambda w, b, i: w * float(b.numpy().base[0]),
    "plain view": lambda w, b, i: w * float(b.numpy().view(np.ndarray).max()),
    "bits": lambda w, b, i: torch.from_numpy(b.numpy().view(np.int32) + 1),
    "fancy index": lambda w, b, i: torch.from_numpy(w.numpy()[i.numpy()]),
    "mask": lambda w, b, i: torch.from_numpy(w.numpy()[i.numpy() > 0]),
    "clip": lambda w, b, i: torch.from_numpy(b.numpy().clip(-1, 1)),
    "matmul": lambda w, b, i: torch.from_numpy(w.numpy() @ b.numpy()),
    "einsum": lambda w, b, i: torch.from_numpy(np.einsum("ij,j->i", w.numpy(), b.numpy())),
    "bytes": lambda w, b, i: w * bytes(b.numpy())[0],
    "tobytes": lambda w, b, i: w * b.numpy().tobytes()[0],
    "array's repr": lambda w, b, i: w * len(repr(b.numpy())),
    "array's format": lambda w, b, i: w * len(f"{b.sum().numpy()}"),
    "pickle": lambda w, b, i: torch.from_numpy(pickled(b.numpy())),
    "branch on a comparison": lambda w, b, i: w * 2 if (b.numpy() > 0).all() else w * 3,
    "array of no dimension": lambda w, b, i: w * 2 if b.sum().numpy() > 0 else w * 3,
    "dlpack": lambda w, b, i: w * float(np.from_dlpack(b).max()),
    "nditer": lambda w, b, i: w * float(sum(float(x) for x in np.nditer(b.numpy()))),
    "memoryview": lambda w, b, i: w * memoryview(b.numpy())[0],
    "struct": lambda w, b, i: w * struct.unpack_from("f", b.numpy())[0],
    "bytearray": lambda w, b, i: w * bytearray(b.numpy())[1],
    "bytes of a stream": lambda w, b, i: w * io.BytesIO(b.numpy()).read()[1],
    "a library in C": lambda w, b, i: w * (ctypes.c_float * 6).from_buffer_copy(b.numpy())[0],
    "buffer of a view": lambda w, b, i: b * memoryview(w.numpy()[1])[2],
    "assigned into a plain array": lambda w, b, i: torch.from_numpy(filled(b.numpy())),
    "assigned, the plain array a tensor before": lambda w, b, i: filled_later(b),
    "assigned, of which a part": lambda w, b, i: b[:2] * torch.from_numpy(filled(b.numpy())[2:4]),
    "assigned, and computed with": lambda w, b, i: torch.from_numpy(filled(b.numpy()) * 2),
    "assigned, and read as a number": lambda w, b, i: w * float(filled(b.numpy()).max()),
    "assigned, and passed on": lambda w, b, i: passed_on_and_filled(b),
    "assigned to a list of arrays": lambda w, b, i: torch.tensor([filled(b.numpy()).tolist()] * 2),
    "assigned, and copied by torch": lambda w, b, i: torch.tensor(filled(b.numpy())),
    "assigned of what is computed": lambda w, b, i: torch.from_numpy(filled((b * 2).numpy())),
    "assigned to an array of numbers": lambda w, b, i: torch.from_numpy(
        assigned(np.array([1.0] * 6, np.float32), slice(None), b.numpy())
    ),
    "only asked for its shape": lambda w, b, i: w * len(b.numpy()),
    "zeros like it": lambda w, b, i: w + torch.from_numpy(np.zeros_like(b.numpy())),
}


def filled(array: Any) -> Any:
    """Return a NumPy array with the values of another one, copied without a Python call on it."""
    plain = np.zeros(6, np.float32)
    plain[:] = array
    return plain


def filled_later(b: torch.Tensor) -> torch.Tensor:
    plain = np.zeros(6, np.float32)
    tensor = torch.from_numpy(plain)
    plain[:] = b.numpy()
    return tensor + 1


def passed_on_and_filled(b: torch.Tensor) -> torch.Tensor:
    array = b.numpy()
    plain = filled(array)
    return torch.from_numpy(array) * torch.from_numpy(plain)


def copied(array: Any) -> Any:
    plain = np.zeros(6, np.float32)
    np.copyto(plain, array)
    return plain


def pickled(array: Any) -> Any:
    return pickle.loads(pickle.dumps(array))  # noqa: S301 - data of this test


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's
@pytest.mark.parametrize("name", HOST_READS)
def test_what_leaves_is_a_guard(name: str) -> None:
    """Equal weights pass; others pass only if the guarded value is the same."""
    recording = record(HOST_READS[name], leaves())
    assert recording.guards
    assert agree(recording.values(leaves()), recording.outputs)
    assert agree(recording.outputs, truth(HOST_READS[name], leaves()))
    verdicts = set()
    for seed in range(1, 9):
        found = recording.values(like(leaves(), seed))
        verdicts.add(found is REFUSED)
        assert found is REFUSED or agree(found, truth(HOST_READS[name], like(leaves(), seed)))
    assert True in verdicts


PASSED_ON: dict[str, Function] = {
    "from_numpy": lambda w, b, i: torch.from_numpy(b.numpy()),
    "as_tensor": lambda w, b, i: torch.as_tensor(b.numpy()),
    "transposed": lambda w, b, i: torch.from_numpy(w.numpy().T) * 2,
    "sliced": lambda w, b, i: torch.from_numpy(w.numpy()[1:3]) * 2,
    "reshaped": lambda w, b, i: torch.from_numpy(b.numpy().reshape(2, 3)),
    "with one more dimension": lambda w, b, i: torch.from_numpy(np.expand_dims(b.numpy(), 0)),
    "np.transpose": lambda w, b, i: torch.from_numpy(np.transpose(w.numpy())) + 1,
    "np.asarray": lambda w, b, i: torch.from_numpy(np.asarray(b.numpy())),
    "asked for its shape": lambda w, b, i: asked(b.numpy()),
    "arrays of numbers beside it": lambda w, b, i: with_numbers(b),
    "from_dlpack": lambda w, b, i: torch.utils.dlpack.from_dlpack(b) * 2,
    "a NumPy number before": lambda w, b, i: np.float32(2) * b,
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_passed_on_is_known_again_without_a_guard(name: str) -> None:
    recording = record(PASSED_ON[name], leaves())
    assert not recording.guards
    assert recording.state == "recipe"
    other = like(leaves())
    assert agree(recording.values(other), truth(PASSED_ON[name], other))


def asked(array: Any) -> torch.Tensor:
    return torch.from_numpy(array) * np.shape(array)[0]


def with_numbers(b: torch.Tensor) -> torch.Tensor:
    """Create arrays of numbers before and after an array is exported."""
    before = np.array([1.0, 2.0, 3.0], np.float32)
    passed = torch.from_numpy(b.numpy())
    after, ones = np.asarray([3.0, 4.0, 5.0], np.float32), np.ones((2, 3), np.float32)
    made = [torch.from_numpy(one) for one in (before, after, ones[1], np.full(3, 2, np.float32))]
    counted = torch.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3)[0])
    return passed * torch.cat([made[0] + made[2], made[1] * made[3]]) + counted.repeat(2)


LITERALS: dict[str, Function] = {
    "item": lambda w, b, i: w * torch.tensor([2.0]).item(),
    "branch": lambda w, b, i: w * 2 if torch.ones(2).sum() > 0 else w,
    "numpy": lambda w, b, i: w * float(torch.arange(3.0).numpy().max()),
    "nonzero": lambda w, b, i: w * torch.nonzero(torch.eye(2)).shape[0],
    "shape of zeros like it": lambda w, b, i: w * (2 if torch.zeros_like(w).sum() > 0 else 3),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literals_need_no_guard(name: str) -> None:
    recording = record(LITERALS[name], leaves())
    assert not recording.guards
    other = like(leaves())
    assert agree(recording.values(other), truth(LITERALS[name], other))


WRITES: dict[str, Callable[[Any], object]] = {
    "element": lambda a: a.__setitem__(0, 5),
    "all": lambda a: a.__setitem__(slice(None), 5),
    "in place": lambda a: a.__iadd__(1),
    "fill": lambda a: a.fill(1),
    "sort": lambda a: a.sort(),
    "partition": lambda a: a.partition(2),
    "byteswap": lambda a: a.byteswap(inplace=True),
    "copyto": lambda a: np.copyto(a, 7),
    "out": lambda a: np.add(a, 1, out=a),
    "at": lambda a: np.add.at(a, [0], 5),
    "through a view": lambda a: a[1:3].fill(2),
    "through flat": lambda a: a.flat.__setitem__(0, 3),
    "through asarray": lambda a: np.asarray(a).fill(2),
}


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_writes_through_numpy_are_refused(name: str, derived: bool) -> None:
    weights = leaves()

    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        tensor = b * 2 if derived else b
        WRITES[name](tensor.numpy())
        return tensor

    with pytest.raises(ValueError, match="read-only"):
        record(function, weights)
    assert agree(weights, leaves())


def test_a_tensor_made_an_array_by_numpy_cannot_be_written_to() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        np.asarray(b)[0] = 1
        return b

    with pytest.raises(ValueError, match="read-only"):
        record(function, leaves())


def test_torch_may_write_to_an_array_that_it_was_given_back() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        derived = b * 2
        torch.from_numpy(derived.numpy()).add_(1)
        return derived

    recording = record(function, leaves())
    assert not recording.guards
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_an_array_that_numpy_changes_is_another_literal() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        array = np.ones(6, np.float32)
        tensor = torch.from_numpy(array)
        first, part = b * tensor, tensor[1:3]
        array[:] = 5
        return first, b * tensor, b[:2] * part, b * torch.from_numpy(array)

    recording = record(function, leaves())
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_a_value_is_what_it_was_when_it_left() -> None:
    """The guard holds the value before a later write in place."""

    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        derived = b * 2
        scale = derived[0].item()
        derived.add_(1)
        return w * scale + derived

    recording = record(function, leaves())
    assert agree(recording.values(leaves()), recording.outputs)
    assert recording.values(like(leaves())) is REFUSED


def test_an_array_is_read_as_it_is_then() -> None:
    """The array is exported, then the tensor is changed, then the array is read."""

    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        derived = b * 2
        array = derived.numpy()
        derived.add_(1)
        return w * float(array[0])

    recording = record(function, leaves())
    assert agree(recording.values(leaves()), recording.outputs)
    assert recording.values(like(leaves())) is REFUSED


def test_a_value_of_unknown_origin_that_leaves_makes_all_unmapped() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return w * torch.Tensor([2.0]).item(), b * 1

    recording = record(function, leaves())
    assert set(recording.states.values()) == {"unmapped"}
    assert "its source weights are unknown" in recording.rows["y1"].reason


@pytest.mark.parametrize("value", [-0.0, float("nan")])
def test_guards_compare_bits(value: float) -> None:
    """For a guard, 0 differs from -0, and a NaN equals itself."""
    weights = leaves()
    weights["b"][0] = value
    recording = record(HOST_READS["item"], weights)
    assert recording.values(weights) is not REFUSED
    assert recording.values({**weights, "b": weights["b"].abs().nan_to_num()}) is REFUSED


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("name", ["numbers", "changed", "large"])
def test_memory_that_a_layer_reads_and_no_tensor_has(lent: bool, name: str) -> None:
    """Memory that NumPy did not create may hold the values of exported arrays."""
    weights = leaves()
    tape = Tape(weights)
    with tape:
        passed = torch.from_numpy(weights["b"].numpy()) if lent else None
        array = {
            "numbers": lambda: np.array([1.0, 2.0], np.float32),
            "changed": lambda: assigned(np.ones(3, np.float32), 1, 5.0),
            "large": lambda: np.zeros(1 << 19, np.float32),
        }[name]()
        with tape.paused():
            flat = torch.from_numpy(array)
        origin = tape.origin_at(flat)
    assert isinstance(origin.node, Literal)
    found = [one.reason for one in tape.host_reads if one.reason == "passed to NumPy"]
    assert len(found) == int(lent and name != "numbers")
    assert passed is None or passed.data_ptr() == weights["b"].data_ptr()


# -- memory that is read where no recording can see it ----------------------------------------

_early_numpy, _early_address = torch.Tensor.numpy, torch.Tensor.data_ptr
"""Methods that a module looked up before the recording began."""


def first_at(address: int) -> float:
    return float(ctypes.c_float.from_address(address).value)


def six_at(address: int) -> list[float]:
    return list((ctypes.c_float * 6).from_address(address))


def moved(b: torch.Tensor) -> Any:
    array = np.zeros(6, np.float32)
    ctypes.memmove(array.ctypes.data, b.data_ptr(), 24)
    return array


def from_storage(storage: Any) -> torch.Tensor:
    with tempfile.TemporaryFile() as file:
        storage._write_file(file, False, False, 1)
        file.seek(0)
        return torch.tensor(struct.unpack("6f", file.read()))


def shared(b: torch.Tensor) -> torch.Tensor:
    tensor = b.clone()
    descriptor, size = tensor.untyped_storage()._share_fd_cpu_()
    with mmap.mmap(descriptor, size) as memory:
        return torch.tensor(struct.unpack("6f", memory[:24]))


def saved(b: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    return torch.load(file) * 1


def read_and_passed_on(b: torch.Tensor) -> torch.Tensor:
    array = b.numpy()
    return torch.from_numpy(array) * (ctypes.c_float * 6).from_buffer_copy(array)[0]


def read_passed_on_and_listed(b: torch.Tensor) -> torch.Tensor:
    array = b.numpy()
    return torch.from_numpy(array) * torch.tensor(struct.unpack("6f", array))


SMUGGLED: dict[str, Function] = {
    "address, a factor": lambda w, b, i: w * first_at(b.data_ptr()),
    "address, of a part": lambda w, b, i: w * first_at(b[2].data_ptr()),
    "address, of what is computed": lambda w, b, i: torch.tensor(six_at((b * 2).data_ptr())),
    "address, of .data": lambda w, b, i: torch.tensor(six_at(b.data.data_ptr())),
    "address, asked of torch._C": lambda w, b, i: torch.tensor(six_at(torch._C._data_address(b))),
    "address, a list": lambda w, b, i: torch.tensor(six_at(b.data_ptr())),
    "address, a new tensor": lambda w, b, i: w.new_tensor(six_at(b.data_ptr())),
    "address, an array": lambda w, b, i: torch.from_numpy(np.array(six_at(b.data_ptr()))),
    "address, np.full": lambda w, b, i: torch.from_numpy(np.full(3, first_at(b.data_ptr()))),
    "address, filled": lambda w, b, i: torch.zeros(3).fill_(first_at(b.data_ptr())),
    "address, full": lambda w, b, i: torch.full((3,), first_at(b.data_ptr())),
    "address, a scalar": lambda w, b, i: torch.scalar_tensor(first_at(b.data_ptr())) * 1,
    "address, assigned": lambda w, b, i: assigned(torch.zeros(3), 0, first_at(b.data_ptr())),
    "address, alpha": lambda w, b, i: torch.add(w, b, alpha=first_at(b.data_ptr())),
    "address, bits": lambda w, b, i: w * ctypes.c_int.from_address(b.data_ptr()).value,
    "address, an index": lambda w, b, i: w[ctypes.c_int.from_address(i.data_ptr()).value] * 1,
    "address, a branch": lambda w, b, i: w * 2 if first_at(b.data_ptr()) > 0 else w * 3,
    "address, text": lambda w, b, i: w * float(str(first_at(b.data_ptr()))),
    "address, bytes": lambda w, b, i: torch.tensor(
        struct.unpack("6f", ctypes.string_at(b.data_ptr(), 24))
    ),
    "address, frombuffer": lambda w, b, i: torch.frombuffer(
        bytearray(ctypes.string_at(b.data_ptr(), 24)), dtype=torch.float32
    ).clone(),
    "address, memmove": lambda w, b, i: torch.from_numpy(moved(b)),
    "address, ctypeslib": lambda w, b, i: torch.from_numpy(
        np.ctypeslib.as_array((ctypes.c_float * 6).from_address(b.data_ptr())).copy()
    ),
    "storage, its address": lambda w, b, i: torch.tensor(six_at(b.untyped_storage().data_ptr())),
    "storage, a copy of it": lambda w, b, i: torch.tensor(
        six_at(torch.UntypedStorage(24).copy_(b.untyped_storage()).data_ptr())
    ),
    "storage, a clone of it": lambda w, b, i: (
        torch.tensor(six_at((clone := b.untyped_storage().clone()).data_ptr())) * clone.nbytes()
    ),
    "storage, a file": lambda w, b, i: from_storage(b.untyped_storage()),
    "storage, another process's": lambda w, b, i: shared(b),
    "pickle, its size": lambda w, b, i: w * len(set(pickle.dumps(b))),
    "pickle, its bytes": lambda w, b, i: torch.tensor(
        [*pickle.dumps(b)[-40:]], dtype=torch.float32
    ),
    "torch.save": lambda w, b, i: saved(b),
    "safetensors": lambda w, b, i: torch.from_numpy(
        safetensors.numpy.load(safetensors.torch.save({"b": b}))["b"]
    ),
    "handle": lambda w, b, i: torch.tensor(
        [6.5] * len(torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([b]))
    ),
    "early numpy": lambda w, b, i: torch.from_numpy(_early_numpy(b).copy()),
    "early numpy, transposed": lambda w, b, i: torch.from_numpy(_early_numpy(w).T.copy()),
    "early numpy, cast": lambda w, b, i: torch.from_numpy(_early_numpy(b).astype(np.float16)),
    "early address": lambda w, b, i: torch.tensor(six_at(_early_address(b))),
    "an array, read and passed on": lambda w, b, i: read_and_passed_on(b),
    "an array, read, passed on, listed": lambda w, b, i: read_passed_on_and_listed(b),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_number_that_may_hold_a_weight_is_no_literal(name: str) -> None:
    recording = record(SMUGGLED[name], leaves())
    assert recording.state == "unmapped"
    assert recording.values(leaves()) is REFUSED


def test_the_reason_names_the_weight_and_what_was_given() -> None:
    recording = record(SMUGGLED["address, a list"], leaves())
    assert "the address of 'b' was given" in recording.rows["y"].reason
    assert "'b'" in record(SMUGGLED["early numpy"], leaves()).rows["y"].reason


def harmless(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Use numbers from before the exposure, from NumPy alone, and for shapes and strides only."""
    before, literal = w * 2.5, torch.tensor([1.5, 2.5])
    b.data_ptr()
    counted = torch.from_numpy(np.arange(6, dtype=np.float32))
    laid_out = w.view(2, 12).permute(1, 0).reshape(3, 8).unsqueeze(0).expand(2, 3, 8).sum((0, 1))
    return before, literal.neg(), b * counted, laid_out, torch.zeros(3) + literal.sum(), w.t() @ w


def test_what_owes_nothing_to_the_numbers_stays() -> None:
    recording = record(harmless, leaves())
    assert [recording.states[f"y{n}"] for n in range(6)] == [
        *("recipe", "frozen", "recipe", "recipe", "frozen", "recipe")
    ]
    assert agree(recording.values(like(leaves())), truth(harmless, like(leaves())))


def test_the_address_of_a_literal_makes_no_number_suspect() -> None:
    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        literal = torch.full((2,), 2.5)
        return w * first_at(literal.data_ptr())

    recording = record(function, leaves())
    assert recording.state == "recipe"
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


def test_upstream_may_ask_for_addresses() -> None:
    """Torch-TensorRT reads the address of every weight, to pass it to TensorRT."""
    code = compile("def ask(tensor): return tensor.data_ptr()", "upstream", "exec")
    upstream = {"__name__": "torch_tensorrt.dynamo.conversion.converter_utils"}
    exec(code, upstream)  # noqa: S102 - a function of a module that is not installed everywhere

    def function(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        upstream["ask"](b)
        return w * 2.5

    recording = record(function, leaves())
    assert recording.state == "recipe"
    assert agree(recording.values(like(leaves())), truth(function, like(leaves())))


UNWATCHED: dict[str, Function] = {
    "a method that was looked up before, computed with": lambda w, b, i: torch.from_numpy(
        np.tanh(_early_numpy(b))
    ),
    "an array that is computed with in C, and passed on": lambda w, b, i: (
        torch.from_numpy(array := b.numpy()) * math.tanh(struct.unpack("6f", array)[0])
    ),
}


@pytest.mark.parametrize("name", UNWATCHED)
def test_what_nobody_can_watch_is_known(name: str) -> None:
    """These recipes are wrong and no guard notices; ``prove=True`` does.

    If this test fails because a case is watched now, move the case to the tests above.
    """
    recording = record(UNWATCHED[name], leaves())
    assert recording.state in {"recipe", "frozen"}
    assert not recording.guards
    other = like(leaves())
    assert not agree(recording.values(other), truth(UNWATCHED[name], other))


def test_all_functions_are_as_before() -> None:
    watched = [
        *((torch.Tensor, name) for name in ("numpy", "__array__", "tolist", "data_ptr")),
        *((torch.Tensor, name) for name in ("__dlpack__", "__setitem__", "new_tensor")),
        *((torch, name) for name in ("tensor", "as_tensor", "asarray", "from_numpy")),
        *((np, name) for name in ("array", "asarray", "full", "copyto", "ascontiguousarray")),
        *((torch.UntypedStorage, name) for name in ("clone", "data_ptr", "__reduce__", "cpu")),
        *((torch.Tensor, name) for name in ("__reduce_ex__", "__cuda_array_interface__")),
        *((torch._C, name) for name in ("_data_address", "_to_dlpack")),
        (torch, "from_dlpack"),
    ]
    before = [getattr(owner, name) for owner, name in watched]

    def fails(w: torch.Tensor, b: torch.Tensor, i: torch.Tensor) -> None:
        assert all(
            getattr(owner, name) is not old
            for (owner, name), old in zip(watched, before, strict=True)
        )
        raise KeyError

    with pytest.raises(KeyError):
        record(fails, leaves())
    assert [getattr(owner, name) for owner, name in watched] == before
