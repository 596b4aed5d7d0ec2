# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu_suite.sh: build, operator tests, compute-sanitizer, benchmarks, in this order.

Every step has a share of the time, is stopped when it is spent, and keeps what it has by then:
tests a JSON line each, benchmarks a CSV that grows. `summary.md` is written again after every step.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_summary
import sanitize_ops
import streamed

ROOT = Path(__file__).parents[1]
GRACE_S = 15.0  # between being asked to stop and being stopped
# step -> part of the whole time at whose end it is stopped; what is left goes to the next
ENDS = {
    "build": 0.25,
    "tests": 0.60,
    "sanitizer": 0.75,
    "benchmarks": 0.92,
    "benchmarks with compiled baselines": 1.0,
}
TESTS = ("tests/ops", "tests/gpu", "tests/kernels", "tests/backends", "tests/heads")
# of these nothing runs on a device
LEFT_OUT = (
    "tests/kernels/test_compile.py",
    "tests/kernels/test_guard_page.py",
    "tests/ops/test_cpu_kernels.py",
)
REHEARSED = ("tests/gpu/test_ops.py", "-k", "test_autocast and cosine_logits")
OPTIONAL = {
    "numpy": "tests of heads that read arrays",
    "ninja": "a parallel build",
    "pytest_benchmark": "its own table",
    "hypothesis": "no test here",
    "open_clip": "tests of prompts on a real text encoder",
    "safetensors": "tests of saved heads",
    "tqdm": "tests of heads in training",
    "PIL": "tests of heads on pictures",
}
RETRY = (streamed.DEVICE_LOST, *range(-64, 0), *range(128, 256))  # the device or the process died
NO_NUMPY = "ignore:Failed to initialize NumPy:UserWarning"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, then kill what is left."""
    for sign, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        break


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class Suite:
    def __init__(self, out: Path, minutes: float, rehearse: bool) -> None:
        import torch

        self.out, self.minutes, self.rehearse = out, minutes, rehearse
        self.start = time.monotonic()
        self.device = "cpu" if rehearse else "cuda"
        self.state: dict[str, object] = {"environment": {}, "steps": [], "minutes": minutes}
        self.state["not_reached"] = list(ENDS)
        self.torch = torch
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
        if shutil.which("nvcc") is None and (toolkit / "nvcc").is_file():
            os.environ["PATH"] = f"{toolkit}{os.pathsep}{os.environ.get('PATH', '')}"
        out.mkdir(parents=True, exist_ok=True)
        self.environ = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"))),
            "PYTHONUNBUFFERED": "1",
        }
        if rehearse:
            self.environ |= {"VTCLIP_GPU_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def left(self, step: str) -> float:
        """Seconds until `step` is stopped."""
        return self.start + 60 * self.minutes * ENDS[step] - time.monotonic()

    def begin(self, command: list[str], log: str, **extra: str) -> subprocess.Popen[bytes]:
        with (self.out / log).open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environ | extra,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, step: str, command: list[str], log: str, **extra: str) -> int | None:
        """Exit code, or None where the time was over."""
        process = self.begin(command, log, **extra)
        try:
            return process.wait(max(0.1, self.left(step)))
        except subprocess.TimeoutExpired:
            stop(process)
            return None
        except BaseException:
            stop(process)
            raise

    def pytest(self, *arguments: str) -> list[str]:
        plain = ["-q", "-p", "no:cacheprovider", "-W", NO_NUMPY, "--continue-on-collection-errors"]
        return [sys.executable, "-m", "pytest", *plain, *arguments]

    def environment(self) -> None:
        where = gpu_summary.where(self.torch, self.device, ROOT)
        missing = [f"{name} ({what})" for name, what in OPTIONAL.items() if not has(name)]
        if sanitize_ops.tool() is None:
            missing.append("compute-sanitizer (memory and race checks)")
        where["missing"] = "; ".join(missing) or "nothing"
        print(f"gpu_suite: missing here: {where['missing']}", flush=True)
        self.state["environment"] = where

    def build(self) -> str:
        if self.rehearse and list((ROOT / "vtclip").glob("_C.*so")):
            return "rehearsal: the extension is there"
        modes = ["cpu"] if self.rehearse else ["cuda", "cpu"]
        extra = {"MAX_JOBS": str(os.cpu_count() or 1)}
        if not self.rehearse:
            major, minor = self.torch.cuda.get_device_capability()
            extra["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        failed = []
        for mode in modes:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            code = self.run("build", command, f"build-{mode}.log", VTCLIP_EXT=mode, **extra)
            if code == 0:
                return "; ".join([f"built with VTCLIP_EXT={mode}", *failed])
            failed.append(f"VTCLIP_EXT={mode} failed: {self._why(f'build-{mode}.log', code)}")
        return "; ".join(["no extension, Triton and reference only", *failed])

    def _why(self, log: str, code: int | None) -> str:
        if code is None:
            return "the time was over"
        lines = [x.strip() for x in (self.out / log).read_text(errors="replace").splitlines()]
        told = (
            [x for x in lines if "cannot be met" in x or "rror:" in x] or lines[-1:] or ["no log"]
        )
        return f"exit code {code}: {told[0][:200]}"

    def tests(self) -> str:
        chosen = REHEARSED if self.rehearse else (*TESTS, *(f"--ignore={x}" for x in LEFT_OUT))
        cores = os.cpu_count() or 1
        parts = 1 if self.rehearse else max(1, min(6, cores // 2))
        restarts = 0
        note = []

        def launch(part: int) -> subprocess.Popen[bytes]:
            stream = ["--stream", str(self.log(part)), "--stream-part", f"{part}/{parts}"]
            command = self.pytest("-p", "streamed", *stream, *chosen)
            threads = str(max(1, cores // parts))
            return self.begin(command, f"tests-{part}.log", OMP_NUM_THREADS=threads)

        running = {part: launch(part) for part in range(parts)}
        try:
            while running and self.left("tests") > 0:
                time.sleep(0.2)
                for part, process in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[part]
                    if code in RETRY and restarts < 20:
                        restarts += 1
                        running[part] = launch(part)
                    elif code not in (0, 1, 5):
                        note.append(f"part {part} ended with exit code {code}")
        finally:
            for part, process in running.items():
                stop(process)
                streamed.mark_stopped(self.log(part))
        if restarts:
            note.append(f"{restarts} restarts after a crash or a lost device")
        if running:
            note.append("stopped by the time limit")
        if not self.rehearse:
            note.append(f"left out, as no device runs them: {', '.join(LEFT_OUT)}")
        return "; ".join(note) or "finished"

    def log(self, part: int) -> Path:
        return self.out / f"tests-{part}.jsonl"

    def sanitizer(self) -> str:
        results = []
        tool = sanitize_ops.tool()
        checks = sanitize_ops.CHECKS if tool and not self.rehearse else ("none",)
        for check in checks:
            for impl in ("triton",) if self.rehearse else ("triton", "cuda"):
                name = f"sanitizer-{check}-{impl}.log"
                command = [sys.executable, str(ROOT / "benchmarks" / "sanitize_ops.py")]
                command += ["--impl", impl, "--device", self.device]
                if self.rehearse:
                    command += ["--only", "cosine_logits"]
                uncached = "0" if check == "racecheck" else "1"
                code = self.run(
                    "sanitizer",
                    sanitize_ops.under(tool, check, command),
                    name,
                    PYTORCH_NO_CUDA_MEMORY_CACHING=uncached,
                )
                text = (self.out / name).read_text(errors="replace")
                results.append(sanitize_ops.parse(text, check, impl, code))
                self.state["sanitizer"] = results
                self.save()
                if code is None:
                    return "stopped by the time limit"
        return "finished" if tool else "compute-sanitizer was not found: the calls ran without it"

    def benchmarks(self, step: str = "benchmarks") -> str:
        compiled = step != "benchmarks"
        if self.rehearse and compiled:
            return "rehearsal: left out"
        out = self.out / ("benchmarks-compiled" if compiled else "benchmarks")
        options = ["--bench-device", self.device, "--bench-out", str(out)]
        options += [] if compiled else ["--bench-no-compile"]
        options += ["--bench-budget", "0" if self.rehearse else "2"]
        options += ["--bench-tiny", "-k", "cross_attn"] if self.rehearse else []
        options += ["--benchmark-only"] if has("pytest_benchmark") else []
        stream = ["-p", "streamed", "--stream", str(self.out / f"{out.name}.jsonl")]
        code = self.run(step, self.pytest("benchmarks", *stream, *options), f"{out.name}.log")
        if code is None:
            streamed.mark_stopped(self.out / f"{out.name}.jsonl")
            return "stopped by the time limit"
        return "finished" if code == 0 else f"exit code {code}"

    def save(self) -> None:
        gpu_summary.write(self.out, self.state)

    def go(self) -> None:
        self.environment()
        self.save()
        actions = {
            "build": self.build,
            "tests": self.tests,
            "sanitizer": self.sanitizer,
            "benchmarks": self.benchmarks,
        }
        for step in ENDS:
            if self.left(step) < 1.0:
                continue
            began = time.monotonic()
            print(f"gpu_suite: {step}, at most {self.left(step):.0f} s", flush=True)
            try:
                note = actions.get(step, lambda step=step: self.benchmarks(step))()
            except OSError as error:
                note = f"could not run: {error}"
            seconds = round(time.monotonic() - began, 1)
            self.state["steps"].append({"step": step, "seconds": seconds, "note": note})
            self.state["not_reached"].remove(step)
            self.save()
        print(f"gpu_suite: {self.out / 'summary.md'}", flush=True)


def refuse(reason: str) -> None:
    print(f"gpu_suite: {reason}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("minutes", nargs="?", type=float, default=30.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on CPU")
    args = parser.parse_args()
    if not args.minutes > 0:
        refuse(f"MINUTES must be above 0, got {args.minutes:g}")
    for module in ("torch", "pytest"):
        if not has(module):
            refuse(f"needs {module}, {sys.executable} has none")
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        refuse(f"needs a CUDA device, torch {torch.__version__} sees none; --rehearse runs on CPU")
    if args.out.exists() and not args.out.is_dir():
        refuse(f"OUT_DIR must be a folder, {args.out} is a file")
    if args.out.is_dir() and any(args.out.iterdir()):
        refuse(f"OUT_DIR must be empty, {args.out} is not")
    if shutil.which("git") is None:
        print("gpu_suite: no git: the commit is not known", flush=True)
    Suite(args.out.resolve(), args.minutes, args.rehearse).go()


if __name__ == "__main__":
    main()
