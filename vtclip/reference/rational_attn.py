# SPDX-License-Identifier: Apache-2.0
"""RAda's attention among the classes of one image: three kinds of query, one joint softmax each.

    S_x[b,h,i,j] = scale * query_x[b,h,i] . key[b,h,j]                for x in image, text, pair
    A_x[b,h]     = K * softmax of S_x[b,h] over all its K * K entries
    out          = mean_x A_x @ value                                 over the queries given

image_query [B, H, 1, d] is one query for every row i, text_query [1 or B, H, K, d], pair_query, key
and value [B, H, K, d] -> out [B, H, K, d] in the input dtype, computed in the accumulation dtype.
The rows of A_image are one softmax over j, because the rows of S_image are equal; the rows of the
other two sum to K together and not to 1 each. Where B, H, K or d is 0, out has no element. This is
the layer of RAda (arXiv 2507.15480) as its authors released it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def rational_attn(
    image_query: Tensor | None,
    text_query: Tensor | None,
    pair_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    scale: float,
) -> Tensor:
    """out of the module docstring."""
    acc = acc_dtype(key.dtype)
    K, columns = key.shape[2], key.to(acc).transpose(-1, -2)  # [B, H, d, K]
    value = value.to(acc)
    attended = []  # [B, H, K, d]
    for query in (image_query, text_query, pair_query):
        if query is None:
            continue
        scores = (query.to(acc) * scale) @ columns  # [B, H, K or 1, K]
        joint = torch.softmax(scores.flatten(2), dim=-1).view(scores.shape)
        rows = joint @ value if query is image_query else K * joint @ value
        attended.append(rows.expand(value.shape))
    return torch.stack(attended).mean(0).to(key.dtype)
