"""An adapter in memory: factors, magnitudes and whole weights, module by module."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from refitkit.errors import Problem, SourceError
from refitkit.program.bits import all_finite, counted, finite

from refitkit_peft.keys import Key, Part, read_key
from refitkit_peft.scales import Scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from refitkit_peft.declarations import Declaration
    from refitkit_peft.lora import Alpha
    from refitkit_peft.reading import Contents

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


@dataclass(frozen=True)
class ModuleParts:
    """What an adapter has for one module.

    Attributes:
        module: Path of the module in the model; with underscores where ``flat``.
        flat: Whether it is written with underscores.
        component: Model of the pipeline, where its keys have one.
        parts: Tensors, by what they are.
        keys: The adapter's own key of each.
    """

    module: str
    flat: bool
    component: str = ""
    parts: dict[Part, torch.Tensor] = field(default_factory=dict)
    keys: dict[Part, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """One of its keys, to name it by."""
        return next(iter(self.keys.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Its path as it is, and without the component: configs are for a component alone."""
        inner = self.module.removeprefix(f"{self.component}.")
        return tuple(dict.fromkeys((self.module, inner)))

    @property
    def rank(self) -> int:
        """The rank of the first factor; 0 if that is missing or no matrix."""
        down = self.parts.get(Part.DOWN, self.parts.get(Part.TABLE_DOWN))
        return 0 if down is None or down.dim() < 2 else down.shape[0]  # noqa: PLR2004

    @property
    def has_kernel(self) -> bool:
        """Whether it is a convolution with a kernel larger than 1."""
        down = self.parts.get(Part.DOWN)
        return down is not None and prod(down.shape[2:]) > 1

    @property
    def twice(self) -> bool:
        """Whether peft adds the product two times: to ``out_proj`` of ``MultiheadAttention``.

        ``MultiheadAttention.merge`` in ``tuners/lora/layer.py`` up to 0.21.2 does, and ``forward``
        calls it, so adapters were trained like that (huggingface/peft#3774).
        """
        return ".base_layer.out_proj.lora_" in self.key


@dataclass(frozen=True)
class Whole:
    """A weight that an adapter holds whole.

    Attributes:
        name: Its name in the model.
        key: The adapter's own.
        value: It.
        of_base: Whether it is one of the base model, saved beside factors for it.
    """

    name: str
    key: str
    value: torch.Tensor
    of_base: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter, for one model.

    Attributes:
        what: What it is, for messages.
        scales: Alpha, rank and settings of each module.
        modules: What it has, by path of the module.
        wholes: Weights that it holds whole.
        problems: What is wrong with it, whatever base it is for.
        digest: 128 bits over all that it adds: two adapters of one digest add the same.
        nbytes: Bytes of its tensors.
    """

    what: str
    scales: Scales
    modules: tuple[ModuleParts, ...]
    wholes: tuple[Whole, ...]
    problems: tuple[Problem, ...]
    digest: str
    nbytes: int


def adapter_of(contents: Contents, component: str = "", alpha: Alpha | None = None) -> Adapter:
    """What a file holds for one model.

    Args:
        contents: What was read.
        component: Which model of a pipeline; empty: the file is for one.
        alpha: The user's own alpha, in place of that of the files.

    Raises:
        SourceError: It holds several adapters, or none for this model.
    """
    keys = _of_component(contents, component)
    _require_one(contents.what, keys)
    tensors = {key.text: contents.tensors[key.text] for key in keys}
    modules, wholes = _sorted(keys, tensors)
    scales = Scales(contents.declarations, alpha, modules.values())
    return Adapter(
        what=contents.what,
        scales=scales,
        modules=tuple(modules.values()),
        wholes=tuple(wholes),
        problems=(*_wrong(keys, tensors), *scales.problems),
        digest=_digest(tensors, contents.declarations, alpha),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _of_component(contents: Contents, component: str) -> list[Key]:
    keys = [read_key(text) for text in contents.tensors]
    there = sorted({key.component for key in keys if key.component})
    if not component and len(there) <= 1:
        return keys
    if component not in there:
        hint = 'say which: Lora(base, {...}, component="...")'
        problems = [Problem(name, "component", hint=hint) for name in there]
        what = f"has nothing for {component!r}" if component else "is for several models"
        raise SourceError(f"{contents.what} {what}.", problems=problems)
    mine = [key for key in keys if key.component == component]
    return [key if key.flat else _inside(key) for key in mine]


def _inside(key: Key) -> Key:
    """A key without its component."""
    module = key.module.removeprefix(f"{key.component}.")
    return Key(key.text, key.part, module, key.adapter, key.component, of_base=key.of_base)


def _require_one(what: str, keys: Iterable[Key]) -> None:
    names = sorted({key.adapter for key in keys if key.adapter})
    if len(names) > 1:
        problems = [Problem(name, "adapter") for name in names]
        hint = "Save each by itself: model.save_pretrained(path, selected_adapters=[name])."
        raise SourceError(f"{what} holds several adapters.", problems=problems, hint=hint)
    factors = {Part.DOWN, Part.UP, Part.TABLE_DOWN, Part.TABLE_UP, Part.FOREIGN}
    if not any(key.part in factors for key in keys):
        raise SourceError(f"{what} holds no factors of a LoRA adapter.")


def _sorted(
    keys: Iterable[Key], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, ModuleParts], list[Whole]]:
    modules: dict[str, ModuleParts] = {}
    wholes: list[Whole] = []
    for key in keys:
        value = tensors[key.text]
        if key.part is Part.WHOLE:
            wholes.append(Whole(key.module, key.text, value, key.of_base))
        elif key.part is not Part.FOREIGN:
            parts = modules.setdefault(key.module, ModuleParts(key.module, key.flat, key.component))
            parts.parts[key.part] = value
            parts.keys[key.part] = key.text
    return modules, wholes


def _wrong(keys: Iterable[Key], tensors: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    """What is wrong with entries by themselves."""
    seen: dict[tuple[str, Part], str] = {}
    for key in keys:
        value = tensors[key.text]
        first = seen.setdefault((key.module, key.part), key.text)
        if key.part is Part.FOREIGN:
            yield Problem(key.text, "cannot be merged", hint="of another kind of adapter than LoRA")
        elif first != key.text:
            yield Problem(key.text, "given twice", hint=f"{first!r} is the same")
        elif key.part is not Part.WHOLE and value.dtype not in _dtypes_of(key.part):
            found = str(value.dtype).removeprefix("torch.")
            yield Problem(key.text, "dtype", found, "float16, bfloat16, float32 or float64")
        elif key.part is Part.ALPHA:  # whether it is a number to divide, the scales say
            if value.numel() != 1:
                yield Problem(key.text, "shape", str(tuple(value.shape)), "one number")
        elif key.part is not Part.WHOLE:  # a mask may hold infinities: refitkit compares wholes
            yield from _not_finite(key.text, value)


def _dtypes_of(part: Part) -> set[torch.dtype]:
    """An alpha may be an integer: ``torch.tensor(alpha)`` in ``networks/lora.py`` of kohya's."""
    return _FLOATS | _INTEGERS if part is Part.ALPHA else _FLOATS


def _not_finite(name: str, value: torch.Tensor) -> Iterator[Problem]:
    if not all_finite(value):
        yield Problem(name, "non-finite", counted(~finite(value)), "finite")


def _digest(
    tensors: Mapping[str, torch.Tensor],
    declarations: Iterable[Declaration],
    alpha: Alpha | None,
) -> str:
    """Keys, dtypes, shapes and bytes, and everything that says how they are used."""
    told = hashlib.blake2b(digest_size=16)
    told.update(repr((alpha, [one.as_data() for one in declarations])).encode())
    for name in sorted(tensors):
        value = tensors[name]
        told.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        if value.numel():
            told.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()
