# SPDX-License-Identifier: Apache-2.0
"""Test-time training batched over images against one image at a time.

    python benchmarks/ttt_speed.py [--images N] [--threads T] [--repeats R]

Rows of "step": the adaptation alone (6 kept views, one AdamW step, prediction) on features, for
RAda at its start, where one step moves `out` only, and for a trained one, where all moves. Rows of
"whole": `vtclip evaluate --ttt` on scenes of the demo, drawing 64 views and encoding them included.
Both ways are run in turn in one process; the medians of wall time and of processor time are
printed per image, and nothing is timed before the two agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from vtclip.clip import load_clip
from vtclip.data.views import image_views
from vtclip.demo.scenes import demo_set
from vtclip.heads import RAda
from vtclip.heads._each import StackedRAda
from vtclip.train import ttt

# name, classes, width: the demo, and a hundred classes at the width of ViT-B
SIZES = (("demo", 24, 128), ("ViT-B", 100, 512))
Way = Callable[[], Tensor]


def head_of(K: int, D: int, *, trained: bool) -> RAda:
    torch.manual_seed(1)
    head = RAda(torch.randn(K, D))
    if trained:
        torch.nn.init.normal_(head.get_parameter("out.weight"), std=0.1 / D**0.5)
    return head


def step_ways(head: RAda, N: int, config: ttt.TTT) -> tuple[Way, Way]:
    kept = torch.randn(N, config.kept, head.text.shape[1])
    first = torch.randn(N, head.text.shape[1])
    at_once = ttt.images_per_step(head, config)

    def single() -> Tensor:
        pairs = zip(kept, first, strict=True)
        return torch.stack([ttt.adapt_one(head, a, b, config=config) for a, b in pairs])

    def batched() -> Tensor:
        parts = []
        for a, b in zip(kept.split(at_once), first.split(at_once), strict=True):
            each = StackedRAda(head, len(a), first_step_only=config.steps == 1)
            parts.append(ttt.adapt_stack(each, a, b, config))
        return torch.cat(parts)

    return single, batched


def whole_ways(head: RAda, N: int, config: ttt.TTT) -> tuple[Way, Way]:
    clip = load_clip("demo")
    pixels = demo_set(-(-N // 24), seed=1)[0][:N]

    def run(head: torch.nn.Module, batch: int | None) -> Tensor:
        views = (
            image_views(clip, Image.fromarray(one), config.views, seed=0, name=str(row))
            for row, one in enumerate(pixels)
        )
        return ttt.adapt(head, views, clip.encode_image, config, batch=batch).adapted

    return lambda: run(Plain(head), 1), lambda: run(head, None)


class Plain(torch.nn.Module):
    """A head that `StackedRAda` does not know, so that it goes image by image."""

    method = "rada"

    def __init__(self, head: RAda) -> None:
        super().__init__()
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image)


def check(batched: Tensor, single: Tensor) -> None:
    error = float((batched - single).abs().amax() / single.abs().amax())
    if not error < 1e-3:  # signs of gradients at rounding may differ, one AdamW step keeps them
        raise SystemExit(f"the two ways differ by {error:.1e} of the largest logit")


def compare_ways(name: str, ways: tuple[Way, Way], N: int, repeats: int) -> None:
    check(ways[1](), ways[0]())
    wall: tuple[list[float], list[float]] = ([], [])
    busy: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for which, way in enumerate(ways):
            start = time.perf_counter(), time.process_time()
            way()
            wall[which].append((time.perf_counter() - start[0]) / N * 1e3)
            busy[which].append((time.process_time() - start[1]) / N * 1e3)
    times = [median(each) for pair in (wall, busy) for each in pair]
    print(
        f"{name:34s} {times[0]:9.2f} {times[1]:9.2f} {times[0] / times[1]:6.2f}x"
        f" {times[2]:9.2f} {times[3]:9.2f} {times[2] / times[3]:6.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Batched test-time training against a loop.")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    N, config = args.images, ttt.TTT()
    print(f"{N} images, {args.threads} threads, torch {torch.__version__}, ms per image")
    print(f"{'':34s} {'wall: one':>9s} {'batched':>9s} {'':7s} {'cpu: one':>9s} {'batched':>9s}")
    for name, K, D in SIZES:
        for trained in (False, True):
            head = head_of(K, D, trained=trained)
            kind = "trained" if trained else "at start"
            ways = step_ways(head, N, config)
            compare_ways(f"step, {name} K={K} D={D}, {kind}", ways, N, args.repeats)
    for trained in (False, True):
        head = head_of(24, 128, trained=trained)
        kind = "trained" if trained else "at start"
        compare_ways(f"whole, demo, {kind}", whole_ways(head, N, config), N, min(args.repeats, 3))


if __name__ == "__main__":
    main()
