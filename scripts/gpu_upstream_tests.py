"""Runs Torch-TensorRT's own ``test_model_refit.py`` through the drop-in ``refitkit.compat``.

The file is upstream's and not part of this repository: pass the one of the installed version. What
is changed of it, in a temporary copy: the one import of ``refit_module_weights``, and pretrained
weights, which would be downloaded, become random ones. With ``--theirs`` only the latter.

usage: python scripts/gpu_upstream_tests.py test_model_refit.py [--theirs] [--json FILE] [--jobs 6]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
THEIRS = "from torch_tensorrt.dynamo import refit_module_weights\n"
OURS = "from refitkit.compat import refit_module_weights\n"
RANDOM = (
    (re.compile(r"\bpretrained=(True|False)"), "weights=None"),
    (
        re.compile(r"\bBertModel\.from_pretrained\([^)]*\)"),
        'BertModel(__import__("transformers").BertConfig())',
    ),
)
"""What would be downloaded, and what stands for it."""
# tensorrt is not to be found by its name where only TensorRT-RTX is, before torch_tensorrt is there
CONFTEST = """
from refitkit.builtin.torch_tensorrt import upstream
upstream.torch_tensorrt()
"""


def rewritten(source: str, *, theirs: bool = False) -> str:
    """Upstream's tests, calling ours and downloading nothing.

    Args:
        source: The text of ``test_model_refit.py``.
        theirs: Whether upstream's function shall be called after all.

    Raises:
        SystemExit: The text is not of a version that is known.
    """
    if source.count(THEIRS) != 1:
        raise SystemExit("This file does not import refit_module_weights as 2.11 to 2.14 do.")
    text = source if theirs else source.replace(THEIRS, OURS)
    for pattern, instead in RANDOM:
        text = pattern.sub(instead, text)
    left = [word for word in ("from_pretrained", "pretrained=True") if word in text]
    if left:
        raise SystemExit(f"This file would still download weights: {', '.join(left)}.")
    return text


def results(report: Path) -> Iterator[dict[str, str]]:
    """Name, outcome and reason of every test in a JUnit file."""
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest wrote it
        bad = next((one for one in case if one.tag in {"failure", "error", "skipped"}), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else bad.get("message") or ""
        yield {
            "test": case.get("name") or "",
            "outcome": outcome,
            "why": why[:1500],
            "seconds": case.get("time") or "",
            "trace": "" if bad is None or outcome == "skipped" else (bad.text or "")[-3000:],
        }


def run(source: str, jobs: int) -> list[dict[str, str]]:
    """Run tests in a folder of their own.

    Raises:
        SystemExit: They cannot even be collected.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_model_refit.py").write_text(source)
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  unit\n  critical\n")
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "-n", str(jobs)] if jobs > 1 else []
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(  # noqa: S603 - our own interpreter; whoever calls this chose the file
            [*command, str(folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        return list(results(report))


def main() -> int:
    """Print one line for each test; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="upstream's test_model_refit.py")
    parser.add_argument("--theirs", action="store_true", help="call upstream's function")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=6)
    given = parser.parse_args()
    found = run(rewritten(given.file.read_text(), theirs=given.theirs), given.jobs)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    for one in found:
        print(
            f"{one['outcome']:<8}{one['test']}  {one['why'].splitlines()[0] if one['why'] else ''}"
        )
    failed = sum(one["outcome"] == "failed" for one in found)
    print(
        f"{len(found)} tests, {failed} failed, calling {'upstream' if given.theirs else 'refitkit'}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
