# SPDX-License-Identifier: Apache-2.0
"""Everything of `vtclip tune` but the GPU's clock: candidates, the walk, the command."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from commands import json_of, refused

from vtclip.cli import main
from vtclip.cli import tune as tune_command
from vtclip.testing.problems import OPS
from vtclip.tune import jobs as tune_jobs
from vtclip.tune import table as tuned
from vtclip.tune.search import MARGIN, fastest, tile_requests, tune, walk

pytest.importorskip("triton", reason="triton is not installed")
from vtclip.kernels import _candidates, _configs, _tiles

SM_90 = _configs.Target("cuda", 90, 227 * 1024)
ATTENTION = [(32, 8, 100, 49, 128), (128, 8, 1000, 196, 64), (2, 2, 9, 7, 5)]
ROWS = {"B": 32, "K": 500, "D": 512, "N": 32, "J": 500}  # sizes of the kernels without heads
WAYS = ("fwd", "bwd")
SMALL = {
    "vtclip": {"B": 2, "K": 20, "C": 32, "L": 9, "H": 2},
    "rada": {"B": 2, "K": 20, "D": 32, "H": 2},
}


@pytest.fixture(autouse=True)
def _built_in_tiles():
    yield
    _tiles.use_tuned({})


def one_job(name, sizes, launcher, dtype=torch.float32):
    return next(job for job in tune_jobs.jobs(name, sizes, dtype, "cpu") if job.name == launcher)


@pytest.mark.parametrize("kind", _tiles.KINDS)
def test_neighbours_differ_in_one_number_and_fit(kind):
    count, names = 0, _tiles.KINDS[kind].sizes
    problems = ATTENTION if "H" in names else [tuple(ROWS[name] for name in names)]
    for dtype, sizes in itertools.product((torch.bfloat16, torch.float32), problems):
        tile = _tiles.choose(kind, dtype, "tf32", sizes, SM_90)
        if tile[0] == 0:
            continue
        found = _candidates.neighbours(kind, tile, dtype, sizes, SM_90)
        count += len(found)
        assert len(set(found)) == len(found)
        for near in found:
            assert sum(a != b for a, b in zip(tile, near, strict=True)) == 1
            assert _candidates.valid(kind, list(near))
            assert near == _tiles.fitted(kind, near, sizes)
            assert _candidates.fits(kind, near, dtype, sizes, SM_90)
    assert count


def test_what_cannot_fit_is_no_candidate():
    huge = _tiles.Tile(256, 256, 8, 4)
    sizes = (32, 8, 1000, 576, 256)
    assert not _candidates.fits("fwd", huge, torch.bfloat16, sizes, SM_90)
    tile = _tiles.Tile(64, 64, 8, 2)
    assert _candidates.fits("fwd", tile, torch.bfloat16, sizes, SM_90)
    small = SM_90._replace(shared_bytes=32 * 1024)
    assert not _candidates.fits("fwd", tile, torch.bfloat16, sizes, small)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("fwd", [64, 64, 8]),
        ("fwd", [64, 64, 8, 2, 1]),
        ("fwd", [64, 48, 8, 2]),
        ("fwd", [64, 64, 3, 2]),
        ("fwd", [64, 64, 8, 0]),
        ("fwd", [64, 64, 8, 2.0]),
        ("fwd", [8, 64, 8, 2]),
        ("fwd", [True, 64, 8, 2]),
        ("fwd", "64 64 8 2"),
        ("backwards", [64, 64, 8, 2]),
        ("rational_logits", [5000]),
    ],
)
def test_numbers_that_are_no_tile(kind, numbers):
    assert not _candidates.valid(kind, numbers)


def test_a_call_is_watched():
    call = one_job("rada", SMALL["rada"], "rational_attn_bwd").draw()
    kinds = [asked.kind for asked in tile_requests(call)]
    assert kinds[0] == "rational_one_bwd"
    call = one_job("vtclip", SMALL["vtclip"], "cross_attn_bwd").draw()
    asked = tile_requests(call)
    assert [one.kind for one in asked] == ["bwd_query", "bwd_key"]
    assert asked[0].key == "bwd_query float32 ieee B2 H2 K20 L9 d16"


def test_the_walk_ends_at_the_median_fastest():
    """Times are 100 + |log2(block_k / 16)|, with one wild outlier among the rounds of each."""
    call = one_job("vtclip", SMALL["vtclip"], "cross_attn_fwd").draw()
    (asked,) = tile_requests(call)
    spoiled: dict[tuple[int, ...], int] = {}

    def timer(call):
        tile = _tiles.choose(*asked)
        spoiled[tile] = spoiled.get(tile, 0) + 1
        if spoiled[tile] % 3 == 2:
            return 1.0 if tile[0] == 32 else 1000.0
        return 100.0 + 20.0 * (tile[0] // 16) + (5.0 if tile[2] != 4 else 0.0)

    found = walk(call, asked, {}, timer)
    assert found.tile[0] == 16
    assert found.tile[2] == 4
    assert (found.before, found.after) == (140.0, 120.0)
    assert found.dropped == 0
    assert found.tried >= 3


def test_less_than_the_margin_changes_nothing():
    assert fastest({"a": 100.0, "b": 100.0 * (1 - MARGIN)}, "a") == "a"
    assert fastest({"a": 100.0, "b": 97.9}, "a") == "b"
    job = one_job("vtclip", SMALL["vtclip"], "cross_attn_fwd")
    found = tune([job], timer=lambda call: 100.0)
    assert found == {}


def test_wrong_results_and_broken_compilers_are_passed_over():
    """A faster tile that gives other numbers, and one that does not compile, are not taken."""
    from triton.runtime.errors import OutOfResources

    arguments = ("fwd", torch.float32, "ieee", (2, 2, 1000, 9, 16), SM_90)

    def call():
        tile = _tiles.choose(*arguments)
        if tile.num_stages > 1:
            raise OutOfResources(300000, 232448, "shared memory")
        return [torch.full((3,), 1.0 if tile.block_k >= 32 else 1.1)]

    (asked,) = tile_requests(call)
    found = walk(call, asked, {}, lambda call: float(_tiles.choose(*asked)[0]))
    assert found.tile[0] == 32
    assert found.dropped >= 2


def test_other_errors_are_not_hidden():
    arguments = ("fwd", torch.float32, "ieee", (2, 2, 1000, 9, 16), SM_90)

    def call():
        if _tiles.choose(*arguments).num_warps == 8:
            raise ZeroDivisionError
        return [torch.ones(3)]

    (asked,) = tile_requests(call)
    with pytest.raises(ZeroDivisionError):
        walk(call, asked, {}, lambda call: 1.0)


@pytest.mark.parametrize("method", SMALL)
def test_every_launcher_has_a_job_that_runs(method):
    names = []
    for job in tune_jobs.jobs(method, SMALL[method], torch.float32, "cpu"):
        results = job.draw()()
        assert all(result.isfinite().all() for result in results if result.is_floating_point())
        names.append(job.name)
    assert names == [f"{op}_{way}" for op in tune_jobs.OPERATORS[method] for way in WAYS]


def test_every_operator_is_timed_for_one_method():
    timed = [name for operators in tune_jobs.OPERATORS.values() for name in operators]
    assert sorted(timed) == sorted(OPS)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The command on CPU tensors in the interpreter, with a clock that likes few rows."""
    monkeypatch.setattr(tune_command, "cuda_device", lambda named: "cpu")
    monkeypatch.setattr("vtclip.backends.triton.gpu_identity", lambda: ("Pretended", 90))
    monkeypatch.setattr("vtclip.backends.triton.interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def clock(call):
        return float(sum(_tiles.choose(*asked)[0] for asked in tile_requests(call)))

    def with_clock(jobs, report):
        return tune(jobs, timer=clock, report=report)

    monkeypatch.setattr("vtclip.tune.search.tune", with_clock)
    monkeypatch.setattr("vtclip.tune.search.STEPS", 1)
    monkeypatch.setattr("vtclip.tune.search.ROUNDS", 1)


def test_the_command_writes_a_table(tmp_path, capsys, pretended_gpu):
    out = tmp_path / "mine.json"
    words = ["tune", "--shape", "rada:B=1,K=40,D=16,H=1", "--dtype", "float32", "--out", str(out)]
    printed = json_of(capsys, *words)
    assert printed["device"] == "Pretended"
    tables = tuned.for_these_versions(out)
    assert tables.keys() == {("Pretended", 90)}
    entries = tables["Pretended", 90]
    assert printed["tiles"].keys() == entries.keys()
    assert "rational_fwd float32 ieee B1 H1 K41 L40 d16" in entries
    assert all(_candidates.valid(key.split()[0], tile) for key, tile in entries.items())
    assert main(words) == 0  # again, into the same file
    assert "tiles faster" in capsys.readouterr().out
    assert tuned.for_these_versions(out) == tables


def test_a_foreign_file_is_not_replaced(tmp_path, capsys, pretended_gpu):
    out = tmp_path / "notes.json"
    out.write_text('{"format": "notes"}')
    words = ["tune", "--shape", "rada:B=2,K=40,D=32,H=2", "--out", out]
    assert "notes.json has no format" in refused(capsys, *words)
    assert out.read_text() == '{"format": "notes"}'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_so(capsys):
    line = "vtclip tune: needs a CUDA device to time on, torch finds none\n"
    assert refused(capsys, "tune") == line


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("B=2,K=3", "must begin with vtclip: or rada:"),
        ("clip:B=2", "must begin with vtclip: or rada:"),
        ("rada:B=2,K=3,D=32", "must give H"),
        ("rada:B=2,K=3,C=32,H=2", "must be rada:B=N,K=N,D=N,H=N"),
        ("rada:B=2,K=3,D=32,H=0", "must be rada:B=N,K=N,D=N,H=N"),
        ("rada:B=2,K=3,D=32,H=2,H=2", "must be rada:"),
        ("rada:B=2,K=3,D=32,H=5", "must have H that divides D, got D=32 and H=5"),
    ],
)
def test_bad_shapes(capsys, shape, message):
    assert message in refused(capsys, "tune", "--shape", shape)
