# SPDX-License-Identifier: Apache-2.0
"""`python -m vtclip.info`: versions, what loads, why the rest does not, what each op takes."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import vtclip
from vtclip.backends import native, record, triton
from vtclip.files import printable
from vtclip.ops._select import Problem, explain
from vtclip.testing.problems import OPS

DISTRIBUTIONS = ("triton", "open_clip_torch", "torchvision", "safetensors", "numpy", "pillow")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> dict[str, object]:
    """Everything `main` prints, as data for JSON."""
    cuda = torch.cuda.is_available()
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
    return {
        "vtclip": vtclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in DISTRIBUTIONS},
        "device": f"{torch.cuda.get_device_name()} (sm_{capability})" if cuda else "cpu only",
        "threads": torch.get_num_threads(),
        "build": native.build_info(),
        "implementations": {
            "cpu": native.load_cpu() or "loaded",
            "cuda": native.load_cuda() or "loaded",
            "triton": triton.load() or "loaded",
            "reference": "loaded",
        },
        "proven": {
            device: record.standing(torch.device(device)).line
            for device in ("cpu", *[f"cuda:{i}" for i in range(torch.cuda.device_count())] * cuda)
        },
        "choice": {
            device: {op: explain(Problem(op, device, torch.float32, 64)) for op in OPS}
            for device in ("cpu", *["cuda"] * cuda)
        },
    }


def render(facts: dict[str, object]) -> str:
    """`report()` as text for people."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and key == "choice":
            for device, ops in value.items():
                lines.append(f"float32 on {device} takes:")
                for op, reasons in ops.items():
                    chosen = next(name for name, against in reasons if not against)
                    refused = [
                        f"{name}: {', '.join(against)}" for name, against in reasons if against
                    ]
                    lines.append(f"  {op:20s} {chosen:10s} ({'; '.join(refused)})")
        elif isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:10s} {text}" for name, text in value.items()] or ["  none"]
        else:
            lines.append(f"{key:16s} {value}")
    return "\n".join(lines)


def main() -> int:
    """Prints the report; always succeeds."""
    for line in render(report()).split("\n"):
        sys.stdout.write(printable(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
