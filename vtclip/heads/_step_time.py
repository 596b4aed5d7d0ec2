# SPDX-License-Identifier: Apache-2.0
"""What the part of a decoder layer that has several exact forms takes on a GPU.

A step is matrix products at the library's rate and passes over memory at the memory's:

    product [batch, m, k] x [batch, k, n]    2 batch m n k / (peak k / (k + 180)) / used
    pass                                     bytes / bandwidth

`used` is the share of the multiprocessors' time that tiles of 128 x 256 or 128 x 128 fill, with the
sum over k split where tiles are few. Peaks are what libraries reach at large sizes, taken from
published figures, not measured here. Operations saved are not time saved: the twice absorbed form
(`_cost.py`) reads and writes its hidden units five times more often than the direct one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import ceil

import torch

FORMS = (0, 1, 2)  # matrices pushed through the values
HALF_RATE_DEPTH = 180  # inner size at which a product reaches half of its peak
SPLITS = (1, 2, 4, 8)  # parts of a long sum over k
LEAST_DEPTH = 1024  # of one such part
# of that peak that attention reaches at few tokens: forward, backward, weights and their backward
ATTENTION, ATTENTION_BACK, WEIGHTS, WEIGHTS_BACK = 0.4, 0.25, 0.2, 0.07
LAUNCH = 1e-6  # seconds between one kernel's end and the next one's first results


@dataclass(frozen=True)
class Rates:
    """Of one device and dtype: products, memory, multiprocessors, bytes of a number."""

    flops: float
    bytes: float
    multiprocessors: int
    size: int = 2


# capability -> TFLOP/s of products of half types, tf32 and float32 at large sizes; TB/s; processors
_DEVICES = {
    80: (250, 120, 17, 1.6, 108),
    86: (120, 60, 25, 0.8, 84),
    89: (280, 75, 55, 0.9, 142),
    90: (720, 360, 52, 4.0, 132),
    100: (1500, 700, 70, 7.0, 148),
    120: (400, 100, 90, 1.6, 188),
}


def rates(capability: int, dtype: torch.dtype, *, tf32: bool = False) -> Rates:
    """Those of the newest known device that is no newer than `capability`, else of the oldest."""
    known = max((key for key in _DEVICES if key <= capability), default=min(_DEVICES))
    half, fast, exact, terabytes, processors = _DEVICES[known]
    single = fast if tf32 else exact
    products = {2: half, 4: single, 8: exact / 2}[dtype.itemsize]
    return Rates(products * 1e12, terabytes * 1e12, processors, dtype.itemsize)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Those of a device at hand; of an sm_90 where it is only thought of."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if device.type != "cuda":
        return rates(90, dtype, tf32=tf32)
    index = torch.cuda.current_device() if device.index is None else device.index
    return rates(_capability(index), dtype, tf32=tf32)


def product_seconds(batch: int, m: int, n: int, k: int, rates: Rates) -> float:
    """One product, in the best of some tiles and splits of the sum."""
    if min(batch, m, n, k) < 1:
        return LAUNCH
    if 1 in (m, n):  # each number of the matrix is used once
        return pass_seconds(batch * max(m, n) * k * rates.size, rates)
    return LAUNCH + min(
        _tiled(batch, m, n, k, rates, tile, splits)
        for tile in ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64))
        for splits in SPLITS
        if splits == 1 or k >= splits * LEAST_DEPTH
    )


def _tiled(
    batch: int, m: int, n: int, k: int, rates: Rates, tile: tuple[int, int], splits: int
) -> float:
    rows, columns = tile
    # a smaller tile loads more for each product; two of them share a multiprocessor
    efficiency = {2**15: 1.0, 2**14: 0.9, 2**13: 0.7}[rows * columns]
    depth = k / splits
    blocks = batch * ceil(m / rows) * ceil(n / columns) * splits
    waves = ceil(blocks / rates.multiprocessors)
    each = 2 * rows * columns * depth * rates.multiprocessors / rates.flops
    seconds = waves * each * (depth + HALF_RATE_DEPTH) / depth / efficiency
    extra = 0.0 if splits == 1 else (splits + 1) * batch * m * n * 4 / rates.bytes + LAUNCH
    return seconds + extra


def pass_seconds(bytes: float, rates: Rates) -> float:
    return LAUNCH + bytes / rates.bytes


@dataclass(frozen=True)
class Steps:
    """What is launched: products, bytes of passes, attention (flops, share of the peak, bytes)."""

    products: tuple[tuple[int, int, int, int], ...]
    passes: tuple[int, ...]
    attention: tuple[tuple[int, float, int], ...]

    def __add__(self, other: Steps) -> Steps:
        return Steps(
            self.products + other.products,
            self.passes + other.passes,
            self.attention + other.attention,
        )

    def seconds(self, rates: Rates) -> float:
        products = sum(product_seconds(*sizes, rates) for sizes in self.products)
        passes = sum(pass_seconds(bytes, rates) for bytes in self.passes)
        attention = (
            max(flops / (share * rates.flops), bytes / rates.bytes)
            for flops, share, bytes in self.attention
        )
        return products + passes + sum(LAUNCH + seconds for seconds in attention)


def forward_steps(form: int, B: int, K: int, C: int, L: int, H: int, F: int, size: int) -> Steps:
    """From values [B, H, L, d] to h [B, K, F] and x2 [B, K, C], in one of the `FORMS`."""
    R, HL, n = B * K, H * L, C + F
    keys = 2 * B * L * C
    norms = (2 * R * C,)  # LN2 of the product and start
    hidden = (1, R, F, C)
    if form == 0:
        attention = (4 * R * L * C, ATTENTION, keys + R * C)
        return _steps(((1, R, C, C), hidden), norms, (attention,), size)
    weights = (2 * R * L * C, WEIGHTS, keys // 2 + R * HL)
    width = C if form == 1 else n
    pushed = ((H, B * L, width, C // H), (B, K, width, HL))
    laid_out = (2 * B * HL * width, 2 * R * HL)  # values and weights as the product wants them
    if form == 1:
        return _steps((*pushed, hidden), (*laid_out, *norms), (weights,), size)
    once = ((1, C, F, C), (1, K, F, C)), (6 * C * F, 3 * C * n, 3 * K * n)
    # start is copied; std, its product and shift, relu; LN2
    passes = (*laid_out, *once[1], R * n, R * C, 2 * R * F, 2 * R * F, 2 * R * C)
    return _steps((*pushed, *once[0]), passes, (weights,), size)


def backward_steps(form: int, B: int, K: int, C: int, L: int, H: int, F: int, size: int) -> Steps:
    """The gradients of what `forward_steps` reads."""
    R, HL, n = B * K, H * L, C + F
    keys = 2 * B * L * C
    cut = (3 * R * F,)  # where h is 0, with the sum of c1's gradient
    # LN2 and what is summed over images of two gradients of x2; in the forward x2 + c2, which the
    # second product is added to
    norm = (4 * R * C, R * C)
    hidden = ((1, R, C, F), (1, F, C, R))
    if form == 0:
        attention = (10 * R * L * C, ATTENTION_BACK, 2 * keys + 2 * R * C)
        products = (*hidden, (1, C, C, R), (1, R, C, C))
        return _steps(products, (*cut, *norm), (attention,), size)
    weights = (4 * R * L * C, WEIGHTS_BACK, keys + 2 * R * HL)
    width, d = C if form == 1 else n, C // H
    pushed = ((B, HL, width, K), (B, K, HL, width), (H, d, width, B * L), (H, B * L, d, width))
    laid_out = 2 * B * HL * width
    if form == 1:
        return _steps((*hidden, *pushed), (*cut, *norm, laid_out), (weights,), size)
    once = ((1, F, C, K), (1, K, C, F), (1, F, C, C), (1, C, F, C)), (16 * C * F,)
    # 1 / std and its product; two sums; the norm by hand and LN2; [du | dt], its sum over images
    scaled = (2 * R * F, 2 * R * F, 3 * R * F, R * F)
    of_std = (R * C, 2 * R * C, 2 * R * C, 3 * R * C, 3 * R * C)
    passes = (*cut, R * F, *scaled, *of_std, 2 * R * n, R * n, laid_out, *once[1])
    return _steps((*pushed, *once[0]), passes, (weights,), size)


def _steps(
    products: tuple[tuple[int, int, int, int], ...],
    passes: tuple[int, ...],
    attention: tuple[tuple[int, float, int], ...],
    size: int,
) -> Steps:
    """With numbers of memory in bytes."""
    counted = tuple((flops, share, numbers * size) for flops, share, numbers in attention)
    return Steps(products, tuple(numbers * size for numbers in passes), counted)


def step_seconds(
    form: int, B: int, K: int, C: int, L: int, H: int, F: int, rates: Rates, *, training: bool
) -> float:
    """One step of one form, forward and with gradients backward."""
    steps = forward_steps(form, B, K, C, L, H, F, rates.size)
    if training:
        steps += backward_steps(form, B, K, C, L, H, F, rates.size)
    return steps.seconds(rates)
