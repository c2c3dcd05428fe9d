#!/usr/bin/env bash
# Runs the GPU tests, and then the GPU benchmark in the time that is left, and leaves results.json
# and table.txt in $OUT. Each file of tests has a process of its own: an error of CUDA spoils no
# other file. When time is up, results so far are kept.
# usage: OUT=folder [BUDGET=seconds] [JOBS=files at a time] [BENCH=no] \
#        bash scripts/gpu_run.sh [tests/gpu/test_x.py ...]
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?set OUT to a folder for the results}"
budget=${BUDGET:-560} jobs=${JOBS:-1} work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
[ $# -gt 0 ] || set -- tests/gpu/test_*.py

left() { # seconds, but at least ten
  local seconds=$((budget - SECONDS))
  echo $((seconds > 10 ? seconds : 10))
}

run_file() {
  local name
  name=$(basename "$1" .py)
  # addopts: plugins that the options in pyproject.toml belong to may be missing there
  timeout -s INT -k 10 "$(left)" python3 -m pytest -p no:cacheprovider -o filterwarnings=default \
    -o addopts= --import-mode=importlib -q -ra --tb=short --durations=5 \
    --junitxml="$work/$name.xml" "$1" >"$work/$name.log" 2>&1
  echo $? >"$work/$name.code"
  tail -n 60 "$work/$name.log"
}

for file in "$@"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
  run_file "$file" &
done
wait
grep -qvx 0 "$work"/*.code && failed=1

if [ "${BENCH:-yes}" = yes ]; then
  python3 benchmarks/gpu.py "$work/bench.json" --budget "$(left)" 2>&1 | tail -n 120 || failed=1
fi

python3 - "$work" "$OUT" <<'PYTHON'
import json, pathlib, platform, sys
from importlib.metadata import PackageNotFoundError, version
from xml.etree import ElementTree

import torch

work, out = map(pathlib.Path, sys.argv[1:])
versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
for package in ("torch", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx"):
    try:
        versions[package] = version(package)
    except PackageNotFoundError:
        continue
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
tests, lines = [], [f"{device}: " + ", ".join(f"{k} {v}" for k, v in versions.items()), ""]
for code in sorted(work.glob("*.code")):
    status, report = int(code.read_text()), code.with_suffix(".xml")
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    seconds = 0.0
    for case in cases:
        bad = next((c for c in case if c.tag in {"failure", "error", "skipped"}), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        counts[outcome] += 1
        seconds += float(case.get("time", 0))
        why = "" if bad is None else (bad.get("message") or "")[:2000]
        row = {"file": code.stem, "test": case.get("name"), "outcome": outcome, "why": why}
        tests.append({**row, "seconds": float(case.get("time", 0))})
    tail = "" if status in (0, 1) else f"  exit {status}" + (" (time is up)" if status == 124 else "")
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    lines.append(f"{code.stem:<40} {told:<36} {seconds:7.1f} s{tail}")
lines += [""] + [f"FAILED {t['file']}::{t['test']}: {t['why'].splitlines()[0] if t['why'] else ''}"
                 for t in tests if t["outcome"] == "failed"]
bench = work / "bench.json"
measured = json.loads(bench.read_text()) if bench.exists() else None
results = {"device": device, "versions": versions, "tests": tests, "benchmark": measured}
(out / "results.json").write_text(json.dumps(results, indent=1))
(out / "table.txt").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
PYTHON
exit "$failed"
