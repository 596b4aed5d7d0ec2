# SPDX-License-Identifier: Apache-2.0
"""`vtclip.repeat`: run again what a result says, and say whether it came out the same.

Verdicts, given the same source and split:
    MATCH      the adapter is equal byte for byte, and so are its numbers
    CLOSE      every number within 1e-6; or, where a version, the device, the threads or the
               instruction set is another one, every accuracy within one test image
    DIFFERENT  anything else
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig

from . import api
from .adapter import TENSORS
from .checkpoint import read_safetensors
from .data.extract import default_cache
from .data.featureset import MANIFEST, FeatureSet
from .data.hashing import hash_all
from .data.images import printable, scan_folder
from .data.npz import open_npz
from .data.sets import as_source
from .data.sources import source_kind
from .files import read_json
from .result import Run
from .settings import choose_device

MATCH, CLOSE, DIFFERENT = "MATCH", "CLOSE", "DIFFERENT"
TOLERANCE = 1e-6
METRICS = ("accuracy", "nll", "ece")
PARTS = (("zero_shot",), ("adapted",), ("new", "zero_shot"), ("new", "adapted"))
OUTPUTS = ("split", "adapter", "encoders")  # digests of what a run makes of its inputs
ELSEWHERE = ("source", "data", "shots", "overrides")  # arguments that are not taken by their name


def repeat(
    run: str | Path | Run,
    *,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Fit and evaluate again as `run` says; what is equal, what differs and by how much.

    out: keep the second run there; else it lies in a temporary folder that is removed.
    A source that is gone, or whose images are not those of the run, is a ValueError.

    The answer: "verdict" (see the module), "inputs" and "split" (digests then and now), "metrics"
    (then, now and their difference), "adapter" (digests, and the largest difference of a value),
    "differs" (versions, device, ... by name, then and now), "seconds".
    """
    run = run if isinstance(run, Run) else Run.load(run)
    arguments = arguments_of(run.result)
    _check_source(run, cache_dir)
    threads = torch.get_num_threads()
    try:
        with _place(out) as folder:
            again = api.fit(out=folder, cache_dir=cache_dir, progress=progress, **arguments)
            if again.result["digests"].get("images") != run.result["digests"].get("images"):
                raise ValueError(f"repeat: the images of {_source_of(run)} have changed")
            return compare(run, again)
    finally:
        torch.set_num_threads(threads)


def arguments_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `vtclip.fit` that a result stands for."""
    if "extended_from" in result:
        raise ValueError("repeat: the run came from `vtclip extend`; repeat the run it extends")
    missing = [name for name in ("method", "seed", "shots", "config", "digests", "split")
               if name not in result]  # fmt: skip
    missing += [f"config.{name}" for name in ("source", "model", "fit")
                if name not in result.get("config", {})]  # fmt: skip
    if missing:
        raise ValueError(f"repeat: the result lacks {', '.join(missing)}")
    config, method = result["config"], result["method"]
    known = inspect.signature(api.fit).parameters
    named = {name: config[name] for name in known if name in config and name not in ELSEWHERE}
    shots = config.get("shots", result["shots"])
    then = environment_of(result)
    return named | {
        "source": config["source"],
        "data": config.get("data"),
        "method": method,
        "shots": shots,
        "seed": result["seed"],
        "overrides": overrides_of(config["fit"], method, shots, bool(config.get("train_encoders"))),
        "device": _device(then.get("device")),
        "threads": then.get("threads"),
    }


def overrides_of(
    settings: Mapping[str, Any], method: str, shots: int, encoders: bool
) -> dict[str, Any]:
    """What of a run's settings is not what the recipe says by now; of encoders all of them."""
    if encoders:
        return {name: value for name, value in settings.items() if name != "recipe"}
    recipe = dataclasses.asdict(HEADS[method].recipe(shots))
    # of settings that came after the run, what they mean where they are not there
    settings = {**dataclasses.asdict(FitConfig(settings["epochs"])), **settings}
    other = {name: value for name, value in settings.items() if recipe.get(name) != value}
    if "head" in other:
        other["head"] = {
            name: value
            for name, value in settings["head"].items()
            if recipe["head"].get(name) != value
        }
    return other


def environment_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Device, threads and the like; of a result from before they were kept, what `device` says."""
    if "environment" in result:
        return dict(result["environment"])
    found = re.match(r"(\S+) \((?:(\d+) threads)?", str(result.get("device", "")))
    if found is None:
        return {}
    threads = {"threads": int(found[2])} if found[2] else {}
    return {"device": found[1], **threads}


def compare(then: Run, now: Run) -> dict[str, Any]:
    """Two runs of the same arguments side by side; see `repeat`."""
    old, new = then.result, now.result
    names = [name for name in {**old["digests"], **new["digests"]} if name not in OUTPUTS]
    found: dict[str, Any] = {
        "run": str(then.folder),
        **{name: old[name] for name in ("method", "source", "shots", "seed")},
        "inputs": {name: _pair(old["digests"].get(name), new["digests"].get(name))
                   for name in names},
        "split": _pair(old["split"], new["split"]),
        "metrics": _metrics(old, new),
        "adapter": _adapter(then, now),
        "differs": differing(old, new),
        "seconds": {"then": old["seconds"]["total"], "now": new["seconds"]["total"]},
    }  # fmt: skip
    if "new" in old:
        found["split_new"] = _pair(old["new"]["split"], new["new"]["split"])
    if "encoders" in old["digests"]:
        found["encoders"] = _pair(old["digests"]["encoders"], new["digests"].get("encoders"))
    return {**found, "verdict": verdict(found)}


def verdict(found: Mapping[str, Any]) -> str:
    """MATCH, CLOSE or DIFFERENT; see the module."""
    splits = [found[name] for name in ("split", "split_new") if name in found]
    if not all(one["equal"] for one in (*found["inputs"].values(), *splits)):
        return DIFFERENT
    rows = found["metrics"]
    near = all(
        row["difference"] is not None and abs(row["difference"]) <= TOLERANCE
        for row in rows.values()
    )
    made = [found[name] for name in ("adapter", "encoders") if name in found]
    if near and all(one["equal"] for one in made):
        return MATCH
    one_image = all(
        row["difference"] is not None and abs(row["difference"]) * row["images"] <= 1 + TOLERANCE
        for name, row in rows.items()
        if name.endswith("accuracy")
    )
    return CLOSE if near or (found["differs"] and one_image) else DIFFERENT


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Versions, revision and environment that are not the same: name to [then, now]."""
    sides = []
    for result in (old, new):
        flat = {"revision": result.get("revision"), **dict(result.get("versions", {}))}
        for name, value in environment_of(result).items():
            parts = value if isinstance(value, Mapping) else {"": value}
            flat |= {f"{name} {part}".strip(): one for part, one in parts.items()}
        sides.append(flat)
    then, now = sides
    # what an older result does not name at all is not known to differ
    return {name: [then[name], now.get(name)] for name in then if then[name] != now.get(name)}


def _metrics(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for part in PARTS:
        rows: list[Any] = [old, new]
        for step in part:
            rows = [row.get(step) if row else None for row in rows]
        if rows[0] is None:
            continue
        for name in METRICS:
            then, now = (row.get(name) if row else None for row in rows)
            gap = 0.0 if then == now else None
            if then is not None and now is not None:
                gap = now - then
            row = {"then": then, "now": now, "difference": gap, "images": rows[0]["count"]}
            found[" ".join((*part, name))] = row
    return found


def _adapter(then: Run, now: Run) -> dict[str, Any]:
    row = _pair(then.result["digests"]["adapter"], now.result["digests"]["adapter"])
    paths = [run.folder / TENSORS for run in (then, now)]
    if row["equal"] or not all(path.is_file() for path in paths):
        return row
    old, new = (read_safetensors(path, "an adapter")[0] for path in paths)
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (old, new)]
    row["same_shapes"] = shapes[0] == shapes[1]
    if row["same_shapes"]:
        gaps = [(old[name].double() - new[name].double()).abs().flatten() for name in old]
        row["largest_difference"] = float(torch.cat(gaps).max()) if gaps else 0.0
    return row


def _pair(then: Any, now: Any) -> dict[str, Any]:
    return {"then": then, "now": now, "equal": then == now}


@contextmanager
def _place(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="vtclip-repeat-") as folder:
        yield Path(folder) / "run"


def _device(name: str | None) -> str | None:
    """The device of then, or None for the usual one where this machine has no such device."""
    try:
        return None if name is None else str(choose_device(name))
    except ValueError:
        return None


def _source_of(run: Run) -> str:
    config = run.result["config"]
    data = config.get("data")
    return printable(str(config["source"])) + (f" below {printable(str(data))}" if data else "")


def _check_source(run: Run, cache_dir: str | Path | None) -> None:
    """Refuse a source that is gone or changed before anything is computed.

    The images of a data set are looked at while they are read.
    """
    config = run.result["config"]
    try:
        source = as_source(config["source"], config.get("data"))
        if not isinstance(source, Path):
            return
        kind = source_kind(source)
    except ValueError as error:
        raise ValueError(f"repeat: the source of {run.folder} is gone: {error}") from None
    wanted, changed = run.result["digests"].get("images"), ""
    if kind == "folder":
        hashed = hash_all(scan_folder(source), False)
        now = hashed.digest()
        if now != wanted:
            digests = dict(zip(hashed.names, hashed.digests, strict=True))
            changed = _changed(digests, run.result["digests"].get("features"), cache_dir)
    elif kind == "features":
        now = FeatureSet.open(source).fields["images"]
    else:
        now = open_npz(source, prompt=config.get("prompt")).info["digests"]["images"]
    if now != wanted:
        raise ValueError(f"repeat: the images of {_source_of(run)} have changed{changed}")


def _changed(now: Mapping[str, str], key: str | None, cache_dir: str | Path | None) -> str:
    """Which files changed, where the cache still has the list of those of then."""
    cache = default_cache() if cache_dir is None else Path(cache_dir).expanduser()
    try:
        manifest = read_json(cache / "features" / str(key)[:32] / MANIFEST, "a features folder")
        then = dict(zip(manifest["names"], manifest["digests"], strict=True))
    except (OSError, ValueError, KeyError):
        return ""
    kinds = {
        "changed": [name for name in now if name in then and now[name] != then[name]],
        "new": [name for name in now if name not in then],
        "gone": [name for name in then if name not in now],
    }
    parts = [
        f"{len(names)} {kind} ({', '.join(map(printable, names[:3]))})"
        for kind, names in kinds.items()
        if names
    ]
    return ": " + ", ".join(parts) if parts else ": same files, other classes or skipped ones"
