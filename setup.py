# SPDX-License-Identifier: Apache-2.0
"""The compiled extension; everything else is in pyproject.toml.

VTCLIP_EXT=auto (default): CPU kernels with a C++ compiler, CUDA kernels with a toolkit and a CUDA
build of torch. cpu, cuda: that, or an error. off: pure Python. `vtclip info` shows the decision.
"""

import os
import shutil
import sys
from copy import deepcopy
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_support"))
import toolchain  # noqa: E402

MODES = ("auto", "cpu", "cuda", "off")
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11, the oldest supported
# what takes longest is begun first; the rest in any order
LONGEST = ("cross_attn", "rational_attn", "ffn_cosine_logits", "norm_cosine_logits")


def decide(mode: str, compiler: str) -> toolchain.Architectures | None:
    """What the CUDA library is for, if there will be one; written down for `vtclip info`."""
    home = toolchain.cuda_home()
    os.environ.update({"CUDA_HOME": home} if home else {})
    import torch

    refused = "VTCLIP_EXT=cpu" if mode == "cpu" else toolchain.why_no_cuda(home)
    if refused and mode == "cuda":
        sys.exit(f"VTCLIP_EXT=cuda cannot be met: {refused}")
    cuda, arches = f"not built: {refused}", None
    if not refused:
        arches = toolchain.architectures(home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = arches.names
        cuda = f"compiled by {home}/bin/nvcc for {arches.names} ({arches.why})"
    info = {"mode": mode, "torch": torch.__version__, "cpu": f"by {compiler}", "cuda": cuda}
    info.update({"arches": arches.names} if arches else {})
    print(f"vtclip: {info}", file=sys.stderr)
    entries = ", ".join(f'{{"{k}", "{v}"}}' for k, v in info.items())
    header, text = ROOT / "build" / "build_info.h", f"#define VTCLIP_BUILD_INFO {entries}\n"
    header.parent.mkdir(exist_ok=True)
    if not header.is_file() or header.read_text() != text:  # what includes it is compiled again
        header.write_text(text)
    return arches


def native_extensions(mode: str) -> tuple[list[Extension], dict[str, type]]:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        missing = f"C++ compiler {compiler!r} was not found"
        if mode != "auto":
            sys.exit(f"VTCLIP_EXT={mode} cannot be met: {missing}")
        print(f"vtclip: no extension: {missing}", file=sys.stderr)
        return [], {}
    arches = decide(mode, compiler)
    device = "cuda" if arches else "cpu"
    from torch.utils import cpp_extension

    includes = cpp_extension.include_paths(device_type=device)  # pybind11's headers among them
    strict = ["-Werror"] * (os.environ.get("VTCLIP_WERROR") == "1")
    # Python's own flags ask for debug information, five times the code; a sanitizer's CFLAGS may
    keep = "-g" in os.environ.get("CFLAGS", "")
    host = ["-O3", *["-g0"] * (not keep), "-Wall", "-Wextra", *strict]
    flags = {
        "cxx": [*host, *(f"-isystem{path}" for path in includes)],
        # -O is the launchers' alone, ptxas always optimises
        "nvcc": ["-O1", "-Xfatbin=-compress-all", "-DUSE_CUDA=1"],
    }
    flags["nvcc"] += [*(f"-isystem={path}" for path in includes), *(arches.flags if arches else ())]

    def extension(name: str, sources: list[str], libraries: list[str]) -> Extension:
        return Extension(
            name,
            sources,
            extra_compile_args=deepcopy(flags),  # the same for all: they are compiled in one run
            extra_link_args=["-Wl,-s"] * (sys.platform == "linux" and not keep),
            include_dirs=[str(ROOT / "build"), str(ROOT / "csrc")],
            define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
            library_dirs=cpp_extension.library_paths(device_type=device),
            libraries=["torch", "torch_cpu", "c10", *libraries],
            language="c++",
        )

    files = ["csrc/module.cpp", *sorted(glob("csrc/cpu/**/*.cpp", root_dir=ROOT, recursive=True))]
    built = [extension("vtclip._C", files, [])]
    if device == "cuda":
        files = sorted(glob("csrc/cuda/**/*.cu", root_dir=ROOT, recursive=True))
        built.append(extension("vtclip._C_cuda", files, ["torch_cuda", "c10_cuda"]))
    from one_run import one_run

    build = one_run(cpp_extension.BuildExtension, ROOT / "build" / "temp", LONGEST)
    return built, {"build_ext": build}


class BuildPython(build_py):
    def get_package_dir(self, package: str) -> str:  # of a wheel; editable installs do not ask
        return "kernels" if package == "vtclip.kernels" else super().get_package_dir(package)


mode = os.environ.get("VTCLIP_EXT", "auto")
if mode not in MODES:
    sys.exit(f"VTCLIP_EXT must be one of {', '.join(MODES)}, got {mode!r}")
ext_modules, cmdclass = native_extensions(mode) if mode != "off" else ([], {})
wanted = tuple(extension.name.removeprefix("vtclip.") + "." for extension in ext_modules)
for library in (ROOT / "vtclip").glob("_C*.so"):
    if not library.name.startswith(wanted):  # an older build of a part not asked for now
        library.unlink()
setup(
    packages=[*find_packages(include=["vtclip", "vtclip.*"]), "vtclip.kernels"],
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPython, **cmdclass},
)
