"""Plans kept in a folder, so that the same program is not planned twice on one machine.

A file is named by the digest of all that its plan depends on. What is found under that name is
checked all the same, like any plan file, and held against the program, the target and the versions
at hand: a file that is damaged or does not fit is ignored, said so, and replaced.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from refitkit.errors import PlanMismatchError, Problem, RefitError
from refitkit.model import FORMAT
from refitkit.program import facts_of
from refitkit.program.facts import tensors_of
from refitkit.protocols import KnowsPlanKey
from refitkit.recipe import RefitPlan
from refitkit.recipe.store import index_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.export import ExportedProgram

    from refitkit.host import Host
    from refitkit.model import PinnedTensor, Slot
    from refitkit.program import ProgramFacts
    from refitkit.protocols import Backend, OpenedModule, PlanKey, Tools
    from refitkit.recipe.plan import Opener

_SUFFIX = ".refitplan"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Wanted:
    """What a plan is wanted for, and all that it depends on.

    Attributes:
        backend: Name of the backend.
        program: The program.
        facts: Its leaves, ties and fingerprint.
        constants: What no state_dict holds and plans keep, by FQN.
        slots: Slots of the target, sorted; None when planning offline.
        key: What the backend tells.
        plugins: Who may have a say in it.
    """

    backend: str
    program: ExportedProgram
    facts: ProgramFacts
    constants: Mapping[str, PinnedTensor]
    slots: tuple[Slot, ...] | None
    key: PlanKey
    plugins: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 over everything: the name of the file."""
        parts = {
            "format": FORMAT,
            "code": code_digest(_PACKAGE),
            "backend": self.backend,
            "graph": self.facts.graph,
            "ranges": sorted(f"{s}: {r}" for s, r in self.program.range_constraints.items()),
            "inputs": _described(self.program.example_inputs),
            "leaves": [leaf.model_dump(mode="json") for leaf in self.facts.leaves],
            "ties": self.facts.ties,
            "constants": {name: one.model_dump() for name, one in self.constants.items()},
            "slots": None if self.slots is None else [one.model_dump() for one in self.slots],
            "text": self.key.text,
            "versions": dict(self.key.versions),
            "platform": self.key.platform,
            "plugins": self.plugins,
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def wanted(
    host: Host,
    backend: Backend,
    program: ExportedProgram,
    module: OpenedModule | None,
    options: Mapping[str, Any],
    tools: Tools,
) -> Wanted | None:
    """What a plan would be wanted for; None where the backend's plans cannot be kept.

    Raises:
        ConfigError: An option cannot be meant.
    """
    key = backend.plan_key(program, module, options) if isinstance(backend, KnowsPlanKey) else None
    if key is None:
        return None
    facts, tensors = facts_of(program), tensors_of(program)
    kept = {leaf.fqn: tensors[leaf.fqn] for leaf in facts.leaves if leaf.kept}
    plugins = [f"{one.name} {one.origin}" for one in host.plugins()]
    plugins += [f"layer type {one.model_dump_json()}" for one in tools.layer_types.values()]
    return Wanted(
        backend=backend.name,
        program=program,
        facts=facts,
        constants=index_of(kept),
        slots=_slots_of(module),
        key=key,
        plugins=tuple(plugins),
    )


@cache
def code_digest(folder: Path) -> str:
    """sha256 over all modules of a package.

    What plans hold is decided by refitkit's code, which can change without its version: a plan that
    an older recorder made is not to outlive it.
    """
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


class PlanCache:
    """Plans in a folder."""

    def __init__(
        self,
        folder: Path,
        progress: Callable[[str], None],
        opener: Opener,
    ) -> None:
        """Touch nothing yet.

        Args:
            folder: Where files are; it is made when the first one is written.
            progress: Called with one line of text for each step.
            opener: What turns weights into sources.
        """
        self._folder, self._tell, self._opener = folder, progress, opener

    def get(self, wish: Wanted, make: Callable[[], RefitPlan]) -> RefitPlan:
        """The plan that is kept, or one that is made now and kept.

        Args:
            wish: What it is wanted for.
            make: Makes one.
        """
        path = self._folder / f"{wish.digest}{_SUFFIX}"
        found = self._read(path, wish)
        if found is not None:
            self._tell(f"the plan was made before: {path}")
            return found
        plan = make()
        self._write(path, plan)
        return plan

    def _read(self, path: Path, wish: Wanted) -> RefitPlan | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            self._tell(f"the plan cache cannot be read: {exc}")
            return None
        try:
            plan = RefitPlan.from_bytes(content, f"{str(path)!r}", self._opener)
            self._check(plan, wish)
        except RefitError as exc:
            self._tell(f"a plan in the cache is not used, and made again: {exc}")
            return None
        return plan

    def _check(self, plan: RefitPlan, wish: Wanted) -> None:
        """Check that a plan is for what is wanted, whatever the name of its file says.

        Raises:
            PlanMismatchError: It is not; lists what differs.
            SourceError: Its guards cannot be evaluated.
        """
        problems = list(_differences(plan, wish))
        if not problems and plan.data.guards:
            problems = list(plan.broken_guards(self._opener(wish.program, plan)))
        if problems:
            raise PlanMismatchError(f"{plan.backend}: it is of something else.", problems=problems)
        if wish.slots is not None:
            plan.check_engines(wish.backend, wish.slots)

    def _write(self, path: Path, plan: RefitPlan) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            plan.save(path)
        except (OSError, RefitError) as exc:
            self._tell(f"the plan cannot be kept for the next time: {exc}")
        else:
            self._tell(f"the plan is kept for the next time: {path}")


def _differences(plan: RefitPlan, wish: Wanted) -> Iterator[Problem]:
    data, facts = plan.data, wish.facts
    made, key = data.fingerprint, wish.key
    pairs: list[tuple[str, object, object]] = [
        ("backend", data.backend, wish.backend),
        ("graph", made.graph, facts.graph),
        ("leaves", data.leaves, facts.leaves),
        ("ties", data.ties, facts.ties),
        ("versions", made.versions, dict(key.versions)),
        ("platform", made.platform, key.platform),
    ]
    if key.settings is not None:
        pairs.append(("settings", made.settings, dict(key.settings)))
    pairs += [(f"constant {n}", data.pinned.get(n), one) for n, one in wish.constants.items()]
    for name, found, wanted_ in pairs:
        if found != wanted_:
            yield Problem(name, "differs")


def _slots_of(module: OpenedModule | None) -> tuple[Slot, ...] | None:
    if module is None:
        return None
    slots = [slot for engine in module.engines.values() for slot in engine.slots.values()]
    return tuple(sorted(slots, key=lambda slot: slot.key))


def _described(inputs: object) -> list[str]:
    """Example inputs without the values of tensors: shapes and dtypes decide how engines are."""
    leaves, form = pytree.tree_flatten(inputs)
    return [str(form), *map(_text, leaves)]


def _text(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)} {value.device}"
    return repr(value)
