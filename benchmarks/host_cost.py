# SPDX-License-Identifier: Apache-2.0
"""Host time of one call of every public op, in microseconds, on tensors of a few elements.

    python benchmarks/host_cost.py [--device cpu|cuda] [--calls 200] [--rounds 15]

What remains when there is next to nothing to compute: checks, selection, autograd, dispatch, the
launcher. Next to it torch's own calls of the same kind. Medians over rounds, all rows in turn.

On a GPU nothing is waited for, so that only the host is timed. Without one Triton's rows are timed
on CPU tensors with every kernel launch replaced by nothing: what Triton itself takes for a launch
is not in them, and they say so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is first imported

import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops
from vtclip.ops._select import Problem, select
from vtclip.testing.problems import FUNCTIONS

SIZES = {"B": 2, "H": 2, "K": 3, "L": 4, "d": 8, "D": 16, "C": 16, "F": 16}
Call = Callable[[], object]


def baselines(device: str) -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """torch's calls that a user would compare with."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    pair = new(2, 2, 3, 8)
    return {
        "F.scaled_dot_product_attention": ([pair] * 3, F.scaled_dot_product_attention),
        "F.linear": ([new(2, 16), new(16, 16), new(16)], F.linear),
    }


def calls(leaves: list[Tensor], op: Callable[..., Tensor]) -> tuple[Call, Call]:
    """Forward without gradients; forward and backward."""
    unique = list(dict.fromkeys(leaves))
    with torch.no_grad():
        grad = torch.ones_like(op(*leaves))
    still = [leaf.detach() for leaf in leaves]
    return lambda: op(*still), lambda: torch.autograd.grad(op(*leaves), unique, grad)


# plain functions: a mock would take longer than what it replaces


def _nothing(self: object, *args: object, **kwargs: object) -> None:
    return None


def _no_reasons(self: object, problem: object) -> tuple[str, ...]:
    return ()


def _same(target: object, tensor: Tensor) -> object:
    return target


@contextmanager
def no_launches() -> Iterator[None]:
    """Triton's ops take CPU tensors, and kernels are not launched."""
    from triton.runtime.jit import JITFunction

    from vtclip.backends.triton import _Triton
    from vtclip.kernels import _configs

    target = _configs.Target("cuda", 90, 227 * 1024)
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(JITFunction, "run", _nothing),
            mock.patch.object(_Triton, "why_not", _no_reasons),
            mock.patch.object(_configs, "target_of", partial(_same, target)),
        ):
            stack.enter_context(patch)
        yield


MAIN_OUTPUT = {"unit_products": 2}  # of all others the first depends on every input


def main_output(name: str, impl: str) -> Callable[..., Tensor]:
    """A public op of one implementation, with one of the tensors it returns."""
    op, index = getattr(ops, name), MAIN_OUTPUT.get(name, 0)

    def call(*leaves: Tensor) -> Tensor:
        results = op(*leaves, impl=impl)
        return results if isinstance(results, Tensor) else results[index]

    return call


def rows(device: str) -> dict[tuple[str, str], tuple[Call, Call]]:
    """(op, implementation) -> its calls; only implementations that run here."""
    table = {(name, "torch"): calls(*case) for name, case in baselines(device).items()}
    for name, function in FUNCTIONS.items():
        leaves = function.draw(SIZES, device=device)
        for impl in ("reference", "cpu", "cuda", "triton"):
            stubbed = impl == "triton" and device == "cpu"
            problem = Problem(function.op.name, device, torch.float32, leaves[0].shape[-1])
            try:
                if not stubbed:
                    select(problem, impl)
            except NotImplementedError:
                continue
            label = "triton, launches stubbed" if stubbed else impl
            table[name, label] = calls(leaves, main_output(name, impl))
    return table


def microseconds(call: Call, count: int, device: str) -> float:
    """Host time per call; on a GPU the queue is empty before and nothing is waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def measure(device: str, count: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Median microseconds: [forward, forward and backward] of every row."""
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(no_launches())
        table = rows(device)
        seen: dict[tuple[str, str], list[list[float]]] = {row: [[], []] for row in table}
        for turn in range(rounds + 1):
            for row, pair in table.items():
                for times, call in zip(seen[row], pair, strict=True):
                    taken = microseconds(call, count if turn else 20, device)
                    if turn:  # the first warms up
                        times.append(taken)
    return {row: [statistics.median(times) for times in pair] for row, pair in seen.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread"
    print(f"torch {torch.__version__}, {device}: microseconds of host time per call")
    print(f"{'':32}{'implementation':28}{'forward':>10}{'forward+backward':>20}")
    for (name, impl), (forward, both) in measure(args.device, args.calls, args.rounds).items():
        print(f"{name:32}{impl:28}{forward:10.1f}{both:20.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
