# SPDX-License-Identifier: Apache-2.0
"""What F.scaled_dot_product_attention takes besides tensors: equal to it, or a helpful error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops
from vtclip.backends import native
from vtclip.ops import _any_order
from vtclip.ops._select import only_reference

B, H, K, L, d = 3, 4, 5, 7, 6
SAYS = "ignore:.*(runs|recompute) through:UserWarning"
pytestmark = pytest.mark.filterwarnings(SAYS)
needs_kernels = pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")


def inputs(G: int = H, v: int = d, Bq: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key and value that want gradients."""
    shapes = (Bq, H, K, d), (B, G, L, d), (B, G, L, v)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def bools(*shape: int) -> Tensor:
    """A mask that leaves every row its first column."""
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


def floats(*shape: int) -> Tensor:
    """Floats to add, some of them -inf, that want a gradient."""
    mask = torch.randn(shape, dtype=torch.float64).masked_fill(~bools(*shape), -torch.inf)
    return mask.requires_grad_()


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **more: Any):
    if mask is not None and mask.dim() == 1:
        mask = mask.expand(K, L)  # torch wants two dimensions at least
    return F.scaled_dot_product_attention(query.expand(B, -1, -1, -1), key, value, mask, **more)


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    pairs = (
        torch.autograd.grad(result, leaves, seed, retain_graph=True)
        for result in (actual, expected)
    )
    for name, (one, other) in enumerate(zip(*pairs, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=f"gradient {name}")


SHAPES = [(L,), (K, L), (1, L), (K, 1), (H, K, L), (H, 1, L), (B, 1, 1, L), (1, 1, 1, L)]
SHAPES += [(B, 1, K, L), (B, H, K, L), (1, H, 1, 1)]


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [bools, floats])
def test_masks_of_any_shape(kind, shape, impl):
    tensors, mask = inputs(), kind(*shape)
    actual = ops.cross_attn(*tensors, attn_mask=mask, impl=impl)
    leaves = [*tensors, mask] if mask.requires_grad else tensors
    assert_equal_with_gradients(actual, sdpa(*tensors, mask), leaves)


@pytest.mark.parametrize("kind", [bools, floats])
def test_both_masks_together(kind):
    tensors, columns, mask = inputs(Bq=B), bools(B, L), kind(H, K, L)
    actual = ops.cross_attn(*tensors, key_mask=columns, attn_mask=mask)
    hidden = ~columns[:, None, None]
    both = mask.expand(B, H, K, L).masked_fill(hidden, False if kind is bools else -torch.inf)
    assert_equal_with_gradients(actual, sdpa(*tensors, both), tensors)


def test_the_log_sum_exp_and_the_weights_have_the_mask_too():
    query, key, value = inputs()
    mask = floats(B, H, K, L)
    scores = query @ key.transpose(-1, -2) / d**0.5 + mask
    lse = ops.cross_attn_lse(query, key, value, attn_mask=mask).lse
    assert_equal_with_gradients(lse, scores.logsumexp(-1), [query, key, mask])
    weights = ops.cross_attn_weights(query, key, attn_mask=mask)
    assert_equal_with_gradients(weights, scores.softmax(-1), [query, key, mask])


@pytest.mark.parametrize("kind", ["bool", "float", "columns"])
def test_a_row_without_a_column_is_zero_with_zero_gradients(kind):
    tensors, visible = inputs(), bools(B, 1 if kind == "columns" else H, 1, L)
    visible = visible.expand(-1, -1, 1 if kind == "columns" else K, -1).clone()
    visible[1] = False
    leaves, mask = tensors, visible
    if kind == "float":
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        leaves = [*tensors, mask.requires_grad_()]
    out, lse = ops.cross_attn_lse(*tensors, attn_mask=mask)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert (out[0] != 0).all()
    grads = torch.autograd.grad(out.sum() + lse[[0, 2]].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[1] == 0).all() for grad in grads[1:])


@needs_kernels
@pytest.mark.parametrize("shape", [(L,), (1, L), (1, 1, L), (B, 1, 1, L), (B, 1, 1, 1)], ids=str)
def test_a_mask_of_columns_is_a_key_mask_to_the_kernels(shape):
    tensors, mask = inputs(dtype=torch.float32), torch.rand(shape) > 0.4
    columns = mask.view(-1, mask.shape[-1]).expand(-1, L)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = ops.cross_attn(*tensors, attn_mask=mask, impl="cpu")
    assert torch.equal(actual, ops.cross_attn(*tensors, key_mask=columns, impl="cpu"))


@pytest.mark.parametrize("impl", [None, "cpu", "reference"])
@pytest.mark.parametrize("v", [1, 2, d + 3, 0], ids="v{}".format)
@pytest.mark.parametrize("Bq", [1, B], ids="Bq{}".format)
def test_a_value_width_of_its_own(Bq, v, impl):
    if impl == "cpu" and native.load_cpu():
        pytest.skip("vtclip._C is not built")
    tensors = inputs(v=v, Bq=Bq)
    actual = ops.cross_attn(*tensors, impl=impl)
    assert actual.shape == (B, H, K, v)
    expected = sdpa(*tensors) if v else actual.detach() + 0 * sum(t.sum() for t in tensors)
    assert_equal_with_gradients(actual, expected, tensors)


@pytest.mark.parametrize("impl", [None, "cpu", "reference"])
@pytest.mark.parametrize("G", [1, 2], ids="G{}".format)
@pytest.mark.parametrize("Bq", [1, B], ids="Bq{}".format)
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads(masked, Bq, G, impl):
    if impl == "cpu" and native.load_cpu():
        pytest.skip("vtclip._C is not built")
    tensors, mask = inputs(G=G, v=d + 2, Bq=Bq), bools(B, 1, 1, L) if masked else None
    actual = ops.cross_attn(*tensors, attn_mask=mask, enable_gqa=True, impl=impl)
    assert_equal_with_gradients(actual, sdpa(*tensors, mask, enable_gqa=True), tensors)
    weights = ops.cross_attn_weights(*tensors[:2], attn_mask=mask, enable_gqa=True, impl=impl)
    again = weights @ tensors[2].repeat_interleave(H // G, 1)
    assert_equal_with_gradients(actual, again, tensors)


def test_grouped_heads_with_a_mask_by_query():
    tensors, mask = inputs(G=2), floats(H, K, L)
    out, lse = ops.cross_attn_lse(*tensors, attn_mask=mask, enable_gqa=True)
    assert_equal_with_gradients(out, sdpa(*tensors, mask, enable_gqa=True), [*tensors, mask])
    assert lse.shape == (B, H, K)


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_is_that_of_torch_and_repeats_by_its_seed(masked):
    tensors, mask = inputs(), floats(B, H, K, L) if masked else None

    def dropped(call: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(*tensors, attn_mask=mask, dropout_p=0.4)

    def oracle(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        query = query.expand(B, -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value, **more)

    first, again = dropped(ops.cross_attn, 1), dropped(ops.cross_attn, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, dropped(ops.cross_attn, 2))
    assert_equal_with_gradients(first, dropped(oracle, 1), tensors)


def test_dropout_keeps_the_mean_and_draws_for_every_image():
    query, key, value = (
        torch.ones(shape) for shape in ((1, 1, 200, 4), (1, 1, 50, 4), (2, 1, 50, 4))
    )
    out = ops.cross_attn(query, key, value, dropout_p=0.25)
    assert abs(float(out.mean()) - 1) < 0.02
    assert not torch.equal(out[0], out[1])
    assert (ops.cross_attn(query, key, value, dropout_p=1.0) == 0).all()


def test_gradcheck_of_every_option():
    mask = floats(2, K, L).masked_fill(torch.tensor(False), 0.0)
    mask = torch.where(mask.isinf(), -1.0, mask).detach().requires_grad_()
    query, key, value = inputs(G=2, v=2)
    columns = bools(B, L)

    def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        both = mask.repeat_interleave(2, 0)
        return ops.cross_attn_lse(
            query, key, value, attn_mask=both, key_mask=columns, enable_gqa=True
        )

    leaves = [query, key, value, mask]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_dtypes_keep_theirs(dtype):
    tensors, mask = inputs(v=d + 1, dtype=dtype), torch.randn(K, L)
    out, lse = ops.cross_attn_lse(*tensors, attn_mask=mask)
    exact = ops.cross_attn(*(t.double() for t in tensors), attn_mask=mask.double())
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


OPTIONS = {
    "columns": {"attn_mask": torch.arange(L) != 2},
    "bool": {"attn_mask": torch.ones(K, L, dtype=torch.bool).tril()},
    "float": {"attn_mask": torch.linspace(-1, 1, K * L, dtype=torch.float64).view(K, L)},
    "gqa": {"enable_gqa": True},
    "width": {},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_whole(option):
    tensors, keywords = inputs(G=2 if option == "gqa" else H, v=4), OPTIONS[option]
    torch.compiler.reset()

    def call(*tensors: Tensor) -> Tensor:
        return ops.cross_attn(*tensors, **keywords)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_equal_with_gradients(compiled(*tensors), call(*tensors), tensors)
    torch.compiler.reset()


def test_dropout_compiled_whole():
    tensors = [tensor.detach() for tensor in inputs()]
    torch.compiler.reset()
    call = torch.compile(
        lambda *tensors: ops.cross_attn(*tensors, dropout_p=0.5),
        backend="aot_eager",
        fullgraph=True,
    )
    first, second = call(*tensors), call(*tensors)
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    torch.compiler.reset()


@needs_kernels
@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"attn_mask": torch.ones(K, L, dtype=torch.bool)}, "attn_mask by query or head"),
        ({"attn_mask": torch.zeros(L)}, "float attn_mask"),
        ({"dropout_p": 0.1}, "dropout_p"),
    ],
)
class TestWhatOnlyTheReferenceHas:
    def test_a_named_kernel_refuses_it(self, keywords, named):
        with pytest.raises(NotImplementedError, match=rf"cpu: takes no {named}\)$"):
            ops.cross_attn(*inputs(), **keywords, impl="cpu")

    def test_its_cost_is_said_once(self, keywords, named, monkeypatch):
        monkeypatch.setattr(_any_order, "_WARNED", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                ops.cross_attn(*inputs(), **keywords)
        (said,) = caught
        text = (
            f'cross_attn: {named} runs through impl="reference", which stores scores [B, H, K, L]'
        )
        assert str(said.message) == f"{text}; said once"
        assert said.filename == __file__

    def test_who_asks_for_the_reference_is_told_nothing(self, keywords, named, monkeypatch):
        monkeypatch.setattr(_any_order, "_WARNED", set())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.cross_attn(*inputs(), **keywords, impl="reference")
            with only_reference():
                ops.cross_attn(*inputs(), **keywords)


def wrong(**keywords: Any) -> Any:
    return lambda: ops.cross_attn(*inputs(), **keywords)


def heads(G: int, **keywords: Any) -> Any:
    return lambda: ops.cross_attn(*inputs(G=G), **keywords)


REFUSED = {
    "causal": (wrong(is_causal=True), ValueError, r"is_causal must be False, got True; give attn_"),
    "causal int": (wrong(is_causal=1), TypeError, "is_causal must be a bool, got int"),
    "gqa int": (wrong(enable_gqa=0), TypeError, "enable_gqa must be a bool, got int"),
    "dropout": (wrong(dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout kind": (wrong(dropout_p="x"), TypeError, "dropout_p must be a float, got str"),
    "dropout nan": (wrong(dropout_p=float("nan")), ValueError, "dropout_p must be finite"),
    "mask kind": (wrong(attn_mask=[True]), TypeError, "attn_mask must be a Tensor, got list"),
    "mask dtype": (
        wrong(attn_mask=torch.ones(K, L, dtype=torch.int64)), TypeError,
        r"attn_mask must be bool \(True = takes part\) or float \(added\), got int64",
    ),
    "mask shape": (
        wrong(attn_mask=torch.ones(L, K)), ValueError,
        r"attn_mask must broadcast to \[B, H, K, L\] = \[3, 4, 5, 7\], got \[7, 5\]",
    ),
    "mask rank": (wrong(attn_mask=torch.ones(1, 1, 1, K, L)), ValueError, "got .1, 1, 1, 5, 7"),
    "mask device": (wrong(attn_mask=torch.ones(L, device="meta")), ValueError, "must be on cpu"),
    "fewer heads": (heads(2), ValueError, "must have the 4 heads of query, got 2; enable_gqa=True"),
    "other heads": (heads(3), ValueError, r"key must be \[B\|1, H, L, d\] = \[3\|1, 4, 7, 6\]"),
    "groups": (heads(3, enable_gqa=True), ValueError, "heads that divide the 4 of query, got 3"),
    "three dimensions": (
        lambda: ops.cross_attn(*(t[0] for t in inputs())), ValueError,
        r"query must have 4 dimensions \[B\|1, H, K, d\], got \[4, 5, 6\]; unsqueeze\(1\) for one",
    ),
    "two dimensions": (
        lambda: ops.cross_attn_weights(inputs()[0], torch.zeros(2, 3)), ValueError,
        r"key must have 4 dimensions \[B\|1, H, L, d\], got \[2, 3\]$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert str(raised.value).startswith("cross_attn")
    assert "\n" not in str(raised.value)


def test_groups_and_widths_by_every_implementation(impl, device, runnable):
    runnable("cross_attn", torch.float32, 8)
    query, key, value = (
        tensor.detach().to(device).requires_grad_()
        for tensor in inputs(2, d + 2, dtype=torch.float32)
    )
    columns = bools(B, 1, 1, L).to(device)
    found = ops.cross_attn(query, key, value, attn_mask=columns, enable_gqa=True, impl=impl)
    wanted = sdpa(query, key, value, columns, enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), [query, key, value]),
        torch.autograd.grad(wanted.sin().sum(), [query, key, value]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
