# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu_suite.sh, on a machine that has torch and pytest and not vtclip.

Build, self-test, operator tests on the device, benchmarks; with --sanitizer compute-sanitizer
instead. Every step has a share of the time, is stopped when it is spent, and keeps what it has by
then. OUT_DIR holds at most six files, written again after every step and every 20 s of one, so that
a run that is killed keeps them: `gpu_summary.PACKED` names them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

BEGAN = time.monotonic()  # before torch is imported: all limits count from here
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # python -I adds neither

GRACE_S = 5.0  # between being asked to stop and being stopped
RESERVE = 15.0  # seconds behind the last step, to stop it and to pack what it left
TICK_S = 20.0  # between two packings
# step -> share of the time; what a step leaves over goes to the next
SHARES = {
    "build": 0.28,
    "selftest": 0.12,
    "tests": 0.26,
    "benchmarks": 0.24,
    "kernel counts": 0.04,
    "benchmarks with compiled baselines": 0.06,
}
SANITIZER = {"build": 0.28, "sanitizer": 0.72}
# in this order: what only a device can show, then the same operators at other shapes, then heads
PHASES = (
    ("tests/gpu",),
    ("tests/ops", "tests/kernels", "-k", "triton or cuda"),
    ("tests/heads", "tests/backends"),
)
# of these nothing runs on a device
LEFT_OUT = (
    "tests/kernels/test_compile.py",
    "tests/kernels/test_guard_page.py",
    "tests/ops/test_any_layout.py",
    "tests/ops/test_cpu_circumstances.py",
    "tests/ops/test_cpu_kernels.py",
)
REHEARSED = (("tests/gpu/test_ops.py", "-k", "test_autocast and cosine_logits"),)
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
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
SETUPTOOLS = 77  # the first that reads pyproject.toml's license
RETRY = (9, *range(-64, 0), *range(128, 256))  # the device or the process died; 9: streamed.py
NO_NUMPY = "ignore:Failed to initialize NumPy:UserWarning"
# Triton 3.6's interpreter takes an int of an array of one element, which NumPy 1.25 warns of
OLD_INTERPRETER = "ignore:Conversion of an array with ndim:DeprecationWarning"
LOADS = "from vtclip.backends import native; print(native.load_{0}() or 'loaded')"


def start_of_clock() -> float:
    """On time.monotonic's scale, when the script began, of which gpu_suite.sh says the time."""
    try:
        ago = time.time() - float(os.environ.pop("GPU_SUITE_START", "nan"))
    except ValueError:
        return BEGAN
    return time.monotonic() - ago if 0.0 <= ago < 60.0 else BEGAN


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Interrupt processes and their children, all at once, then kill what is left."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                continue
        until = time.monotonic() + (GRACE_S if sign == signal.SIGINT else max(GRACE_S, 1.0))
        while time.monotonic() < until and any(process.poll() is None for process in running):
            time.sleep(0.05)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def why_no_build(version: str | None) -> str:
    """Why this setuptools cannot read the project, or the empty string."""
    if version is None:
        return f"setuptools is not installed (needs {SETUPTOOLS} or newer)"
    if int(version.split(".")[0]) < SETUPTOOLS:
        return f"setuptools {version} is older than {SETUPTOOLS}"
    return ""


def interpreter_note(triton: str | None, numpy: str | None) -> str:
    """What a rehearsal cannot run: Triton 3.6's interpreter with NumPy from 2.4 on."""

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if triton is None or numpy is None:
        missing = "Triton" if triton is None else "NumPy"
        return f"rehearsed kernels need Triton's interpreter, {missing} is not installed"
    if numbers(triton) < (3, 7) and numbers(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} does not run with NumPy {numpy}"
    return ""


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Suite:
    """The steps `shares`, within `minutes` of the start of the clock."""

    def __init__(
        self, out: Path, minutes: float, shares: dict[str, float], rehearse: bool, start: float
    ) -> None:
        import torch

        self.torch, self.rehearse, self.start = torch, rehearse, start
        self.out = out
        self.work = Path(tempfile.mkdtemp(prefix="vtclip-gpu-suite-"))
        self.seconds = 60 * minutes - min(RESERVE, 6 * minutes)
        self.shares = shares
        self.device = "cpu" if rehearse else "cuda"
        self.state: dict[str, Any] = {"environment": {}, "steps": [], "minutes": minutes}
        self.state["not_reached"] = list(shares)
        self.no_build = why_no_build(version_of("setuptools"))
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
        if shutil.which("nvcc") is None and (toolkit / "nvcc").is_file():
            os.environ["PATH"] = f"{toolkit}{os.pathsep}{os.environ.get('PATH', '')}"
        out.mkdir(parents=True, exist_ok=True)
        self.environ = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"))),
            "PYTHONUNBUFFERED": "1",
            "VTCLIP_CACHE": str(self.work / "cache"),  # no record of the user's decides here
        }
        if rehearse:
            self.environ |= {"VTCLIP_GPU_REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def left(self, step: str) -> float:
        """Seconds until `step` is stopped."""
        names = list(self.shares)
        parts = [self.shares[name] for name in names[: names.index(step) + 1]]
        end = self.seconds * sum(parts) / sum(self.shares.values())
        return self.start + end - time.monotonic()

    def begin(self, command: list[str], log: str, **extra: str) -> subprocess.Popen[bytes]:
        with (self.work / log).open("ab") as file:
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
            return self.wait(step, process)
        finally:
            stop(process)

    def wait(self, step: str, process: subprocess.Popen[bytes]) -> int | None:
        packed = time.monotonic()
        while self.left(step) > 0:
            try:
                return process.wait(min(0.5, max(0.05, self.left(step))))
            except subprocess.TimeoutExpired:
                packed = self.pack_at_times(packed)
        return None

    def pack_at_times(self, packed: float) -> float:
        """Packs what there is where the last packing is `TICK_S` ago; when that was."""
        if time.monotonic() - packed < TICK_S:
            return packed
        self.save()
        return time.monotonic()

    def pytest(self, *arguments: str) -> list[str]:
        plain = ["-q", "-p", "no:cacheprovider", "-W", NO_NUMPY, "--continue-on-collection-errors"]
        plain += ["-W", OLD_INTERPRETER] if self.rehearse else []
        return [sys.executable, "-m", "pytest", *plain, *arguments]

    def environment(self) -> None:
        import gpu_summary
        import sanitize_ops

        where = gpu_summary.where(self.torch, self.device, ROOT)
        missing = [f"{name} ({what})" for name, what in OPTIONAL.items() if not has(name)]
        if sanitize_ops.tool() is None:
            missing.append("compute-sanitizer (memory and race checks)")
        if self.no_build:
            missing.append(f"a build: {self.no_build}")
        note = interpreter_note(version_of("triton"), version_of("numpy")) if self.rehearse else ""
        missing += [note] if note else []
        where["setuptools"] = version_of("setuptools") or "none"
        where["missing"] = "; ".join(missing) or "nothing"
        print(f"gpu_suite: missing here: {where['missing']}", flush=True)
        self.state["environment"] = where

    def build(self) -> str:
        if self.rehearse and list((ROOT / "vtclip").glob("_C.*so")):
            return "rehearsal: the extension is there"
        if self.there():
            return "the libraries are there, newer than their sources, and load: not built again"
        if self.no_build:
            return f"no extension, Triton and reference only: {self.no_build}"
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

    def there(self) -> bool:
        """Whether a build that came with the checkout can be used."""
        libraries = [*(ROOT / "vtclip").glob("_C*.so")]
        kinds = ("cpu",) if self.rehearse else ("cuda", "cpu")
        if len(libraries) < len(kinds):
            return False
        sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        if max(sources) > min(path.stat().st_mtime for path in libraries):
            return False
        said = [
            subprocess.run(
                [sys.executable, "-c", LOADS.format(kind)],
                env=self.environ,
                capture_output=True,
                text=True,
            ).stdout.strip()
            for kind in kinds
        ]
        return said == ["loaded"] * len(kinds)

    def _why(self, log: str, code: int | None) -> str:
        if code is None:
            return "the time was over"
        lines = [x.strip() for x in (self.work / log).read_text(errors="replace").splitlines()]
        told = (
            [x for x in lines if "cannot be met" in x or "rror:" in x] or lines[-1:] or ["no log"]
        )
        return f"exit code {code}: {told[0][:200]}"

    def selftest(self) -> str:
        """Every operator, implementation and dtype once; the record is not for the other steps."""
        command = [sys.executable, "-m", "vtclip", "selftest", "--device", self.device]
        command += ["--impl", "reference"] if self.rehearse else []
        command += ["--json", str(self.work / "selftest.json")]
        code = self.run("selftest", command, "selftest.log", VTCLIP_CACHE=str(self.work / "record"))
        notes = {None: "stopped by the time limit", 0: "all right", 1: "something is wrong"}
        return notes.get(code, f"exit code {code}")

    def tests(self) -> str:
        import streamed

        phases = REHEARSED if self.rehearse else PHASES
        cores = os.cpu_count() or 1
        parts = 1 if self.rehearse else max(1, min(6, cores // 2))
        restarts, packed = 0, time.monotonic()
        note = []
        reached = dict.fromkeys(range(parts), 0)

        def launch(part: int) -> subprocess.Popen[bytes]:
            stream = ["--stream", str(self.log(part)), "--stream-part", f"{part}/{parts}"]
            chosen = (*phases[reached[part]], *(f"--ignore={path}" for path in LEFT_OUT))
            command = self.pytest("-p", "streamed", *stream, *chosen)
            threads = str(max(1, cores // parts))
            return self.begin(command, f"tests-{part}.log", OMP_NUM_THREADS=threads)

        running = {part: launch(part) for part in range(parts)}
        try:
            while running and self.left("tests") > 0:
                time.sleep(0.2)
                packed = self.pack_at_times(packed)
                for part, process in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[part]
                    if code in RETRY and restarts < 20:
                        restarts += 1
                        running[part] = launch(part)
                        continue
                    if code not in (0, 1, 5):
                        place = " ".join(phases[reached[part]])
                        note.append(f"part {part} of {place} ended with exit code {code}")
                    reached[part] += 1
                    if reached[part] < len(phases):
                        running[part] = launch(part)
        finally:
            stop(*running.values())
            for part in running:
                streamed.mark_stopped(self.log(part))
        if restarts:
            note.append(f"{restarts} restarts after a crash or a lost device")
        if running:
            least = min(reached[part] for part in running)
            note.append(f"stopped by the time limit in {' '.join(phases[least])}")
        if not self.rehearse:
            note.append(f"left out, as no device runs them: {', '.join(LEFT_OUT)}")
        return "; ".join(note) or "finished"

    def log(self, part: int) -> Path:
        return self.work / f"tests-{part}.jsonl"

    def sanitizer(self) -> str:
        import sanitize_ops

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
                text = (self.work / name).read_text(errors="replace")
                results.append(sanitize_ops.parse(text, check, impl, code))
                self.state["sanitizer"] = results
                self.save()
                if code is None:
                    return "stopped by the time limit"
        return "finished" if tool else "compute-sanitizer was not found: the calls ran without it"

    def benchmarks(self, step: str = "benchmarks") -> str:
        import streamed

        if self.rehearse and step != "benchmarks":
            return "rehearsal: left out"
        out = self.work / step.replace(" with ", "-").replace(" ", "-").removesuffix("-baselines")
        options = ["--bench-device", self.device, "--bench-out", str(out)]
        options += [] if "compiled" in step else ["--bench-no-compile"]
        options += ["--bench-budget", "0" if self.rehearse else "1"]
        options += ["--bench-tiny", "-k", "cross_attn"] if self.rehearse else []
        if step == "kernel counts":  # apart from the times, which a profiler in the process changes
            options += ["--bench-count", "-k", "RAda and K50"]
        elif has("pytest_benchmark"):
            options += ["--benchmark-only"]
        stream = ["-p", "streamed", "--stream", str(self.work / f"{out.name}.jsonl")]
        code = self.run(step, self.pytest("benchmarks", *stream, *options), f"{out.name}.log")
        if code is None:
            streamed.mark_stopped(self.work / f"{out.name}.jsonl")
            return "stopped by the time limit"
        return "finished" if code == 0 else f"exit code {code}"

    def save(self) -> None:
        import gpu_summary

        gpu_summary.write(self.work, self.out, self.state)

    def action(self, step: str) -> Callable[[], str]:
        named = {"build": self.build, "selftest": self.selftest, "tests": self.tests}
        named["sanitizer"] = self.sanitizer
        return named.get(step) or (lambda: self.benchmarks(step))

    def go(self) -> None:
        """All steps; whatever ends them, what they have left is packed."""
        try:
            self.environment()
            self.save()
            for step in self.shares:
                if self.left(step) < 1.0:
                    continue
                self.state["not_reached"].remove(step)
                self.step(step)
                self.save()
        except Ended as ended:
            self.state["ended"] = str(ended)
            raise
        finally:
            with ignored(SIGNALS):
                self.save()
                shutil.rmtree(self.work, ignore_errors=True)
                print(f"gpu_suite: {self.out / 'summary.md'}", flush=True)

    def step(self, step: str) -> None:
        began = time.monotonic()
        entry: dict[str, Any] = {"step": step, "seconds": 0.0, "note": "was ended in it"}
        self.state["steps"].append(entry)
        print(f"gpu_suite: {step}, at most {self.left(step):.0f} s", flush=True)
        try:
            entry["note"] = self.action(step)()
        except OSError as error:
            entry["note"] = f"could not run: {error}"
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)


@contextlib.contextmanager
def ignored(signums: Sequence[int]) -> Iterator[None]:
    """What is written within is written whole; the handlers of before stand again after it."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Ended(SystemExit):
    """A signal asked for the end; what there is by then is packed."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.signum).name}"


def end(signum: int, _frame: FrameType | None) -> None:
    raise Ended(signum)


def refuse(reason: str) -> None:
    print(f"gpu_suite: {reason}", file=sys.stderr)
    sys.exit(2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("minutes", nargs="?", type=float, default=9.0, metavar="MINUTES")
    parser.add_argument("--sanitizer", action="store_true", help="compute-sanitizer alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on CPU")
    args = parser.parse_args()
    if not args.minutes > 0:
        refuse(f"MINUTES must be above 0, got {args.minutes:g}")
    return args


def main() -> None:
    start = start_of_clock()
    for signum in SIGNALS:
        signal.signal(signum, end)
    args = arguments()
    for module in ("torch", "pytest"):
        if not has(module):
            refuse(f"needs {module}, {sys.executable} has none")
    if args.out.exists() and not args.out.is_dir():
        refuse(f"OUT_DIR must be a folder, {args.out} is a file")
    if args.out.is_dir() and any(args.out.iterdir()):
        refuse(f"OUT_DIR must be empty, {args.out} is not")
    no_build = why_no_build(version_of("setuptools"))
    if no_build:
        print(f"gpu_suite: the CUDA library cannot be built: {no_build}", flush=True)
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        refuse(f"needs a CUDA device, torch {torch.__version__} sees none; --rehearse runs on CPU")
    if shutil.which("git") is None:
        print("gpu_suite: no git: the commit is not known", flush=True)
    shares = SANITIZER if args.sanitizer else SHARES
    Suite(args.out.resolve(), args.minutes, dict(shares), args.rehearse, start).go()


if __name__ == "__main__":
    main()
