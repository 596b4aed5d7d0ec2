# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel as its launcher would, for GPUs that are not here.

Launchers run on CPU tensors with `JITFunction.run` replaced: instead of a launch, the arguments
are specialised the way Triton does it and compiled for the target. One JSON line per kernel.

Usage: TRITON_INTERPRET=0 python _compile.py PACKAGE TARGET DTYPE PRECISION WIDTH...
A width of 0 stands for the tiles that `vtclip tune` would time next to the built-in ones, "-" for
the launches that standard input lists in JSON: [operator, sizes, variant].
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
from generated_code import counts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vtclip.testing.problems import OPS


def module(name):
    """A file of the package whose kernels are compiled."""
    return importlib.import_module(f"{sys.argv[1]}.{name}")


def kernel(name):
    """A launcher by the name of its operator."""
    return getattr(module(name.removesuffix("_fwd").removesuffix("_bwd")), name)


_candidates, _configs, _tiles = map(module, ("_candidates", "_configs", "_tiles"))

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
        shared, ptx = compiled.metadata.shared, compiled.asm.get("ptx")
        found = {}
        if ptx is not None:
            found = counts(
                compiled.asm["ttir"], ptx, f"sm_{target.arch}", options["num_warps"],
                registers, shared,
            )  # fmt: skip
        rows.append(
            {
                "kernel": self.__name__,
                "shared": shared,
                "registers": registers,
                "spilled": spilled,
                "narrow": narrow_offsets(compiled.asm["ttir"]),
                "dots": float32_dots(compiled.asm["ttir"]),
                "grid": grid,
                "options": options,
                "constants": {
                    name: value
                    for name, value in kwargs.items()
                    if isinstance(value, int | str) and name not in options
                },
                **found,
            }
        )

    return run


def empty(shape, dtype):
    """Memory nobody reads."""
    return torch.empty(shape, dtype=dtype)


ONE_IMAGE = {"B": 1, "K": 100, "L": 100}  # the shortest tiles, chosen by waves
FEW_IMAGES = {"B": 2}  # where matrix products outside the kernels are computed
# (sizes, variant) where tiles or code depend on them
PROBLEMS = {
    "cross_attn": [({}, "masked"), ({"L": 197}, "masked"), (ONE_IMAGE, "")],
    "cross_attn_weights": [({}, "masked"), ({"L": 197}, "masked"), (ONE_IMAGE, "")],
    "rational_attn": [
        # one tile, of the smallest to the largest; several
        *(({"K": classes}, "") for classes in (16, 32, 50, 1000)),
        (ONE_IMAGE, "no image query"),
    ],
    "cosine_logits": [({}, ""), ({"K": 20}, "text per image")],
    "ffn_cosine_logits": [(FEW_IMAGES, ""), (FEW_IMAGES, "features frozen")],
    "rational_head": [
        (FEW_IMAGES | {"K": classes}, penalty + features)
        for classes, penalty in (
            (50, "none"),
            (1000, "l1"),
            (50, "mse"),
            (1000, "mse"),
            (1000, "linf"),
        )
        for features in ("", ", features frozen")
    ],
}


def launches(dtype, width):
    """Every launcher, those without heads at width 128 only, on memory nobody reads."""
    D = 8 * width
    sizes = {"B": 32, "H": 8, "K": 1000, "L": 49, "d": width, "D": D, "C": D, "F": 64}
    for op in OPS.values():
        if width != 128 and "H" not in op.sizes:
            continue
        for changed, variant in PROBLEMS.get(op.name, [({}, "")]):
            inputs = op.draw(sizes | changed, variant=variant, dtype=dtype, make=empty)
            op.run(kernel, inputs, empty)
    if width != 128:
        return
    column_sums = kernel("column_sums")
    image, text = empty((32, D), dtype), empty((1000, D), dtype)
    column_sums(image, text, empty((640, 3 * D), dtype))
    # strides and sizes of 1, one of another type than its neighbours
    huge = torch.as_strided(image, (1, 1), (2**33, 2**32))
    column_sums(huge, text.T, image[:1].expand(7, -1))
    kernel("relu_gradient")(empty((640, 4 * D), dtype), empty((640, 4 * D), dtype))
    sum_norm(dtype, D)


def sum_norm(dtype, C):
    """LayerNorm of a sum, with and without its second result, and the backward."""
    product, start, vector = (empty(shape, dtype) for shape in ((32, 1000, C), (1000, C), (C,)))
    kernel("sum_norm_fwd")(product, start, vector, vector, None, 1e-5)
    *_, mean, rstd = kernel("sum_norm_fwd")(product, start, vector, vector, vector, 1e-5)
    kernel("sum_norm_bwd")(product, product, product, start, vector, mean, rstd)


def listed(dtype):
    """The launches that standard input lists."""
    for name, sizes, variant in json.load(sys.stdin):
        if name == "column_sums":
            B, K, D = (sizes[letter] for letter in "BKD")
            tensors = empty((B, D), dtype), empty((K, D), dtype), empty((B * K, 3 * D), dtype)
            kernel(name)(*tensors)
            continue
        op = OPS[name]
        inputs = op.draw(sizes, variant=variant, dtype=dtype, make=empty, heads_inside=True)
        op.run(kernel, inputs, empty)


def candidates(dtype, precision, target):
    """Launchers once for each neighbour of a built-in tile."""
    B, H, K, L, d, D = 32, 8, 1000, 49, 128, 1024
    letters = {"B": B, "H": H, "K": K, "L": L, "d": d, "D": D}
    for kind, name, variant in (
        ("fwd", "cross_attn_fwd", ""),
        ("bwd_key", "cross_attn_bwd", "lse unused"),
        ("weights", "cross_attn_weights_fwd", ""),
        ("head_fwd", "rational_head_fwd", "none"),
    ):
        op, sizes = OPS[name[: -len("_fwd")]], (B, H, K, L, d)
        if kind == "head_fwd":
            letters, sizes = letters | FEW_IMAGES, (2, K, D)
        inputs = op.draw(letters, variant=variant, dtype=dtype, make=empty)
        arguments = op.forward_arguments(inputs)
        if name.endswith("_bwd"):
            outputs = kernel(f"{op.name}_fwd")(*arguments)
            arguments = op.backward_arguments(inputs, outputs, empty)
        tile = _tiles.choose(kind, dtype, precision, sizes, target)
        near = _candidates.neighbours(kind, tile, dtype, sizes, target)
        assert len(near) >= 3, (kind, near)
        entry = _tiles.entry_name(kind, dtype, precision, sizes)
        for neighbour in near:
            table = {(target.name, target.capability): {entry: tuple(neighbour)}}
            with _tiles.choosing(_tiles.from_tables(table)):
                kernel(name)(*arguments)


def main(package, target_name, dtype_name, precision, *widths):
    gpu, target = TARGETS[target_name]
    _configs.target_of = lambda tensor: target
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    rows = []
    JITFunction.run = record(rows, gpu)
    dtype = getattr(torch, dtype_name)
    for width in widths:
        if width == "-":
            listed(dtype)
        elif int(width):
            launches(dtype, int(width))
        else:
            candidates(dtype, precision, target)
        for row in rows:
            sys.stdout.write(json.dumps({"width": width, **row}) + "\n")
        rows.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
