# SPDX-License-Identifier: Apache-2.0
"""What a run of gpu_suite.sh leaves: summary.md to read, junit.xml, targets.csv, an archive of all.

python benchmarks/gpu_summary.py OUT_DIR        # again, from the files of a run
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tarfile
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import results
import sanitize_ops
import streamed
import targets
from table import markdown

STATE, ARCHIVE = "state.json", "everything.tar.gz"
PACKED = ("summary.md", "targets.csv", "junit.xml", STATE, ARCHIVE)  # all that OUT_DIR holds
NOT_PACKED = ("cache", "record")  # folders of a run that nobody reads later
COLUMNS = ("median_ms", "p20_ms", "p80_ms", "times_ours", "kernels", "peak_mib")
SHOWN = 40  # failed tests named on the page; junit.xml has them all


def where(torch: ModuleType, device: str, root: Path) -> dict[str, str]:
    """Device, driver, versions, commit, date."""
    here = os.getcwd()
    os.chdir(root)  # the commit is asked for here
    try:
        found = {name: str(value) for name, value in results.environment(device).items()}
    finally:
        os.chdir(here)
    found["python"] = platform.python_version()
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["devices"] = str(torch.cuda.device_count())
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = f"{properties.total_memory / 2**30:.0f}"
        printed = results.output("nvcc", "--version").strip().splitlines()
        found["nvcc"] = printed[-1] if printed else "none"
    return found


def tests(out: Path) -> dict[str, dict[str, object]]:
    """Every test of every part that was begun."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(out.glob("*.jsonl")):
        found |= streamed.read(path)
    return found


def junit(found: dict[str, dict[str, object]]) -> ElementTree.ElementTree:
    """JUnit XML of the tests, whatever happened to the process that ran them."""
    bad = {"failed": "failure", "error": "error", "crashed": "error", "not collected": "error"}
    suite = ElementTree.Element("testsuite", name="vtclip on a device", tests=str(len(found)))
    for name, entry in found.items():
        file, _, test = name.partition("::")
        seconds = str(entry.get("seconds", 0.0))
        case = ElementTree.SubElement(
            suite, "testcase", classname=file, name=test or file, time=seconds
        )
        outcome, reason = str(entry["outcome"]), str(entry.get("reason", ""))
        if outcome in bad:
            ElementTree.SubElement(case, bad[outcome], message=f"{outcome}: {reason}")
        elif outcome != "passed":
            ElementTree.SubElement(case, "skipped", message=f"{outcome}: {reason}")
    for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(kind, str(len(suite.findall(f"./testcase/{tag}"))))
    return ElementTree.ElementTree(suite)


def _tests_page(found: dict[str, dict[str, object]]) -> list[str]:
    if not found:
        return ["No test was begun."]
    counts = Counter((name.split("::")[0], str(entry["outcome"])) for name, entry in found.items())
    files = list(dict.fromkeys(file for file, _ in counts))
    outcomes = ["passed", "failed", "skipped", "error", "crashed", "not collected", "stopped"]
    outcomes = [outcome for outcome in outcomes if any(counts[file, outcome] for file in files)]
    totals = Counter(str(entry["outcome"]) for entry in found.values())
    rows = [[file, *(counts[file, outcome] for outcome in outcomes)] for file in files]
    rows.append(["**all**", *(totals[outcome] for outcome in outcomes)])
    lines = markdown(["file", *outcomes], rows)
    bad = [(name, e) for name, e in found.items() if e["outcome"] not in ("passed", "skipped")]
    if bad:
        lines += ["", "Not passed:", ""]
        lines += [f"- `{n}` {e['outcome']}: {str(e['reason'])[:200]}" for n, e in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"- and {len(bad) - SHOWN} more, in junit.xml")
    reasons = Counter(str(e["reason"]) for e in found.values() if e["outcome"] == "skipped")
    if reasons:
        lines += ["", "Skipped, by reason:", ""]
        lines += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    return lines


def _targets_page(lines: list[dict[str, str]]) -> list[str]:
    columns = ("case", "mode", "what", "graph", "at_most", "measured")
    rows = [[*(line[column] for column in columns), line["reached"] or "-"] for line in lines]
    return markdown(["case", "mode", "what", "graph", "at most", "measured", "reached"], rows)


def _rows_page(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return ["No benchmark was finished."]
    lines = []
    for row in rows:
        texts = [row.get(column) or "" for column in COLUMNS]
        if row.get("note"):
            cells = [row["note"].replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
        else:
            cells = [f"{float(t):.4g}" if t else "-" for t in texts]
        lines.append([row["case"], row["mode"], row["provider"], *cells])
    return markdown(["case", "mode", "provider", *COLUMNS], lines)


def _sanitizer_page(found: list[dict[str, object]]) -> list[str]:
    if not found:
        return ["Not run: `--sanitizer` is a run of its own."]
    rows = []
    for entry in found:
        kernels = ", ".join(entry["kernels"]) or "-"  # type: ignore[arg-type]
        shown = {**entry, "kernels": kernels}
        rows.append(["-" if shown[c] is None else shown[c] for c in sanitize_ops.COLUMNS])
    head = ["check", "impl", "calls made", "errors", "in kernels", "exit code"]
    return markdown(head, rows)


def rows_of(work: Path) -> list[dict[str, str]]:
    """Rows of the benchmarks, each once, with the kernels that another process has counted."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for folder in ("benchmarks", "benchmarks-compiled"):
        for row in targets.read(work / folder / "results.csv"):
            rows.setdefault(_key(row), row)
    for row in targets.read(work / "kernel-counts" / "results.csv"):
        counted = rows.setdefault(_key(row), row)
        counted["kernels"] = row.get("kernels", "")
    return list(rows.values())


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["case"], row["mode"], row["provider"]


def _selftest_page(work: Path) -> list[str]:
    path = work / "selftest.log"
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return ["```", *text.splitlines(), "```"] if text else ["Not reached."]


def page(work: Path, state: dict[str, object], table: list[dict[str, str]]) -> str:
    """summary.md."""
    environment: dict[str, str] = state["environment"]  # type: ignore[assignment]
    steps: list[dict[str, object]] = state["steps"]  # type: ignore[assignment]
    lines = ["# vtclip on a device", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in environment.items()]
    notes = [[s["step"], s["seconds"], str(s["note"]).replace("|", "/")] for s in steps]
    lines += ["", f"## Steps, of {state['minutes']:g} minutes", ""]
    lines += markdown(["step", "seconds", "note"], notes)
    left: list[str] = state["not_reached"]  # type: ignore[assignment]
    lines += ["", f"Not reached in the time: {', '.join(left) or 'nothing'}."]
    lines += [f"The run was {state['ended']}."] if "ended" in state else []
    lines += ["", "## Self-test", "", *_selftest_page(work)]
    lines += ["", "## Tests", "", *_tests_page(tests(work))]
    lines += ["", "## Targets", "", *_targets_page(table)]
    sanitized: list[dict[str, object]] = state.get("sanitizer", [])  # type: ignore[assignment]
    lines += ["", "## compute-sanitizer", "", *_sanitizer_page(sanitized)]
    lines += ["", "## Benchmarks", ""]
    lines += ["Medians between CUDA events, the L2 cache flushed before each call or replay;"]
    lines += [
        "`times_ours` is the provider over vtclip in the same run.",
        "",
        *_rows_page(rows_of(work)),
    ]
    return "\n".join(lines) + "\n"


def write(work: Path, out: Path, state: dict[str, object]) -> None:
    """All files of `PACKED`, from what the steps have left in `work` so far; each in one step."""
    table = targets.table(rows_of(work))

    def write_targets(path: Path) -> None:
        targets.write(path, table)

    def write_tests(path: Path) -> None:
        junit(tests(work)).write(path, encoding="utf-8", xml_declaration=True)

    def write_archive(path: Path) -> None:
        with tarfile.open(path, "w:gz", compresslevel=3) as archive:
            for file in sorted(work.iterdir()):
                if file.name not in NOT_PACKED:
                    archive.add(file, file.name)

    writers = {
        STATE: lambda path: path.write_text(json.dumps(state, indent=1) + "\n"),
        "junit.xml": write_tests,
        "targets.csv": write_targets,
        "summary.md": lambda path: path.write_text(page(work, state, table)),
        ARCHIVE: write_archive,
    }
    for name, make in writers.items():
        fresh = out / f".{name}.new"
        make(fresh)
        os.replace(fresh, out / name)


def again(out: Path) -> None:
    """Rewrites the pages of a run from its archive."""
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(out / ARCHIVE) as archive:
            archive.extractall(name, filter="data")
        write(Path(name), out, json.loads((out / STATE).read_text()))


if __name__ == "__main__":
    again(Path(sys.argv[1]))
