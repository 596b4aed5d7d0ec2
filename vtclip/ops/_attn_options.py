# SPDX-License-Identifier: Apache-2.0
"""What `F.scaled_dot_product_attention` takes and the attention kernels do not, brought to them.

Grouped heads and a value width of its own become shapes that kernels take; a boolean mask of
columns becomes a key mask. What is left (other masks, dropout) is the reference's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.ops._any_order import warn_of_reference
from vtclip.ops._checks import FLOATS, expect_number
from vtclip.ops._select import Backend, Impl, Problem, select

_AXES = {"query": "B|1, H, K, d", "key": "B|1, H, L, d", "value": "B|1, H, L, v"}


def expect_heads(op: str, tensors: dict[str, Tensor], enable_gqa: bool) -> None:
    """Every tensor is [batch, heads, rows, width]; heads are those of the query, or divide them."""
    H = -1
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            hint = "; unsqueeze(1) for one head" if tensor.dim() == 3 else ""
            raise ValueError(
                f"{op}: {name} must have 4 dimensions [{_AXES[name]}], "
                f"got {list(tensor.shape)}{hint}"
            )
        G = tensor.shape[1]
        if name == "query":
            H = G
        elif G != H:
            _expect_groups(op, name, H, G, enable_gqa)


def _expect_groups(op: str, name: str, H: int, G: int, enable_gqa: bool) -> None:
    divides = G > 0 and H % G == 0
    if enable_gqa and not divides:
        raise ValueError(f"{op}: {name} must have heads that divide the {H} of query, got {G}")
    if divides and not enable_gqa:
        raise ValueError(
            f"{op}: {name} must have the {H} heads of query, got {G}; "
            "enable_gqa=True lets query heads share them"
        )


def expect_flag(op: str, name: str, flag: object) -> None:
    """A Python bool."""
    if not isinstance(flag, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(flag).__name__}")


def expect_dropout(op: str, dropout_p: float) -> None:
    """A probability."""
    expect_number(op, dropout_p=dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")


def refuse_causal(op: str, is_causal: bool) -> None:
    """Queries that are shared by images have no position among their tokens."""
    expect_flag(op, "is_causal", is_causal)
    if is_causal:
        raise ValueError(
            f"{op}: is_causal must be False, got True; "
            "give attn_mask=torch.ones(K, L, dtype=torch.bool).tril() instead"
        )


def expect_attn_mask(op: str, mask: Tensor, query: Tensor, sizes: dict[str, int]) -> Tensor:
    """The mask as [B|1, H|1, K|1, L|1]; a batch of its own counts where B is 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: attn_mask must be a Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, *FLOATS):
        dtype = str(mask.dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: attn_mask must be bool (True = takes part) or float (added), got {dtype}"
        )
    if mask.device != query.device:
        raise ValueError(f"{op}: attn_mask must be on {query.device}, got {mask.device}")
    shape = [sizes[letter] for letter in "BHKL"]
    if mask.dim() == 4 and shape[0] == 1:
        shape[0] = mask.shape[0]
    own = shape[len(shape) - mask.dim() :]
    pairs = zip(mask.shape, own, strict=False)
    if mask.dim() > 4 or any(size not in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"{op}: attn_mask must broadcast to [B, H, K, L] = {shape}, got {list(mask.shape)}"
        )
    sizes["B"] = shape[0]
    return mask[(None,) * (4 - mask.dim())]


def masks_of(
    key_mask: Tensor | None, attn_mask: Tensor, sizes: dict[str, int]
) -> tuple[Tensor | None, Tensor | None]:
    """key_mask and attn_mask [B|1, H|1, K|1, L|1], which joins the former if it masks columns."""
    if attn_mask.dtype != torch.bool or attn_mask.shape[1] != 1 or attn_mask.shape[2] != 1:
        return key_mask, attn_mask
    columns = attn_mask[:, 0, 0].expand(attn_mask.shape[0], sizes["L"])  # [B|1, L]
    return (columns if key_mask is None else key_mask & columns), None


def chosen_for(
    op: str, query: Tensor, width: int, impl: Impl | None, *, attn_mask: Tensor | None,
    dropout_p: float = 0.0,
) -> Backend:  # fmt: skip
    """The implementation of `op` with these options; a warning where they cost the kernels."""
    problem = Problem(op, query.device.type, query.dtype, width)
    if attn_mask is None and dropout_p == 0:
        return select(problem, impl)
    option = "dropout_p"
    if attn_mask is not None:
        by_bool = attn_mask.dtype == torch.bool
        option = "attn_mask by query or head" if by_bool else "float attn_mask"
    chosen = select(problem._replace(needs=option), impl)
    if impl is None and select(problem, None).name != "reference":
        warn_of_reference(op, option, "scores [B, H, K, L]")
    return chosen


def per_query_head(tensor: Tensor, heads: int) -> Tensor:
    """Key or value [B, G, L, d] once for every one of `heads` query heads; a copy."""
    return tensor.repeat_interleave(heads // max(1, tensor.shape[1]), dim=1)


def in_groups(query: Tensor, groups: int) -> Tensor:
    """[B, H, K, d] -> [B, G, H / G * K, d]: the heads of a group are one longer set of queries."""
    B, H, K, d = query.shape
    return query.reshape(B, groups, H // max(1, groups) * K, d)


def out_of_groups(result: Tensor, H: int, K: int) -> Tensor:
    """[B, G, H / G * K, ...] -> [B, H, K, ...]."""
    return result.reshape(result.shape[0], H, K, *result.shape[3:])


def widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind its last axis up to that width."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor
