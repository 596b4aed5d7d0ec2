# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of a decoder layer with few passes over its hidden units on a GPU.

    h = relu(x W1^T + c1)      z = x + h W2^T + c2                    x [R, C], h [R, F]

h is the largest tensor of a step. cuBLAS adds a bias and cuts at 0 as a product leaves the chip, so
h is written once and not read again for it: `torch._addmm_activation`, which torch does not
differentiate; `_Hidden` does. Without gradients x joins the second product in place of an addition
apart; its bias c2 is then in x already, see `folded_biases`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip.ops._any_order import is_transformed
from vtclip.ops._autograd import bound_once
from vtclip.ops._select import Problem, select


def on_gpu(x: Tensor, weight: Tensor) -> bool:
    """Whether x @ weight^T may leave the usual operators: a GPU and one dtype.

    A traced graph, torch.func, forward mode and autocast see torch's own operators only.
    """
    if x.device.type == "cpu" or not hasattr(torch, "_addmm_activation"):
        return False
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


class _Hidden(torch.autograd.Function):
    """relu(x weight^T + bias); what its backward computes can be differentiated again."""

    @staticmethod
    @bound_once
    def forward(one_kernel: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch._addmm_activation(bias, x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.one_kernel, x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden = ctx.saved_tensors
        _, to_x, to_weight, to_bias = ctx.needs_input_grad
        # where a graph of this is wanted, all of it is torch's own
        if ctx.one_kernel and to_bias and not (torch.is_grad_enabled() or is_transformed()):
            d_sum, d_bias = torch.ops.vtclip.relu_gradient_triton(d_hidden, hidden)
        else:
            d_sum = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)
            d_bias = d_sum.sum(0) if to_bias else None
        return (
            None,
            d_sum @ weight if to_x else None,
            d_sum.t() @ x if to_weight else None,
            d_bias,
        )


def hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(x @ weight^T + bias): x [R, C], weight [F, C], bias [F] -> [R, F]."""
    if not on_gpu(x, weight):
        return F.relu(F.linear(x, weight, bias), inplace=True)
    if torch.is_grad_enabled():
        # where Triton serves the operators of the same head
        problem = Problem("norm_cosine_logits", x.device.type, x.dtype, x.shape[-1])
        one_kernel = select(problem, None).name == "triton"
        result: Tensor = _Hidden.apply(one_kernel, x, weight, bias)
        return result
    return torch._addmm_activation(bias, x, weight.t())


def folds(x: Tensor, weight: Tensor) -> bool:
    """Whether the second product is added to its residual in place."""
    return not torch.is_grad_enabled() and on_gpu(x, weight)


def folded_biases(layer: nn.TransformerDecoderLayer) -> tuple[Tensor, Tensor]:
    """Biases of the norm before and of the first product that leave x + c2 where x would be.

    norm2's bias + c2, and c1 - W1 c2, as W1 x + c1 = W1 (x + c2) + (c1 - W1 c2).
    """
    first, last = layer.linear1, layer.linear2.bias
    return layer.norm2.bias + last, torch.addmv(first.bias, first.weight, last, alpha=-1)
