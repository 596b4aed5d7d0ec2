# SPDX-License-Identifier: Apache-2.0
"""Classes added to a run: what stays, what is exact, what the numbers count, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from commands import json_of, refused
from sealing import opened
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.data.splits import few_shot_split
from vtclip.demo.scenes import CLASS_NAMES
from vtclip.heads import HEADS, Support
from vtclip.heads._head import NewClasses
from vtclip.heads.auto import Auto
from vtclip.runs.adapter import load_adapter
from vtclip.runs.classifier import Classifier
from vtclip.runs.extend import check_extendable, extended_head, is_exact
from vtclip.runs.result import Run
from vtclip.runs.seen import Seen

C, PER_CLASS, OLD, ALL = 16, 12, 3, 5
NAMES = ["ant", "bee", "cat", "dog", "eel"]
OVERRIDES = {"vtclip": {"epochs": 2}, "rada": {"epochs": 2}, "tip-adapter-f": {"epochs": 2}}


def world() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    text = draw.standard_normal((ALL, C)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    label = np.repeat(np.arange(ALL), PER_CLASS)
    image = text[label] + 0.3 * draw.standard_normal((len(label), C)).astype(np.float32)
    spatial = 0.3 * draw.standard_normal((len(label), 4, C)).astype(np.float32)
    return {"image": image, "label": label, "text": text, "spatial": spatial}


def table(path: Path, classes: list[int], **changed: Any) -> Path:
    """An .npz of some of the classes; rows keep their names."""
    all_of = world()
    rows = np.flatnonzero(np.isin(all_of["label"], classes))
    arrays = {
        "image": all_of["image"][rows],
        "spatial": all_of["spatial"][rows],
        "label": np.array([classes.index(k) for k in all_of["label"][rows]]),
        "text": all_of["text"][classes],
        "classname": np.array([NAMES[k] for k in classes]),
        "fname": np.array([f"row{row:03d}" for row in rows]),
        "temperature": np.float32(np.log(30.0)),
    }
    np.savez(path, **{**arrays, **changed})
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extend")
    table(root / "old.npz", [0, 1, 2])
    table(root / "new.npz", [3, 4])
    table(root / "all.npz", [0, 1, 2, 3, 4])
    return root


@pytest.fixture(scope="module")
def fitted(place: Path) -> Any:
    made: dict[str, Run] = {}

    def fit(method: str) -> Run:
        if method not in made:
            made[method] = vtclip.fit(
                place / "old.npz", method=method, shots=3, out=place / method, device="cpu",
                overrides=OVERRIDES.get(method),
            )  # fmt: skip
        return made[method]

    return fit


def head_of(folder: Path) -> Any:
    return load_adapter(folder).head


def test_zero_shot_is_exact_and_every_number_counts_what_it_says(place, fitted, tmp_path):
    run = fitted("zeroshot")
    larger = vtclip.extend(run.folder, place / "new.npz", out=tmp_path / "run2", device="cpu")
    result = larger.result
    data = world()
    unit = [F.normalize(torch.from_numpy(data[key]), dim=1) for key in ("image", "text")]
    cosine, label = unit[0].double() @ unit[1].double().T, torch.from_numpy(data["label"])
    names = [f"row{row:03d}" for row in range(len(label))]
    test = few_shot_split(label, names, shots=0, seed=1).test
    old, new = (test[label[test] < OLD], test[label[test] >= OLD])

    def share(rows: torch.Tensor, classes: int) -> float:
        return float((cosine[rows, :classes].argmax(1) == label[rows]).double().mean())

    assert result["before"]["adapted"]["accuracy"] == share(old, OLD) == run.accuracy
    assert result["old_classes"]["adapted"]["accuracy"] == share(old, ALL)
    assert result["new_classes"]["adapted"]["accuracy"] == share(new, ALL)
    assert larger.accuracy == share(test, ALL)
    assert result["before"]["zero_shot"] == run.result["zero_shot"]
    assert result["classes"] == NAMES
    assert result["extension"]["exact"] is True
    assert result["test"]["images"] == len(test)
    assert result["images"] == {"train": run.result["images"]["train"],
                                "val": run.result["images"]["val"], "test": len(test)}  # fmt: skip
    everything = vtclip.fit(
        place / "all.npz", method="zeroshot", shots=3, out=tmp_path / "all", device="cpu"
    )
    assert everything.accuracy == larger.accuracy
    assert opened(tmp_path / "run2" / "result.json") == result


@pytest.mark.parametrize("method", ["rada", "vtclip"])
def test_parameters_that_belong_to_no_class_stay_as_they_are(place, fitted, tmp_path, method):
    run = fitted(method)
    larger = vtclip.extend(run, place / "new.npz", out=tmp_path / "run2", device="cpu")
    before, after = head_of(run.folder), head_of(larger.folder)
    for name, value in before.state_dict().items():
        if name != "text":
            assert torch.equal(after.state_dict()[name], value)
    assert torch.equal(after.text[:OLD], before.text)
    assert load_adapter(larger.folder).temperature == load_adapter(run.folder).temperature
    extension = larger.result["extension"]
    assert extension["exact"] is False
    assert f"the logits of a class under {method} depend on the others" in extension["note"]
    assert larger.result["before"]["adapted"] == run.result["adapted"]


@pytest.mark.parametrize("method", ["tip-adapter", "proker", "takl", "tip-x", "proto-clip"])
def test_heads_that_keep_images_become_those_of_all_classes(place, fitted, tmp_path, method):
    if method not in HEADS:
        pytest.skip(f"{method} is not among the heads")
    run = fitted(method)
    larger = vtclip.extend(run, place / "new.npz", out=tmp_path / "run2", shots=3, device="cpu")
    assert larger.result["extension"]["exact"] is True
    assert larger.result["images"]["train"] == 3 * ALL
    before, after = head_of(run.folder), head_of(larger.folder)
    rows = vtclip.open_source(place / "all.npz")
    split = few_shot_split(rows.label, rows.names, shots=3, seed=1)
    batch = rows.batch(split.train)
    options = {key: value for key, value in before.options().items() if key != "num_support"}
    whole = type(before)(rows.text, **options)
    whole.fit_support(Support(F.normalize(batch.image, dim=1), batch.label))
    image = torch.randn(9, C, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(after(image), whole(image), atol=1e-3)
    assert not torch.allclose(after(image)[:, :OLD], head_of(fitted("zeroshot").folder)(image))


def test_trained_keys_are_a_warm_start(place, fitted, tmp_path):
    run = fitted("tip-adapter-f")
    larger = vtclip.extend(run, place / "new.npz", out=tmp_path / "run2", shots=2, device="cpu")
    assert larger.result["extension"]["exact"] is False
    before, after = head_of(run.folder), head_of(larger.folder)
    assert torch.equal(after.keys[: len(before.keys)], before.keys)
    assert len(after.keys) == len(before.keys) + 2 * (ALL - OLD)
    assert larger.result["sources"][1]["shots"] == 2


def test_an_average_of_heads_is_extended_member_by_member(fitted):
    names = "rada", "proker"
    heads = [head_of(fitted(name).folder) for name in names]
    members = [
        {"method": name, "options": head.options(), "temperature": T, "weight": weight}
        for name, head, T, weight in zip(names, heads, (0.7, 1.6), (0.25, 0.75), strict=True)
    ]
    auto = Auto(heads[0].text, members=members, logit_scale=30.0)
    for place, head in zip(auto.heads, heads, strict=True):
        place.load_state_dict(head.state_dict())
    text = F.normalize(torch.from_numpy(world()["text"][OLD:]), dim=1)
    support = Support(text, torch.arange(OLD, ALL))
    new = NewClasses(NAMES[OLD:], text, text[:, None], support, lambda: pytest.fail("no encoder"))
    both, image = extended_head(auto, new), torch.randn(6, C)
    parts = [extended_head(head, new)(image).softmax(1) for head in heads]
    shares = [(part.log() / T).softmax(1) for part, T in zip(parts, (0.7, 1.6), strict=True)]
    wanted = 0.25 * shares[0] + 0.75 * shares[1]
    assert torch.allclose(both(image).softmax(1), wanted, atol=1e-5)
    assert is_exact(auto) is False


@pytest.mark.parametrize("method", [name for name in HEADS if name != "coop"])
def test_every_head_is_extended_or_refused(method):
    """Another head that has no way is to be listed here; coop needs a text encoder."""
    text = F.normalize(torch.randn(OLD, C), dim=1)
    head: Any = HEADS[method](text)
    support = Support(text, torch.arange(OLD) + OLD)
    new = NewClasses(NAMES[:OLD], text, text[:, None], support, lambda: pytest.fail("no encoder"))
    if method in ("linear-probe", "taskres", "zs-lp", "clap"):
        with pytest.raises(ValueError, match=r"be extended: .*proker"):
            check_extendable(head)
        return
    check_extendable(head)
    larger = extended_head(head, new)
    given = [torch.randn(2, C), torch.randn(2, 4, C)][: 2 if larger.needs_spatial else 1]
    assert larger(*given).shape == (2, 2 * OLD)
    assert torch.equal(larger.text[:OLD], head.text)


def test_a_second_extension_and_evaluation_count_every_source(place, fitted, tmp_path):
    one, two = table(tmp_path / "one.npz", [3]), table(tmp_path / "two.npz", [4])
    run = fitted("tip-adapter")
    middle = vtclip.extend(run, one, out=tmp_path / "run2", device="cpu")
    last = vtclip.extend(middle, two, out=tmp_path / "run3", device="cpu")
    at_once = vtclip.extend(run, place / "new.npz", out=tmp_path / "both", device="cpu")
    assert last.result["classes"] == NAMES
    assert last.result["adapted"]["accuracy"] == at_once.accuracy
    assert last.result["extended_from"]["adapter"] == middle.result["digests"]["adapter"]
    assert last.result["before"]["adapted"]["accuracy"] == middle.accuracy

    found = vtclip.evaluate(last.folder, device="cpu")
    assert found["accuracy"] == last.accuracy
    assert found["per_class"] == last.result["adapted"]["per_class"]
    assert found["test"]["images"] == 6 * ALL
    of_old = vtclip.evaluate(last.folder, place / "old.npz", device="cpu")
    assert of_old["test"]["images"] == 6 * OLD  # test rows only
    assert of_old["accuracy"] == found["old_classes"]["accuracy"]
    assert vtclip.evaluate(last.folder, two, device="cpu")["test"]["images"] == 6
    # a table it was not made with counts whole
    table(tmp_path / "other.npz", [4, 0], fname=np.array([f"x{i}" for i in range(24)]),
          image=world()["image"][:24] + 0.01)  # fmt: skip
    other = vtclip.evaluate(last.folder, tmp_path / "other.npz", device="cpu")
    assert other["test"]["images"] == 24
    table(two, [4], image=np.float32(2) * world()["image"][:12])
    # no row of it is one that the run tested: those are said to be gone, the others still count
    changed = vtclip.evaluate(last.folder, device="cpu")
    assert changed["test"]["images"] == 6 * (ALL - 1)
    assert (changed["left_out"]["gone"], changed["left_out"]["new"]) == (6, 12)
    assert changed["old_classes"]["accuracy"] == found["old_classes"]["accuracy"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes and a run on them, and two more classes in another place."""
    root = tmp_path_factory.mktemp("scenes")
    pictures.scenes_of(root / "old", (0, 4, 8))
    pictures.scenes_of(root / "new", (12, 16))
    (root / "new" / CLASS_NAMES[12] / "broken.png").write_bytes(b"no picture")
    vtclip.fit(root / "old", method="proker", shots=2, out=root / "run", device="cpu",
            cache_dir=root / "cache")  # fmt: skip
    return root


def test_folders_go_through_the_encoder_of_the_run(scenes, tmp_path):
    options: dict[str, Any] = {"cache_dir": scenes / "cache", "device": "cpu"}
    larger = vtclip.extend(scenes / "run", scenes / "new", out=tmp_path / "many", **options)
    assert larger.result["classes"][3:] == [CLASS_NAMES[16], CLASS_NAMES[12]]  # natural order
    (broken,) = larger.result["test"]["unreadable"]
    assert broken.startswith(f"{CLASS_NAMES[12]}/broken.png: ")
    assert larger.result["sources"][1]["shots"] == 2
    # as if all classes had been there from the start: the same images train and test
    shutil.copytree(scenes / "old", tmp_path / "all")
    shutil.copytree(scenes / "new", tmp_path / "all", dirs_exist_ok=True)
    whole = vtclip.fit(
        tmp_path / "all", method="zeroshot", shots=2, out=tmp_path / "whole", **options
    )
    assert larger.result["zero_shot"]["accuracy"] == whole.accuracy
    classifier = Classifier.load(larger.folder, device="cpu")
    found = classifier.predict(sorted((scenes / "new").glob("*/0*.png")), 5)
    assert {one.label for one in found[0]} == set(larger.result["classes"])
    assert vtclip.evaluate(larger.folder, **options)["accuracy"] == larger.accuracy


def test_a_folder_of_one_class_and_its_name(scenes, tmp_path, capsys):
    one = scenes / "new" / CLASS_NAMES[16]
    words = ["extend", scenes / "run", one, "--cache-dir", scenes / "cache", "--device", "cpu"]
    result = json_of(capsys, *words, "--out", tmp_path / "a")
    assert result["classes"][3:] == [CLASS_NAMES[16]]
    words += ["--name", "gray moon", "--shots", "1", "--out", tmp_path / "b"]
    assert main([*map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "3 old classes, before" in out
    assert "1 new among 4" in out
    assert "exact" in out
    named = Run.load(tmp_path / "b").result
    assert named["classes"][3:] == ["gray moon"]
    assert (result["sources"][1]["shots"], named["sources"][1]["shots"]) == (2, 1)
    again = vtclip.evaluate(tmp_path / "b", cache_dir=scenes / "cache", device="cpu")
    assert again["accuracy"] == pytest.approx(named["accuracy"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "OLDCLASS", "--out", "new"], "already; fit again with all its images to add"),
        (["RUN", "OLDCLASS", "--out", "new"], "or, if they are of another class, give --name"),
        (["RUN", "NEW", "--out", "new", "--name", CLASS_NAMES[0]], "give another --name"),
        (["RUN", "BOTH", "--out", "new"], "the run has 1 of these 2 classes already ("),
        (["TABLERUN", "OLDTABLE", "--out", "new"], "the run has 2 of these 2 classes already (bee"),
        (["RUN", "SHOUT", "--out", "new"], "are the same name but for case"),
        (["RUN", "FEW", "--out", "new"], "class 'dotted heart' has 1 image, too few to hold out"),
        (["RUN", "NEW", "--out", "new", "--shots", "most"], "--shots: must be a number or all"),
        (["RUN", "NEW", "--out", "new", "--shots", "0"], "--shots: must be in"),
        (["RUN", "NEW", "--out", "there"], "--out there exists; give a new folder"),
        (["RUN", "NEW", "--out", "RUN/inner"], "lies inside the run"),
        (["RUN", "NEW", "--out", "NEW/inner"], "lies inside the folder of new classes"),
        (["RUN", "NEW"], "required: --out"),
        (["RUN", "EMPTY", "--out", "new"], "must hold one folder per class"),
        (["RUN", "MIXED", "--out", "new"], "holds images and folders; --name makes all of them"),
        (["RUN", "nowhere", "--out", "new"], "FOLDER 'nowhere' does not exist"),
        (["NEW", "NEW", "--out", "new"], "not a vtclip run"),
        (["RUN", "TABLE", "--out", "new"], "the source was not made by the model of the run"),
        (["RUN", "TABLE", "--out", "new", "--name", "x"], "--name is for a folder of images"),
        (["TABLERUN", "NEW", "--out", "new"], "must come from an .npz table of width 16"),
        (["TABLERUN", "WIDE", "--out", "new"], "the source has width 8"),
        (["BASETONEW", "TABLE", "--out", "new"], "is a base-to-new run"),
        (["FINAL", "nothing", "--out", "new"], "was fitted with --final"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    scenes, place, fitted, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTCLIP_CACHE", str(scenes / "cache"))
    (tmp_path / "there").write_text("mine")
    (tmp_path / "empty").mkdir()
    places = {"RUN": scenes / "run", "NEW": scenes / "new", "TABLE": place / "new.npz",
              "TABLERUN": fitted("zeroshot").folder, "EMPTY": tmp_path / "empty"}  # fmt: skip
    if "OLDCLASS" in words:
        places["OLDCLASS"] = scenes / "old" / CLASS_NAMES[4]
    if "BOTH" in words:
        places["BOTH"] = pictures.scenes_of(tmp_path / "both", (0, 12))
    if "OLDTABLE" in words:
        places["OLDTABLE"] = table(tmp_path / "old.npz", [1, 2])
    if "SHOUT" in words:
        name = CLASS_NAMES[0].upper().replace(" ", "_")
        places["SHOUT"] = pictures.scenes(tmp_path / "shout" / name, 1, 4)
    if "FEW" in words:
        places["FEW"] = pictures.scenes(tmp_path / "few" / "dotted heart", 19, 1)
    if "MIXED" in words:
        places["MIXED"] = pictures.scenes(tmp_path / "mixed", 19, 2)
        pictures.scenes(tmp_path / "mixed" / "inner", 19, 2)
    if "WIDE" in words:
        places["WIDE"] = table(tmp_path / "wide.npz", [3], image=world()["image"][36:48, :8],
                               text=world()["text"][3:4, :8])  # fmt: skip
    if "BASETONEW" in words:
        places["BASETONEW"] = vtclip.fit(
            place / "old.npz", method="zeroshot", base_to_new=True, out=tmp_path / "b2n",
            shots=0, device="cpu",
        ).folder  # fmt: skip
    if "FINAL" in words:  # refused before anything is read of the new classes
        places["nothing"] = tmp_path / "empty"
        places["FINAL"] = vtclip.fit(
            place / "old.npz", method="proker", final=True, out=tmp_path / "final", device="cpu"
        ).folder
    before = sorted(tmp_path.rglob("*"))
    given = [str(places.get(w, w)) if "/" not in w else
             str(places[w.split("/")[0]] / w.split("/")[1]) for w in words]  # fmt: skip
    assert message in refused(capsys, "extend", *given)
    assert sorted(tmp_path.rglob("*")) == before
    for folder in (scenes / "run", scenes / "new"):
        assert not (folder / "inner").exists()


def test_heads_of_their_classes_are_refused_with_the_methods_that_can(place, tmp_path):
    if "linear-probe" not in HEADS:
        pytest.skip("linear-probe is not among the heads")
    run = vtclip.fit(place / "old.npz", method="linear-probe", shots=2, out=tmp_path / "p")
    with pytest.raises(ValueError, match=r"linear-probe, whose .* be extended: .*rada.*proker"):
        vtclip.extend(run, place / "new.npz", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tuned_encoders_come_along(scenes, tmp_path):
    options: dict[str, Any] = {"cache_dir": scenes / "cache", "device": "cpu"}
    how = {"method": "rada", "train_encoders": True, "overrides": {"epochs": 1, "batch_size": 3}}
    run = vtclip.fit(scenes / "old", shots=1, out=tmp_path / "run", **how, **options)
    larger = vtclip.extend(run, scenes / "new", out=tmp_path / "run2", **options)
    assert (tmp_path / "run2" / "encoders.safetensors").is_file()
    assert larger.result["before"]["adapted"]["accuracy"] == run.accuracy
    classifier = Classifier.load(tmp_path / "run2", device="cpu")
    tuned = Classifier.load(tmp_path / "run", device="cpu").clip.weights_digest
    assert classifier.clip.weights_digest == tuned
    assert vtclip.evaluate(larger, **options)["accuracy"] == larger.accuracy


def test_a_learned_prompt_reads_the_new_names(scenes, tmp_path):
    options: dict[str, Any] = {"cache_dir": scenes / "cache", "device": "cpu"}
    run = vtclip.fit(scenes / "old", method="coop", shots=1, out=tmp_path / "run",
                  overrides={"epochs": 1}, **options)  # fmt: skip
    larger = vtclip.extend(run, scenes / "new", out=tmp_path / "run2", **options)
    before, after = head_of(run.folder), head_of(larger.folder)
    assert torch.equal(after.text[:3], before.text)
    names = larger.result["classes"]
    again = before.with_names(vtclip.load_clip("demo"), names)
    assert torch.allclose(after.text, again.text, atol=1e-5)
    assert larger.result["extension"]["exact"] is False
    own = vtclip.fit(scenes / "old", method="coop", shots=1, out=tmp_path / "csc",
                  overrides={"epochs": 1, "head": {"class_specific": True}}, **options)  # fmt: skip
    with pytest.raises(ValueError, match="coop, whose parameters belong to its classes"):
        vtclip.extend(own, scenes / "new", out=tmp_path / "run3", **options)
    assert not (tmp_path / "run3").exists()


def test_a_data_set_with_official_lists_is_extended_by_a_folder(tmp_path, trees):
    root = trees.make_split(tmp_path / "root", "caltech101")
    before = trees.fingerprint(root)
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "device": "cpu"}
    run = vtclip.fit("caltech101", data=root, method="tip-adapter", shots=1, out=tmp_path / "run",
                  **options)  # fmt: skip
    new = pictures.scenes(tmp_path / "striped circle", 0, 6)
    larger = vtclip.extend(run, new, out=tmp_path / "run2", **options)
    assert larger.result["before"]["adapted"]["accuracy"] == run.accuracy
    assert larger.result["images"]["test"] == run.result["images"]["test"] + 3
    # the new class is read with the words that the set's own template has
    templates = load_adapter(run.folder).features["templates"]
    text = vtclip.load_clip("demo").encode_text(["striped circle"], templates)
    assert torch.allclose(head_of(larger.folder).text[-1:], text, atol=1e-6)
    assert vtclip.evaluate(larger, **options)["accuracy"] == larger.accuracy
    assert trees.fingerprint(root) == before


def uneven(path: Path, classes: list[int], counts: list[int]) -> Path:
    """`table` with the first so many images of each class."""
    table(path, classes)
    arrays = dict(np.load(path))
    label = arrays["label"]
    rows = np.concatenate([np.flatnonzero(label == k)[:n] for k, n in enumerate(counts)])
    for name in ("image", "spatial", "label", "fname"):
        arrays[name] = arrays[name][rows]
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f", "tip-x", "proker", "takl"])
def test_a_small_new_class_brings_what_it_has_and_votes_like_the_others(
    fitted, tmp_path, caplog, method
):
    run = fitted(method)
    source = uneven(tmp_path / "new.npz", [3, 4], [12, 4])
    larger = vtclip.extend(run, source, out=tmp_path / "run2", device="cpu")
    entry = larger.result["sources"][1]
    assert (entry["shots"], entry["draw"]) == (3, "up to")
    counts = {"dog": {"train": 3, "val": 0, "test": 6}, "eel": {"train": 2, "val": 0, "test": 2}}
    assert entry["images_per_class"] == counts
    assert "1 of 2 classes trains on fewer images: eel 2" in caplog.text
    head = head_of(larger.folder)
    assert torch.bincount(head.label).tolist() == [3, 3, 3, 3, 2]
    votes = head.class_weights() * torch.bincount(head.label)
    torch.testing.assert_close(votes, torch.full((ALL,), 3.0))
    assert head.votes_per_class == 3.0
    test = vtclip.evaluate(larger.folder, device="cpu")
    assert test["accuracy"] == pytest.approx(larger.accuracy)


def test_all_images_of_new_classes_join_a_run_of_all(place, tmp_path, capsys):
    source = uneven(tmp_path / "old.npz", [0, 1, 2], [12, 8, 4])
    run = vtclip.fit(source, method="tip-adapter", shots="all", out=tmp_path / "run", device="cpu")
    mean = head_of(run.folder).votes_per_class
    new = uneven(tmp_path / "new.npz", [3, 4], [10, 3])
    words = [str(run.folder), str(new), "--out", str(tmp_path / "run2"), "--device", "cpu"]
    assert main(["extend", *words]) == 0
    out = capsys.readouterr().out
    assert "2 to 5 images of each kept" in out
    assert [line.split() for line in out.splitlines() if line.startswith("eel")] == [
        ["eel", "2", "0", "1"]
    ]
    head = head_of(tmp_path / "run2")
    assert torch.bincount(head.label).tolist()[3:] == [5, 2]
    torch.testing.assert_close(head.values().sum(dim=0), torch.full((ALL,), mean))


def test_a_new_class_of_one_image_trains_and_is_named_as_untested(fitted, tmp_path, caplog):
    source = uneven(tmp_path / "new.npz", [3, 4], [12, 1])
    larger = vtclip.extend(fitted("proker"), source, out=tmp_path / "run2", device="cpu")
    assert larger.result["sources"][1]["images_per_class"]["eel"]["train"] == 1
    assert "1 of 2 classes has no test image" in caplog.text


def test_exact_runs_are_extended_by_as_many_images_of_every_class(place, tmp_path):
    run = vtclip.fit(
        place / "old.npz", method="tip-adapter", shots=3, exact_shots=True, out=tmp_path / "run",
        device="cpu",
    )  # fmt: skip
    source = uneven(tmp_path / "new.npz", [3, 4], [12, 4])
    larger = vtclip.extend(run, source, out=tmp_path / "run2", device="cpu")
    assert larger.result["sources"][1]["shots"] == 2
    head = head_of(larger.folder)
    assert torch.bincount(head.label).tolist() == [3, 3, 3, 2, 2]
    assert head.votes_per_class is None
    for shots, message in ((3, "shots = 3 needs 3 images per class"), ("all", "must be a number")):
        with pytest.raises(ValueError, match=message):
            vtclip.extend(run, source, out=tmp_path / "run3", shots=shots, device="cpu")
        assert not (tmp_path / "run3").exists()


def divided(root: Path, kind: str) -> Path:
    """Scenes of one class, 3 of which train, 2 validate and 5 test: in folders or a list."""
    name, parts = CLASS_NAMES[12], ["train"] * 3 + ["val"] * 2 + ["test"] * 5
    files = sorted(pictures.scenes(root / "all" / name, 12, len(parts)).glob("*.png"))
    if kind == "list":
        lines = [f"{f},{name},{part}\n" for f, part in zip(files, parts, strict=True)]
        (root / "new.csv").write_text("path,label,split\n" + "".join(lines))
        return root / "new.csv"
    for file, part in zip(files, parts, strict=True):
        (root / "new" / part / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "new" / part / name / file.name)
    return root / "new"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["folder", "list"])
def test_a_source_with_splits_keeps_them(kind, exact, scenes, tmp_path, caplog):
    options: dict[str, Any] = {"cache_dir": scenes / "cache", "device": "cpu"}
    run: Any = scenes / "run"
    if exact:
        run = vtclip.fit(scenes / "old", method="proker", shots=2, exact_shots=True,
                         out=tmp_path / "exact", **options)  # fmt: skip
    source = divided(tmp_path / "more", kind)
    caplog.clear()
    larger = vtclip.extend(run, source, out=tmp_path / "larger", **options)
    # the head of a folder's run keeps its validation images, that of exact shots does not
    use, role = ("not used", "unused") if exact else ("kept, as the run's are)", "train")
    assert f"3 training images (2 kept), 2 validation images ({use}" in caplog.text
    assert "5 test images" in caplog.text
    (counts,) = larger.result["sources"][1]["images_per_class"].values()
    assert counts == {"train": 2 if exact else 4, "val": 0, "test": 5}
    seen = Seen.read(larger.folder, larger.result["seen"])
    own = {Path(name).name: role
           for name, label, role in zip(seen.names, seen.labels, seen.roles, strict=True)
           if label == CLASS_NAMES[12]}  # fmt: skip
    roles = [own[f"{number:02d}.png"] for number in range(10)]
    assert sorted(roles[:3]) == ["train", "train", "unused"]
    assert roles[3:] == [role] * 2 + ["test"] * 5
    assert vtclip.evaluate(larger, **options)["accuracy"] == larger.accuracy


def test_images_of_new_classes_are_never_validated_on(place, tmp_path):
    """Nothing is chosen again: those that an exact draw would keep back stay unused."""
    run = vtclip.fit(place / "old.npz", method="tip-adapter", shots=3, exact_shots=True,
                     out=tmp_path / "run", device="cpu")  # fmt: skip
    larger = vtclip.extend(run, place / "new.npz", out=tmp_path / "run2", device="cpu")
    seen = Seen.read(larger.folder, larger.result["seen"])
    added = [role for label, role in zip(seen.labels, seen.roles, strict=True)
             if label in NAMES[OLD:]]  # fmt: skip
    assert added.count("val") == 0
    assert added.count("train") == 3 * 2
