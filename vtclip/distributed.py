# SPDX-License-Identifier: Apache-2.0
"""One process, or several that torchrun started: who is first, sums over all, and no deadlock.

Two time limits. A sum over all processes fails after `STEP_TIMEOUT`: there each waits only for the
step of the others. What the first process does alone (features, saving, validation) may take up to
`WORK_TIMEOUT`, and the others wait for its note in the store, so that they learn of its failure at
once. A process that raises closes its connections, which ends the sums of the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vtclip.environment import check_launcher, num_processes, process_number
from vtclip.environment import is_first as is_first


class Interrupted(Exception):
    """A signal stopped the fit between two steps; `path` holds the state, if it was saved."""

    def __init__(self, signum: int, step: int, path: Path | None) -> None:
        where = "nothing was saved" if path is None else f"state saved in {path}"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {where}")
        self.signum, self.step = signum, step


STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal:
    """In its `with`, the first SIGINT, SIGTERM or SIGHUP (a closed terminal) only sets `received`;
    a second of its kind acts at once. Under nohup SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPS:
                ignored = signal.getsignal(signum) == signal.SIG_IGN
                if signum == signal.SIGINT or not ignored:
                    self._old[signum] = signal.signal(signum, self._receive)
        return self

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


STEP_TIMEOUT = timedelta(minutes=5)
WORK_TIMEOUT = timedelta(hours=6)
DONE = "done"
Item = TypeVar("Item")
Result = TypeVar("Result")


class PeerFailed(ConnectionError):
    """Another process failed, stalled or has other inputs, so this one cannot go on."""


class World:
    """The processes of one run; a single one (size 1) waits for nobody in any method."""

    def __init__(self, rank: int = 0, size: int = 1, store: PrefixStore | None = None) -> None:
        self.rank, self.size, self._store = rank, size, cast("PrefixStore", store)
        self._notes = 0
        self._patient_group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's share of a batch: contiguous rows; shares differ by one row at most."""
        count = len(rows)
        return rows[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    def padded_share(self, count: int) -> Tensor:
        """This process's share of `count` indices; the last index pads all to one size."""
        size = -(-count // self.size)
        return torch.arange(self.rank * size, (self.rank + 1) * size).clamp(max=count - 1)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The rows [count, D] of all processes from their `padded_share`, with gradient."""
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered[:count]

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def by_first(self, work: Callable[[], Result]) -> Result | None:
        """`work` in the first process, while the others wait for it and return None."""
        if self.size == 1:
            return work()
        self._notes += 1
        key = f"note {self._notes}"
        if self.first:
            try:
                result = work()
            except BaseException as error:
                self._store.set(key, f"{type(error).__name__}: {error}")
                raise
            self._store.set(key, DONE)
            return result
        self._store.wait([key], WORK_TIMEOUT)
        note = self._store.get(key).decode()
        if note != DONE:
            raise PeerFailed(f"rank {self.rank}: stopped, because rank 0 failed: {note}")
        return None

    def by_each(self, work: Callable[[], Result]) -> Result:
        """`work` in the first process and then, with its files in place, in the others."""
        result = self.by_first(work)
        return work() if result is None else result

    def collect(self, value: Item) -> list[Item]:
        """The values of all processes, by rank, in all of them, however late some arrive."""
        if self.size == 1:
            return [value]
        if self._patient_group is None:  # that of the sums does not wait so long
            group = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT)
            self._patient_group = cast("dist.ProcessGroup", group)
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self._patient_group)
        return values

    def check_same(self, what: str, digest: str) -> None:
        """Raises if the processes do not agree, e.g. on the list of images."""
        if self.size == 1:
            return
        self._store.set(f"{what} {self.rank}", digest)
        for rank in range(self.size):
            self._store.wait([f"{what} {rank}"], STEP_TIMEOUT)
            other = self._store.get(f"{what} {rank}").decode()
            if other != digest:
                raise PeerFailed(
                    f"rank {self.rank} has {what} {digest[:12]}, rank {rank} has {other[:12]}"
                )

    def stop_signal(self) -> StopSignal:
        return StopSignal() if self.size == 1 else _PatientStop()


class _Gather(torch.autograd.Function):
    """Rows [n, D] of each process to [size * n, D] in all of them.

    Every process's loss depends on every row, so a row's gradient is the sum over the processes;
    DistributedDataParallel then averages the gradients of the weights, as for one process's loss.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world = world
        shares = [torch.empty_like(rows) for _ in range(world.size)]
        dist.all_gather(shares, rows.contiguous())
        return torch.cat(shares)

    @staticmethod
    @once_differentiable  # reads nothing but `grads`, so no second derivative can be missed
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        size = len(total) // ctx.world.size
        return total[ctx.world.rank * size : (ctx.world.rank + 1) * size], None


class _PatientStop(StopSignal):
    """Ctrl-C reaches each process twice, from the terminal and from torchrun: only noted."""

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self.received = self.received or signum


def device_of_rank(device: torch.device, named: bool) -> torch.device:
    """`device`, but cuda:LOCAL_RANK for several processes; `named`: the user gave an index."""
    if num_processes() == 1 or device.type != "cuda":
        return device
    if named:
        raise ValueError(f"device {device}: several processes take one GPU each, say cuda")
    local = process_number("LOCAL_RANK", 0)
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK is {local}, this torch sees {torch.cuda.device_count()} GPUs; "
            "start fewer processes, or say device cpu"
        )
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world of this process, left at the end; errors of a peer become PeerFailed."""
    check_launcher()
    if num_processes() == 1:
        yield World()
        return
    rank = process_number("RANK", 0)
    try:
        store, rank, size = next(rendezvous("env://", timeout=STEP_TIMEOUT))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=STEP_TIMEOUT,
        )
        yield World(rank, size, PrefixStore("vtclip", store))
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            raise ValueError(f"MASTER_PORT must be free, {host}:{port} is taken") from None
        if not _of_a_peer(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise PeerFailed(
            f"rank {rank}: another process failed or stalled, see its message ({reason})"
        ) from None
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _of_a_peer(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "socket", "peer", "timed out", "timeout")
    return any(word in text for word in words)
