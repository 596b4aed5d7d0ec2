# SPDX-License-Identifier: Apache-2.0
"""What `vtclip selftest` found on a device: one file in the cache folder for each combination of
device, driver, torch, Triton, vtclip and build. A record of any other combination is not used.

A kernel that the record calls wrong is left out by selection, with that reason; the reference never
is, as there is nothing behind it.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtclip.backends import native
from vtclip.backends.problem import constant_when_traced
from vtclip.files import (
    default_cache,
    json_digest,
    locked,
    read_json,
    several,
    to_json,
    write_atomic,
)
from vtclip.kernels import _limits

FORMAT, VERSION = "vtclip self-test", 1
WHAT = "a record of vtclip selftest"
RIGHT, WRONG, FAILED, UNAVAILABLE = "right", "wrong", "failed", "not available"
BAD = (WRONG, FAILED)
DRIVER = Path("/proc/driver/nvidia/version")
# what a device can run; the others need tensors elsewhere
IMPLS = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

Key = tuple[str, str, str]  # op, impl, dtype as in a row


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The driver's version as its kernel module tells it, else the CUDA version it serves."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", DRIVER.read_text())
    except OSError:
        found = None
    if found is None:
        return f"CUDA {getattr(torch._C, '_cuda_getDriverVersion')()}"  # noqa: B009
    return found[1]


@functools.cache
def _build() -> str:
    """Digest of the compiled libraries and of the Triton kernels' sources."""
    package = Path(native.__file__).parents[1]
    kernels = Path(_limits.__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(package.glob("_C*.so")), *sorted(kernels.glob("*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def identity(device: torch.device) -> dict[str, str]:
    """What a record holds for: it says nothing of a device with another value of any of these."""
    from vtclip import __version__

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
        }
    else:
        where = {
            "device": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "driver": "none",
        }
    versions = {"torch": torch.__version__, "triton": _version("triton"), "vtclip": __version__}
    return {"type": device.type, **where, **versions, "build": _build()}


def _folder() -> Path:
    return default_cache() / "selftest"


def _prefix(known: Mapping[str, str]) -> str:
    """How the names of all records of one device begin."""
    words = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")[:60]
    mark = json_digest({name: known[name] for name in ("type", "device", "capability")})[:8]
    return f"{known['type']}-{words}-{mark}-"


def place(device: torch.device) -> Path:
    """Where the record of this device, with these versions, lies or would lie."""
    known = identity(device)
    return _folder() / f"{_prefix(known)}{json_digest(known)[:12]}.json"


def key(row: Mapping[str, Any]) -> Key:
    return row["op"], row["impl"], row["dtype"]


def read(path: Path) -> dict[str, Any]:
    """A record; a ValueError says in one line why a file is none."""
    value = read_json(path, WHAT)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise ValueError(f"not {WHAT}: {path} has no format {FORMAT!r}, version {VERSION}")
    rest = {name: part for name, part in value.items() if name != "digest"}
    if value.get("digest") != json_digest(rest):
        raise ValueError(f"not {WHAT}: {path} is damaged or was edited (its digest differs)")
    return value


def write(device: torch.device, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Keeps `rows` (see `vtclip.testing.selftest.Row`); those of other implementations stay."""
    path = place(device)
    fresh = {key(row): dict(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        kept = {key(row): row for row in _rows(path)} if path.exists() else {}
        value = {
            "format": FORMAT,
            "version": VERSION,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "identity": identity(device),
            "rows": list({**kept, **fresh}.values()),
        }
        write_atomic(path, to_json({**value, "digest": json_digest(value)}))
    forget()
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a record; none where it is damaged, as `standing` says."""
    try:
        rows: list[dict[str, Any]] = read(path)["rows"]
    except (ValueError, OSError):
        return []
    return rows


class Standing(NamedTuple):
    """Whether a device is proven: all that can run there was right.

    kind: "proven", "failed" (a kernel was wrong), "partial", "stale", "damaged", "unproven".
    line: the same in words. path: the record, where there is one.
    """

    kind: str
    line: str
    path: Path | None = None


def standing(device: torch.device) -> Standing:
    """What is known of `device`, as installed here."""
    known = identity(device)
    name = known["device"]
    path = place(device)
    if not path.exists():
        return _without_record(known, name)
    try:
        value = read(path)
    except (ValueError, OSError) as error:
        return Standing("damaged", f"{name}: not proven: {error}; run vtclip selftest", path)
    rows = value["rows"]
    counts = {kind: sum(row["status"] == kind for row in rows) for kind in (RIGHT, *BAD)}
    source = f"on {value['date'][:10]}, {path}"
    bad = sum(counts[kind] for kind in BAD)
    if bad:
        text = f"{bad} of {several(bad + counts[RIGHT], 'kernel')} wrong or failed, left out"
        return Standing("failed", f"{name}: {text} ({source})", path)
    tested = {row["impl"] for row in rows}
    missing = [impl for impl in IMPLS[device.type] if impl not in tested]
    if missing:
        text = f"not proven: {', '.join(missing)} not tested; run vtclip selftest"
        return Standing("partial", f"{name}: {text} ({source})", path)
    text = f"proven: {several(counts[RIGHT], 'kernel')} right"
    return Standing("proven", f"{name}: {text} ({source})", path)


def _without_record(known: Mapping[str, str], name: str) -> Standing:
    """Not proven, with what differs from the newest record of this device, where there is one."""
    others = [path for path in _folder().glob(f"{_prefix(known)}*.json") if path.is_file()]
    for path in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
        try:
            then = read(path)["identity"]
        except (ValueError, OSError):
            continue
        changes = ", ".join(
            f"{part} {then.get(part)}, here {now}" for part, now in known.items()
            if then.get(part) != now
        )  # fmt: skip
        text = f"not proven: the record {path.name} is of {changes}; run vtclip selftest"
        return Standing("stale", f"{name}: {text}", path)
    return Standing("unproven", f"{name}: not proven: run vtclip selftest")


_ignored = False


@contextmanager
def ignored() -> Iterator[None]:
    """Within it selection reads no record: a kernel that was wrong before can be tested again."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


def forget() -> None:
    """Read records again when they are asked for next."""
    _known.clear()


Failures = dict[tuple[str, str, torch.dtype], str]
_known: dict[str, Failures] = {}  # by type of device


def _failures(device_type: str) -> Failures:
    """(op, impl, dtype) -> why it is left out, on any of the devices of that type."""
    if device_type == "cpu":
        devices = [torch.device("cpu")]
    elif device_type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    else:
        devices = []
    found = {}
    for path in dict.fromkeys(place(device) for device in devices if _folder().is_dir()):
        for row in _rows(path) if path.exists() else []:
            if row["status"] in BAD and row["impl"] != "reference":
                dtype = getattr(torch, row["dtype"])
                found[row["op"], row["impl"], dtype] = f"{row['reason']} (vtclip selftest, {path})"
    return found


@constant_when_traced
def why_failed(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    """What the self-test said against a kernel, or the empty string."""
    failures = _known.get(device_type)  # of every call: the usual way through is two lookups
    if failures is None:
        failures = _known[device_type] = _failures(device_type)
    if not failures or _ignored:
        return ""
    return failures.get((op, impl, dtype), "")
