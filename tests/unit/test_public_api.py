"""The public surface is pinned, documented and free of heavy imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import refitkit

PUBLIC = [
    "CompileError",
    "CompiledModule",
    "Config",
    "ConfigError",
    "DeadlockError",
    "DiffReport",
    "EngineError",
    "InputMismatchError",
    "ModuleLostError",
    "NotRefittableError",
    "Pipeline",
    "PlanMismatchError",
    "PluginError",
    "Problem",
    "RefitError",
    "RefitInProgressError",
    "RefitPlan",
    "RefitReport",
    "RefitResult",
    "RefitResults",
    "ResourceError",
    "SourceError",
    "TaskVectors",
    "ToolchainError",
    "UnmappedSlotError",
    "UnsupportedTargetError",
    "UpdateManifest",
    "UpdateStateError",
    "VerificationError",
    "VerificationResult",
    "WeightMismatchError",
    "WeightReceiver",
    "WeightedAverage",
    "__version__",
    "compile",
    "diff",
    "hookimpl",
    "inspect",
    "load",
    "made_of",
    "plan",
    "refit",
    "refit_all",
    "tensorrt_converter",
    "verify",
]
PACKAGE = Path(refitkit.__file__).parent
MODULES = [
    found.name
    for found in pkgutil.walk_packages([str(PACKAGE)], "refitkit.")
    if not found.name.endswith(".__main__")  # importing that runs it
]
HEAVY = ("torch", "numpy", "safetensors", "torch_tensorrt", "tensorrt", "sklearn", "pydantic")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_public_names_are_these() -> None:
    assert refitkit.__all__ == PUBLIC
    assert dir(refitkit) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(refitkit, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_every_error_is_public() -> None:
    from refitkit import errors

    names = {n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)}
    assert names <= set(refitkit.__all__)


def test_a_type_checker_sees_the_same_names() -> None:
    """What ``if TYPE_CHECKING`` imports is what ``__getattr__`` gives."""
    tree = ast.parse(Path(refitkit.__file__).read_text())
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refitkit")
        for alias in node.names
    }
    assert seen == refitkit._HOME_OF
    assert {*seen, "__version__"} == set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"refitkit.*refti"):
        _ = refitkit.refti


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, refitkit; print([m for m in {HEAVY} if m in sys.modules])"
    done = fresh(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", ["Config", "RefitError", "hookimpl", "RefitReport"])
def test_values_and_hooks_need_no_torch(name: str) -> None:
    done = fresh(f"import sys, refitkit; refitkit.{name}; print('torch' in sys.modules)")
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_making_a_host_imports_no_torch() -> None:
    done = fresh(
        "import sys; from refitkit import host; host.make_host(); print('torch' in sys.modules)"
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


ALLOWED = {
    "errors",
    "model",
    "protocols",
    "recipe",
    "program",
    "hookspecs",
    "config",
    "files",
    "processes",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("builtin/**/*.py")), ids=lambda p: p.stem)
def test_built_ins_use_only_what_a_third_party_may(path: Path) -> None:
    """Imports of their own family aside; also those inside functions."""
    family = "builtin." + path.relative_to(PACKAGE / "builtin").parts[0].removesuffix(".py")
    names = imported_by(path)
    own = [n.removeprefix("refitkit.") for n in names if n.startswith("refitkit.")]
    foreign = [
        name
        for name in own
        if name.partition(".")[0] not in ALLOWED and not (name + ".").startswith(family + ".")
    ]
    assert foreign == []
    assert "refitkit" not in names or family == "builtin"


@pytest.mark.parametrize(
    "path",
    sorted(PACKAGE.parent.glob("plugins/*/src/**/*.py")),
    ids=lambda p: f"{p.parent.name}.{p.stem}",
)
def test_our_plugins_use_only_what_a_third_party_may(path: Path) -> None:
    """What docs/guides/writing-plugins.md lists; of the package itself its public names."""
    own = [n.removeprefix("refitkit.") for n in imported_by(path) if n.startswith("refitkit.")]
    conformance = {"testing"} if path.name == "conformance.py" else set()
    foreign = [name for name in own if name.partition(".")[0] not in ALLOWED | conformance]
    assert set(foreign) <= {"cli.api"}


def imported_by(path: Path) -> list[str]:
    """Names of all modules that a file imports, or imports something from."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return names + [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
