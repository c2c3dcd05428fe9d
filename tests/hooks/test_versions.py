"""Plugins for other versions of refitkit, optional hooks, and two plugins of one name."""

from __future__ import annotations

import logging
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

import refitkit
from refitkit.cli.main import main
from refitkit.config import Config
from refitkit.errors import PluginError
from refitkit.host import make_host, misfit
from refitkit.model import StageStarted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FITS = "import refitkit\n\n@refitkit.hookimpl\ndef refitkit_event(event): ...\n"
NEWER = "from refitkit.protocols import NoSuchProtocol\n"
UNKNOWN_HOOK = "import refitkit\n\n@refitkit.hookimpl\ndef refitkit_of_the_future(): ...\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution with one plugin, as files that importlib.metadata reads."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def do(distribution: str, plugin: str, code: str, *requires: str) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        lines = [
            f"Name: {distribution}",
            "Version: 1.0",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        (info / "entry_points.txt").write_text(f"[refitkit]\n{plugin} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return do


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """The exit code, and both streams."""
    code = main(list(args))
    streams = capsys.readouterr()
    return code, streams.out + streams.err


# -- optional hooks -------------------------------------------------------------------------------


class Future:
    name = "future"

    def __init__(self) -> None:
        self.events: list[object] = []

    @refitkit.hookimpl
    def refitkit_event(self, event: object) -> None:
        self.events.append(event)

    @refitkit.hookimpl(optionalhook=True)
    def refitkit_of_the_future(self, anything: object) -> None:
        raise AssertionError("no refitkit calls this hook yet")


def test_an_optional_hook_that_does_not_exist_is_ignored() -> None:
    plugin = Future()
    host = make_host(plugins=[plugin])
    info = host.plugins()[-1]
    assert (info.name, info.hooks) == ("future", ("refitkit_event",))
    assert info.ignored == ("refitkit_of_the_future",)
    event = StageStarted("refit", "load")
    host.emit(event)
    assert plugin.events == [event]


def test_a_hook_that_does_not_exist_and_is_not_optional_is_still_refused() -> None:
    class Misspelt:
        name = "misspelt"

        @refitkit.hookimpl
        def refitkit_of_the_future(self) -> None: ...

    # ``Future`` comes first: its mark must not count for the other plugin
    with pytest.raises(PluginError, match="'misspelt' implements refitkit_of_the_future"):
        make_host(plugins=[Future(), Misspelt()])


def test_an_optional_hook_that_exists_is_called() -> None:
    class Optional:
        name = "optional"
        events: list[object] = []  # noqa: RUF012 - one object

        @refitkit.hookimpl(optionalhook=True)
        def refitkit_event(self, event: object) -> None:
            self.events.append(event)

    host = make_host(plugins=[Optional()])
    host.emit(StageStarted("refit", "load"))
    assert host.plugins()[-1].hooks == ("refitkit_event",)
    assert len(Optional.events) == 1


def test_plugins_list_and_check_take_optional_hooks(
    install: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "d-optional", "optional", UNKNOWN_HOOK.replace("hookimpl", "hookimpl(optionalhook=True)")
    )
    code, text = printed(capsys, "plugins", "list")
    assert code == 0
    assert "optional" in text
    assert "broken" not in text
    code, text = printed(capsys, "plugins", "check", "optional", "--json")
    assert code == 0
    assert "does not have the optional hooks refitkit_of_the_future" in text


# -- versions of refitkit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "found"),
    [
        ("refitkit>=99", f"needs refitkit>=99, this is refitkit {refitkit.__version__}"),
        ("Refitkit (>=99)", f"needs refitkit>=99, this is refitkit {refitkit.__version__}"),
        ("refitkit[testing] >=99", f"needs refitkit>=99, this is refitkit {refitkit.__version__}"),
        (f"refitkit>={refitkit.__version__}", ""),
        ("refitkit", ""),
        ("refitkit; python_version > '3'", ""),
        ("refitkit>=99; extra == 'new'", ""),
        ("refitkit-quant>=99", ""),
        ("refitkit.more>=99", ""),
        ("refitkit>>>", ""),
        ("torch>=99", ""),
    ],
)
def test_requirements_on_refitkit(requirement: str, found: str) -> None:
    assert misfit([requirement]) == found


def test_all_requirements_that_are_not_met_are_named() -> None:
    assert misfit(["refitkit>=98", "refitkit!=1", "refitkit>99"]).startswith(
        "needs refitkit>=98 and refitkit>99, this is"
    )


@pytest.mark.parametrize(
    ("code", "fault"), [(NEWER, "ImportError"), (UNKNOWN_HOOK, "is not a hook")]
)
def test_a_plugin_that_cannot_be_loaded_names_the_version_first(
    install: Any, code: str, fault: str
) -> None:
    install("d-newer", "newer", code, "refitkit>=99")
    with pytest.raises(PluginError) as info:
        make_host()
    needs = f"needs refitkit>=99, this is refitkit {refitkit.__version__}"
    assert info.value.message.startswith(f"The plugin 'newer' of d-newer 1.0 {needs}.")
    assert fault in info.value.message
    assert "pip install --upgrade d-newer refitkit" in info.value.hint
    assert "--no-plugin newer" in info.value.hint


def test_a_plugin_that_fits_and_cannot_be_loaded_names_no_version(install: Any) -> None:
    install("d-fits", "fits", NEWER, "refitkit")
    with pytest.raises(PluginError) as info:
        make_host()
    assert "needs refitkit" not in str(info.value)


def test_a_plugin_that_loads_is_used_and_logged_once(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install("d-loads", "loads", FITS, "refitkit>=99")
    with caplog.at_level(logging.WARNING, "refitkit"):
        hosts = [make_host(), make_host()]
    (text,) = [one.getMessage() for one in caplog.records if "'loads'" in one.getMessage()]
    assert "of d-loads 1.0 needs refitkit>=99, this is refitkit" in text
    assert [info.hooks for info in hosts[1].plugins() if info.name == "loads"] == [
        ("refitkit_event",)
    ]


@pytest.mark.parametrize("command", [("plugins",), ("doctor",), ("plugins", "check", "shown")])
def test_commands_show_the_version_that_is_needed(
    install: Any, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    install("d-shown", "shown", FITS, "refitkit>=99")
    code = main(list(command))
    assert "needs refitkit>=99, this is refitkit" in capsys.readouterr().out
    assert code == (1 if "check" in command else 0)


# -- two plugins of one name ----------------------------------------------------------------------


@pytest.fixture
def _twins(install: Any) -> None:
    # the first fails to import: this error would hide the cause
    install("d-first", "twin", textwrap.dedent("raise RuntimeError('first')"))
    install("d-second", "twin", FITS)


TWINS = "Two plugins are called 'twin': one is d-first 1.0, the other d-second 1.0."


@pytest.mark.usefixtures("_twins")
def test_two_distributions_with_one_name_are_named_before_either_is_imported() -> None:
    with pytest.raises(PluginError) as info:
        refitkit.Pipeline()
    assert info.value.message == TWINS
    assert "pip uninstall d-second" in info.value.hint
    assert not {"d_first", "d_second"} & sys.modules.keys()


@pytest.mark.usefixtures("_twins")
@pytest.mark.parametrize("command", [("doctor",), ("inspect", "x"), ("--help",)])
def test_commands_name_both_distributions(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    code, text = printed(capsys, *command)
    assert code == 3
    assert text.count(TWINS) == 1
    assert "cannot be imported" not in text


@pytest.mark.parametrize("command", [("plugins",), ("plugins", "check", "twin")])
@pytest.mark.parametrize("first", [FITS, "raise RuntimeError('first')"])
def test_plugins_name_both_distributions(
    install: Any, capsys: pytest.CaptureFixture[str], first: str, command: tuple[str, ...]
) -> None:
    install("d-first", "twin", first)
    install("d-second", "twin", FITS)
    code, text = printed(capsys, *command)
    assert code == (1 if "check" in command else 0)
    assert text.count(TWINS) == 1


@pytest.mark.usefixtures("_twins")
def test_both_are_switched_off_by_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    host = make_host(Config(no_plugins=frozenset({"twin"})))
    assert "twin" not in {info.name for info in host.plugins()}
    code, text = printed(capsys, "--no-plugin", "twin", "plugins")
    assert code == 0
    rows = [line.split()[-2:] for line in text.splitlines() if line.split()[:1] == ["twin"]]
    assert len(rows) == 2
    assert "d-first 1.0" in text
    assert "d-second 1.0" in text
