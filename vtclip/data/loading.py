# SPDX-License-Identifier: Apache-2.0
"""Files to batches of pixels, decoded one batch ahead into buffers that are reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vtclip.data.decode import ImageError
from vtclip.data.threads import Cores, decode_pool, num_cores


class Batches(AbstractContextManager["Batches"]):
    """Pixels of the rows of each of `pieces`, in order.

    load: views [1 + P, 3, H, W] of one row, or the ImageError that says why it has none.
    shape: (1 + P, 3, H, W).
    computing: threads of the computation that takes the batches.

    Decoding of the first batch starts at once. `next_batch` returns the pixels of the rows that
    could be read, [n * (1 + P), 3, H, W], and for each row its error or None. The pixels are valid
    until the next call.
    """

    def __init__(
        self,
        load: Callable[[int], Tensor | ImageError],
        pieces: Sequence[range],
        shape: tuple[int, ...],
        computing: int,
    ) -> None:
        self._load, self._pieces = load, pieces
        rows = max((len(piece) for piece in pieces), default=0)
        # decoded images are never copied, and fresh memory is touched only once
        self._buffers = [torch.empty(rows, *shape).numpy() for _ in range(min(2, len(pieces)))]
        self._ahead: list[list[Future[ImageError | None]]] = []
        self._number = 0
        self._cores = Cores(num_cores(), computing)
        self._pool = decode_pool()
        self._submit(0)

    def next_batch(self) -> tuple[Tensor, list[ImageError | None]]:
        self._submit(self._number + 1)
        with self._cores.lent():
            errors = [future.result() for future in self._ahead.pop(0)]
        pixels = torch.from_numpy(self._buffers[self._number % 2])[: len(errors)]
        self._number += 1
        read = [slot for slot, error in enumerate(errors) if error is None]
        if len(read) < len(errors):
            pixels = pixels[read]
        return pixels.flatten(0, 1), errors

    def _submit(self, number: int) -> None:
        if number >= len(self._pieces):
            return
        buffer = self._buffers[number % 2]

        def work(slot: int, row: int) -> ImageError | None:
            with self._cores.decoding():
                views = self._load(row)
                if isinstance(views, ImageError):
                    return views
                buffer[slot] = views.numpy()  # torch's own copy would take threads of its own
                return None

        piece = self._pieces[number]
        self._ahead.append([self._pool.submit(work, slot, row) for slot, row in enumerate(piece)])

    def __exit__(self, *reason: object) -> None:
        for future in (future for batch in self._ahead for future in batch):
            future.cancel()
        self._cores.close()
        self._pool.shutdown()
