# SPDX-License-Identifier: Apache-2.0
"""One set of kernels in a process of its own, one JSON line per case.

python -m harness.child cuda sm_90 [--all] [--ops cross_attn,..] [--dtypes float16,..] > X.jsonl

Run in tests/ptx. A process that is not preloaded with the stand-in starts itself again with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import build, coverage

PIPE = subprocess.PIPE
SETS = (("cuda", "sm_90"), ("triton", "sm_80"), ("triton", "sm_90"))
HERE = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Of a child: the stand-in preloaded, this checkout imported, one thread."""
    paths = [str(HERE), str(build.ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "LD_PRELOAD": str(build.standin()),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(
    arguments: Sequence[str], module: str = "harness.child", **options: Any
) -> subprocess.Popen[str]:
    """A child with these arguments."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=environment(), cwd=HERE, text=True, **options)


def opened(set_name: str, arch: str) -> Any:
    """The set of this process, in place of the backend that has its name."""
    import torch

    from harness.cuda_set import CudaSet
    from harness.host import Recorder, Standin
    from harness.triton_set import TritonSet
    from vtclip.ops import _select

    torch.set_num_threads(1)
    backend = {"cuda": CudaSet, "triton": TritonSet}[set_name](Recorder(Standin()), arch)
    _select.BACKENDS = (backend, _select.REFERENCE)
    return backend


def hexed(executed: np.ndarray) -> str:
    """Flags as text."""
    return np.packbits(executed).tobytes().hex()


def outcome(backend: Any, case: Any, dtype: str, backward: bool = True) -> dict[str, Any]:
    """One case: what was wrong, what the checks found, which instructions were reached."""
    from harness import cases

    recorder = backend.recorder
    recorder.start()
    started = time.process_time()
    try:
        errors = cases.wrong(case, dtype, backend, backward)
    except Exception as error:
        errors = [f"{type(error).__name__}: {str(error)[:2000]}"]
    kernels: dict[str, dict[str, Any]] = {}
    findings = []
    for launch in recorder.launches:
        executed = np.asarray(launch.report.executed, bool)
        row = kernels.setdefault(launch.key, {"executed": np.zeros_like(executed), "launches": 0})
        row["executed"] |= executed
        row["launches"] += 1
        findings += [
            {"kernel": launch.key, "kind": f.kind, "message": f.message, "line": f.line,
             "count": f.count}
            for f in launch.report.findings
        ]  # fmt: skip
        row["beyond"] = coverage.beyond_reach(launch.kernel)
    for row in kernels.values():
        row["instructions"] = len(row["executed"])
        row["executed"], row["beyond"] = hexed(row["executed"]), hexed(row["beyond"])
    return {
        "case": case.name,
        "op": case.op,
        "dtype": dtype,
        "errors": errors,
        "findings": findings,
        "kernels": kernels,
        "launches": len(recorder.launches),
        "thread_instructions": sum(x.report.thread_instructions for x in recorder.launches),
        "executing": round(sum(launch.seconds for launch in recorder.launches), 3),
        "seconds": round(time.process_time() - started, 3),
    }


def _dtypes(arguments: argparse.Namespace) -> list[str]:
    from harness import cases

    asked = arguments.dtypes.split(",") if arguments.dtypes else ()
    listed = cases.dtypes(arguments.set, arguments.arch, arguments.all or bool(asked))
    return [dtype for dtype in listed if dtype in asked or not asked]


def outcomes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """First what exists, then every case."""
    from harness import cases

    backend = opened(arguments.set, arguments.arch)
    yield {"set": arguments.set, "arch": arguments.arch, "exist": backend.kernels()}
    wanted = arguments.ops.split(",") if arguments.ops else [""]
    for op in wanted:
        for case in cases.chosen(arguments.set, arguments.all, op):
            if arguments.match not in case.name:
                continue
            for dtype in _dtypes(arguments):
                yield outcome(backend, case, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=("cuda", "triton"))
    parser.add_argument("arch", choices=("sm_75", "sm_80", "sm_90"))
    parser.add_argument("--all", action="store_true", help="every case, not the short list")
    parser.add_argument("--ops", default="", help="operators, with commas between")
    parser.add_argument("--dtypes", default="", help="dtypes, with commas between")
    parser.add_argument("--match", default="", help="part of a case's name")
    arguments = parser.parse_args()
    if "standin" not in os.environ.get("LD_PRELOAD", ""):
        sys.exit(start(sys.argv[1:]).wait())
    for row in outcomes(arguments):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
