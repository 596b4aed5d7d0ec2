# SPDX-License-Identifier: Apache-2.0
"""A run can be repeated from its result alone, and what differs is found and named."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import json_of, refused
from pictures import dots
from PIL import Image
from sealing import as_older, opened

import vtclip
from vtclip.cli import main
from vtclip.files import sealed, to_json
from vtclip.heads import HEADS
from vtclip.runs.repeat import METRICS, repeat, request_of
from vtclip.runs.result import Run, revision

TEXTS_ARE_ENOUGH = sorted(set(HEADS) - {"coop"})  # coop learns words: it needs a text encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight pictures of 16 x 16 pixels."""
    return dots(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    head = {"queries": ["image", "text"]}
    overrides = {"epochs": 2, "lr": 7e-4, "head": head}
    return vtclip.fit(npz, method="rada", shots=2, seed=3, overrides=overrides, out=out)


def altered(run: Run, tmp_path: Path, **changes: Any) -> Path:
    """The run with other entries in its result; "a.b" stands for result["a"]["b"]."""
    result = copy.deepcopy(run.result)
    for place, value in changes.items():
        *parents, last = place.split(".")
        here = result
        for step in parents:
            here = here[step]
        here[last] = value
    folder = tmp_path / "altered"
    folder.mkdir(parents=True)
    for name in ("adapter.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((run.folder / name).read_bytes())
    (folder / "result.json").write_bytes(to_json(sealed(result)))
    return folder


@pytest.mark.parametrize("method", TEXTS_ARE_ENOUGH)
def test_every_method_matches(method, npz, tmp_path):
    shots = 1 if method == "auto" else 4
    trained = HEADS[method].recipe(shots).epochs > 0
    overrides = {"epochs": 2, "batch_size": 7} if trained else None
    made = vtclip.fit(npz, method=method, shots=shots, overrides=overrides, out=tmp_path / "run")
    found = repeat(made.folder, out=tmp_path / "again")
    assert found["verdict"] == "MATCH"
    assert found["differs"] == {}
    adapters = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("run", "again")]
    assert adapters[0] == adapters[1]
    assert all(row["difference"] == 0 for row in found["metrics"].values())
    assert len(found["metrics"]) == 2 * len(METRICS)
    again = Run.load(tmp_path / "again").result
    assert again["config"] == made.result["config"]


def test_learned_words_match(photos, cache, tmp_path):
    if "coop" not in HEADS:
        pytest.skip("no method that needs a text encoder is registered")
    options: dict[str, Any] = {"method": "coop", "shots": 1, "overrides": {"epochs": 1}}
    made = vtclip.fit(photos, **options, out=tmp_path / "run", cache_dir=cache)
    assert repeat(made, cache_dir=cache)["verdict"] == "MATCH"


def test_pseudo_labels_match(npz, tmp_path):
    options: dict[str, Any] = {"method": "tip-adapter", "shots": 2, "pseudo_labels": True}
    made = vtclip.fit(npz, out=tmp_path / "run", **options)
    found = repeat(made, out=tmp_path / "again")
    assert found["verdict"] == "MATCH"
    assert Run.load(tmp_path / "again").result["config"]["pseudo_labels"] is True


def test_settings_that_are_not_the_recipe_are_taken_over(run):
    request = request_of(run.result)
    head = {"queries": ["image", "text"]}
    assert request.overrides == {"epochs": 2, "lr": 7e-4, "enough_pairs": 0, "head": head}
    assert (request.seed, request.shots, request.device) == (3, 2, torch.device("cpu"))


def test_settings_that_came_later_keep_the_meaning_of_then(run):
    """A run of the recipe's epochs from before training could end earlier trained all of them."""
    settings = dict(run.result["config"]["fit"])
    settings["epochs"] = HEADS["rada"].recipe(run.result["shots"]).epochs
    for name in ("enough_pairs", "least_epochs"):
        settings.pop(name)
    result = {**run.result, "config": {**run.result["config"], "fit": settings}}
    assert HEADS["rada"].recipe(run.result["shots"]).enough_pairs > 0
    assert request_of(result).overrides["enough_pairs"] == 0


def test_base_to_new_compares_both_halves(npz, tmp_path):
    options: dict[str, Any] = {"method": "rada", "shots": 2, "overrides": {"epochs": 1}}
    made = vtclip.fit(npz, base_to_new=True, out=tmp_path / "run", **options)
    found = repeat(made)
    assert found["verdict"] == "MATCH"
    accuracy = made.result["new"]["adapted"]["accuracy"]
    assert found["metrics"]["new adapted accuracy"]["now"] == accuracy
    assert found["split_new"]["equal"]
    folder = altered(made, tmp_path, **{"new.split": "0" * 64})
    assert repeat(folder)["verdict"] == "DIFFERENT"


def test_trained_encoders_match(photos, cache, tmp_path):
    options: dict[str, Any] = {"method": "rada", "shots": 2, "train_encoders": True}
    overrides = {"epochs": 1, "batch_size": 3, "head_lr": 2e-3}
    made = vtclip.fit(photos, **options, overrides=overrides, out=tmp_path / "run", cache_dir=cache)
    found = repeat(made, cache_dir=cache)
    assert found["encoders"]["equal"]
    assert found["verdict"] == "MATCH"
    folder = altered(made, tmp_path, **{"digests.encoders": "0" * 64})
    found = repeat(folder, cache_dir=cache)
    assert (found["encoders"]["equal"], found["verdict"]) == (False, "CLOSE")


def test_data_set_matches(cache, tmp_path, trees):
    root = trees.make_split(tmp_path / "root", "eurosat")
    options: dict[str, Any] = {"data": root, "method": "tip-adapter", "shots": 2, "seed": 2}
    made = vtclip.fit("eurosat", **options, out=tmp_path / "run", cache_dir=cache)
    found = repeat(made, cache_dir=cache)
    assert found["verdict"] == "MATCH"
    assert found["inputs"]["lists"]["equal"]
    listed = json.loads((root / "eurosat" / "split_zhou_EuroSAT.json").read_text())["test"][0][0]
    trees.picture(next(root.rglob(listed)), 77, 1)
    with pytest.raises(ValueError, match=r"the images of eurosat below \S+ have changed"):
        repeat(made, cache_dir=cache)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"digests.adapter": "0" * 64}, "CLOSE"),  # the same numbers by another adapter
        ({"digests.images": "0" * 64}, None),
        ({"digests.text": "0" * 64}, "DIFFERENT"),
        ({"split": "0" * 64}, "DIFFERENT"),
        ({"adapted.nll": 5.0}, "DIFFERENT"),
        ({"adapted.nll": 5.0, "versions.torch": "1.0"}, "CLOSE"),
        ({"adapted.nll": 5.0, "environment.instructions.torch": "SSE"}, "CLOSE"),
        ({"one image": 1}, "DIFFERENT"),
        ({"one image": 1, "versions.torch": "1.0"}, "CLOSE"),
        ({"one image": 2, "versions.torch": "1.0"}, "DIFFERENT"),
    ],
)
def test_verdicts(run, tmp_path, changes, verdict, capsys):
    if "one image" in changes:
        values, images = run.result["adapted"], changes.pop("one image")
        changes["adapted.accuracy"] = values["accuracy"] - images / values["count"]
    folder = altered(run, tmp_path, **changes)
    if verdict is None:
        assert "have changed" in refused(capsys, "repeat", folder)
        return
    found = json_of(capsys, "repeat", folder, status=int(verdict == "DIFFERENT"))
    assert found["verdict"] == verdict
    if "versions.torch" in changes:
        assert found["differs"] == {"torch": ["1.0", run.result["versions"]["torch"]]}
    if "digests.adapter" in changes:
        assert found["adapter"]["largest_difference"] == 0


def test_embeddings_of_texts_may_differ_in_rounding_but_not_their_sentences(
    photos, cache, tmp_path
):
    """What a processor's own matrix products make of a text is no other text."""
    options: dict[str, Any] = {"method": "tip-adapter", "shots": 2, "cache_dir": cache}
    made = vtclip.fit(photos, **options, out=tmp_path / "run")
    for name, verdict in (("text", "CLOSE"), ("features", "DIFFERENT"), ("weights", "DIFFERENT")):
        folder = altered(made, tmp_path / name, **{f"digests.{name}": "0" * 64})
        found = repeat(folder, cache_dir=cache)
        assert (name, found["verdict"]) == (name, verdict)
        assert not found["inputs"][name]["equal"]


def test_how_much_an_adapter_differs_is_said(run, npz, tmp_path, capsys):
    other = vtclip.fit(
        npz, method="rada", shots=2, seed=3, overrides={"epochs": 3}, out=tmp_path / "o"
    )
    assert other.result["digests"]["adapter"] != run.result["digests"]["adapter"]
    changes = {"config.fit.epochs": 3, "config.fit.lr": other.result["config"]["fit"]["lr"]}
    folder = altered(run, tmp_path, **changes, **{"config.fit.head": {}})
    assert main(["repeat", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "adapter                differs: " in printed
    assert "DIFFERENT: " in printed.splitlines()[0]
    assert "adapted nll " in printed
    assert "differs by" in printed


def test_a_source_that_is_gone_is_named(run, tmp_path):
    folder = altered(run, tmp_path, **{"config.source": str(tmp_path / "no.npz")})
    with pytest.raises(ValueError, match=r"the source of .*altered is gone: source: no such file"):
        repeat(folder)


def test_changed_images_are_named(photos, tmp_path):
    import shutil

    copy_of = tmp_path / "photos"
    shutil.copytree(photos, copy_of)
    cache, out = tmp_path / "cache", tmp_path / "run"
    made = vtclip.fit(copy_of, method="zeroshot", shots=1, out=out, cache_dir=cache)
    assert repeat(made, cache_dir=cache)["verdict"] == "MATCH"
    Image.new("RGB", (16, 16)).save(copy_of / "red dot" / "3.png")
    (copy_of / "red dot" / "5.png").unlink()
    Image.new("RGB", (16, 17)).save(copy_of / "blue dot" / "new.png")
    wanted = (
        r"photos have changed: 1 changed \(red dot/3.png\), 1 new \(blue dot/new.png\), "
        r"1 gone \(red dot/5.png\)$"
    )
    with pytest.raises(ValueError, match=wanted):
        repeat(made, cache_dir=cache)
    with pytest.raises(ValueError, match=r"photos have changed$"):  # no list of those of then
        repeat(made, cache_dir=tmp_path / "other")
    assert not list(tmp_path.glob("other/features/*/manifest.json"))


def test_results_that_cannot_be_repeated(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a vtclip run"):
        repeat(tmp_path)
    result = {**run.result, "config": {"source": "x"}}
    with pytest.raises(ValueError, match=r"the result lacks config.model, config.fit"):
        repeat(Run(tmp_path, result))
    with pytest.raises(ValueError, match="came from `vtclip extend`"):
        repeat(Run(tmp_path, {**run.result, "extended_from": {}}))


def test_threads_are_those_of_then_and_are_put_back(run, tmp_path):
    before = torch.get_num_threads()
    folder = altered(run, tmp_path, **{"environment.threads": before + 1})
    found = repeat(folder, out=tmp_path / "again")
    assert Run.load(tmp_path / "again").result["environment"]["threads"] == before + 1
    assert "threads" not in found["differs"]
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_here_is_named(run, tmp_path):
    folder = altered(run, tmp_path, **{"environment.device": "cuda:77"})
    found = repeat(folder)
    assert found["differs"]["device"][0] == "cuda:77"
    assert found["verdict"] in ("MATCH", "CLOSE")


def test_older_results_without_an_environment_are_repeated(run, tmp_path):
    folder = altered(run, tmp_path)

    def older(result: dict[str, Any]) -> None:
        del result["environment"]
        del result["config"]["shots"]
        result["device"] = "cpu (1 threads)"

    as_older(folder / "result.json", older)
    result = opened(folder / "result.json")
    assert request_of(result).threads == 1
    found = vtclip.repeat(folder)
    assert (found["verdict"], found["differs"]) == ("MATCH", {})


def test_every_argument_that_decides_a_number_is_in_the_result(run):
    elsewhere = {"method", "seed", "device", "threads"}  # beside "config" in the result
    named = {"overrides": "fit", "exact_shots": "draw"}  # in "config" by another name
    conduct = {"records", "out", "overwrite", "resume", "cache_dir", "progress"}
    conduct |= {"encoder_batch_size", "strict", "on_metrics"}
    own = {"train_encoders", "lora"}  # are in the results of such runs only
    for name in set(inspect.signature(vtclip.fit).parameters) - elsewhere - conduct - own:
        assert named.get(name, name) in run.result["config"], name
    assert {"method", "seed", "environment", "versions", "revision"} <= set(run.result)
    assert {"images", "text", "split", "adapter"} <= set(run.result["digests"])


def test_a_checkout_names_its_commit(root):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    words = ["git", "-C", str(root), "rev-parse", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert (revision() or "").removesuffix("-dirty") == commit
