# SPDX-License-Identifier: Apache-2.0
"""The compiled extension; everything else is in pyproject.toml.

VTCLIP_EXT=auto (default): CPU kernels with a C++ compiler, CUDA kernels with a toolkit and a CUDA
build of torch. cpu, cuda: that, or an error. off: pure Python. `vtclip info` shows the decision.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "cpu", "cuda", "off")
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11, the oldest supported
DEFAULT_ARCHES = "7.5;8.0;9.0+PTX"  # 8.0 serves 8.6 and 8.9, PTX what is newer


def cuda_home() -> str:
    """The toolkit behind CUDA_HOME or nvcc; nvcc may be a link or a script outside its toolkit."""
    nvcc = shutil.which("nvcc")
    if os.environ.get("CUDA_HOME") or nvcc is None:
        return os.environ.get("CUDA_HOME", "")
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stdout + dry.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])


def why_no_cuda(home: str) -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not Path(home, "bin", "nvcc").is_file():
        return f"no CUDA toolkit found (no nvcc on PATH or in CUDA_HOME = {home!r})"
    done = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is not None and release[1] == torch.version.cuda.split(".")[0]:
        return ""
    return f"toolkit at {home} is CUDA {release and release[1]}, torch has {torch.version.cuda}"


def native_extensions(mode: str) -> tuple[list[Extension], dict[str, type]]:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        missing = f"C++ compiler {compiler!r} was not found"
        if mode != "auto":
            sys.exit(f"VTCLIP_EXT={mode} cannot be met: {missing}")
        print(f"vtclip: no extension: {missing}", file=sys.stderr)
        return [], {}
    home = cuda_home()
    os.environ.update({"CUDA_HOME": home} if home else {})
    import torch
    from torch.utils import cpp_extension

    refused = "VTCLIP_EXT=cpu" if mode == "cpu" else why_no_cuda(home)
    if refused and mode == "cuda":
        sys.exit(f"VTCLIP_EXT=cuda cannot be met: {refused}")
    arches = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHES)
    cuda = f"not built: {refused}" if refused else f"compiled by {home}/bin/nvcc for {arches}"
    info = {"mode": mode, "torch": torch.__version__, "cpu": f"by {compiler}", "cuda": cuda}
    print(f"vtclip: {info}", file=sys.stderr)
    entries = ", ".join(f'{{"{k}", "{v}"}}' for k, v in info.items())
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "build_info.h").write_text(f"#define VTCLIP_BUILD_INFO {entries}\n")

    includes = cpp_extension.include_paths()  # pybind11's headers among them: torch brings a copy
    strict = ["-Werror"] * (os.environ.get("VTCLIP_WERROR") == "1")
    host = ["-O3", "-Wall", "-Wextra", *strict, *(f"-isystem{path}" for path in includes)]
    common = {
        "include_dirs": [str(ROOT / "build"), str(ROOT / "csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", TARGET_VERSION)],
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["torch", "torch_cpu", "c10"],
        "language": "c++",
    }
    files = ["csrc/module.cpp", *sorted(glob("csrc/cpu/**/*.cpp", root_dir=ROOT, recursive=True))]
    built = [Extension("vtclip._C", files, extra_compile_args={"cxx": host}, **common)]
    if not refused:
        common["libraries"] = [*common["libraries"], "torch_cuda", "c10_cuda"]
        common["library_dirs"] = cpp_extension.library_paths(device_type="cuda")
        common["define_macros"] = [*common["define_macros"], ("USE_CUDA", "1")]
        cuda_includes = cpp_extension.include_paths(device_type="cuda")
        args = {"cxx": host, "nvcc": ["-O3", *(f"-isystem={path}" for path in cuda_includes)]}
        files = sorted(glob("csrc/cuda/*.cu", root_dir=ROOT))
        built.append(Extension("vtclip._C_cuda", files, extra_compile_args=args, **common))

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:  # the folder is kept: reinstalls compile what changed
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "temp")

    return built, {"build_ext": Build}


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
