# SPDX-License-Identifier: Apache-2.0
"""Tiny kernels, good and with one fault each: the executor tells which is which."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from executor import Memory, Module, launch, tensor_map  # noqa: E402

TARGETS = {"basic": "sm_80", "matrix": "sm_80", "hopper": "sm_90a"}
T = np.arange(128)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Every kernel of kernels/*.cu by name, compiled to PTX."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the executor's own kernels cannot be compiled")
    found = {}
    for name, target in TARGETS.items():
        path = tmp_path_factory.mktemp("ptx") / f"{name}.ptx"
        source = HERE / "kernels" / f"{name}.cu"
        subprocess.run(["nvcc", "-ptx", f"-arch={target}", source, "-o", path], check=True)
        found |= Module(path.read_text()).kernels
    return found


@pytest.fixture
def run(kernels):
    """Launches a kernel on arrays, given by pointers, and numbers behind them."""

    def run(name, *arguments, grid=1, threads=128, shared=0, unwritten=(), lanes=2048):
        memory, packed = Memory(), b""
        for k, x in enumerate(arguments):
            if isinstance(x, np.ndarray):
                memory.add(x.ctypes.data, x.nbytes, f"argument {k}", k not in unwritten)
                x = x.ctypes.data
                packed += b"\0" * (-len(packed) % 8) + struct.pack("<Q", x)
            else:
                packed += x if isinstance(x, bytes) else struct.pack("<i", x)
        sizes = {"grid": (grid, 1, 1), "block": (threads, 1, 1), "shared_bytes": shared}
        kernel = kernels[name]
        report = launch(kernel, parameters=packed, memory=memory, lanes=lanes, **sizes)
        report.kinds = sorted({f.kind for f in report.findings})
        return report

    return run


def floats(*shape, t="f4", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(t)


X = floats(2048)
# kernel, how it is launched on x and y, what y shall hold (None: nothing is asked), what is found
VECTORS = [
    ("tree", {}, lambda: [X[:128].sum()], []),
    ("tree_no_barrier", {}, lambda: [X[:128].sum()], ["race"]),
    ("barrier_in_branch", {}, lambda: X[:128], ["barrier"]),
    ("neighbour", {}, lambda: X[T ^ 1], []),
    ("neighbour_no_sync", {}, lambda: X[T ^ 1], ["race"]),
    ("shared_shifted", {"shared": 516}, lambda: X[:128], []),
    ("shared_shifted", {"shared": 512}, None, ["bounds"]),
    ("shared_unwritten", {}, None, ["uninitialised"]),
    ("misaligned", {}, None, ["alignment"]),
    ("shuffle_sum", {}, lambda: np.repeat(X[:128].reshape(4, 32).sum(1), 32), []),
    ("shuffle_in_branch", {}, None, ["member mask"]),
    ("twice_equal", {}, lambda: X[T // 2], []),
    ("twice_unequal", {}, lambda: X[T // 2], ["race"]),
    ("either_space", {}, lambda: np.where(T % 2, 2 * X[:128], X[:128]), []),
    ("odd_block", {"threads": 100}, lambda: X[99::-1], []),
    ("copy", {}, lambda: X[:512].reshape(128, 4)[::-1].ravel(), []),
    ("copy_no_wait", {}, None, ["uninitialised"]),
    ("copy_wait_one", {}, None, ["uninitialised"]),
    ("copy_no_barrier", {}, lambda: X[:512].reshape(128, 4)[::-1].ravel(), ["race"]),
    ("overwritten", {}, lambda: X[:128], []),
    ("overwritten_no_sync", {}, lambda: X[:128], ["race"]),
    ("paired", {}, lambda: np.r_[np.zeros(64), X[63::-1]], []),
    ("paired_again", {}, lambda: np.r_[np.zeros(64), X[63::-1]], []),
    ("paired_late", {}, lambda: np.r_[np.zeros(64), X[63::-1]], ["race"]),
    ("bulk", {}, lambda: X[:128] + X[128:256], []),
    ("bulk_no_wait", {}, lambda: X[:128] + X[128:256], ["race"]),
    ("bulk_too_few_bytes", {}, None, ["deadlock"]),
]


@pytest.mark.parametrize(("name", "how", "expected", "kinds"), VECTORS)
def test_vectors(run, name, how, expected, kinds):
    y = np.zeros(512, "f4")
    report = run(name, X, y, **how)
    assert report.kinds == kinds, report.findings
    if expected is not None:
        want = np.asarray(expected(), "f4")
        np.testing.assert_allclose(y[: want.size], want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("ring", []),
        ("ring_no_barrier", ["race"]),
        ("pipeline", []),
        ("pipeline_unordered", ["race"]),
    ],
)
def test_loops_over_tiles(run, name, kinds):
    y = np.zeros(128, "f4")
    report = run(name, X, y, 6)
    assert report.kinds == kinds, report.findings
    np.testing.assert_allclose(y, X[:768].reshape(6, 128).sum(0)[::-1], atol=1e-5)


def test_bounds_are_exact(run):
    x, y = floats(128), np.zeros(128, "f4")
    assert run("shifted", x, y, 127).kinds == []
    assert (y[:127] == x[1:]).all()
    report = run("shifted", x, y, 128)
    assert report.kinds == ["bounds"]
    assert report.findings[0].count == 1
    assert "thread 127" in report.findings[0].message
    assert "512 bytes into the buffer 'argument 0' of 512 bytes" in report.findings[0].message


def test_a_store_out_of_bounds_is_dropped(run):
    room = np.zeros(128, "f4")
    report = run("block_number", room[:100], grid=2)
    assert "bounds" in report.kinds
    assert (room[100:] == 0).all()
    assert (room[:100] == 1).all()


def test_unwritten_global_memory(run):
    y = np.zeros(128, "f4")
    assert run("neighbour", floats(128), y, unwritten=(0,)).kinds == ["uninitialised"]
    assert run("neighbour", floats(128), y, unwritten=(1,)).kinds == []


@pytest.mark.parametrize("lanes", [2048, 128])  # blocks at once, and one after another
@pytest.mark.parametrize(
    ("name", "kinds"),
    [("block_number", ["race"]), ("same_value", []), ("reads_other_block", ["race"])],
)
def test_blocks_are_not_ordered(run, name, kinds, lanes):
    assert run(name, np.zeros(512, "f4"), grid=2, lanes=lanes).kinds == kinds


def test_races_are_seen_across_a_long_log(run, monkeypatch):
    monkeypatch.setattr("executor.access.LONGEST_LOG", 1)
    for name, kinds in (
        ("block_number", ["race"]),
        ("same_value", []),
        ("reads_other_block", ["race"]),
    ):
        assert run(name, np.zeros(512, "f4"), grid=2, lanes=128).kinds == kinds


def test_global_memory_within_a_block(run):
    z = np.zeros(128, "f4")
    assert run("through_global", X, np.zeros(128, "f4"), z).kinds == []
    assert (z == X[127::-1]).all()
    assert run("through_global_no_barrier", X, np.zeros(128, "f4"), z).kinds == ["race"]


def test_atomics(run):
    x = np.random.default_rng(0).integers(0, 8, 128).astype("i4")
    counts, order = np.zeros(8, "i4"), np.zeros(128, "i4")
    assert run("histogram", x, counts, order).kinds == []
    assert (counts == np.bincount(x)).all()
    assert all(sorted(order[x == k]) == list(range(counts[k])) for k in range(8))
    assert run("histogram_no_atomic", x, counts).kinds == ["race"]


def test_votes_of_a_block(run):
    y = np.zeros(128, "i4")
    assert run("any_negative", X, y).kinds == []
    assert (y == 1 + 2 * (X[:128] < 0).sum()).all()


def test_local_and_constant_memory(run):
    y = np.zeros(128, "f4")
    assert run("local_array", X[:128].copy(), y, 3).kinds == []
    assert (y == X[(T + 1) % 128]).all()
    assert run("constants", y).kinds == []
    assert (y == T % 4 + 1).all()


@pytest.mark.parametrize("below", [False, True])
def test_constants_lie_anywhere(kernels, below):
    """Variables of a module are known above and below the buffers of a launch, and once."""
    module = Module(kernels["constants"].module.text)
    room = np.zeros(1024, "u1")
    room = room[-room.ctypes.data % 256 :]
    table, y = (room[:16], room[64:576]) if below else (room[512:528], room[:512])
    table.view("f4")[:] = T[:4] + 5
    module.data["table"] = table
    memory, packed = Memory(), struct.pack("<Q", y.ctypes.data)
    memory.add(y.ctypes.data, y.nbytes)
    for _ in range(2):
        sizes = {"grid": (1, 1, 1), "block": (128, 1, 1)}
        report = launch(module.kernels["constants"], parameters=packed, memory=memory, **sizes)
        assert not report.findings
    assert (y.view("f4") == T % 4 + 5).all()


def test_arithmetic(run):
    d, f = floats(128, t="f8"), floats(128)
    y, g, n = np.zeros(128), np.zeros(128, "f4"), np.zeros(128, "i4")
    assert run("arithmetic", d, f, y, g, n).kinds == []
    np.testing.assert_allclose(y, (d * d - 1) / (d + 3) + abs(d) + np.exp(d), rtol=1e-13)
    want = np.exp(f) + np.log(abs(f) + 1) + 1 / np.sqrt(f * f + 1) + np.tanh(f)
    np.testing.assert_allclose(g, want, rtol=2e-6)
    whole = np.fmod((f * np.float32(100)).astype("i4"), 7)
    for t in range(128):
        first = (t & -t).bit_length()
        turned = int(f"{t:032b}"[::-1], 2) % 5
        assert n[t] - whole[t] == t.bit_count() + 32 - (t + 1).bit_length() + first + turned


def test_pairs_of_halves(run):
    a, b, c = floats(256, t="f2"), floats(256, t="f2", seed=1), np.zeros(256, "f2")
    d = (floats(256).view("u4") >> 16).astype("u2")
    e = np.zeros(256, "u2")
    assert run("half_pairs", a, b, c, d, e).kinds == []
    assert (c == (a.astype("f8") * b + np.maximum(a, b)).astype("f2")).all()
    wide = (d.astype("u4") << 16).view("f4")
    np.testing.assert_allclose(
        (e.astype("u4") << 16).view("f4"), wide + wide * wide, rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize("name", ["product", "product_swapped", "product_untransposed"])
def test_a_product_of_a_warp(run, name):
    a, b, c = floats(16, 16, t="f2"), floats(16, 8, t="f2", seed=1), np.zeros((16, 8), "f4")
    report = run(name, a, b, c, threads=32)
    assert report.kinds == []
    assert report.matrix_products == 1
    assert np.allclose(c, a.astype("f4") @ b.astype("f4"), atol=1e-3) == (name == "product")


def test_a_product_in_tf32(run):
    a, b, c = floats(16, 8), floats(8, 8, seed=1), np.zeros((16, 8), "f4")
    assert run("product_tf32", a, b, c, threads=32).kinds == []
    np.testing.assert_allclose(c, a @ b, atol=4e-3)
    assert (c != a @ b).any()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("group", []),
        ("group_rs", []),
        ("group_no_fence", ["proxy"]),
        ("group_no_wait", ["proxy"]),
        ("group_overwritten", ["race"]),
    ],
)
def test_a_product_of_a_warpgroup(run, name, kinds):
    a, b, c = floats(64, 16, t="f2"), floats(8, 16, t="f2", seed=1), np.zeros((64, 8), "f4")
    report = run(name, a, b, c)
    assert report.kinds == kinds, report.findings
    np.testing.assert_allclose(c, a.astype("f4") @ b.astype("f4").T, atol=1e-3)


def test_copies_filled_with_zeros(run):
    x, y = floats(509), np.zeros(512, "f4")
    assert run("copy_filled", x, y, 509).kinds == []
    assert (y.reshape(128, 4) == np.r_[x, 0, 0, 0].astype("f4").reshape(128, 4)[::-1]).all()


@pytest.mark.parametrize(("name", "kinds"), [("tile", []), ("tile_no_fence", ["proxy"])])
@pytest.mark.parametrize("swizzle", [0, 3])
def test_tiles_by_tensor_maps(kernels, name, kinds, swizzle):
    source, target, raw = (
        floats(40, 200, t="f2"),
        np.zeros((12, 56), "f2"),
        np.zeros((16, 64), "f2"),
    )
    maps = b"".join(
        tensor_map.encode(x.ctypes.data, x.shape[::-1], x.strides[:1], (64, 16), 2, swizzle)
        for x in (source, target)
    )
    memory = Memory()
    for x in (source, target, raw):
        memory.add(x.ctypes.data, x.nbytes)
    packed = maps + struct.pack("<iiQ", 152, 30, raw.ctypes.data)
    sizes = {"grid": (1, 1, 1), "block": (128, 1, 1)}
    report = launch(kernels[name], parameters=packed, memory=memory, **sizes)
    assert sorted({f.kind for f in report.findings}) == kinds, report.findings
    tile = np.zeros((16, 64), "f2")  # what lies outside is zero
    tile[:10, :48] = source[30:, 152:]
    assert (target == tile[:12, :56] + np.float16(1)).all()
    pieces = raw.reshape(16, 8, 8)
    if swizzle:  # in row r the pieces of 16 bytes are exchanged by xor with r mod 8
        pieces = np.stack([pieces[r, np.arange(8) ^ r % 8] for r in range(16)])
    assert (pieces.reshape(16, 64) == tile).all()
