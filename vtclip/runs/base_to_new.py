# SPDX-License-Identifier: Apache-2.0
"""Base-to-new: a head trained on the first half of the classes names the other half as well.

The first ceil(n / 2) classes by label are base, the others new. Shots and validation images are of
base classes only. Base test images are classified among the base classes, new ones among the new
classes, with the same parameters over the texts of the new classes. What trades one for the other
shows in the harmonic mean of the two accuracies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.sets import AnySource, source_name
from vtclip.data.splits import Split
from vtclip.files import Json, printable, several
from vtclip.heads import HEADS, Head
from vtclip.names import option, pick
from vtclip.runs.adapter import Adapter
from vtclip.runs.result import named_classes
from vtclip.runs.seen import Seen
from vtclip.train import engine, metrics
from vtclip.train.methods import text_encoder
from vtclip.train.rows import split_rows

logger = logging.getLogger(__name__)
HALVES = ("base", "new")


def check_any_classes(method: str, overrides: Mapping[str, object] | None = None) -> None:
    """Refuse a method, or an option of it, whose parameters belong to its classes."""
    if not HEADS[method].any_classes:
        able = [name for name, head in HEADS.items() if head.any_classes]
        raise ValueError(
            f"{option('base_to_new')}: {option('method')} must be one of {', '.join(able)}, "
            "whose parameters "
            f"do not depend on the classes, got {method!r}"
        )
    options = (overrides or {}).get("head")
    if isinstance(options, Mapping) and options.get("class_specific"):
        raise ValueError(
            f"{option('base_to_new')}: {option('class_specific')} context belongs to its own "
            "classes"
        )


def with_classes(
    head: Head, records: Records, class_names: list[str], device: torch.device
) -> Head:
    """The head's parameters over `class_names`, of which the records must have each."""
    text = class_texts(records, class_names)
    if head.needs_text_encoder:
        return head.with_names(text_encoder(records, device), class_names).to(device)
    return head.with_text(text).to(device)


def base_and_new(records: Records) -> tuple[Records, Records]:
    """The records of the base classes and those of the new classes."""
    K = len(records.class_names)
    if K < 2:
        raise ValueError(
            f"{option('base_to_new')}: the source must have at least 2 classes, got {K}"
        )
    middle = (K + 1) // 2
    return records.subset_classes(range(middle)), records.subset_classes(range(middle, K))


def new_test_split(
    base: Records,
    split: Split,
    new: Records,
    seed: int,
    test_fraction: float,
    *,
    learns: bool,
    strict: bool,
) -> tuple[Split, Json]:
    """The test rows of classes that are never trained on, without copies of base images.

    Copies, by file or pixels, are those of images that trained or validated; with the split comes
    how many are left out for either. The rule of the split, and so its digest, knows nothing of
    them. strict: copies are a ValueError. The test list of a data set is official and stays whole.
    """
    drawn = split_rows(new, False, 0, seed, test_fraction)
    left_out = {"trained": 0, "validated": 0}
    if new.digests is None or ("set" in new.info and not strict):
        return drawn, left_out
    seen = Seen.of(base, split, learns=learns)
    roles = seen.roles_of(new.digests, new.pixels)
    copies = [row for row in drawn.test.tolist() if roles[row] in ("train", "val")]
    if not copies:
        return drawn, left_out
    left_out["trained"] = sum(roles[row] == "train" for row in copies)
    left_out["validated"] = len(copies) - left_out["trained"]
    text = (
        f"{option('base_to_new')}: {several(len(copies), 'test image')} of new classes "
        f"{'has' if len(copies) == 1 else 'have'} the content of images of base classes that "
        f"trained ({left_out['trained']}) or validated ({left_out['validated']}), e.g. "
        f"{printable(new.names[copies[0]])}"
    )
    if strict:
        raise ValueError(f"{text}; {option('strict')} refuses such a source")
    kept = ~torch.isin(drawn.test, torch.tensor(copies))
    if not bool(kept.any()):
        raise ValueError(f"{text}; no test image of a new class is left")
    logger.warning("%s; left out for it", text)
    return replace(drawn, test=drawn.test[kept]), left_out


def new_class_metrics(
    base: Json,
    heads: Mapping[str, Head],
    records: Records,
    split: Split,
    device: torch.device,
) -> Json:
    """`base`, `new` and `harmonic_mean`, each with zero_shot and adapted.

    records: those of the new classes; each of `heads` names the test images of `split` among them
    by their texts. The temperature is the one fitted on base images: there are no others to fit it
    on.
    """
    new: Json = {}
    for name, head in heads.items():
        values = engine.head_metrics(
            with_classes(head, records, records.class_names, device),
            records,
            split.test,
            device=device,
            temperature=base[name]["temperature"],
        )
        new[name] = named_classes(values, records.class_names)
    mean = {name: harmonic_mean(base[name]["accuracy"], new[name]["accuracy"]) for name in heads}
    new |= {"classes": records.class_names, "split": split.digest}
    return {"base": dict(base), "new": new, "harmonic_mean": mean}


def harmonic_mean(base: float, new: float) -> float:
    return 2 * base * new / (base + new) if base + new else 0.0


def evaluate_base_to_new(
    adapter: Adapter,
    result: Json,
    records: Records,
    source: AnySource,
    *,
    device: torch.device,
) -> Json:
    """Metrics of a finished run on the images of `records`, which all count.

    The source has all of the run's new classes or none. `harmonic_mean` needs both kinds of
    classes.
    """
    known = {"base": list(result["classes"]), "new": list(result["new"]["classes"])}
    every = known["base"] + known["new"]
    names = [pick("class", name, every) for name in records.class_names]
    report: Json = {"method": result["method"], "source": source_name(source)}
    for half in HALVES:
        classes = [i for i, name in enumerate(names) if name in known[half]]
        if not classes:
            continue
        rows, head = records.subset_classes(classes), adapter.head
        if half == "new":
            head = with_classes(head, rows, known[half], device)
        if not len(rows):
            continue
        to_run = torch.tensor([known[half].index(name) for name in rows.class_names])
        index = torch.arange(len(rows))
        logits, label = engine.all_logits(head, rows, index, device=device)
        values = metrics.all_metrics(logits, to_run[label], adapter.temperature)
        report[half] = named_classes(values, known[half])
    if all(half in report for half in HALVES):
        report["harmonic_mean"] = harmonic_mean(*(report[half]["accuracy"] for half in HALVES))
    return report


def class_texts(records: Records, class_names: list[str]) -> Tensor:
    """The records' class texts in the order of `class_names`."""
    missing = [name for name in class_names if name not in records.class_names]
    if missing:
        raise ValueError(
            f"{option('base_to_new')}: the source must have all new classes or none, "
            f"{missing[0]!r} is missing"
        )
    return records.text[[records.class_names.index(name) for name in class_names]]
