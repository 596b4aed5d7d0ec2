# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of a decoder layer with few passes over its hidden units on a GPU.

    h = relu(x W1^T + c1)      z = x + h W2^T + c2                    x [R, C], h [R, F]

h is the largest tensor of a step. cuBLAS adds a bias and cuts at 0 as a product leaves the chip, so
h is written once and not read again for it: `torch._addmm_activation`, which torch does not
differentiate; `_Hidden` does. The second product is added in place to x with its bias c2 in it: to
a second result of the norm that makes x (`norm_of_sum`), or without gradients to the only one, see
`folded_biases`.
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


def by_triton(x: Tensor) -> bool:
    """Whether Triton serves the operators of the same head, of rows [., C] as x has."""
    problem = Problem("norm_cosine_logits", x.device.type, x.dtype, x.shape[-1])
    return select(problem, None).name == "triton"


def _graph_wanted() -> bool:
    """In a backward: whether what it computes shall be differentiated again."""
    return torch.is_grad_enabled() or is_transformed()


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
        if ctx.one_kernel and to_bias and not _graph_wanted():
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
        result: Tensor = _Hidden.apply(by_triton(x), x, weight, bias)
        return result
    return torch._addmm_activation(bias, x, weight.t())


def _plain_norm_of_sum(
    product: Tensor, start: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = F.layer_norm(product + start, weight.shape, weight, bias, eps).flatten(0, 1)
    return x, x + shift


class _NormOfSum(torch.autograd.Function):
    """x and x + shift [B K, C]; see `norm_of_sum`."""

    @staticmethod
    @bound_once
    def forward(
        product: Tensor, start: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        kernel = torch.ops.vtclip.sum_norm_fwd_triton
        # results that are no views: the second one is changed in place
        results: tuple[Tensor, ...] = kernel(product, start[0], weight, bias, shift, eps)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, d_x: Tensor | None, d_shifted: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        product, start, weight, bias, shift, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        grads = [
            product.new_zeros(mean.numel(), product.shape[2]) if grad is None else grad
            for grad in (d_x, d_shifted)
        ]
        if _graph_wanted():
            with torch.enable_grad():
                results = _plain_norm_of_sum(product, start, weight, bias, shift, ctx.eps)
            inputs = product, start, weight, bias, shift
            asked = [x for x, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(results, asked, grads, create_graph=True))
            return (*(next(found) if need else None for need in needed), None)
        d_product, d_start, d_vectors = torch.ops.vtclip.sum_norm_bwd_triton(
            *(grad.view_as(product) for grad in grads), product, start[0], weight, mean, rstd
        )
        found = iter((d_product, d_start[None], *d_vectors))
        return (*(grad if need else None for grad, need in zip(found, needed, strict=True)), None)


def norm_of_sum(product: Tensor, start: Tensor, norm: nn.LayerNorm, shift: Tensor) -> Any:
    """(x, x + shift), both [B K, C]; x = LayerNorm(product + start), in one pass on a GPU.

    product [B, K, C], start [1, K, C], shift [C]: where `norms_sums` holds.
    """
    return _NormOfSum.apply(product, start, norm.weight, norm.bias, shift, norm.eps)[:2]


def norm_of_sum_alone(product: Tensor, start: Tensor, norm: nn.LayerNorm, bias: Tensor) -> Tensor:
    """x alone, [B K, C], with another bias than the norm's; without gradients."""
    kernel = torch.ops.vtclip.sum_norm_fwd_triton
    x: Tensor = kernel(product, start[0], norm.weight, bias, None, norm.eps)[0]
    return x


def norms_sums(start: Tensor, weight: Tensor) -> bool:
    """Whether a sum of [B, K, C] and start [1|B, K, C] is normalised as it is formed."""
    return start.shape[0] == 1 and on_gpu(start, weight) and by_triton(start)


def folds(x: Tensor, weight: Tensor) -> bool:
    """Whether the second product is added to its residual in place."""
    return not torch.is_grad_enabled() and on_gpu(x, weight)


def folded_biases(layer: nn.TransformerDecoderLayer) -> tuple[Tensor, Tensor]:
    """Biases of the norm before and of the first product that leave x + c2 where x would be.

    norm2's bias + c2, and c1 - W1 c2, as W1 x + c1 = W1 (x + c2) + (c1 - W1 c2).
    """
    first, last = layer.linear1, layer.linear2.bias
    return layer.norm2.bias + last, torch.addmv(first.bias, first.weight, last, alpha=-1)
