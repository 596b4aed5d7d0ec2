# SPDX-License-Identifier: Apache-2.0
"""Features under attack: bytes cut or flipped, full disks, kills, several processes."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import python
from safetensors.torch import load_file

import vtclip.data.shards as shards
from vtclip import files
from vtclip.data.extract import extract_features
from vtclip.data.featureset import FeaturesDamaged, FeatureSet
from vtclip.train.checkpoint import Checkpoint

FILES = ("manifest.json", "text.safetensors", "shard-00001.safetensors")


@pytest.fixture
def features(cached: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished folder in a cache, of four shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    folder: Path = cached(spatial="raw")[0].folder
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 8, 60, 0.5, -1])
def test_cut_file_is_found_and_built_again(features, cached, fake_clip, name, keep, caplog):
    good = contents(features)
    data = good[name]
    size = int(len(data) * keep) if isinstance(keep, float) else keep % len(data)
    (features / name).write_bytes(data[:size])
    with pytest.raises(FeaturesDamaged, match=r"^features: [^\n]*$"):
        FeatureSet.open(features).verify()
    clip = fake_clip()
    cached(model=clip, spatial="raw")
    assert clip.images_encoded >= 15
    assert contents(features) == good
    assert "building it again" in caplog.text


def test_missing_files_are_found(features):
    for name in FILES[1:]:
        data = (features / name).read_bytes()
        (features / name).unlink()
        with pytest.raises(FeaturesDamaged, match="got no such file"):
            FeatureSet.open(features)
        (features / name).write_bytes(data)
    (features / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FeatureSet.open(features)


def test_every_flipped_bit_is_found(features):
    draw = random.Random(0)
    for name, data in contents(features).items():
        positions = {0, 1, 7, 8, len(data) - 1, *(draw.randrange(len(data)) for _ in range(40))}
        for position in positions:
            broken = bytearray(data)
            broken[position] ^= 1 << draw.randrange(8)
            (features / name).write_bytes(bytes(broken))
            with pytest.raises((FeaturesDamaged, ValueError)):
                FeatureSet.open(features).verify()
        (features / name).write_bytes(data)
    FeatureSet.open(features).verify()


def test_flipped_bit_is_found_before_the_first_row_is_read(features):
    path = features / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(bytes(data))
    records = FeatureSet.open(features).records()
    assert records.batch(torch.tensor([0])).image.shape == (1, 16)
    with pytest.raises(FeaturesDamaged, match="shard-00002.safetensors was changed after"):
        records.batch(torch.tensor([8]))


def test_shards_swapped_for_each_other_are_found(features):
    one, two = (features / f"shard-0000{n}.safetensors" for n in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(FeaturesDamaged, match="was changed after it was written"):
        FeatureSet.open(features).verify()


def test_planted_pickle_is_never_loaded(features, tmp_path):
    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'trapped'}",)

    torch.save({"image": Trap()}, features / "shard-00000.safetensors")
    with pytest.raises(FeaturesDamaged):
        FeatureSet.open(features).verify()
    assert not (tmp_path / "trapped").exists()


def test_manifest_cannot_point_outside_of_its_folder(features, tmp_path):
    manifest = json.loads((features / "manifest.json").read_text())
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((features / "shard-00000.safetensors").read_bytes())
    manifest["shards"][0]["file"] = f"../../../{secret.name}"
    body = {key: value for key, value in manifest.items() if key != "digest"}
    manifest["digest"] = files.json_digest(body)
    (features / "manifest.json").write_bytes(files.to_json(manifest))
    with pytest.raises(FeaturesDamaged, match="got no such file"):
        FeatureSet.open(features)


def test_damaged_explicit_folder_is_not_removed_unasked(pictures, tmp_path, fake_clip):
    out = tmp_path / "out"
    extract_features(pictures, out, model=fake_clip())
    (out / "text.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="remove the folder to build it again"):
        extract_features(pictures, out, model=fake_clip())
    assert (out / "shard-00000.safetensors").exists()


def test_a_view_takes_nothing_of_what_it_views_along(tmp_path):
    view = torch.randn(1000, 1000).T[:2, ::500]
    entry = shards.write_tensors(tmp_path / "view", {"view": view})
    assert entry["bytes"] == (tmp_path / "view").stat().st_size < 500
    assert torch.equal(load_file(tmp_path / "view")["view"], view)
    head = torch.nn.Linear(2, 2)
    head.weight = torch.nn.Parameter(view)
    Checkpoint(tmp_path / "state", {}).save(head, torch.optim.SGD(head.parameters()), 1, 0.0)
    assert (tmp_path / "state").stat().st_size < 10_000  # most of it torch's random state
    again = torch.nn.Linear(2, 2)
    assert Checkpoint(tmp_path / "state", {}).load(again, torch.optim.SGD(again.parameters()))
    assert torch.equal(again.weight, view)


@contextmanager
def small_files_only() -> Iterator[None]:
    """Files end at 1000 bytes; around the call only, because pytest may write to a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_names_path_and_bytes_and_keeps_the_old(features, cached, fake_clip):
    good = contents(features)
    message = r"cannot write \d+ bytes to .*: File too large"
    with small_files_only(), pytest.raises(OSError, match=message):
        cached(model=fake_clip(seed=1), spatial="raw")
    assert contents(features) == good
    other = next(path for path in features.parent.iterdir() if path != features)
    assert [path.name for path in other.iterdir() if path.name.endswith(".new")] == []
    _, report = cached(spatial="raw")
    assert report.reused


SERVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from fake_clip import FakeClip
from pictures import noise
import vtclip.data.extract as extract
import vtclip.data.shards as shards
from vtclip.data.featureset import FeatureSet
shards.SHARD_ROWS = 2
root = Path(sys.argv[2])
pictures = noise(root / "pictures", each=10)

def build(out):
    return extract.extract_features(pictures, out, model=FakeClip(), spatial="raw",
                                    progress=False)

whole, _ = build(root / "whole")

def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(0)
    return pid

good = files(root / "whole")
start = time.monotonic()
build(root / "timed")
length = time.monotonic() - start
draw, seen = random.Random(0), []
out = root / "killed"
for run in range(25):
    pid = child(lambda: build(out))
    time.sleep(draw.uniform(0, 0.6 * length))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    state = "nothing"
    if (out / "manifest.json").exists():
        found = FeatureSet.open(out)
        found.verify()
        state = "finished"
    elif (out / "partial.json").exists():
        state = f"{len(list(out.glob('shard-*.json')))} shards"
    seen.append(state)
    if state == "finished":
        out = root / f"killed{run}"
build(out)
same = files(out) == good

gate = root / "gate"
def race(number):
    def work():
        while not gate.exists():
            time.sleep(0.001)
        _, report = build(root / "raced")
        (root / f"raced{number}").write_text(str(report.reused))
    return work
pids = [child(race(number)) for number in range(4)]
gate.touch()
for pid in pids:
    os.waitpid(pid, 0)
reused = sorted((root / f"raced{number}").read_text() for number in range(4))
print(json.dumps({"seen": seen, "same": same, "reused": reused,
                  "raced": files(root / "raced") == good}))
"""


def test_kills_and_races_leave_good_features(tmp_path, root):
    """25 builds killed at random moments, then four processes at once, in one interpreter start."""
    helpers = root / "tests" / "helpers"
    run = python("-c", SERVER, helpers, tmp_path, cwd=root)
    assert (run.returncode, run.stderr) == (0, "")
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["seen"]) == 25
    assert any("shards" in state for state in result["seen"])
    assert result["same"]
    assert result["raced"]
    assert result["reused"] == ["False", "True", "True", "True"]
