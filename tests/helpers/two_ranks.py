# SPDX-License-Identifier: Apache-2.0
"""What a process of a group does in tests; here, as a spawned process imports helpers alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vtclip.nn import SharedQueryAttention


def gradients_of_rank(
    rank: int, place: str, sizes: tuple[int, int, int], state: dict[str, Tensor], inputs: Tensor,
    result: Any,
) -> None:  # fmt: skip
    """Puts the gradients of half of the images into `result`; the processes meet at `place`."""
    torch.set_num_threads(1)
    store = dist.FileStore(place, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ours = SharedQueryAttention(*sizes, dtype=torch.float64)
    ours.load_state_dict(state)
    wrapped = DistributedDataParallel(ours)
    wrapped(inputs[2 * rank : 2 * rank + 2]).square().mean().backward()
    result[rank] = {name: p.grad.numpy() for name, p in ours.named_parameters()}
    dist.destroy_process_group()
