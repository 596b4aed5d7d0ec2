# SPDX-License-Identifier: Apache-2.0
"""Several processes extract one set of features: each image once, the bytes as of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import environment, python
from pictures import noise

from vtclip.cli import main
from vtclip.data.extract import extract_features
from vtclip.data.featureset import FeatureSet
from vtclip.data.shards import Work, shards_of

READABLE, LOST = 20, 1  # 3 classes of 7 files, of which one is not a picture


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, Any]:
    """The outcome of each way in which the processes behaved; see _ranks_child.py."""
    child, place = Path(__file__).parent / "_ranks_child.py", tmp_path_factory.mktemp("ranks")
    paths = f"{root}{os.pathsep}{root / 'tests' / 'helpers'}"
    done = python(child, place, env=environment(PYTHONPATH=paths), timeout=400)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize(
    ("way", "size"), [("two", 2), ("three", 3), ("five", 5), ("slow", 2), ("patient", 2)]
)
def test_bytes_are_those_of_one_process(ways, way, size):
    outcome = ways[way]
    assert outcome["codes"] == [0] * size
    assert outcome["same"]
    encoded = [process["encoded"] for process in outcome["processes"]]
    assert sum(encoded) == READABLE + size  # and a blank image in each, for the shape
    assert max(encoded) - min(encoded) <= 4  # a shard is 2 images
    for process in outcome["processes"]:
        assert process["rows"] == READABLE
        assert [name for name, _ in process["skipped"]] == ["dog/3.png"]


@pytest.mark.parametrize("way", ["two", "three"])
def test_an_evaluation_counts_each_image_once_in_any_number_of_processes(ways, way):
    count, accuracy, nll = ways["one"]["counted"]
    assert count == READABLE
    for process in ways[way]["processes"]:
        assert process["counted"] == [count, accuracy, nll]


def test_more_processes_than_images(ways):
    outcome = ways["few"]
    assert outcome["codes"] == [0] * 5
    assert outcome["same"]
    assert {process["rows"] for process in outcome["processes"]} == {3}


def test_a_killed_process_leaves_no_finished_set_and_a_rerun_completes_it(ways):
    outcome = ways["killed"]
    assert outcome["codes"] == [1, -9]
    assert "manifest.json" not in outcome["files"]
    assert "partial.json" in outcome["files"]
    assert "PeerFailed: rank 0: another process failed" in outcome["processes"][0]["error"]
    notes = [name for name in outcome["files"] if name.endswith(".json") and "shard" in name]
    assert len(notes) >= 1
    again = ways["again"]
    assert again["codes"] == [0, 0]
    assert again["same"]
    encoded = sum(process["encoded"] for process in again["processes"])
    assert encoded < READABLE  # what was finished is not encoded again
    assert again["files"] == ways["two"]["files"]


def test_finished_features_are_reused_by_all(ways):
    assert ways["reused"]["codes"] == [0, 0]
    assert all(process["reused"] for process in ways["reused"]["processes"])
    assert [process["encoded"] for process in ways["reused"]["processes"]] == [0, 0]
    assert not any(process["reused"] for process in ways["two"]["processes"])


def test_an_error_in_one_process_ends_all(ways):
    outcome = ways["poison"]
    assert outcome["codes"] == [1, 1]
    first, second = (process["error"] for process in outcome["processes"])
    assert "ValueError: features: image features of 1 images are not finite" in second
    assert "PeerFailed: rank 0: another process failed or stalled" in first
    assert "manifest.json" not in outcome["files"]


def test_processes_that_see_other_images_refuse_to_begin(ways):
    outcome = ways["differ"]
    assert outcome["codes"] == [1, 1]
    assert any("has list of images" in process["error"] for process in outcome["processes"])
    assert outcome["files"] == []


def test_torchrun_writes_what_one_process_writes(tmp_path):
    """The command, with the bundled model: three shards for two processes."""
    noise(tmp_path / "pictures", ("red dot", "green dot"), 66)
    words = ["features", str(tmp_path / "pictures"), "--device", "cpu", "--spatial", "none"]
    words += ["--threads", "1", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*launch, "-m", "vtclip", *words, tmp_path / "two", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("132 images of 2 classes, ") == 1
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert len([name for name in one if name.startswith("shard-")]) == 3


@pytest.mark.parametrize(
    ("images", "batch", "passes", "rows"),
    [
        (1, 64, 1, [1]),
        (64, 64, 1, [64]),
        (1005, 64, 1, [64] * 15 + [45]),
        (100_000, 64, 1, [3136] * 31 + [2784]),
        (1_281_167, 64, 1, [4096] * 312 + [3215]),
        (200, 64, 11, [65, 65, 65, 5]),  # five images to a batch
        (10, 4, 1, [10]),
        (70, 7, 1, [70]),
    ],
)
def test_shards_follow_from_the_images_alone(images, batch, passes, rows, monkeypatch, fake_clip):
    class Hashed:
        names = range(images)

    fields = {"augment_passes": passes - 1, "dtype": None}
    work = Work(Hashed(), fake_clip(), fields, batch, False)  # type: ignore[arg-type]
    for size in (1, 2, 7):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        planned = shards_of(work, None)
        assert [shard.stop - shard.start for shard in planned] == rows
        assert [shard.start for shard in planned] == [sum(rows[:n]) for n in range(len(rows))]


def test_another_batch_size_takes_over_no_shards(pictures, tmp_path, fake_clip, monkeypatch):
    """The shards of an interrupted run are used for the very same batches only."""
    monkeypatch.setattr("vtclip.data.shards.SHARD_ROWS", 4)
    for batch, taken in ((2, 8), (4, 0)):
        clip = fake_clip()
        encode = clip.encode_image

        def stop(pixels: Any, spatial: Any = None, clip: Any = clip, encode: Any = encode) -> Any:
            if clip.images_encoded >= 8:
                raise KeyboardInterrupt
            return encode(pixels, spatial)

        clip.encode_image = stop
        out = tmp_path / f"out{batch}"
        with pytest.raises(KeyboardInterrupt):
            extract_features(pictures, out, model=clip, batch_size=2)
        again = fake_clip()
        extract_features(pictures, out, model=again, batch_size=batch)
        assert again.images_encoded == 15 - taken
        FeatureSet.open(out).verify()
