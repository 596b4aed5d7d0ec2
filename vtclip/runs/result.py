# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: `result.json`, its table, and where it was made."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtclip import __version__
from vtclip.backends import native
from vtclip.environment import num_processes
from vtclip.files import (
    Json,
    NewFiles,
    printable,
    read_json,
    sealed,
    settle,
    to_json,
    unsealed,
    write_atomic,
)
from vtclip.heads import method_from
from vtclip.machine import Stopwatch, peak_memory_mb
from vtclip.schemas import (
    by_name,
    check,
    either,
    maybe,
    number,
    obj,
    rows,
    share,
    table,
    text,
    tuple_of,
    whole,
)

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from vtclip import Classifier
    from vtclip.data.records import Records
    from vtclip.runs.pictures import Picture
    from vtclip.runs.predictions import Prediction

RESULT, WHAT = "result.json", "a vtclip run"

_measured = {name: maybe(number()) for name in ("nll", "ece", "nll_scaled", "ece_scaled")}
_one_label = table(
    {
        "accuracy": share,
        "interval95": tuple_of(share, share),
        "macro_f1": share,
        **_measured,
        "temperature": maybe(number(0, above=True)),
        "count": whole(),
        "per_class": by_name(maybe(share)),
    }
)
_several_labels = table(
    {
        **{name: maybe(share) for name in ("map", "micro_ap", "macro_f1", "micro_f1")},
        "bce": maybe(number()),
        "threshold": share,
        "count": whole(),
    }
)
_metrics = either(_one_label, _several_labels)
_both = {"zero_shot": _metrics, "adapted": _metrics}
_names = rows(text)
# what every version wrote that an argument can lead to; keys after a "?" came later
SCHEMA = table(
    {
        "method": text,
        "method_from?": maybe(by_name(maybe(text))),
        "source": text,
        "shots": either(whole(), text),
        "seed": whole(),
        **_both,
        "accuracy?": share,
        "map?": maybe(share),
        "seconds": by_name(number(0)),
        "memory_mb?": maybe(by_name(maybe(number(0)))),
        "device?": text,
        "environment?": obj,
        "versions?": by_name(maybe(text)),
        "revision?": maybe(text),
        "config": table({"source?": text, "data?": maybe(text), "model?": text, "fit?": obj}),
        "digests": by_name(maybe(text)),
        "split": text,
        "classes": rows(text, least=1),
        "images": by_name(whole()),
        "test": table({"images": whole(), "unreadable": _names}),
        "base?": table(_both),
        "new?": table({**_both, "classes": _names, "split": text}),
        "harmonic_mean?": table({"zero_shot": share, "adapted": share}),
        "candidates?": rows(
            table({"method": text, "weight?": share, "seconds?": number(0), "left_out?": number(0)})
        ),
        "sources?": rows(table({"source": text, "classes": _names, "split": text})),
        "seen?": table({"file": text, "sha256": text, "images": by_name(whole())}),
        "images_per_class?": by_name(by_name(whole())),
        "extended_from?": obj,
        "extension?": obj,
        "refit?": obj,
    }
)


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run: its folder and the contents of its `result.json`."""

    folder: Path
    result: Json

    def __repr__(self) -> str:
        result = self.result
        count = result.get("test", {}).get("images")
        accuracy = result.get("accuracy")
        share = "" if accuracy is None else f", accuracy={accuracy:.4f}, test_images={count}"
        return (
            f"Run({str(self.folder)!r}, method={result.get('method')!r}, "
            f"classes={len(result.get('classes', ()))}{share})"
        )

    def confusion(self) -> Tensor:
        """Counts [K, K] of test images, row = true class, column = prediction, as "classes".

        A ValueError for a run whose result holds none: an earlier version's, or an extended one.
        """
        from vtclip.runs.predictions import confusion_counts

        if "confusion" not in self.result:
            raise ValueError(
                f"{self.folder} holds no confusion matrix; vtclip evaluate computes it"
            )
        return confusion_counts(self.result["confusion"])

    def _repr_html_(self) -> str:
        """What a notebook shows: metrics, confusions, the worst wrong images."""
        from vtclip.runs.notebook import run_html

        return run_html(self.folder, self.result)

    @property
    def rows(self) -> list[Json]:
        """What the run said of each validation and test image: file, label, predicted, role ("val"
        or "test"), probability of the predicted class, and top, (class, probability) pairs.
        """
        from vtclip.runs.predictions import rows_of

        return rows_of(self.folder)

    @property
    def predictions(self) -> DataFrame:
        """`rows` as a pandas frame; an ImportError without pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError(
                'predictions: pandas is not installed: pip install "vtclip[tables]"; Run.rows '
                "needs none"
            ) from None
        return pandas.DataFrame(self.rows)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The run's `vtclip.Classifier`, loaded once, on a GPU where there is one."""
        import vtclip

        return vtclip.Classifier.load(self.folder)

    def predict(
        self, images: Picture | Iterable[Picture], topk: int = 5, *, batch_size: int = 64
    ) -> list[Prediction] | list[list[Prediction]]:
        """`Classifier.predict`: the topk most probable classes of one image, or of each of many."""
        found: list[Prediction] | list[list[Prediction]]
        found = self.classifier.predict(images, topk, batch_size=batch_size)
        return found

    def predict_proba(self, images: Picture | Iterable[Picture], *, batch_size: int = 64) -> Tensor:
        """`Classifier.predict_proba`: probabilities [B, K] float64, columns as "classes"."""
        return self.classifier.predict_proba(images, batch_size=batch_size)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions on the test images, 0..1."""
        if "accuracy" not in self.result:
            raise ValueError("the run has several labels per image and no accuracy; see its map")
        return float(self.result["accuracy"])

    @classmethod
    def write(cls, folder: Path, result: Json, new: NewFiles) -> Run:
        """A run whose result, as it will be read back, is one of the new files of `folder`."""
        run = cls(folder, json.loads(to_json(result)))
        new.write(RESULT, run.as_bytes())
        return run

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """The run in `folder`; ValueError where its result was damaged or is no result."""
        folder = Path(folder).expanduser()
        settle(folder)
        path = folder / RESULT
        contents = unsealed(read_json(path, WHAT), path, WHAT)
        check(contents, SCHEMA, f"not {WHAT}: {path}")
        return cls(folder, contents)

    def save(self) -> None:
        """Write `result` to the folder's result.json, in one step."""
        write_atomic(self.folder / RESULT, self.as_bytes())

    def as_bytes(self) -> bytes:
        """The contents of `result.json`, with their digest."""
        return to_json(sealed(self.result))

    def table(self) -> str:
        """Zero-shot and the adapted head, a line of metrics each, as `vtclip fit` prints them."""
        return result_table(self.result)


def make_result(
    values: Json,
    watch: Stopwatch,
    *,
    method: str,
    source: str,
    shots: int | str,
    seed: int,
    config: Json,
    digests: Mapping[str, str | None],
    split: str,
    classes: Sequence[str],
    images: Mapping[str, int],
    unreadable: Sequence[str],
    **others: object,
) -> Json:
    """The contents of `result.json`.

    values: metrics of the decisions `zero_shot` and `adapted`, and of others where there are any.
    config: the record of the request; digests and split: of what the run was made from.
    images: training, validation and test images; `unreadable` ones are not among them.
    """
    device = watch.device or torch.device("cpu")
    origin = method_from(method)
    return {
        "method": method,
        **({} if origin is None else {"method_from": origin}),
        "source": source,
        "shots": shots,
        "seed": seed,
        "zero_shot": values["zero_shot"],
        "adapted": values["adapted"],
        **_summary(values["adapted"]),
        "seconds": {**watch.seconds, "total": sum(watch.seconds.values())},
        "peak_memory_mb": peak_memory_mb(device),
        "memory_mb": watch.memory_mb,
        "device": device_name(device),
        "environment": environment(device),
        "versions": versions(),
        "revision": revision(),
        "config": config,
        "digests": digests,
        "split": split,
        "classes": classes,
        "images": images,
        "test": {"images": images["test"], "unreadable": unreadable},
        **{name: value for name, value in values.items() if name not in ("zero_shot", "adapted")},
        **others,
    }


def _summary(adapted: Json) -> Json:
    """The one number of a run: accuracy, or mAP where an image may have several labels."""
    name = "map" if "map" in adapted else "accuracy"
    return {name: adapted[name]}


@functools.cache
def versions() -> dict[str, str | None]:
    installed: dict[str, str | None] = {"vtclip": __version__, "python": platform.python_version()}
    for name in ("torch", "open_clip_torch", "triton", "numpy", "pillow", "safetensors"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


@functools.cache
def revision() -> str | None:
    """The git commit of a checkout, "-dirty" where tracked files differ; None when installed.

    It is that of the process: what was imported does not change with a later commit.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def environment(device: torch.device) -> Json:
    """What else decides the last bits of a result: device, threads, instruction sets, processes."""
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "instructions": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "vtclip": native.build_info().get("instructions"),
        },
        "processes": num_processes(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def named_classes(values: Json, class_names: list[str]) -> Json:
    per_class = dict(zip(class_names, values["per_class"], strict=True))
    return {**values, "per_class": per_class}


def unreadable(records: Records) -> list[str]:
    """Files of the source that could not be read, as "name: reason"; no number counts them."""
    return [f"{name}: {reason}" for name, reason in records.info.get("skipped", [])]


COLUMNS = {"accuracy": 9, "95 % interval": 14, "macro-F1": 9, "NLL": 8, "ECE": 8}
COLUMNS |= {"NLL at T": 9, "ECE at T": 9, "T": 7}


def result_table(result: Json) -> str:
    """Zero-shot against adapted, one line each; T is the temperature fitted on validation.

    A base-to-new run has these lines for either half of the classes.
    """
    names = {"zero_shot": "zero-shot"}
    if result["method"] != "zeroshot":
        names["adapted"] = result["method"]
    if "harmonic_mean" not in result:
        tables = [candidates_table(result["candidates"])] if "candidates" in result else []
        return "\n".join([*tables, metrics_table({names[key]: result[key] for key in names})])
    rows = {
        f"{part} {name}": result[part][key]
        for part in ("base", "new")
        for key, name in names.items()
    }
    mean = result["harmonic_mean"]
    shares = ", ".join(f"{name} {100 * mean[key]:.2f} %" for key, name in names.items())
    return f"{metrics_table(rows)}\nharmonic mean of base and new accuracy: {shares}"


def candidates_table(candidates: Sequence[Json]) -> str:
    """What validation images said of each candidate and its weight in the pool, one line each."""
    count = max((row.get("count", 0) for row in candidates), default=0)
    where = f"{count} validation images" if count else "no validation images"
    lines = [f"{where:<24} {'accuracy':>9} {'NLL at T':>9} {'T':>7} {'seconds':>8}"]
    for row in candidates:
        name = printable(row["method"])
        if "left_out" in row:
            seconds = row["left_out"]
            lines.append(f"{name:<24} left out for --budget: about {seconds:.0f} s")
            continue
        accuracy = f"{100 * row['accuracy']:.2f} %" if "accuracy" in row else "-"
        cells = _number(row.get("nll_scaled")), _number(row.get("temperature"))
        weight = f"  weight {row['weight']:.2f}" if row["weight"] else ""
        line = f"{name:<24} {accuracy:>9} {cells[0]:>9} {cells[1]:>7}"
        lines.append(f"{line} {row['seconds']:>8.1f}{weight}")
    return "\n".join(lines)


SEVERAL_COLUMNS = {"mAP": 9, "micro-AP": 9, "macro-F1": 9, "micro-F1": 9, "BCE": 8, "from p": 7}


def several_table(rows: Mapping[str, Json]) -> str:
    """Metrics of several labels per image; "from p": the probability from which a class counts."""
    first = max(len(name) for name in rows) + 1
    lines = [" " * first + "".join(f" {name:>{w}}" for name, w in SEVERAL_COLUMNS.items())]
    for name, row in rows.items():
        shares = [row[key] for key in ("map", "micro_ap", "macro_f1", "micro_f1")]
        cells = [*(f"{100 * share:.2f} %" for share in shares), f"{row['bce']:.4f}"]
        cells.append(f"{row['threshold']:.3f}")
        widths = SEVERAL_COLUMNS.values()
        line = "".join(f" {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{name:<{first}}{line}")
    return "\n".join(lines)


def metrics_table(rows: Mapping[str, Json]) -> str:
    rows = {printable(name): row for name, row in rows.items()}
    if any("map" in row for row in rows.values()):
        return several_table(rows)
    first = max(len(name) for name in rows) + 1
    lines = [" " * first + "".join(f" {name:>{width}}" for name, width in COLUMNS.items())]
    for name, row in rows.items():
        low, high = row["interval95"]
        cells = [
            f"{100 * row['accuracy']:.2f} %",
            f"{100 * low:.1f}-{100 * high:.1f} %",
            f"{100 * row['macro_f1']:.2f} %",
            *(
                _number(row[key])
                for key in ("nll", "ece", "nll_scaled", "ece_scaled", "temperature")
            ),
        ]
        widths = COLUMNS.values()
        line = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{name:<{first}}{line}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
