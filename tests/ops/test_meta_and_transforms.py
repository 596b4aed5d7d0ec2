# SPDX-License-Identifier: Apache-2.0
"""Every operator on meta tensors, and under vmap and forward mode as it is called by default."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vtclip import ops
from vtclip.testing.problems import FUNCTIONS

SIZES = {"B": 2, "K": 3, "L": 4, "H": 2, "d": 3, "D": 5, "C": 5, "F": 4}
CALLS = {
    ", ".join(filter(None, (name, variant))): function
    for name, usual in FUNCTIONS.items()
    for variant, function in (("", usual), *usual.variants())
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
pytestmark = pytest.mark.filterwarnings("ignore:.*(runs|recompute) through:UserWarning")


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors_give_meta_tensors(call, dtype):
    real = call.draw(SIZES, dtype=dtype)
    meta = [tensor.detach().to("meta").requires_grad_() for tensor in real]
    wanted, found = call.outputs(*real), call.outputs(*meta)
    for one, other in zip(found, wanted, strict=True):
        assert (one.device.type, one.shape, one.dtype) == ("meta", other.shape, other.dtype)
    joined = [output for output in found if output.requires_grad]
    assert joined  # a penalty that is always 0 asks for nothing
    torch.autograd.backward(joined, [torch.empty_like(output) for output in joined])
    for leaf, tensor in zip(meta, real, strict=True):
        grad = leaf.grad
        assert (grad.device.type, grad.shape, grad.dtype) == ("meta", tensor.shape, dtype)


@each_call
def test_meta_tensors_under_the_meta_device_and_autocast(call):
    meta = [tensor.detach().to("meta") for tensor in call.draw(SIZES)]
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert all(output.device.type == "meta" for output in call.outputs(*meta))


def test_a_kernel_asked_for_by_name_refuses_meta_tensors():
    meta = [tensor.detach().to("meta") for tensor in FUNCTIONS["cross_attn"].draw(SIZES)]
    with pytest.raises(NotImplementedError, match="cpu: needs cpu tensors, got meta"):
        ops.cross_attn(*meta, impl="cpu")


def test_the_options_of_attention_on_meta_tensors():
    with torch.device("meta"):
        query, key = torch.empty(1, 4, 3, 5), torch.empty(2, 2, 6, 5)
        value, mask = torch.empty(2, 2, 6, 7), torch.ones(2, 1, 3, 6, dtype=torch.bool)
        columns = torch.ones(2, 6, dtype=torch.bool)
        out = ops.cross_attn(
            query, key, value, key_mask=columns, attn_mask=mask, dropout_p=0.1, enable_gqa=True
        )
    assert (out.device.type, out.shape) == ("meta", (2, 4, 3, 7))


def alone(call: Callable[..., Tensor], tensors: list[Tensor], i: int) -> Callable[[Tensor], Tensor]:
    """The call as a function of its i-th tensor."""
    return lambda tensor: call(*tensors[:i], tensor, *tensors[i + 1 :])


@each_call
def test_vmap_over_each_and_over_all_tensors(call):
    tensors = [tensor.detach() for tensor in call.draw(SIZES, dtype=torch.float64)]
    many = [torch.stack([tensor, tensor.flip(-1)]) for tensor in tensors]
    expected = torch.stack([call(*(batch[i] for batch in many)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(call)(*many), expected)
    for i, batch in enumerate(many):
        function = alone(call, tensors, i)
        expected = torch.stack([function(tensor) for tensor in batch])
        torch.testing.assert_close(torch.func.vmap(function)(batch), expected)


@each_call
def test_forward_mode_along_each_tensor(call):
    tensors = [tensor.detach() for tensor in call.draw(SIZES, dtype=torch.float64)]
    step = 1e-6
    for i, tensor in enumerate(tensors):
        function, along = alone(call, tensors, i), tensor.flip(-1).cos()
        value, slope = torch.func.jvp(function, (tensor,), (along,))
        torch.testing.assert_close(value, function(tensor))
        ahead, behind = function(tensor + step * along), function(tensor - step * along)
        size = float(slope.abs().max())
        assert size > 0
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=0, atol=1e-5 * size)


MASKS = {
    "key_mask": {"key_mask": torch.tensor([[True, False, True, True]])},
    "columns": {"attn_mask": torch.tensor([True, False, True, True])},
    "bool": {"attn_mask": torch.ones(3, 4, dtype=torch.bool).tril()},
    "float": {"attn_mask": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grouped", [False, True])
def test_vmap_and_forward_mode_of_the_options_of_attention(mask, grouped):
    shapes = (5, 1, 4, 3, 3), (5, 2, 2 if grouped else 4, 4, 3), (5, 2, 2 if grouped else 4, 4, 2)
    many = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def call(*tensors: Tensor) -> Tensor:
        return ops.cross_attn(*tensors, **MASKS[mask], enable_gqa=grouped)

    expected = torch.stack([call(*(batch[i] for batch in many)) for i in range(5)])
    torch.testing.assert_close(torch.func.vmap(call)(*many), expected)
    leaves = [batch[0].requires_grad_() for batch in many]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)


def test_vmap_over_a_mask_is_vmap_over_images():
    query, key, value = (torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (3, 4, 4))
    masks = torch.tensor([[True, False, True, True], [True, True, True, False]])
    for name in ("key_mask", "attn_mask"):
        each = torch.func.vmap(
            lambda mask, name=name: ops.cross_attn(query, key, value, **{name: mask[None]})
        )
        expected = torch.cat([ops.cross_attn(query, key, value, key_mask=m[None]) for m in masks])
        torch.testing.assert_close(each(masks)[:, 0], expected)


def test_dropout_under_vmap_draws_where_torch_lets_it():
    tensors = [torch.randn(2, 1, 2, n, 3) for n in (3, 4, 4)]

    def call(*one: Tensor) -> Tensor:
        return ops.cross_attn(*one, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="random"):
        torch.func.vmap(call)(*tensors)
    assert torch.func.vmap(call, randomness="different")(*tensors).isfinite().all()
