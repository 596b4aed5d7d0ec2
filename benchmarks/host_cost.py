# SPDX-License-Identifier: Apache-2.0
"""Host time of one call of every public op, in microseconds, on tensors of a few elements.

    python benchmarks/host_cost.py [--device cpu|cuda] [--calls 200] [--rounds 15]

What remains when there is next to nothing to compute: checks, selection, autograd, dispatch, the
launcher. Beside it torch's own calls of the same kind. Medians over rounds, all rows in turn.

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

B, H, K, L, d = 2, 2, 3, 4, 8
D = H * d
Call = Callable[[], object]


def cases(device: str) -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """Leaves of every op, and the op with its first output."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    query, key, pair, one = new(1, H, K, d), new(B, H, L, d), new(B, H, K, d), new(B, H, 1, d)
    image, text, rows = new(B, D), new(K, D), new(B, K, D)
    weight, bias = new(D, D), new(D)
    return {
        "cross_attn": ([query, key, key], ops.cross_attn),
        "cross_attn_lse": (
            [query, key, key],
            lambda *t, impl: ops.cross_attn_lse(*t, impl=impl)[0],
        ),
        "cross_attn_weights": ([query, key], ops.cross_attn_weights),
        "cosine_logits": ([image, text], ops.cosine_logits),
        "norm_cosine_logits": ([rows, bias, bias, text, image], ops.norm_cosine_logits),
        "rational_attn": ([one, query, pair, pair, pair], ops.rational_attn),
        "unit_products": ([image, text], lambda *t, impl: ops.unit_products(*t, impl=impl)[2]),
        "rational_logits": ([image, text, rows], ops.rational_logits),
        "rational_head": (
            [rows, weight, bias, image, text],
            lambda *t, impl: ops.rational_head(*t, impl=impl)[0],
        ),
    }


def baselines(device: str) -> dict[str, tuple[list[Tensor], Callable[..., Tensor]]]:
    """torch's calls that a user would compare with."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    pair = new(B, H, K, d)
    return {
        "F.scaled_dot_product_attention": ([pair] * 3, F.scaled_dot_product_attention),
        "F.linear": ([new(B, D), new(D, D), new(D)], F.linear),
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


def rows(device: str) -> dict[tuple[str, str], tuple[Call, Call]]:
    """(op, implementation) -> its calls; only implementations that run here."""
    found = {(name, "torch"): calls(*case) for name, case in baselines(device).items()}
    for name, (leaves, op) in cases(device).items():
        asked = "cross_attn" if name == "cross_attn_lse" else name
        for impl in ("reference", "cpu", "cuda", "triton"):
            stubbed = impl == "triton" and device == "cpu"
            try:
                if not stubbed:
                    select(Problem(asked, device, torch.float32, leaves[0].shape[-1]), impl)
            except NotImplementedError:
                continue
            label = "triton, launches stubbed" if stubbed else impl
            found[name, label] = calls(leaves, lambda *t, op=op, impl=impl: op(*t, impl=impl))
    return found


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
