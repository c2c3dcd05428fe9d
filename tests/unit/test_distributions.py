"""Which modules a file may name: those of installed plugins, and no others."""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING

import pytest

from refitkit import Config
from refitkit.host import make_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from refitkit.host import Host

PLUGIN = "refitkit_trusted"
FILES = {
    f"{PLUGIN}/__init__.py": "",
    f"{PLUGIN}/converters.py": "",
    f"{PLUGIN}/__main__.py": "",
    f"{PLUGIN}/deep/__init__.py": "raise RuntimeError",
    f"{PLUGIN}/deep/gates.py": "raise RuntimeError",
    f"{PLUGIN}/bare/gates.py": "raise RuntimeError",
    f"{PLUGIN}_tools/__init__.py": "",
}


@pytest.fixture(autouse=True)
def _modules_forgotten() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a distribution, as files that importlib.metadata reads."""

    def do(
        target: str, files: dict[str, str], *, folder: str = "site", name: str = "trusted"
    ) -> Path:
        site = tmp_path / folder
        for path, code in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(code)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[refitkit]\n{name} = {target}\n")
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return site

    return do


def allowed(host: Host, *names: str) -> list[str]:
    return [name for name in names if host.may_import(name)]


def test_modules_of_the_plugins_package_are_allowed_and_not_imported(
    install: Callable[..., Path],
) -> None:
    install(PLUGIN, FILES)
    names = [PLUGIN, *(f"{PLUGIN}.{n}" for n in ("converters", "deep", "deep.gates", "bare.gates"))]
    assert allowed(make_host(), *names) == names
    assert {n for n in sys.modules if n.startswith(PLUGIN)} == {PLUGIN}


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", f".{PLUGIN}", f"{PLUGIN}.", f"{PLUGIN}..converters", f"{PLUGIN}:x"),
        *(f"{PLUGIN}/converters", f"{PLUGIN}.converters.x", f"{PLUGIN}.nothing", f"{PLUGIN}.bare"),
        *(f"{PLUGIN}_tools", f"{PLUGIN.upper()}.converters", f"{PLUGIN}.__main__", "antigravity"),
        *("refitkit", "refitkit.cli.main", "refitkit.cli.__main__", "os.path"),
    ],
)
def test_no_other_name_is(install: Callable[..., Path], name: str) -> None:
    install(PLUGIN, FILES)
    assert not make_host().may_import(name)


def test_a_plugin_that_is_switched_off_is_not_trusted(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(PLUGIN, FILES)
    name = f"{PLUGIN}.converters"
    importlib.import_module(PLUGIN)
    assert not make_host(Config(no_plugins=frozenset({"trusted"}))).may_import(name)
    monkeypatch.setenv("REFITKIT_NO_PLUGIN", "trusted")
    assert not make_host().may_import(name)


def test_a_plugin_that_is_broken_is_not_trusted(install: Callable[..., Path]) -> None:
    install(PLUGIN, {**FILES, f"{PLUGIN}/__init__.py": "raise RuntimeError"})
    host = make_host(on_broken=lambda _: None)
    assert not allowed(host, PLUGIN, f"{PLUGIN}.converters")


def test_an_installed_plugin_that_is_passed_stays_trusted(install: Callable[..., Path]) -> None:
    install(PLUGIN, FILES)
    host = make_host(plugins=[importlib.import_module(PLUGIN)])
    assert host.may_import(f"{PLUGIN}.converters")


def test_a_file_of_another_distribution_in_the_package_is_not(
    install: Callable[..., Path],
) -> None:
    site = install(PLUGIN, FILES)
    (site / PLUGIN / "intruder.py").write_text("raise RuntimeError")
    assert not make_host().may_import(f"{PLUGIN}.intruder")


def test_the_parts_of_others_in_a_namespace_package_are_not(install: Callable[..., Path]) -> None:
    own = {"rk_space/ours/__init__.py": "", "rk_space/ours/gates.py": "", "rk_space/more.py": ""}
    install("rk_space.ours", own)
    install("rk_other", {"rk_other.py": "", "rk_space/theirs.py": ""}, folder="x", name="other")
    names = ["rk_space.ours.gates", "rk_space.more"]
    assert allowed(make_host(), *names, "rk_space", "rk_space.theirs") == names


def test_a_module_that_another_folder_hides_is_not(install: Callable[..., Path]) -> None:
    own = {"rk_space/ours.py": "", "rk_space/gates.py": ""}
    install("rk_space.ours", own)
    other = install("rk_other", {"rk_other.py": "", "rk_space/gates.py": ""}, folder="x", name="o")
    assert sys.path[0] == str(other)
    assert not make_host().may_import("rk_space.gates")


def test_a_package_that_the_distribution_does_not_contain_is_not(
    install: Callable[..., Path],
) -> None:
    """Its entry point names a module of somebody else, json for one."""
    install("json", {"rk_unused.py": ""})
    assert not make_host().may_import("json.tool")


def test_an_editable_project_is_trusted_with_its_own_package(
    tmp_path: Path, install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    for path, code in FILES.items():
        (project / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        (project / "src" / path).write_text(code)
    monkeypatch.syspath_prepend(str(project / "src"))
    site = install(PLUGIN, {"__editable__.pth": ""})
    names = f"{PLUGIN}.converters", f"{PLUGIN}_tools"
    assert not allowed(make_host(), *names)
    direct = {"url": project.as_uri(), "dir_info": {"editable": True}}
    (site / "trusted-1.0.dist-info" / "direct_url.json").write_text(json.dumps(direct))
    assert allowed(make_host(), *names) == [names[0]]
    direct["url"] = "https://example.org"
    (site / "trusted-1.0.dist-info" / "direct_url.json").write_text(json.dumps(direct))
    assert not allowed(make_host(), *names)
