# SPDX-License-Identifier: Apache-2.0
"""`vtclip.repeat`: fit again what a result records, and say whether the numbers are the same.

Verdicts, given the same source, sentences, weights and split:
    MATCH      adapter and embeddings of the texts are equal byte for byte, and so are the numbers
    CLOSE      every number within 1e-6; or, where a version, the device, the threads or the
               instruction set is another one, every accuracy within one test image
    DIFFERENT  anything else
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from vtclip.data.featureset import MANIFEST, FeatureSet
from vtclip.data.hashing import hash_all
from vtclip.data.listed import list_images
from vtclip.data.npz import open_npz
from vtclip.data.sets import as_source
from vtclip.data.sources import source_kind
from vtclip.extensions.registry import missing_line
from vtclip.files import Json, cache_folder, printable, read_json, read_safetensors
from vtclip.heads import HEADS
from vtclip.machine import choose_device
from vtclip.names import option
from vtclip.runs.adapter import CONFIG, TENSORS, load_adapter
from vtclip.runs.encoders import load_base
from vtclip.runs.fit import fit_request
from vtclip.runs.request import FitRequest
from vtclip.runs.result import Run
from vtclip.runs.sources import check_listable
from vtclip.train.auto import RULE

MATCH, CLOSE, DIFFERENT = "MATCH", "CLOSE", "DIFFERENT"
TOLERANCE = 1e-6
METRICS = ("accuracy", "nll", "ece")
DECISIONS = (
    *(("zero_shot",), ("adapted",), ("together",)),
    *(("new", "zero_shot"), ("new", "adapted")),
)
OUTPUTS = ("split", "adapter", "encoders")  # digests of what a run makes of its inputs


def repeat(
    run: str | Path | Run,
    *,
    out: str | Path | None = None,
    model: str | Path | None = None,
    encoder_batch_size: int = 64,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Json:
    """Fit and evaluate again as `run` says; what is equal, what differs and by how much.

    out: keep the second run there; else it lies in a temporary folder that is removed.
    model: another place of the model that the run was fitted with; another one is refused.
    A source that is gone, or whose images are not those of the run, is a ValueError.

    The comparison: "verdict" (see the module), "inputs" and "split" (digests then and now),
    "metrics" (then, now and their difference), "adapter" (digests, and the largest difference of a
    value), "differs" (versions, device, ... by name, then and now), "seconds".
    """
    run = run if isinstance(run, Run) else Run.load(run)
    check_repeatable(run.result)
    _check_source(run, cache_dir)
    threads = torch.get_num_threads()
    try:
        with _place(out) as folder:
            request = request_of(
                run.result,
                out=folder,
                encoder_batch_size=encoder_batch_size,
                cache_dir=cache_dir,
                progress=progress,
            )
            request = _with_model(run, request, model)
            again = fit_request(request)
            if again.result["digests"].get("images") != run.result["digests"].get("images"):
                raise ValueError(f"repeat: the images of {_source_of(run)} have changed")
            return compare(run, again)
    finally:
        torch.set_num_threads(threads)


def _with_model(run: Run, request: FitRequest, model: str | Path | None) -> FitRequest:
    """The request with the model at the place `model`, checked against the run's."""
    if isinstance(request.source, Path) and source_kind(request.source) in ("npz", "features"):
        if model is not None:
            raise ValueError(
                f"repeat: {option('model')} must be left out, {request.source} has no images"
            )
        return request
    chosen = request if model is None else dataclasses.replace(request, model=str(model))
    if (run.folder / CONFIG).is_file():
        features = load_adapter(run.folder, result=run.result).features
        if features.get("model") is not None:
            load_base({**features, "model": request.model}, model, torch.device("cpu"))
    return chosen


def check_repeatable(result: Json) -> None:
    """Refuse a result that does not say all that a fit needs."""
    if "extended_from" in result:
        raise ValueError("repeat: the run came from `vtclip extend`; repeat the run it extends")
    missing = [name for name in ("method", "seed", "shots", "config", "digests", "split")
               if name not in result]  # fmt: skip
    missing += [f"config.{name}" for name in ("source", "model", "fit")
                if name not in result.get("config", {})]  # fmt: skip
    if missing:
        raise ValueError(f"repeat: the result lacks {', '.join(missing)}")
    if result["method"] not in HEADS and result.get("method_from"):
        line = missing_line("method", result["method"], result["method_from"])
        raise ValueError(f"repeat: {line}")
    rule = result["config"].get("pool", "a mean of probabilities")
    if result["method"] == "auto" and rule != RULE:
        raise ValueError(
            f"repeat: method auto must pool by {RULE} to be fitted again, and an earlier version "
            f"fitted this run by {rule}; predict and evaluate work with it"
        )


def request_of(result: Json, **place: object) -> FitRequest:
    """The request that led to a result, on its device and with its threads."""
    then = environment_of(result)
    return FitRequest.from_config(
        result["config"],
        method=result["method"],
        shots=result["shots"],
        seed=result["seed"],
        device=_device(then.get("device")),
        threads=then.get("threads"),
        **place,
    )


def environment_of(result: Json) -> Json:
    """Device, threads and the like; of a result from before they were kept, what `device` says."""
    if "environment" in result:
        return dict(result["environment"])
    match = re.match(r"(\S+) \((?:(\d+) threads)?", str(result.get("device", "")))
    if match is None:
        return {}
    threads = {"threads": int(match[2])} if match[2] else {}
    return {"device": match[1], **threads}


def compare(then: Run, now: Run) -> Json:
    """Two runs of the same arguments side by side; see `repeat`."""
    old, new = then.result, now.result
    names = [name for name in {**old["digests"], **new["digests"]} if name not in OUTPUTS]
    comparison: Json = {
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
        comparison["split_new"] = _pair(old["new"]["split"], new["new"]["split"])
    if "encoders" in old["digests"]:
        comparison["encoders"] = _pair(old["digests"]["encoders"], new["digests"].get("encoders"))
    return {**comparison, "verdict": verdict(comparison)}


def verdict(comparison: Json) -> str:
    """MATCH, CLOSE or DIFFERENT; see the module."""
    splits = [comparison[name] for name in ("split", "split_new") if name in comparison]
    inputs, written = dict(comparison["inputs"]), []
    if inputs.get("features", {}).get("then") is not None:
        # its digest holds sentences and weights: their embeddings are what an encoder made of them
        written = [inputs.pop("text")] if "text" in inputs else []
    if not all(pair["equal"] for pair in (*inputs.values(), *splits)):
        return DIFFERENT
    rows = comparison["metrics"]
    near = all(
        row["difference"] is not None and abs(row["difference"]) <= TOLERANCE
        for row in rows.values()
    )
    written += [comparison[name] for name in ("adapter", "encoders") if name in comparison]
    if near and all(pair["equal"] for pair in written):
        return MATCH
    one_image = all(
        row["difference"] is not None and abs(row["difference"]) * row["images"] <= 1 + TOLERANCE
        for name, row in rows.items()
        if name.endswith("accuracy")
    )
    return CLOSE if near or (comparison["differs"] and one_image) else DIFFERENT


def differing(old: Json, new: Json) -> dict[str, list[object]]:
    """Versions, revision and environment that are not the same: name to [then, now]."""
    sides = []
    for result in (old, new):
        flat = {"revision": result.get("revision"), **dict(result.get("versions", {}))}
        for name, value in environment_of(result).items():
            items = value if isinstance(value, Mapping) else {"": value}
            flat |= {f"{name} {key}".strip(): item for key, item in items.items()}
        sides.append(flat)
    then, now = sides
    # what an older result does not name at all is not known to differ
    return {name: [then[name], now.get(name)] for name in then if then[name] != now.get(name)}


def _metrics(old: Json, new: Json) -> dict[str, Json]:
    metrics = {}
    for path in DECISIONS:
        rows: list[Json | None] = [old, new]
        for step in path:
            rows = [row.get(step) if row else None for row in rows]
        if rows[0] is None:
            continue
        for name in METRICS:
            then, now = (row.get(name) if row else None for row in rows)
            gap = 0.0 if then == now else None
            if then is not None and now is not None:
                gap = now - then
            row = {"then": then, "now": now, "difference": gap, "images": rows[0]["count"]}
            metrics[" ".join((*path, name))] = row
    return metrics


def _adapter(then: Run, now: Run) -> Json:
    row = _pair(then.result["digests"]["adapter"], now.result["digests"]["adapter"])
    paths = [run.folder / TENSORS for run in (then, now)]
    if row["equal"] or not all(path.is_file() for path in paths):
        return row
    old, new = (read_safetensors(path, "an adapter")[0] for path in paths)
    shapes = [{name: tuple(tensor.shape) for name, tensor in side.items()} for side in (old, new)]
    row["same_shapes"] = shapes[0] == shapes[1]
    if row["same_shapes"]:
        gaps = [(old[name].double() - new[name].double()).abs().flatten() for name in old]
        row["largest_difference"] = float(torch.cat(gaps).max()) if gaps else 0.0
    return row


def _pair(then: object, now: object) -> Json:
    return {"then": then, "now": now, "equal": then == now}


@contextmanager
def _place(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="vtclip-repeat-") as folder:
        yield Path(folder) / "run"


def _device(name: str | None) -> torch.device:
    """The recorded device, or the usual one where this machine has no such device."""
    try:
        return choose_device(name)
    except ValueError:
        return choose_device(None)


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
        for role in ("source", "val", "test", "unlabelled"):
            check_listable(run, role, "fit again with them")
    except ValueError as error:
        raise ValueError(f"repeat: {error}") from None
    try:
        source = as_source(config["source"], config.get("data"))
        if not isinstance(source, Path):
            return
        kind = source_kind(source)
    except ValueError as error:
        raise ValueError(f"repeat: the source of {run.folder} is gone: {error}") from None
    wanted, changed = run.result["digests"].get("images"), ""
    if kind == "folder":
        hashed = hash_all(list_images(source, follow_links=bool(config.get("follow_links"))), False)
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
    """Which files changed, where the cache still has the list of the run's files."""
    cache = cache_folder(cache_dir)
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
    changes = [
        f"{len(names)} {kind} ({', '.join(map(printable, names[:3]))})"
        for kind, names in kinds.items()
        if names
    ]
    return ": " + ", ".join(changes) if changes else ": same files, other classes or skipped ones"
