# SPDX-License-Identifier: Apache-2.0
"""`vtclip.extend`: a run over its own classes and new ones, without training again.

The encoder, its templates, the head's parameters, its hyper-parameters and its temperature stay as
the run has them; what the new classes bring are their texts and, for heads that keep labelled
images, a few of those. Without parameters to train the result is exact, the head that a fit of all
classes would give with the same hyper-parameters. With them it is a warm start: its parameters have
not seen the new classes. `Head.class_specific` says which heads cannot be extended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vtclip.clip.texts import is_per_class
from vtclip.data.class_names import as_class_names
from vtclip.data.records import Records
from vtclip.data.sources import source_kind
from vtclip.data.splits import ALL, EXACT, UP_TO, Split, few_shot_split
from vtclip.files import Json, NewFiles, is_leftover, json_digest, printable, settle, several
from vtclip.heads import HEADS, Head
from vtclip.heads._head import NewClasses
from vtclip.heads.zeroshot import ZeroShot
from vtclip.machine import Stopwatch, choose_device, set_threads
from vtclip.names import SHOTS, name_key, option
from vtclip.runs import result
from vtclip.runs.adapter import Adapter, load_adapter
from vtclip.runs.class_counts import images_per_class, warn_of_few
from vtclip.runs.duplicates import check_duplicates
from vtclip.runs.encoders import add_with_encoders
from vtclip.runs.folder import claimed, finish_run
from vtclip.runs.multi_label import check_single, check_single_run
from vtclip.runs.new_classes import NewSource, check_new, new_classes
from vtclip.runs.refit import refit_split
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import NEW, Seen
from vtclip.runs.sources import RunSources, SourceRows, metrics_over, sources_of
from vtclip.train.rows import TrainingRows, support_of, usual_shots

logger = logging.getLogger(__name__)


def extend(
    run: str | Path | Run,
    folder: str | Path,
    *,
    out: str | Path,
    name: str | None = None,
    class_names: Mapping[str, str] | str | Path | None = None,
    follow_links: bool = False,
    shots: int | str | None = None,
    model: str | Path | None = None,
    encoder_batch_size: int = 64,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Run:
    """A new run in `out` over the classes of `run` and those of `folder`, evaluated once.

    folder: images of one class, called like the folder or `name`; a folder of class folders; or a
        features folder or .npz table of other classes, where the run was fitted on one.
    class_names: from the ids that the folder gives its classes to their names, or the file that
        holds them, as `vtclip.fit` takes it; by default that of the run, for classes in it.
    follow_links: enter folders that are links, too. The new run keeps both.
    shots: images per new class for heads that keep images; None takes as many as the run had. Of a
        run of up to N images per class it is at most so many, or "all", and a class with fewer
        brings those; they are counted. Of a run of exactly N it is so many of every class, and
        None takes the next of 16, 8, 4, 2, 1 that every new class has. Of a run that trained on its
        validation images at last (`refit` of `vtclip.fit`) a new class keeps up to 4 more, as the
        run's own do. Other heads take none. Half of each new class is held out, by the run's own
        share.
    model: another place of the encoder's weights (see vtclip.clip).

    The result has `before` (the run's own classes, named among these alone), `old_classes` and
    `new_classes` (test images of either, named among all), each zero-shot and adapted, and
    over all test images `zero_shot`, `adapted` and `accuracy`. Zero-shot is the run's encoder with
    the class texts alone, tuned where the run tuned it. `extended_from` names the run by its
    digests. Nothing is written where anything is refused.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    path, target = Path(folder).expanduser(), Path(out).expanduser()
    where = choose_device(device)
    set_threads(threads)
    _check_out(target, run.folder, path)
    _check_run(run)
    _check_shots(run, shots)
    adapter = load_adapter(run.folder, device=where, result=run.result)
    check_extendable(adapter.head)
    source = _source(run, path, name, class_names, follow_links)
    _check_names(adapter.class_names, source)
    watch = Stopwatch(where, progress=progress)
    sources = RunSources(
        run, adapter, where, model, cache_dir, progress, batch_size=encoder_batch_size
    )
    _check_new_texts(sources, source)
    with watch.stage("features"):
        old = sources.rows()
        passes = sources.options["augment_passes"] if keeps_images(adapter.head) else 0
        added = sources.added(source, passes)
    check_new(adapter.class_names, added.class_names, source)
    every = [*adapter.class_names, *added.class_names]
    split, shots = _split(run, adapter.head, added, shots)
    keeps = keeps_images(adapter.head)
    split, twice = _checked(run, path, added, split, shots if keeps else None)
    old, split, known = _without_copies(sources, old, added, split, keeps)
    with watch.stage("extend"):
        head = _extended_head(sources, added, split)
        # scores among the old classes say nothing of those among all
        wider = replace(adapter, head=head, class_names=every, calibration=None, together=None)
    new = SourceRows(added, split.test, torch.arange(len(adapter.class_names), len(every)))
    with watch.stage("evaluate"):
        values = _evaluated(adapter, wider, old, new, run.result["zero_shot"]["temperature"])
    contents = _contents(run, adapter.head, every, values, [*old, new], split, watch)
    contents["left_out"] = {**_left_out(old, twice), "repeated": known}
    entry = {"shots": shots, "draw": _rule(run), "learns": keeps, **_described(added, split)}
    contents["sources"] = [*sources_of(run), {**source.as_json(), **entry}]
    with claimed(target), NewFiles(target) as files:
        _check_out(target, run.folder, path)  # again: now nobody else writes it
        contents["digests"]["adapter"] = add_with_encoders(files, wider, sources.clip)
        contents |= _seen(sources, Seen.of(added, split, learns=keeps), files)
        return finish_run(target, files, contents)


def _source(
    run: Run,
    path: Path,
    name: str | None,
    class_names: Mapping[str, str] | str | Path | None,
    follow_links: bool,
) -> NewSource:
    """Where the new classes lie; options that have no meaning for it are refused."""
    if name is not None and class_names is not None:
        raise ValueError(f"{option('name')} cannot be combined with {option('class_names')}")
    names = as_class_names(class_names)
    source = NewSource(path, name, run.result["config"].get("class_names"), names, follow_links)
    if source_kind(path) != "folder":
        source.refuse_table()
    return source


def _check_new_texts(sources: RunSources, source: NewSource) -> None:
    """Refuse a run of sentences per class that has none for a new one, before images are read."""
    if source_kind(source.path) == "folder":
        _check_sentences(sources.templates_of_new(), new_classes(source).class_names)


def _check_shots(run: Run, shots: int | str | None) -> None:
    if isinstance(shots, str) and (shots != ALL or _rule(run) != UP_TO):
        wish = f'a number or "{ALL}"' if _rule(run) == UP_TO else "a number, as the run's are exact"
        raise ValueError(f"{option('shots')} must be {wish}, got {shots!r}")
    if isinstance(shots, int) and shots < 1:
        raise ValueError(f"{option('shots')} must be at least 1, got {shots}")


def _described(added: Records, split: Split) -> Json:
    """What an extended run keeps of the new classes and of their images."""
    return {
        "classes": added.class_names,
        "images_per_class": images_per_class(added, split),
        "images": added.info["digests"]["images"],
        "split": split.digest,
    }


def _extended_head(sources: RunSources, added: Records, split: Split) -> Head:
    support, adapter = None, sources.adapter
    if len(split.train):
        rows = TrainingRows(added, split.train)
        support = support_of(rows, split.train, sources.device)
        support = support._replace(label=support.label + len(adapter.class_names))
    new = NewClasses(added.class_names, added.text, added.text_views, support, sources.clip)
    return extended_head(adapter.head, new)


def _evaluated(
    before: Adapter,
    after: Adapter,
    old: Sequence[SourceRows],
    new: SourceRows,
    zero_shot_temperature: float | None,
) -> Json:
    """Metrics of zero-shot and of the head, over the old classes and then over all."""
    known = before.head
    zero_shot = ZeroShot(known.text, logit_scale=known.logit_scale)
    text = torch.cat([known.text, new.records.text.to(known.text)])
    heads: dict[str, tuple[Head, Head, float | None]] = {
        "zero_shot": (zero_shot, zero_shot.with_text(text), zero_shot_temperature),
        "adapted": (known, after.head, before.temperature),
    }
    device = known.text.device
    places = {"old_classes": old, "new_classes": [new], "all": [*old, new]}
    values: Json = {place: {} for place in ("before", *places)}
    for which, (small, large, T) in heads.items():
        values["before"][which] = metrics_over(small, old, before.class_names, T, device)
        for place, rows in places.items():
            values[place][which] = metrics_over(large, rows, after.class_names, T, device)
    return {**values, **values.pop("all")}


def _contents(
    run: Run,
    head: Head,
    class_names: list[str],
    values: Json,
    sources: Sequence[SourceRows],
    split: Split,
    watch: Stopwatch,
) -> Json:
    """The result of the extended run; what it has in common with `run` is taken from there."""
    return result.make_result(
        values,
        watch,
        **{name: run.result[name] for name in ("method", "source", "shots", "seed")},
        config=run.result["config"],
        digests=dict(run.result["digests"]),
        split=run.result["split"],
        classes=class_names,
        images={
            **{role: run.result["images"][role] + n for role, n in split.counts().items()},
            "test": sum(len(rows.test) for rows in sources),
        },
        unreadable=[line for rows in sources for line in result.unreadable(rows.records)],
        extension={"exact": is_exact(head), "note": note_of(head)},
        extended_from={
            "run": str(run.folder.resolve()),
            "result": json_digest(run.result),
            **{key: run.result["digests"].get(key) for key in ("adapter", "split", "images")},
        },
    )


def _without_copies(
    sources: RunSources, old: Sequence[SourceRows], added: Records, split: Split, learns: bool
) -> tuple[list[SourceRows], Split, int]:
    """The test rows of old and new classes without copies of each other, and how many those are.

    An image of an old class that trains a new one is no test image any more, and one of the new
    classes that the run saw under another class is none either.
    """
    if sources.seen is None or added.digests is None:
        return list(old), split, 0
    every = sources.seen + Seen.of(added, split, learns=learns)
    kept, left_out = [], 0
    for rows in old:
        digests = rows.records.digests or []
        roles = every.roles_of(digests, rows.records.pixels)
        fitted = torch.tensor([role in ("train", "val") for role in roles], dtype=torch.bool)
        test = rows.test[~fitted[rows.test]] if len(fitted) else rows.test
        left_out += len(rows.test) - len(test)
        kept.append(replace(rows, test=test))
    known = sources.seen.roles_of(added.digests, added.pixels)
    fresh = torch.tensor([role == NEW for role in known], dtype=torch.bool)
    test = split.test[fresh[split.test]]
    left_out += len(split.test) - len(test)
    if not len(test) or not sum(len(rows.test) for rows in kept):
        raise ValueError(
            "extend: no test image is left that is not in both the run's classes and the new ones"
        )
    if left_out:
        logger.warning(
            "%d test images are left out: the new classes hold images that the run saw under "
            "others", left_out,
        )  # fmt: skip
    return kept, replace(split, test=test), left_out


def _seen(sources: RunSources, added: Seen, files: NewFiles) -> Json:
    """Writes which images the run and its extension saw, where that is known of the run."""
    return {} if sources.seen is None else {"seen": (sources.seen + added).write(files)}


def _left_out(old: Sequence[SourceRows], twice: Json) -> Json:
    """Test images that do not count: copies in the new classes, and those of the run now gone."""
    gone = old[-1].left_out.gone
    if gone:
        logger.warning(
            "%d of %s of the run %s gone and not counted",
            gone, several(old[-1].left_out.tested, "test image"), "is" if gone == 1 else "are",
        )  # fmt: skip
    return {**twice, "gone": gone}


def _refit(run: Run) -> bool:
    """Whether the run's head keeps its validation images, too."""
    return bool(run.result["config"].get("refit"))


def _rule(run: Run) -> str:
    """How shots of new classes are drawn: as the run's; exactly where those had no labels."""
    config = run.result["config"]
    return EXACT if config.get("pseudo_labels") else str(config.get("draw", EXACT))


def _split(
    run: Run, head: Head, added: Records, shots: int | str | None
) -> tuple[Split, int | str]:
    """Held-out and support rows of the new classes, and the shots, 0 for heads that keep none."""
    fraction, rule = run.result["config"]["test_fraction"], _rule(run)
    tested = added.roles is not None and bool((added.roles == 2).any())
    if not keeps_images(head):
        shots = 0
    elif shots is None and rule == UP_TO:
        shots = run.result["shots"]
    elif shots is None:
        shots = _usual(run.result["shots"], added, 0.0 if tested else fraction)
    split = few_shot_split(
        added.label,
        added.names,
        shots=shots,
        seed=run.result["seed"],
        test_fraction=fraction,
        class_names=added.class_names,
        rule=rule,
        roles=added.roles,
        validate=rule == EXACT or _refit(run),
    )
    if _refit(run) and keeps_images(head):  # as images of that role of the run's own classes
        split = refit_split(split)
    split = replace(split, val=split.val[:0])  # nothing is chosen by them
    counts = torch.bincount(added.label[split.test], minlength=len(added.class_names))
    if int(counts.max() if rule == UP_TO else counts.min()) == 0:
        k = int(counts.argmin())
        total = int((added.label == k).sum())
        few = f"too few to hold out {fraction:g} of them"
        if tested:
            few = "none of which the source calls a test image"
        raise ValueError(
            f"extend: class {added.class_names[k]!r} has {several(total, 'image')}, {few}"
        )
    return split, shots


def _checked(
    run: Run, path: Path, added: Records, split: Split, shots: int | str | None
) -> tuple[Split, Json]:
    """The split without copies, and how many those are; what of it is unexpected is said.

    shots: None of a method that keeps no images.
    """
    keeps = shots is not None
    _say_roles(path, added, split, keeps, _refit(run))
    split, twice = check_duplicates(added, split, False, learns=keeps)
    if _rule(run) == UP_TO:
        warn_of_few(added, split, shots)
    return split, twice


def _say_roles(path: Path, added: Records, split: Split, keeps: bool, refit: bool) -> None:
    """Say what became of images that the source itself calls training, validation or test ones."""
    if added.roles is None:
        return
    train, val, test = torch.bincount(added.roles.long(), minlength=3).tolist()
    number = int((added.roles[split.train] == 0).sum())
    kept = f"{number} kept" if keeps else "not used: the method keeps none"
    apart = len(split.test) - test
    parts = [f"{several(train, 'training image')} ({kept}{f', {apart} tested' if apart else ''})"]
    if val:
        use = "kept, as the run's are" if keeps and refit else "not used: nothing is chosen again"
        parts.append(f"{several(val, 'validation image')} ({use})")
    if test:
        parts.append(several(test, "test image"))
    logger.warning("%s divides its images itself: %s", printable(str(path)), ", ".join(parts))


def _usual(wanted: int | str, added: Records, fraction: float) -> int:
    """The run's shots where every new class has them beyond its test share, else fewer.

    Of a run of all images that there were, 16.
    """
    wanted = max(SHOTS) if isinstance(wanted, str) else wanted
    pool = added if added.roles is None else added.select((added.roles == 0).nonzero().flatten())
    counts = torch.bincount(pool.label, minlength=len(added.class_names)).tolist()
    enough = min(count - int(count * fraction) for count in counts) >= wanted
    return wanted if enough else min(wanted, usual_shots(pool, fraction))


def _check_run(run: Run) -> None:
    if "config" not in run.result or "split" not in run.result:
        raise ValueError(f"not a vtclip run: {run.folder / RESULT} lacks its config or its split")
    check_single_run(run.result, "extend")
    if run.result["config"].get("final"):
        raise ValueError(
            f"extend: {run.folder} was fitted with {option('final')}, so that its adapter has seen "
            f"all its test images and none is left to evaluate the old classes on; extend a run "
            f"without {option('final')}, or fit all classes together with it"
        )
    if run.result["config"].get("base_to_new"):
        raise ValueError(
            f"extend: {run.folder} is a base-to-new run, whose other half of the classes is new "
            "already; fit one without " + option("base_to_new")
        )


def _check_out(out: Path, run: Path, folder: Path) -> None:
    settle(out)
    if out.exists() and not (out.is_dir() and all(is_leftover(one.name) for one in out.iterdir())):
        what = " and holds a run" if (out / RESULT).is_file() else ""
        raise FileExistsError(f"{option('out')} {out} exists{what}; give a new folder")
    for what, place in ("run", run), ("folder of new classes", folder):
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"{option('out')} {out} lies inside the {what} {place}")


def _check_names(known: list[str], source: NewSource) -> None:
    """Refuse names that the run has already before any image is read."""
    check_single(source.path, "extend")
    if source_kind(source.path) == "folder":
        check_new(known, new_classes(source).class_names, source)


def _check_sentences(templates: Sequence[Any] | None, names: Sequence[str]) -> None:
    """Refuse new classes that a run of sentences per class was given none for."""
    if not templates or not is_per_class(templates[0]):
        return
    known = {name_key(name) for name in templates[0]}
    absent = [name for name in names if name_key(name) not in known]
    if absent:
        raise ValueError(
            f"extend: the run was fitted with sentences per class, and there are none for "
            f"{printable(absent[0])!r}; fit again with {option('templates')} that has them"
        )


def check_extendable(head: Head) -> None:
    """Refuse a head whose parameters belong to its classes, naming the methods that can."""
    for member in head.member_heads:
        if member.class_specific:
            able = ", ".join(name for name, kind in HEADS.items() if not kind.class_specific)
            holder = "this run of auto averages" if member is not head else "this run is of method"
            raise ValueError(
                f"extend: {holder} {member.method}, whose parameters belong to its classes; "
                f"methods that can be extended: {able}"
            )


def keeps_images(head: Head) -> bool:
    """Whether an extended head takes in labelled images of the new classes."""
    return any(member.keeps_images for member in head.member_heads)


def is_exact(head: Head) -> bool:
    """Whether extending gives what fitting all classes with the same hyper-parameters would."""
    return not any(True for _ in head.parameters())


def note_of(head: Head) -> str:
    """One sentence on what the logits of an extended head are."""
    if is_exact(head):
        return "exact: the same head as fitted to all classes with the same hyper-parameters"
    names = [member.method for member in head.member_heads if member.mixes_classes]
    note = "warm start: parameters as trained on the old classes, no training followed"
    if names:
        note += f"; the logits of a class under {' and '.join(names)} depend on the others shown"
    return note


@torch.no_grad()
def extended_head(head: Head, new: NewClasses) -> Head:
    """The head over its K classes and the K' of `new` after them, in evaluation mode."""
    return head.with_new_classes(new).to(head.text.device).eval()
