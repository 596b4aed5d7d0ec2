# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by every test; Triton runs interpreted where there is no GPU."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from vtclip.backends import native
from vtclip.ops._select import Problem, select

if TYPE_CHECKING:
    from vtclip.data.records import Records

ROOT = Path(__file__).parents[1]
ONE_THREAD = (
    "bench",
    "cli",
    "clip",
    "data",
    "heads",
    "nn",
    "runs",
    "serve",
    "train",
)  # folders of tests on tiny tensors
SIGNALS = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
IMPLS = ("cpu", "triton", "cuda", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thin",
        type=int,
        default=1,
        metavar="N",
        help="of every test function run the first parameter set and about one in N of the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--thin: chosen by a checksum of the name, so that no dtype or layout is left out by its place
    in a list; the same tests every time. The others are counted as deselected."""
    step, functions = config.getoption("--thin"), set[str]()
    if step < 1:
        raise pytest.UsageError(f"--thin must be at least 1, got {step}")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        chosen = function not in functions or zlib.crc32(item.nodeid.encode()) % step == 0
        (kept if chosen else dropped).append(item)
        functions.add(function)
    if dropped:
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the user's records, tables or features, nor writes into them."""
    before = os.environ.get("VTCLIP_CACHE")
    os.environ["VTCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("VTCLIP_CACHE")
    if before is not None:
        os.environ["VTCLIP_CACHE"] = before


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves none behind."""
    python, state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python)
    torch.set_rng_state(state)


def _process_state() -> dict[str, Any]:
    """What tests of one process share and none may leave changed."""
    signals = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    return {
        **signals,
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True, scope="session")
def _signals_arrive() -> Iterator[None]:
    """A signal that a test sends arrives under nohup and in a job in the background too."""
    ignored = [
        signum
        for signum in (getattr(signal, name) for name in SIGNALS)
        if signal.getsignal(signum) == signal.SIG_IGN
    ]
    for signum in ignored:
        default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        signal.signal(signum, default)
    yield
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _leaves_no_state(_signals_arrive: None) -> Iterator[None]:
    """A test that ignores a signal or changes the folder for good fails itself, not a later one."""
    before = _process_state()
    yield
    after = _process_state()
    assert after == before, {name for name in before if after[name] != before[name]}


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """On tiny tensors several processes with spinning threads lose a thousandfold."""
    threads = torch.get_num_threads()
    if request.path.parent.name in ONE_THREAD:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real features and photos, kept outside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data set folder is not beside the checkout")
    return folder


def device_for(impl: str) -> str:
    """Where an implementation's tests run on this machine."""
    return "cpu" if impl == "cpu" or not torch.cuda.is_available() else "cuda"


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation; skipped, with the reason, where it cannot run or would prove nothing."""
    name: str = request.param
    if name in ("cuda", "reference") and not torch.cuda.is_available():
        pytest.skip(f"{name}: no CUDA device")
    return name


@pytest.fixture(params=["reference", "cpu"])
def exact_impl(request: pytest.FixtureRequest) -> str:
    """Each implementation with float64 on a CPU; cpu is skipped where it was not compiled."""
    name: str = request.param
    missing = native.load_cpu() if name == "cpu" else ""
    if missing:
        pytest.skip(missing)
    return name


@pytest.fixture
def device(impl: str) -> str:
    """The device `impl` runs on."""
    return device_for(impl)


@pytest.fixture
def runnable(impl: str, device: str) -> object:
    """A function that skips the test, with the selector's reasons, where `impl` cannot run."""

    def check(op: str, dtype: torch.dtype, width: int) -> None:
        try:
            select(Problem(op, device, dtype, width), impl)  # type: ignore[arg-type]
        except NotImplementedError as refused:
            pytest.skip(str(refused))

    return check


@pytest.fixture(scope="session")
def trees() -> ModuleType:
    """Small data sets in the layout of the real ones (tests/helpers/trees.py)."""
    import trees

    return trees


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of features on which VT-CLIP has something to learn."""
    import numpy as np  # late: operators are tested on machines without it
    from tables import animal_features

    path = tmp_path_factory.mktemp("source") / "animals.npz"
    np.savez(path, **animal_features())
    return path


@pytest.fixture(scope="session")
def records() -> Records:
    """The same table in memory, at a logit scale of 20."""
    from tables import ANIMALS, animal_features

    from vtclip.data.records import Records

    features = animal_features()
    image, label, text, spatial = (
        torch.from_numpy(features[name]) for name in ("image", "label", "text", "spatial")
    )
    return Records.from_tensors(image, label, text, ANIMALS, spatial=spatial, logit_scale=20.0)
