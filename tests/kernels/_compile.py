# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel as its launcher would, for GPUs that are not here.

Launchers run on CPU tensors with `JITFunction.run` replaced: instead of a launch, the arguments
are specialised the way Triton does it and compiled for the target. One JSON line per kernel.

Usage: TRITON_INTERPRET=0 python _compile.py PACKAGE TARGET DTYPE PRECISION WIDTH...
A width of 0 stands for the tiles that `vtclip tune` would time beside the built-in ones.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

(
    _candidates,
    _configs,
    _tiles,
    cosine_logits,
    cross_attn,
    cross_attn_weights,
    ffn_cosine_logits,
    norm_cosine_logits,
    rational_attn,
    rational_head,
    rational_logits,
    column_sums,
    unit_products,
) = (
    importlib.import_module(f"{sys.argv[1]}.{name}")
    for name in (
        "_candidates",
        "_configs",
        "_tiles",
        "cosine_logits",
        "cross_attn",
        "cross_attn_weights",
        "ffn_cosine_logits",
        "norm_cosine_logits",
        "rational_attn",
        "rational_head",
        "rational_logits",
        "column_sums",
        "unit_products",
    )
)

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), _configs.Target("cuda", 80, 163 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), _configs.Target("cuda", 90, 227 * 1024)),
    "sm_100": (GPUTarget("cuda", 100, 32), _configs.Target("cuda", 100, 227 * 1024)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), _configs.Target("hip", 0, 64 * 1024)),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def source(fn, args, kwargs):
    """ASTSource of a launch: 1 becomes a constant and multiples of 16 are told, as at run time."""
    names = [p.name for p in fn.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(fn.params):
        value = values[param.name]
        aligned = False
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name] = "constexpr"
            constants[param.name] = 1
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not param.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attributes)


def spills(compiled, target):
    """(registers, spilled bytes; on AMD spilled registers) from the binary's own resource table."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        return int(registers.group(1)), int(spilled.group(1))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        text = output(tools / "cuobjdump", "-res-usage", cubin)
        registers, stack = (
            int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK")
        )
        if stack == 0:
            return registers, 0
        # the stack may hold other things; the assembler tells
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        newer = tools / "ptxas-blackwell"
        ptxas = newer if target.arch >= 90 and newer.exists() else tools / "ptxas"
        text = output(ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={arch}", ptx, "-o", cubin)
    return registers, int(re.search(r"(\d+) bytes spill stores", text).group(1))


def output(*command):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return result.stdout + result.stderr


def narrow_offsets(ttir):
    """Pointer offsets that were not computed in 64 bits, as lines of TTIR."""
    defined = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, flags=re.M))
    bad = []
    for line in re.findall(r"^.*tt\.addptr.*$", ttir, flags=re.M):
        types = line.split(" : ", 1)[1].split(" loc(")[0]
        if not re.search(r"i64>?$", types.strip()):
            bad.append(line.strip())
    for name, body in defined.items():
        # a 32-bit product that is widened afterwards has wrapped already
        widened = re.match(r"arith\.extsi (%[\w#]+)", body)
        product = defined.get(widened.group(1), "") if widened else ""
        if product.startswith("arith.muli") and not re.search(r"%pid|program_id", product):
            bad.append(f"{name} = {body} of {product}")
    return bad


def float32_dots(ttir):
    """How dots of float32 operands are computed: "ieee" where nothing is said."""
    found = set()
    for line in re.findall(r"^.*= tt\.dot .*$", ttir, flags=re.M):
        if re.search(r": tensor<\w+xf32> \*", line):
            said = re.search(r"inputPrecision = (\w+)", line)
            found.add(said.group(1) if said else "ieee")
    return sorted(found)


def record(rows, target):
    seen = set()

    def run(self, *args, grid, warmup=False, **kwargs):
        options = {
            k: kwargs[k] for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs
        }
        launch = source(self, args, kwargs)
        key = f"{self.__name__} {launch.signature} {launch.constants} {launch.attrs} {options}"
        if key in seen:
            return
        seen.add(key)
        compiled = triton.compile(launch, target=target, options=options)
        registers, spilled = spills(compiled, target)
        rows.append(
            {
                "kernel": self.__name__,
                "shared": compiled.metadata.shared,
                "registers": registers,
                "spilled": spilled,
                "narrow": narrow_offsets(compiled.asm["ttir"]),
                "dots": float32_dots(compiled.asm["ttir"]),
                "grid": grid,
                "options": options,
            }
        )

    return run


def launches(dtype, width, B=32, H=8, K=1000):
    """Every launcher once (attention at one and at several key tiles), on memory nobody reads."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    for L in (49, 197):
        query, key, value = new(1, H, K, width), new(B, H, L, width), new(B, H, L, width)
        key_mask = torch.ones(B, L, dtype=torch.bool)
        out, lse = cross_attn.cross_attn_fwd(query, key, value, key_mask, 0.1)
        cross_attn.cross_attn_bwd(out, lse, query, key, value, key_mask, out, lse, 0.1)
        weights = cross_attn_weights.cross_attn_weights_fwd(query, key, key_mask, 0.1)
    cross_attn_weights.cross_attn_weights_bwd(weights, weights, query, key, 0.1)
    pairs = new(B, H, K, width)
    for classes in (16, 32, 50, K):  # one tile, of the smallest to the largest; several
        image, texts, *pair_like = new(B, H, 1, width), query, pairs, pairs, pairs
        tensors = (image, *(tensor[:, :, :classes] for tensor in (texts, *pair_like)))
        out, *kept = rational_attn.rational_attn_fwd(*tensors, 0.1, True)
        rational_attn.rational_attn_bwd(out, *tensors, *kept, 0.1)
    # one image: the shortest tiles, chosen by waves
    few, key, value, pair = (tensor[:1, :, :100] for tensor in (query, key, value, pairs))
    out, lse = cross_attn.cross_attn_fwd(few, key, value, None, 0.1)
    cross_attn.cross_attn_bwd(out, lse, few, key, value, None, out, lse, 0.1)
    cross_attn_weights.cross_attn_weights_fwd(few, key, None, 0.1)
    tensors = (None, few, pair, pair, pair)
    out, *kept = rational_attn.rational_attn_fwd(*tensors, 0.1, True)
    rational_attn.rational_attn_bwd(out, *tensors, *kept, 0.1)
    if width != 128:
        return
    C = H * width
    image, text, g = new(B, C), new(K, C), new(B, K)
    _, *rnorms = cosine_logits.cosine_logits_fwd(image, text, 1.0)
    cosine_logits.cosine_logits_bwd(g, image, text, *rnorms, 1.0)
    texts = new(B, 20, C)
    _, *rnorms = cosine_logits.cosine_logits_fwd(image, texts, 1.0)
    cosine_logits.cosine_logits_bwd(g[:, :20], image, texts, *rnorms, 1.0)
    tensors = (new(B, K, C), new(C), new(C), text, image)
    stats = norm_cosine_logits.norm_cosine_logits_fwd(*tensors, 1.0, 1.0, 1e-5)
    norm_cosine_logits.norm_cosine_logits_bwd(g, *tensors, *stats, 1.0, 1.0, 1e-5)
    few = slice(0, 2)  # its matrix products outside the kernels are computed
    layer = (new(2, K, 64), new(C, 64), new(C), tensors[0][few], *tensors[1:4], image[few])
    _, *kept = ffn_cosine_logits.ffn_cosine_logits_fwd(*layer, 1.0, 1.0, 1e-5)
    for features in (False, True):
        ffn_cosine_logits.ffn_cosine_logits_bwd(g[few], *layer, *kept, 1.0, 1.0, features)
    mask = new(B, K, C)
    rational_logits.rational_logits_fwd(image, text, mask, 1.0)
    rational_logits.rational_logits_bwd(g, image, text, mask, 1.0)
    unit_products.unit_products_fwd(image, text, 1.0)
    unit_products.unit_products_bwd(image, text, mask, image, text, 1.0)
    column_sums.column_sums(image, text, new(B * 20, 3 * C))
    # strides and sizes of 1, one of another type than its neighbours
    huge = torch.as_strided(image, (1, 1), (2**33, 2**32))
    column_sums.column_sums(huge, text.T, image[:1].expand(7, -1))
    for classes, penalty in ((50, 0), (K, 1), (50, 2), (K, 2), (K, 3)):
        few = slice(0, 2)  # its matrix products outside the kernels are computed
        tensors = (mask[few, :classes], new(C, C), new(C), image[few], text[:classes])
        _, size, peak = rational_head.rational_head_fwd(*tensors, 1.0, penalty)
        for features in (False, True):
            rational_head.rational_head_bwd(
                g[few, :classes], size, *tensors, peak, 1.0, penalty, features
            )


def candidates(dtype, precision, target, B=32, H=8, K=1000, L=49, d=128):
    """Launchers once for each neighbour of a built-in tile."""

    def new(*shape):
        return torch.empty(shape, dtype=dtype)

    query, key, value = new(1, H, K, d), new(B, H, L, d), new(B, H, L, d)
    out, lse = new(B, H, K, d), torch.empty(B, H, K)
    context = (new(2, K, H * d), new(H * d, H * d), new(H * d), new(2, H * d), new(K, H * d))
    calls = {
        "fwd": lambda: cross_attn.cross_attn_fwd(query, key, value, None, 0.1),
        "bwd_key": lambda: cross_attn.cross_attn_bwd(
            out, None, query, key, value, None, out, lse, 0.1
        ),
        "weights": lambda: cross_attn_weights.cross_attn_weights_fwd(query, key, None, 0.1),
        "head_fwd": lambda: rational_head.rational_head_fwd(*context, 1.0, 0),
    }
    for kind, call in calls.items():
        sizes = (2, K, H * d) if kind == "head_fwd" else (B, H, K, L, d)
        tile = _tiles.choose(kind, dtype, precision, sizes, target)
        near = _candidates.neighbours(kind, tile, dtype, sizes, target)
        assert len(near) >= 3, (kind, near)
        name = _tiles.entry_name(kind, dtype, precision, sizes)
        for one in near:
            table = {(target.name, target.capability): {name: tuple(one)}}
            with _tiles.choosing(_tiles.from_tables(table)):
                call()


def main(package, target_name, dtype_name, precision, *widths):
    gpu, target = TARGETS[target_name]
    _configs.target_of = lambda tensor: target
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    rows = []
    JITFunction.run = record(rows, gpu)
    for width in widths:
        if int(width):
            launches(getattr(torch, dtype_name), int(width))
        else:
            candidates(getattr(torch, dtype_name), precision, target)
        for row in rows:
            sys.stdout.write(json.dumps({"width": int(width), **row}) + "\n")
        rows.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
