# SPDX-License-Identifier: Apache-2.0
"""The compiled extension; everything else is in pyproject.toml.

VTCLIP_EXT=auto (default): C++ CPU kernels where a compiler is found, CUDA kernels where a toolkit
and a CUDA build of torch are found. cpu, cuda: exactly that, or an error. off: pure Python.
The decision is printed and kept in the extension, where `vtclip info` reads it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "off")
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11, the oldest supported
DEFAULT_ARCHES = "7.5;8.0;8.6;9.0+PTX"


def cuda_home() -> str:
    """The toolkit behind CUDA_HOME or nvcc; nvcc may be a link or a script outside its toolkit."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else str(Path(nvcc).resolve().parents[1])


def why_no_cuda(home: str) -> str:
    import torch

    if not home:
        return "no CUDA toolkit found (CUDA_HOME is not set, nvcc is not on PATH)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    done = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"toolkit at {home} is CUDA {release and release[1]}, torch has {torch.version.cuda}"
    return ""


def native_extensions(mode: str) -> tuple[list[Extension], dict[str, type]]:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        if mode != "auto":
            sys.exit(f"VTCLIP_EXT={mode} needs a C++ compiler, {compiler!r} was not found")
        print(f"vtclip: no extension: C++ compiler {compiler!r} was not found", file=sys.stderr)
        return [], {}
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home
    import pybind11
    import torch
    from torch.utils import cpp_extension

    refused = "VTCLIP_EXT=cpu" if mode == "cpu" else why_no_cuda(home)
    if refused and mode == "cuda":
        sys.exit(f"VTCLIP_EXT=cuda cannot be met: {refused}")
    if not refused:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHES)
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    cuda = f"not built: {refused}" if refused else f"compiled by {home}/bin/nvcc for {arches}"
    info = {"mode": mode, "torch": torch.__version__, "cpu": f"by {compiler}", "cuda": cuda}
    print("vtclip: " + "; ".join(f"{k}: {v}" for k, v in info.items()), file=sys.stderr)
    generated = ROOT / "build" / "generated"
    generated.mkdir(parents=True, exist_ok=True)
    entries = ", ".join(f'{{"{k}", "{v}"}}' for k, v in info.items())
    (generated / "build_info.h").write_text(f"#define VTCLIP_BUILD_INFO {entries}\n")

    includes = [*cpp_extension.include_paths(), pybind11.get_include()]
    strict = ["-Werror"] if os.environ.get("VTCLIP_WERROR") == "1" else []
    host = ["-O3", "-Wall", "-Wextra", *strict, *(f"-isystem{path}" for path in includes)]
    common = {
        "include_dirs": [str(generated), str(ROOT / "csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", TARGET_VERSION)],
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["torch", "torch_cpu", "c10"],
        "language": "c++",
    }
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    sources = ["csrc/module.cpp", *sources]
    built = [Extension("vtclip._C", sources, extra_compile_args={"cxx": host}, **common)]
    if not refused:
        sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
        common["libraries"] = [*common["libraries"], "torch_cuda", "c10_cuda"]
        common["library_dirs"] = cpp_extension.library_paths(device_type="cuda")
        common["define_macros"] = [*common["define_macros"], ("USE_CUDA", "1")]
        cuda_includes = cpp_extension.include_paths(device_type="cuda")
        args = {"cxx": host, "nvcc": ["-O3", *(f"-isystem={path}" for path in cuda_includes)]}
        built.append(Extension("vtclip._C_cuda", sources, extra_compile_args=args, **common))

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "temp")  # editable installs rebuild what changed

    return built, {"build_ext": Build}


mode = os.environ.get("VTCLIP_EXT", "auto")
if mode not in MODES:
    sys.exit(f"VTCLIP_EXT must be one of {', '.join(MODES)}, got {mode!r}")
ext_modules, cmdclass = ([], {}) if mode == "off" else native_extensions(mode)
wanted = {f"{extension.name.removeprefix('vtclip.')}." for extension in ext_modules}
for built in (ROOT / "vtclip").glob("_C*.so"):  # an older build of a part not asked for now
    if not built.name.startswith(tuple(wanted) or ("-",)):
        built.unlink()
setup(
    packages=[*find_packages(include=["vtclip", "vtclip.*"]), "vtclip.kernels"],
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
