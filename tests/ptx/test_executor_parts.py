# SPDX-License-Identifier: Apache-2.0
"""The executor's parts: reading PTX, memory, opcodes one by one."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from executor import Memory, Module, PtxError, Unsupported, launch, tensor_map  # noqa: E402

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"
# out[i] of 8 bytes for thread i; in[i] likewise
BODY = """
.visible .entry k(.param .u64 k_in, .param .u64 k_out) .maxntid 64, 1, 1
{{
  .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<16>; .reg .b64 %rd<16>;
  .reg .f32 %f<16>; .reg .f64 %fd<16>;
  ld.param.u64 %rd1, [k_in];
  ld.param.u64 %rd2, [k_out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 8;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  {code}
  ret;
}}
"""


def compute(code, values):
    """Runs code with %rd4, %rd5 the addresses of a thread's input and output of 8 bytes."""
    kernel = Module(HEAD + BODY.format(code=code)).kernels["k"]
    x, y = np.zeros(32, "u8"), np.zeros(32, "u8")
    raw = np.asarray(values)
    x.view("u1").reshape(32, 8)[: len(raw), : raw.itemsize * (raw.size // len(raw))] = (
        np.ascontiguousarray(raw).view("u1").reshape(len(raw), -1)
    )
    memory = Memory()
    for a in (x, y):
        memory.add(a.ctypes.data, a.nbytes)
    packed = struct.pack("<QQ", x.ctypes.data, y.ctypes.data)
    report = launch(kernel, grid=(1, 1, 1), block=(32, 1, 1), parameters=packed, memory=memory)
    assert report.findings == []
    return y[: len(raw)]


I32 = np.array([0, 1, -1, 5, -7, 2**31 - 1, -(2**31), 0x12345678], "i4")
F32 = np.array([0.0, -0.0, 1.5, -2.5, 3.4e38, 1e-40, np.inf, np.nan], "f4")


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("add.s32 %r3, %r2, 7;", lambda x: x + 7),
        ("mul.hi.s32 %r3, %r2, 1000000007;", lambda x: x * 1000000007 >> 32),
        ("mul.hi.u32 %r3, %r2, 2000000011;", lambda x: (x % 2**32) * 2000000011 >> 32),
        ("div.s32 %r3, %r2, 3;", lambda x: int(x / 3)),
        ("rem.s32 %r3, %r2, 3;", lambda x: x - 3 * int(x / 3)),
        ("shr.s32 %r3, %r2, 33;", lambda x: -1 if x < 0 else 0),
        ("shr.u32 %r3, %r2, 4;", lambda x: x % 2**32 >> 4),
        ("shl.b32 %r3, %r2, 40;", lambda x: 0),
        ("clz.b32 %r3, %r2;", lambda x: 32 - (x % 2**32).bit_length()),
        ("popc.b32 %r3, %r2;", lambda x: (x % 2**32).bit_count()),
        ("bfe.u32 %r3, %r2, 4, 8;", lambda x: x % 2**32 >> 4 & 255),
        ("bfe.s32 %r3, %r2, 4, 4;", lambda x: ((x >> 4 & 15) ^ 8) - 8),
        ("bfi.b32 %r3, 5, %r2, 8, 4;", lambda x: x & ~0xF00 | 0x500),
        ("lop3.b32 %r3, %r2, 255, 3855, 0xE8;", lambda x: x & 255 | x & 3855 | 255 & 3855),
        (
            "prmt.b32 %r3, %r2, 0, 0x0123;",
            lambda x: int.from_bytes((x % 2**32).to_bytes(4, "big"), "little"),
        ),
        ("shf.l.wrap.b32 %r3, %r2, %r2, 8;", lambda x: x << 8 | (x % 2**32) >> 24),
        (
            "prmt.b32 %r3, %r2, 0, 0xBA98;",
            lambda x: sum(255 << 8 * k for k in range(4) if x >> 8 * k & 128),
        ),
        (
            "and.b32 %r4, %r2, 0x7777; prmt.b32 %r3, %r2, -1, %r4;",
            lambda x: sum(
                ((x % 2**32 | 0xFFFFFFFF << 32) >> 8 * (x >> 4 * k & 7) & 255) << 8 * k
                for k in range(4)
            ),
        ),
        ("mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};", lambda x: x << 16 | x >> 16 & 65535),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1;", lambda x: 1 if x < 0 else 2),
        (
            "mov.u32 %r3, 9; setp.gt.s32 %p1, %r2, 0; @!%p1 mov.u32 %r3, 8;",
            lambda x: 9 if x > 0 else 8,
        ),
        ("{ .reg .b32 %r2; mov.b32 %r2, 4; } mov.b32 %r3, %r2;", lambda x: x),
        ("cvt.s8.s32 %r3, %r2;", lambda x: ((x & 255) ^ 128) - 128),
        ("cvt.sat.u8.s32 %r3, %r2;", lambda x: min(max(x, 0), 255)),
        ("min.u32 %r3, %r2, 9;", lambda x: min(x % 2**32, 9)),
        ("bfind.u32 %r3, %r2;", lambda x: (x % 2**32).bit_length() - 1),
    ],
)
def test_integers(code, function):
    got = compute(f"ld.global.u32 %r2, [%rd4]; {code} st.global.u32 [%rd5], %r3;", I32)
    want = [function(int(x)) % 2**32 for x in I32]
    assert got.tolist() == want


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("fma.rn.f32 %f2, %f1, 0f40000000, 0f3F800000;", lambda x: (x.astype("f8") * 2 + 1)),
        ("max.f32 %f2, %f1, 0f00000000;", lambda x: np.fmax(x, 0)),
        ("max.NaN.f32 %f2, %f1, 0f00000000;", lambda x: np.maximum(x, 0)),
        ("add.sat.f32 %f2, %f1, 0f00000000;", lambda x: np.fmin(np.fmax(x, 0), 1)),
        ("rcp.approx.ftz.f32 %f2, %f1;", lambda x: 1 / x),
        ("cvt.rni.f32.f32 %f2, %f1;", np.rint),
        ("abs.f32 %f2, %f1;", np.abs),
        ("cvt.f64.f32 %fd1, %f1; cvt.rn.f32.f64 %f2, %fd1;", lambda x: x),
        ("cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f2, %h1;", lambda x: x.astype("f2")),
        ("cvt.rz.f16.f32 %h1, %f1; cvt.f32.f16 %f2, %h1;",
         lambda x: np.where(np.isfinite(x), np.clip(x.astype("f2"), -65504, 65504), x)),
        ("cvt.f64.f32 %fd1, %f1; mul.f64 %fd1, %fd1, 0d3FF0000000000001; cvt.rm.f32.f64 %f2, %fd1;",
         lambda x: np.where(x < 0, np.nextafter(x, np.float32(-np.inf)), x)),
        ("cvt.f64.f32 %fd1, %f1; mul.f64 %fd1, %fd1, 0d3FF0000000000001; cvt.rp.f32.f64 %f2, %fd1;",
         lambda x: np.where(x > 0, np.nextafter(x, np.float32(np.inf)), x)),
        ("setp.neu.f32 %p1, %f1, %f1; selp.f32 %f2, 0f3F800000, 0f00000000, %p1;", np.isnan),
        ("setp.ne.f32 %p1, %f1, %f1; selp.f32 %f2, 0f3F800000, 0f00000000, %p1;", np.zeros_like),
    ],
)  # fmt: skip
def test_floats(code, function):
    got = compute(f"ld.global.f32 %f1, [%rd4]; {code} st.global.f32 [%rd5], %f2;", F32)
    with np.errstate(all="ignore"):
        want = np.asarray(function(F32)).astype("f4")
    np.testing.assert_array_equal(got.astype("u4").view("f4"), want)


def test_conversions_to_integers_saturate():
    code = "ld.global.f32 %f1, [%rd4]; cvt.rzi.s32.f32 %r3, %f1; st.global.u32 [%rd5], %r3;"
    assert compute(code, F32).astype("u4").view("i4").tolist() == [
        *(0, 0, 1, -2, 2**31 - 1, 0, 2**31 - 1, 0)
    ]  # fmt: skip


def test_a_fused_product_of_doubles_is_rounded_once():
    a = 1 + 2.0**-30
    code = "ld.global.f64 %fd1, [%rd4]; mul.f64 %fd3, %fd1, %fd1; neg.f64 %fd4, %fd3;"
    code += "fma.rn.f64 %fd5, %fd1, %fd1, %fd4; st.global.f64 [%rd5], %fd5;"
    assert compute(code, np.array([a])).view("f8")[0] == 2.0**-60


def test_pairs_of_halves_add_up_in_memory():
    code = "ld.global.u32 %r2, [%rd4]; red.global.add.noftz.f16x2 [%rd5], %r2;"
    code += "atom.global.add.noftz.f16x2 %r3, [%rd5], %r2;"
    got = compute(code, np.array([[1.5, -3.0], [0.25, 8.0]], "f2"))
    assert got.astype("u4").view("f2").tolist() == [3.0, -6.0, 0.5, 16.0]


def test_pairs_pack_and_unpack():
    code = "ld.global.v2.f32 {%f1, %f2}, [%rd4]; cvt.rn.bf16x2.f32 %r3, %f2, %f1;"
    code += "st.global.u32 [%rd5], %r3;"
    got = compute(code, np.array([[1.0, -3.0]], "f4"))
    assert int(got[0]) == 0xC0403F80


def test_what_is_not_modelled_is_refused_before_it_runs():
    with pytest.raises(Unsupported, match="line 15: vadd.s32.s32.s32 is not modelled"):
        compute("vadd.s32.s32.s32 %r3, %r1, %r1;", [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add.s32", "line 1: wanted a .target"),
        (HEAD + ".entry k() { .wrong x; ret; }", "line 4: directive '.wrong x' not understood"),
        (HEAD + ".entry k() { ld.u32 %r1, [%r2 + + 3]; ret; }", "line 4: address"),
    ],
)
def test_errors_name_the_line(text, message):
    with pytest.raises(PtxError, match=message):
        _ = Module(text).kernels["k"].instructions


def test_the_executor_is_small_and_of_use_to_others():
    texts = {path.name: path.read_text() for path in (HERE / "executor").glob("*.py")}
    lines = {name: text.count("\n") for name, text in texts.items()}
    assert sum(lines.values()) <= 3000, lines
    texts["README.md"] = (HERE / "executor" / "README.md").read_text()
    assert [name for name, text in texts.items() if "vtclip" in text.lower()] == []


def test_parameters_have_offsets():
    text = ".entry k(.param .u8 a, .param .align 16 .b8 b[20], .param .u64 c) .reqntid 32 { ret; }"
    kernel = Module(HEAD + text).kernels["k"]
    places = [(p.name, p.offset, p.size, p.alignment) for p in kernel.parameters]
    assert places == [("a", 0, 1, 1), ("b", 16, 20, 16), ("c", 40, 8, 8)]
    assert (kernel.parameter_bytes, kernel.required_threads, kernel.instructions) == (48, (32,), 1)


def test_memory_keeps_what_was_written():
    memory = Memory()
    room = np.zeros(64, "u1")
    memory.add(room.ctypes.data, 40, "a", initialised=False)
    with pytest.raises(PtxError, match="overlap the buffer 'a' of 40 bytes"):
        memory.add(room.ctypes.data + 39, 2)
    memory.add(room.ctypes.data + 40, 2)
    assert not memory.is_initialised(room.ctypes.data, 1)
    memory.initialise(room.ctypes.data + 4, 4)
    assert memory.is_initialised(room.ctypes.data + 4, 4)
    assert not memory.is_initialised(room.ctypes.data + 4, 5)
    memory.remove(room.ctypes.data)
    with pytest.raises(PtxError, match="no buffer starts at"):
        memory.remove(room.ctypes.data)


def test_tensor_maps_refuse_what_the_driver_refuses():
    good = {"address": 4096, "dims": (64, 8), "strides": (128,), "box": (64, 8), "element": 2}
    tile = tensor_map.decode(tensor_map.encode(**good, swizzle=3))
    assert (tile.dims, tile.strides, tile.box, tile.swizzle) == ((64, 8), (128,), (64, 8), 3)
    for key, value, message in (
        ("address", 4100, "address"),
        ("strides", (100,), "strides"),
        ("box", (65, 8), "box: a row"),
        ("box", (264, 8), "box"),
        ("element", 3, "element"),
    ):
        with pytest.raises(PtxError, match=f"wanted {message}"):
            tensor_map.encode(**(good | {key: value}))


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("vote.sync.ballot.b32 %r3, %p1, -1;", lambda t: 0x11111111),
        ("vote.sync.any.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;", lambda t: 1),
        ("vote.sync.all.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;", lambda t: 0),
        ("match.any.sync.b32 %r3, %r2, -1;", lambda t: 0x11111111 << t % 4),
        ("redux.sync.add.s32 %r3, %r2, -1;", lambda t: 48),
        ("redux.sync.max.u32 %r3, %r2, -1;", lambda t: 3),
        ("elect.sync %r3|%p2, -1; @%p2 add.u32 %r3, %r3, 7;", lambda t: 7 if t == 0 else 0),
        ("activemask.b32 %r3;", lambda t: 2**32 - 1),
        ("shfl.sync.up.b32 %r3, %r1, 1, 0, -1;", lambda t: max(t - 1, 0)),
        ("shfl.sync.down.b32 %r3|%p2, %r1, 2, 31, -1;", lambda t: t + 2 if t < 30 else t),
        ("shfl.sync.idx.b32 %r3, %r1, 5, 0x181f, -1;", lambda t: t // 8 * 8 + 5),
        ("shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;", lambda t: t ^ 3),
    ],
)
def test_lanes_of_a_warp(code, function):
    """%r2 is the thread's number modulo 4, %p1 whether that is 0."""
    code = f"and.b32 %r2, %r1, 3; setp.eq.u32 %p1, %r2, 0; {code} st.global.u32 [%rd5], %r3;"
    assert compute(code, np.zeros(32, "u8")).tolist() == [function(t) for t in range(32)]
