# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu compiled with sanitizers into a program of its own, without torch, Python or OpenMP.

`stub/` stands for torch's stable ABI: every tensor and buffer is a heap block of exactly its bytes,
filled with NaN, and every range runs on a thread of its own, so that ThreadSanitizer sees all that
orders two accesses. The files of csrc/cpu are the ones that are shipped, host code included, and
operators are called by the table in `vtclip/testing/problems.py`: a new one is in it already.

The portable kernels alone by default; --sanitized-all also compiles and runs those of AVX2 and
AVX-512, with and without its products of bfloat16 pairs, in more sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sanitized import SANITIZERS, Builder, Kernels

# instruction set -> what torch calls the processors that have it
WIDE = ("AVX512",)
PROCESSORS = {
    "scalar": ("DEFAULT", "NO AVX", "AVX2", *WIDE),
    "avx2": ("AVX2", *WIDE),
    "avx512": WIDE,
    "avx512_bf16": WIDE,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitized-all",
        action="store_true",
        help="tests/cpu_sanitized: every instruction set and all sizes, not the short list",
    )


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether the long lists run."""
    return bool(request.config.getoption("--sanitized-all", default=False))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`capability`: the portable kernels, or all instruction sets."""
    if "capability" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--sanitized-all", default=False)
        names = list(PROCESSORS) if everything else ["scalar"]
        metafunc.parametrize("capability", names, scope="session", indirect=True)


@pytest.fixture(scope="session")
def capability(request: pytest.FixtureRequest) -> str:
    """An instruction set that this processor has."""
    if torch.backends.cpu.get_cpu_capability() not in PROCESSORS[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    if request.param == "avx512_bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no products of bfloat16 pairs")
    return request.param


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory, everything: bool) -> Builder:
    return Builder(tmp_path_factory.mktemp("cpu_sanitized"), everything)


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Kernels]]:
    """A function that starts a program; all are ended with the tests."""
    started: list[Kernels] = []

    def run(path: Path, capability: str = "scalar") -> Kernels:
        started.append(Kernels(path, capability))
        return started[-1]

    yield run
    said = [kernels.end() for kernels in started if kernels.process.poll() is None]
    assert not any(said), "\n".join(said)  # memory that was never freed


@pytest.fixture(scope="session", params=SANITIZERS)
def sanitizer(request: pytest.FixtureRequest, builder: Builder) -> str:
    """Each sanitizer; skipped, with the reason, where the compiler or the machine lacks it."""
    if reason := builder.why_not(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def kernels(
    sanitizer: str, capability: str, builder: Builder, start: Callable[..., Kernels]
) -> Kernels:
    """The operators under a sanitizer, of one instruction set."""
    return start(builder.program(sanitizer), capability)
