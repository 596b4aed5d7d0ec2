# SPDX-License-Identifier: Apache-2.0
"""Matrix operands and tensor maps in every form, as small kernels in handwritten PTX."""

from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from executor import Memory, Module, launch, tensor_map  # noqa: E402

HEAD = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k({parameters}) {{
  .reg .pred %p<4>; .reg .b32 %r<40>; .reg .b64 %rd<16>; .reg .f32 %f<40>; .reg .f64 %fd<8>;
  .shared .align 1024 .b8 s[16384];
  .shared .align 8 .b64 bar;
  mov.u32 %r1, %tid.x;
"""
SPAN = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a swizzled row; 0: not swizzled
MODE = {0: 0, 1: 3, 2: 2, 3: 1}  # of matrix descriptors


def execute(code, parameters, threads, *arguments, known=()):
    """Runs code with parameters p0, p1, ...: arrays by pointer, numbers of 64 bits, bytes.

    Arrays in `known` are memory, too.
    """
    names = [f".param {kind} p{k}" for k, kind in enumerate(parameters)]
    names = ", ".join(f"{name}[128]" if ".b8" in name else name for name in names)
    kernel = Module(HEAD.format(parameters=names) + code + "  ret;\n}\n").kernels["k"]
    memory, packed = Memory(), b""
    for x in (*arguments, *known):
        if isinstance(x, np.ndarray):
            whole = x if x.base is None else x.base
            memory.add(whole.ctypes.data, whole.nbytes)
    for x in arguments:
        words = x if isinstance(x, (bytes, int)) else x.ctypes.data
        packed += words if isinstance(words, bytes) else struct.pack("<Q", words)
    sizes = {"grid": (1, 1, 1), "block": (threads, 1, 1)}
    report = launch(kernel, parameters=packed, memory=memory, **sizes)
    assert report.findings == []
    return report


def floats(*shape, t, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(t)


def test_a_product_of_doubles():
    """Lane 4 r + c holds A [8, 4] at (r, c), B at (c, r), and two neighbours of C [8, 8]."""
    a, b, c = floats(8, 4, t="f8"), floats(4, 8, t="f8", seed=1), np.zeros((8, 8))
    code = """
  ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u64 %rd3, [p2];
  mad.wide.u32 %rd1, %r1, 8, %rd1; mad.wide.u32 %rd2, %r1, 8, %rd2;
  mad.wide.u32 %rd3, %r1, 16, %rd3;
  ld.global.f64 %fd1, [%rd1]; ld.global.f64 %fd2, [%rd2]; mov.f64 %fd3, 0d3FF0000000000000;
  mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd4, %fd5}, {%fd1}, {%fd2}, {%fd3, %fd3};
  st.global.v2.f64 [%rd3], {%fd4, %fd5};
"""
    report = execute(code, [".u64"] * 3, 32, a, np.ascontiguousarray(b.T), c)
    assert report.matrix_products == 1
    np.testing.assert_allclose(c, a @ b + 1, rtol=1e-14)


def image(lines, swizzle):
    """Halves [L, E] as they lie in shared memory; bytes from 8 lines, and from a span, to the next.

    8 lines of `span` bytes make a block; in line l the pieces of 16 bytes are exchanged by xor
    with l mod 8, halved where the span is: 8 / 4 / 2 / 1 values at 128 / 64 / 32 / 16 bytes.
    """
    count, length = lines.shape
    span = SPAN[swizzle]
    down, along = 8 * span, count * span
    raw = np.full(count * max(span, 2 * length) // 2, np.nan, "f2")
    for i, e in itertools.product(range(count), range(length)):
        piece = e % (span // 2) // 8 ^ i % 8 * span // 128
        at = i // 8 * down + e // (span // 2) * along + i % 8 * span + piece * 16 + e % 8 * 2
        raw[at // 2] = lines[i, e]
    return raw, down, along


def operand(x, swizzle, transposed):
    """[rows, k] of halves: shared memory and descriptor, K-major or (transposed) MN-major."""
    raw, down, along = image(x.T if transposed else x, swizzle)
    leading, stride = (down, along) if transposed and not swizzle else (along, down)
    return raw, leading >> 4 << 16 | stride >> 4 << 32 | MODE[swizzle] << 62


@pytest.mark.parametrize("into", ["f32", "f16"])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_operands_of_wgmma(swizzle, transposed, into):
    """D [64, 64] = 1 + A [64, 16] B [64, 16]^T, both from shared memory at 0 and 8192."""
    a, b = floats(64, 16, t="f2"), floats(64, 16, t="f2", seed=1)
    shared, descriptors = np.zeros(8192, "f2"), []
    for x, trans, start in ((a, transposed[0], 0), (b, transposed[1], 4096)):
        raw, descriptor = operand(x, swizzle, trans)
        shared[start : start + raw.size] = raw
        descriptors.append(descriptor + (start >> 3))
    registers, one = ("f", "0f3F800000") if into == "f32" else ("r", "0x3C003C00")
    results = [f"%{registers}{8 + k}" for k in range(32 if into == "f32" else 16)]
    code = "ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u64 %rd3, [p2];"
    code += "ld.param.u64 %rd4, [p3]; mad.wide.u32 %rd3, %r1, 16, %rd3; mov.u32 %r2, s;"
    code += f"mad.wide.u32 %rd4, %r1, {4 * len(results)}, %rd4; shr.u32 %r3, %r2, 4;"
    code += "cvt.u64.u32 %rd5, %r3; add.s64 %rd1, %rd1, %rd5; add.s64 %rd2, %rd2, %rd5;"
    code += "mad.lo.u32 %r2, %r1, 16, %r2;"
    for k in range(0, 16384, 2048):
        code += f"ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd3+{k}];"
        code += f"st.shared.v4.u32 [%r2+{k}], {{%r4, %r5, %r6, %r7}};"
    code += "".join(f"mov.b32 {r}, {one};" for r in results)
    code += "fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned; setp.eq.u32 %p1, 0, 0;"
    code += f"wgmma.mma_async.sync.aligned.m64n64k16.{into}.f16.f16 {{{', '.join(results)}}}, "
    code += f"%rd1, %rd2, %p1, 1, 1, {transposed[0]}, {transposed[1]};"
    code += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    code += "".join(f"st.global.b32 [%rd4+{4 * k}], {r};" for k, r in enumerate(results))
    raw = np.zeros((128, 32), "f4" if into == "f32" else "f2")
    execute(code, [".u64"] * 4, 128, *descriptors, shared, raw)
    # thread 32 w + 4 g + q: column block, row g or g + 8 of 16 w, columns 2 q, 2 q + 1
    blocks = raw.reshape(4, 8, 4, 8, 2, 2)
    got = blocks.transpose(0, 4, 1, 3, 2, 5).reshape(64, 64).astype("f4")
    want = a.astype("f4") @ b.astype("f4").T + 1
    np.testing.assert_allclose(got, want, atol=1e-4 if into == "f32" else 1e-2)


@pytest.mark.parametrize(
    ("shape", "box", "corner", "swizzle"),
    [
        ((100,), (32,), (80,), 0),
        ((30, 20), (16, 16), (-3, 7), 1),
        ((12, 9, 20), (4, 4, 16), (2, -1, 8), 2),
        ((7, 6, 5, 36), (2, 3, 2, 32), (6, 1, 2, -8), 3),
        ((3, 4, 5, 6, 8), (2, 2, 2, 2, 8), (1, 3, -1, 2, 0), 0),
        ((3, 4, 5, 6, 8), (2, 2, 2, 2, 8), (1, 3, -1, 2, 4), 1),
    ],
)
def test_tensor_maps_of_every_rank(shape, box, corner, swizzle):
    """A box (outermost dimension first) to shared memory, as it lies there, and to a tensor."""
    element = 2 if swizzle == 1 and len(shape) == 2 else 4
    x = floats(*shape[:-1], -(-shape[-1] // 8) * 8, t=f"f{element}")[..., : shape[-1]]
    count, rank = int(np.prod(box)), len(shape)
    raw, out = np.zeros(count, x.dtype), np.zeros(box, x.dtype)
    maps = [
        tensor_map.encode(
            y.ctypes.data, y.shape[::-1], y.strides[-2::-1], box[::-1], element, swizzle
        )
        for y in (x, out)
    ]
    at = ", ".join(f"{c}" for c in corner[::-1])
    zeros = ", ".join("0" for _ in corner)
    code = f"""
  mov.b64 %rd1, p0; cvta.param.u64 %rd1, %rd1; mov.b64 %rd2, p1; cvta.param.u64 %rd2, %rd2;
  ld.param.u64 %rd3, [p2]; mov.u32 %r2, s; setp.ne.u32 %p1, %r1, 0;
  @%p1 bra waiting;
  mbarrier.init.shared.b64 [bar], 1; fence.proxy.async;
  mbarrier.arrive.expect_tx.shared.b64 _, [bar], {count * element};
  cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r2], [%rd1, {{{at}}}], [bar];
waiting:
  bar.sync 0;
again:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [bar], 0;
  @!%p2 bra again;
  @%p1 bra done;
  cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%rd2, {{{zeros}}}], [%r2];
  cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; mov.u32 %r3, 0;
copy:
  ld.shared.u32 %r4, [%r2]; st.global.u32 [%rd3], %r4;
  add.u32 %r2, %r2, 4; add.s64 %rd3, %rd3, 4; add.u32 %r3, %r3, 4;
  setp.lt.u32 %p3, %r3, {count * element};
  @%p3 bra copy;
done:
"""
    execute(code, [".align 64 .b8"] * 2 + [".u64"], 32, *maps, raw, known=(x, out))
    padded = np.pad(x, [(b, b) for b in box])
    want = padded[tuple(slice(c + b, c + 2 * b) for c, b in zip(corner, box, strict=True))]
    assert (want != 0).any()
    assert (out == want).all()
    pieces = want.reshape(-1, 16 // element)
    n = np.arange(len(pieces))
    turned = n ^ n // 8 % (SPAN[swizzle] // 16)  # in line i of 128 bytes, by i mod pieces of a row
    assert (raw.reshape(pieces.shape) == pieces[turned]).all()
