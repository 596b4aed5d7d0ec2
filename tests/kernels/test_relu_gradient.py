# SPDX-License-Identifier: Apache-2.0
"""relu_gradient: the gradient before a ReLU, and its sum over the rows."""

import pytest
import torch

from vtclip.kernels.relu_gradient import relu_gradient


@pytest.mark.parametrize("rows", [0, 1, 33, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_where_hidden_is_zero_and_summed(device, rows, dtype):
    grad, hidden = (torch.randn(rows, 150, device=device).to(dtype) for _ in range(2))
    hidden[::2, ::3] = 0.0
    hidden.relu_()
    for given in (grad, grad.t().contiguous().t()):
        d_sum, d_bias = relu_gradient(given, hidden)
        assert torch.equal(d_sum, torch.ops.aten.threshold_backward(grad, hidden, 0))
        wanted = d_sum.double().sum(0)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(d_bias.double(), wanted, rtol=rounding, atol=1e-5)
