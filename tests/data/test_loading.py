# SPDX-License-Identifier: Apache-2.0
"""Decoding ahead: order, errors, whose cores, and pixels that are torchvision's to the bit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as vision

from vtclip.clip.pixels import normalized
from vtclip.data import loading
from vtclip.data.decode import ImageError
from vtclip.data.loading import Batches
from vtclip.data.threads import Cores, num_cores

SHAPE = (1, 3, 2, 2)
NORMS = [((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
         ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.0, 0.1, 0.9), (1.0, 1e-3, 7.0))]  # fmt: skip


def views(row: int) -> Tensor:
    return torch.full(SHAPE, float(row))


@pytest.fixture(params=[0, 1, 2, 3], ids=lambda spare: f"{spare} spare")
def spare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cores that the computation leaves free, of three."""
    monkeypatch.setattr(loading, "num_cores", lambda: 3)
    return int(request.param)


@pytest.mark.parametrize(("mean", "std"), NORMS)
def test_pixels_are_those_of_torchvision(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    every = np.stack([np.arange(256), np.arange(256)[::-1], np.roll(np.arange(256), 7)], axis=-1)
    drawn = np.random.default_rng(0).integers(0, 256, (33, 47, 3))
    for pixels in every[None], drawn, drawn[:1, :1]:
        image = Image.fromarray(pixels.astype(np.uint8))
        wanted = vision.normalize(vision.to_tensor(image), list(mean), list(std))
        pixel_values = normalized(image, mean, std)
        assert torch.equal(pixel_values, wanted)
        assert (pixel_values.dtype, pixel_values.is_contiguous()) == (torch.float32, True)


def test_decoding_starts_no_threads_of_torch() -> None:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("this system does not list the threads of a process")
    image = Image.fromarray(np.zeros((400, 400, 3), np.uint8))

    def started(work: Callable[[], object]) -> int:
        counts: list[int] = []

        def run() -> None:
            counts.append(len(os.listdir(tasks)))
            work()
            counts.append(len(os.listdir(tasks)))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return counts[1] - counts[0]

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert started(lambda: normalized(image, *NORMS[0])) == 0
        if started(lambda: vision.normalize(vision.to_tensor(image), *map(list, NORMS[0]))) == 0:
            pytest.skip("this torch starts no threads of its own here")
    finally:
        torch.set_num_threads(before)


def test_batches_come_in_order_and_hold_until_the_next(spare: int) -> None:
    pieces = [range(0, 5), range(5, 10), range(10, 12), range(20, 25), range(30, 31)]

    def load(row: int) -> Tensor:
        time.sleep(0.001 * (row % 3))
        return views(row)

    with Batches(load, pieces, SHAPE, 3 - spare) as batches:
        for piece in pieces:
            pixels, errors = batches.next_batch()
            assert errors == [None] * len(piece)
            wanted = torch.cat([views(row) for row in piece])
            assert torch.equal(pixels, wanted)
            time.sleep(0.01)  # the next batch is being decoded
            assert torch.equal(pixels, wanted)


def test_unreadable_rows_have_an_error_and_no_pixels(spare: int) -> None:
    def load(row: int) -> Tensor | ImageError:
        return ImageError(str(row), "broken") if row % 2 else views(row)

    with Batches(load, [range(4), range(5, 6), range(6, 9)], SHAPE, 3 - spare) as batches:
        pixels, errors = batches.next_batch()
        assert [error and error.path for error in errors] == [None, "1", None, "3"]
        assert pixels[:, 0, 0, 0].tolist() == [0, 2]
        pixels, errors = batches.next_batch()
        assert (len(pixels), len(errors)) == (0, 1)
        assert batches.next_batch()[0][:, 0, 0, 0].tolist() == [6, 8]


def test_several_passes_stay_with_their_image(spare: int) -> None:
    def load(row: int) -> Tensor:
        return torch.stack([views(row)[0], views(row)[0] + 0.5])

    with Batches(load, [range(3)], (2, 3, 2, 2), 3 - spare) as batches:
        pixels, _ = batches.next_batch()
    assert pixels[:, 0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_other_errors_are_raised_and_nothing_hangs(spare: int) -> None:
    def load(row: int) -> Tensor:
        if row == 5:
            raise RuntimeError("row 5")
        return views(row)

    def take_all() -> None:
        with Batches(load, [range(4), range(4, 8), range(8, 12)], SHAPE, 3 - spare) as batches:
            for _ in range(3):
                batches.next_batch()

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="row 5"):
        take_all()
    with Batches(load, [range(4), range(8, 12)], SHAPE, 3 - spare):
        pass  # left before the first batch
    with Batches(load, [], SHAPE, 3 - spare):
        pass
    assert threading.active_count() == threads


def test_decoding_has_the_free_cores_and_all_while_it_is_waited_for(spare: int) -> None:
    """While a batch is computed at most `spare` images are decoded; while one is awaited, three."""
    running, most, computing = 0, {True: 0, False: 0}, False
    lock = threading.Lock()

    def load(row: int) -> Tensor:
        nonlocal running
        with lock:
            running += 1
            most[computing] = max(most[computing], running)
        time.sleep(0.002)
        with lock:
            most[computing] = max(most[computing], running)
            running -= 1
        return views(row)

    pieces = [range(start, start + 12) for start in range(0, 60, 12)]
    with Batches(load, pieces, SHAPE, 3 - spare) as batches:
        for _ in pieces:
            batches.next_batch()
            with lock:
                assert running <= spare
                computing = True
            time.sleep(0.02)
            with lock:
                computing = False
    assert most[True] <= spare
    if spare == 0:
        assert most[False] >= min(2, num_cores())  # the pool is that of this machine
        assert most[True] == 0


def test_cores_of_processes_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert num_cores() == 8
    for processes, share in ((2, 4), (3, 2), (8, 1), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert num_cores() == share


def test_more_threads_than_cores_leave_decoding_none_but_the_waiting_time() -> None:
    cores = Cores(2, 5)
    order: list[str] = []

    def work() -> None:
        with cores.decoding():
            order.append("decoded")

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.02)
    order.append("computed")
    with cores.lent():
        thread.join(timeout=5)
    assert order == ["computed", "decoded"]
