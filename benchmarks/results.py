# SPDX-License-Identifier: Apache-2.0
"""The rows of one run, and the CSV and JSON they are kept in."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vtclip.backends import native

ROWS: list[dict[str, object]] = []


def environment(device: str) -> dict[str, object]:
    """Where the numbers come from."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": name,
        **(_cuda_versions() if device == "cuda" else {}),
        "instructions": native.build_info().get("instructions", "none"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": output("git", "describe", "--always", "--dirty").strip(),
        "date": date.today().isoformat(),
    }


def output(*command: str) -> str:
    """What a program prints; nothing where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cuda_versions() -> dict[str, object]:
    asked = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "driver": output(*asked).strip() or "unknown",
        "triton": triton,
        "cuda": torch.version.cuda,
    }


def save(out: Path, device: str) -> None:
    """Writes `results.csv` and `results.json` under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    where = environment(device)
    rows = [{**row, **where} for row in ROWS]
    with (out / "results.csv").open("w", newline="") as file:
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
