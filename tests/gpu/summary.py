"""Collects the results of run.sh: ``python summary.py WORK OUT``. It needs nothing but Python.

OUT gets ``summary.txt`` (a row for each part and each test), ``tests.log``, ``bench.txt``, ``bench.json``, and
``report.html`` of the demo.
"""

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def outcomes(path: Path) -> list[tuple[str, str, float]]:
    """Return the outcome, the name and the seconds of each test in a JUnit file."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        found = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        outcome = next(iter(found), "passed")
        reason = f" ({found['skipped'].get('message')})" if outcome == "skipped" else ""
        rows.append((outcome, f"{case.get('name')}{reason}", float(case.get("time") or 0)))
    return rows


def main(work: Path, out: Path) -> None:
    lines, logs = [], []
    for status in sorted((work / "parts").glob("*.status"), key=lambda path: path.stat().st_mtime_ns):
        part = status.stem
        lines.append(f"{part}: {status.read_text().strip()}")
        junit = status.with_suffix(".xml")
        if junit.exists():
            rows = outcomes(junit)
            counts = {name: sum(row[0] == name for row in rows) for name in ("passed", "failure", "error", "skipped")}
            lines.append("    " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
            lines += [f"    {outcome:8}{seconds:7.1f} s  {name}" for outcome, name, seconds in rows]
        log = status.with_suffix(".log").read_text(errors="replace")
        logs.append(f"===== {part} =====\n{log[-2_000_000:]}\n")
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    (out / "tests.log").write_text("".join(logs))
    results = {path.stem: json.loads(path.read_text()) for path in sorted((work / "bench").glob("*.json"))}
    if results:
        (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    for source, name in ((work / "bench/gpu.txt", "bench.txt"), (work / "demo/report.html", "report.html")):
        if source.exists():
            shutil.copyfile(source, out / name)
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
