# SPDX-License-Identifier: Apache-2.0
"""The list of jobs: complete, in order, keyed by all that decides a result, shared without loss."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vtclip.bench import jobs as module
from vtclip.bench.jobs import (
    BenchJob,
    JobShard,
    Settings,
    job_list,
    parse_shard,
    path_sources,
    set_sources,
    spatial_rows_only,
)
from vtclip.names import METHODS

SETTINGS = Settings()


def listed(path: Path, methods: list[str] | None = None, **changed: object) -> list[BenchJob]:
    settings = dataclasses.replace(SETTINGS, **changed)  # type: ignore[arg-type]
    return job_list(path_sources([path], settings), methods, [2, 1], [3, 1], settings)


def test_every_combination_once_and_draws_of_a_source_together(animals, insects):
    sources = path_sources([animals, insects], SETTINGS)
    jobs = job_list(sources, ["rada", "zeroshot"], [4, 1], [2, 1], SETTINGS)
    places = [job.place() for job in jobs]
    wanted = itertools.product(("animals", "insects"), (1, 4), (2, 1), ("rada", "zeroshot"))
    assert places == [(s, method, n, seed) for s, n, seed, method in wanted]
    assert len({job.key for job in jobs}) == len(jobs)
    assert len({job.name for job in jobs}) == len(jobs)


def test_the_list_is_the_same_every_time_and_wherever_the_file_lies(animals, tmp_path):
    copy = tmp_path / "animals.npz"
    copy.write_bytes(animals.read_bytes())
    keys = [job.key for job in listed(animals)]
    assert keys == [job.key for job in listed(animals)]
    assert keys == [job.key for job in listed(copy)]


def test_a_key_changes_with_all_that_decides_the_result(animals, tmp_path, monkeypatch):
    def key(path: Path = animals, **changed: object) -> str:
        return listed(path, ["rada"], **changed)[0].key

    seen = {key(), key(test_fraction=0.4), key(prompt="one"), key(model="other")}
    arrays = dict(np.load(animals))
    arrays["image"] = arrays["image"] * 2
    np.savez(tmp_path / "animals.npz", **arrays)
    seen.add(key(tmp_path / "animals.npz"))
    (tmp_path / "beasts.npz").write_bytes(animals.read_bytes())
    seen.add(key(tmp_path / "beasts.npz"))
    recipe = module.recipe_config("rada", 1, {"epochs": 3})
    monkeypatch.setattr(module, "recipe_config", lambda *_: recipe)
    seen.add(key())
    assert len(seen) == 7


def test_the_order_of_shots_and_seeds_does_not_change_keys(animals):
    source = path_sources([animals], SETTINGS)
    one = job_list(source, ["rada"], [1, 4], [1, 2], SETTINGS)
    two = job_list(source, ["zeroshot", "rada"], [4, 1], [2, 1], SETTINGS)
    assert {job.key for job in one} < {job.key for job in two}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
def test_shards_share_the_list_without_loss(insects, animals, count):
    jobs = job_list(path_sources([insects, animals], SETTINGS), None, [1, 2], [1, 2], SETTINGS)
    parts = [JobShard(index, count).of(jobs) for index in range(1, count + 1)]
    assert sorted(job.key for part in parts for job in part) == sorted(job.key for job in jobs)
    assert len({JobShard(index, count).file for index in range(1, count + 1)}) == count


def test_each_method_goes_to_every_shard(animals):
    """A slow method must not be the work of one process."""
    jobs = job_list(
        path_sources([animals], SETTINGS), ["rada", "zeroshot"], [1, 2], [1, 2], SETTINGS
    )
    for index in (1, 2):
        part = JobShard(index, 2).of(jobs)
        assert [sum(job.method == name for job in part) for name in ("rada", "zeroshot")] == [2, 2]


def test_default_methods_are_those_that_apply_and_named_ones_give_a_reason(animals):
    default = {job.method for job in listed(animals)}
    assert default == {job.method for job in listed(animals, list(METHODS)) if job.skip is None}
    assert "zeroshot" in default
    assert "vtclip" not in default
    (reason,) = {job.skip for job in listed(animals, ["vtclip", "zeroshot"]) if job.skip}
    assert reason == "vtclip needs spatial features, and animals has none"
    (reason,) = {job.skip for job in listed(animals, ["coop"])}
    assert reason == "coop needs the text encoder, and animals names no model"


def test_all_methods_of_a_source_count_the_same_rows(insects):
    alone, both = listed(insects, ["rada"]), listed(insects, ["rada", "vtclip"])
    assert {job.spatial for job in alone} == {None}
    assert {job.spatial for job in both} == {"default"}
    assert not spatial_rows_only(alone[0].source, alone)
    assert spatial_rows_only(both[0].source, both)
    assert {job.key for job in alone}.isdisjoint(job.key for job in both)


def test_a_test_set_gets_fixed_methods_only(tmp_path, trees: ModuleType):
    root = trees.make_set(tmp_path / "root", "imagenetv2")
    sources = set_sources(root, ["imagenetv2"], SETTINGS)
    jobs = job_list(sources, ["zeroshot", "rada"], [1, 2], [5, 6], SETTINGS)
    wanted = [("imagenetv2", name, 0, 5) for name in ("zeroshot", "rada")]
    assert [job.place() for job in jobs] == wanted
    assert jobs[0].skip is None
    assert jobs[1].skip == "rada needs training images, and imagenetv2 is a test set"


def test_sets_are_those_that_are_there_and_a_named_one_must_be(tmp_path, trees: ModuleType):
    root = trees.make_set(tmp_path / "root", "eurosat")
    trees.make_set(root, "dtd")
    assert {source.name for source in set_sources(root, None, SETTINGS)} == {"dtd", "eurosat"}
    with pytest.raises(ValueError, match=r"food101: the folder .* is missing"):
        set_sources(root, ["dtd", "food101"], SETTINGS)
    with pytest.raises(ValueError, match="must be a folder"):
        set_sources(tmp_path / "nothing", None, SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data set is complete"):
        set_sources(tmp_path / "empty", None, SETTINGS)
    with pytest.raises(ValueError, match="test_fraction must be left out"):
        set_sources(root, ["dtd"], Settings(test_fraction=0.25))


def test_a_set_is_named_by_its_lists(tmp_path, trees: ModuleType):
    root = trees.make_set(tmp_path / "root", "dtd")
    (before,) = set_sources(root, ["dtd"], SETTINGS)
    rows = trees.read_rows(root, "dtd")
    rows["train"].pop()
    trees.write_split(root, "dtd", rows)
    (after,) = set_sources(root, ["dtd"], SETTINGS)
    assert before.identity != after.identity


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shots": [0]}, "shots must be at least 1, got 0"),
        ({"shots": [2, 2]}, "shots must differ, got 2,2"),
        ({"seeds": [1, 1]}, "seeds must differ, got 1,1"),
        ({"seeds": [-1]}, "seed must be in"),
        ({"methods": ["rada", "rada"]}, "methods must differ"),
        ({"methods": ["rado"]}, "unknown method 'rado'; did you mean 'rada'"),
    ],
)
def test_bad_lists(animals, given, message):
    wanted = {"methods": ["rada"], "shots": [1], "seeds": [1], **given}
    with pytest.raises(ValueError, match=message):
        job_list(path_sources([animals], SETTINGS), settings=SETTINGS, **wanted)


def test_bad_sources(animals, tmp_path):
    other = tmp_path / "animals.npz"
    other.write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"animals\.npz: not a readable \.npz file"):
        path_sources([other], SETTINGS)
    other.write_bytes(animals.read_bytes())
    with pytest.raises(ValueError, match="source: the names of sources must differ, got .* and "):
        path_sources([animals, other], SETTINGS)
    with pytest.raises(ValueError, match="an .npz file takes no augment_passes, got 2"):
        path_sources([animals], Settings(augment_passes=2))


LAUNCHED = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("text", "environ", "wanted"),
    [
        (None, {}, JobShard(1, 1)),
        (None, LAUNCHED | {"RANK": "2", "WORLD_SIZE": "3"}, JobShard(3, 3)),
        ("2/4", {"RANK": "0", "WORLD_SIZE": "1"}, JobShard(2, 4)),
    ],
)
def test_shard_by_name_or_by_torchrun(monkeypatch, text, environ, wanted):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert parse_shard(text) == wanted


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/", "/2", "-1/2", "a/b", "1/0", "1/2/3", ""])
def test_bad_shards(monkeypatch, text):
    with pytest.raises(ValueError, match="shard must be i/n with i in 1..n"):
        parse_shard(text)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        parse_shard(None)
