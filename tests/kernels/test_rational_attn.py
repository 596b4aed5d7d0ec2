# SPDX-License-Identifier: Apache-2.0
"""rational_attn_fwd and rational_attn_bwd: what the operators' tests do not see.

Those compare out and every gradient with the reference, in every dtype, over sizes, strides and
subsets of the queries. Here: the saved tensors, the boundary between one tile and several,
launches, layout, repeatability.
"""

import itertools

import pytest
import torch
from kernel_checks import drawing

KINDS = ("image", "text", "pair")
NAMES = ("d_image", "d_text", "d_pair", "d_key", "d_value")


def problem(B, H, K, d, *, kinds=KINDS, shared=True, dtype=torch.float32, device="cpu"):
    draw = drawing(device, dtype)
    drawn = draw(B, H, 1, d), draw(1 if shared else B, H, K, d), draw(B, H, K, d)
    queries = [query if kind in kinds else None for kind, query in zip(KINDS, drawn, strict=True)]
    return [*queries, draw(B, H, K, d), draw(B, H, K, d)], draw(B, H, K, d)


def oracle(tensors, scale):
    """out, parts, image_out, stats in float64 with every map."""
    image, text, pair, key, value = (None if t is None else t.cpu().double() for t in tensors)
    B, H, K, _ = key.shape
    parts, rows, image_out = [], [], key.new_zeros(0, H, key.shape[3])
    stats = key.new_zeros(3, 2, B, H)
    for i, query in enumerate((image, text, pair)):
        if query is None:
            continue
        scores = (scale * query @ key.transpose(-1, -2)).expand(B, H, -1, K).flatten(2)
        stats[i, 0] = scores.amax(-1)
        stats[i, 1] = (scores - stats[i, 0, :, :, None]).exp().sum(-1)
        weights = scores.softmax(-1).view(B, H, -1, K)
        if i == 0:
            image_out = (weights @ value)[:, :, 0]
            rows.append(image_out[:, :, None].expand(value.shape))
        else:
            parts.append(K * weights @ value)
            rows.append(parts[-1])
    parts = torch.stack(parts) if parts else key.new_zeros(0, *value.shape)
    return torch.stack(rows).mean(0), parts, image_out, stats


def run(tensors, grad_out, scale=0.4):
    from vtclip.kernels import rational_attn

    out, *kept = rational_attn.rational_attn_fwd(*tensors, scale, True)
    grads = rational_attn.rational_attn_bwd(grad_out, *tensors, *kept, scale)
    return [out, *kept], apart(*grads)


def apart(d_image, d_text, d_pairs):
    """The five gradients of a launcher's three; of an absent pair query [0]."""
    *pair, key, value = d_pairs.permute(2, 0, 3, 1, 4).unbind()
    return d_image, d_text, *(pair or [d_pairs.new_empty(0)]), key, value


def relative(actual, wanted):
    return ((actual.cpu().double() - wanted).abs().max() / wanted.abs().max()).item()


SUBSETS = [kinds for n in (1, 2, 3) for kinds in itertools.combinations(KINDS, n)]


@pytest.mark.parametrize("kinds", SUBSETS, ids="-".join)
@pytest.mark.parametrize("K", [9, 70])
def test_saved_tensors(K, kinds, device):
    tensors, grad_out = problem(2, 2, K, 12, kinds=kinds, device=device)
    outputs, grads = run(tensors, grad_out)
    # sums of K * K float32 terms, scores of up to about 8: 64 roundings are ample
    for name, actual, wanted in zip(
        ("out", "parts", "image_out", "stats"), outputs, oracle(tensors, 0.4), strict=True
    ):
        assert actual.shape == wanted.shape, name
        if wanted.numel():
            assert relative(actual, wanted) < 64 * 2**-24, name
    absent = [i for i, query in enumerate(tensors[:3]) if query is None]
    assert (outputs[3][absent] == 0).all()
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        assert list(grad.shape) == ([0] if tensor is None else list(tensor.shape)), NAMES[i]


@pytest.mark.parametrize("K", [15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_edges_of_tiles(K, device):
    """The image's row in the last tile, alone in one, and where all tiles are full."""
    tensors, grad_out = problem(1, 1, K, 4, device=device)
    outputs, grads = run(tensors, grad_out)
    leaves = [tensor.cpu().double().requires_grad_() for tensor in tensors]
    wanted = oracle(leaves, 0.4)[0]
    assert relative(outputs[0], wanted.detach()) < 64 * 2**-24
    expected = torch.autograd.grad(wanted, leaves, grad_out.cpu().double())
    for name, actual, want in zip(NAMES, grads, expected, strict=True):
        # of a saturated map dA - c cancels: as the operators' tests, room for that
        assert relative(actual, want) < 512 * 2**-24, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("K", [20, 70])
def test_rows_of_little_weight_keep_their_precision(K, dtype, device):
    """A row far below the map's maximum is stored as an average before it is weighed."""
    tensors, grad_out = problem(1, 1, K, 8, kinds=("pair",), dtype=dtype, device=device)
    tensors[2][:, :, 1:] = 0.0  # all rows but one: equal scores, below the first row's by `gap`
    tensors[2][:, :, 0] = 1.0
    tensors[3][:, :, :, 1:] = 0.0
    tensors[3][:, :, :, 0] = 12.0
    outputs, _ = run(tensors, grad_out, scale=1.0)
    small = outputs[1][0, 0, 0, 1:].cpu().double()
    want = oracle(tensors, 1.0)[1][0, 0, 0, 1:]
    assert 0 < want.abs().max() < 1e-3
    steps = 2 * torch.finfo(dtype).eps * want.abs().max() + 2 * torch.finfo(dtype).tiny
    assert (small - want).abs().max() <= steps


def test_fp16_values_do_not_overflow_before_they_are_weighed(device):
    tensors, grad_out = problem(1, 1, 70, 8, kinds=("text",), dtype=torch.float16, device=device)
    tensors[4].fill_(6e4)
    tensors[1].zero_()
    outputs, _ = run(tensors, grad_out * 1e-4)
    assert (outputs[0] == 6e4).all()


@pytest.mark.parametrize(("K", "gradient", "value"), [(16, 256.0, 128.0), (1000, 16.0, 64.0)])
def test_fp16_gradients_of_a_scaled_loss_do_not_overflow(K, gradient, value, device):
    """A row that two keys share alike: A is K / 2 there and A (dA - c) beyond float16."""
    tensors, grad_out = problem(
        1, 1, K, 8, kinds=("text", "pair"), dtype=torch.float16, device=device
    )
    _, text, pair, key, values = tensors
    for query in text, pair:
        query *= 0.001
        query[0, 0, 0] = 0.0
        query[0, 0, 0, 0] = 0.1
    key *= 0.05
    key[0, 0, :2, 0] = 300.0
    key[0, 0, :2, 1] = torch.tensor([0.05, -0.05])
    grad_out[0, 0, 0] = 0.0
    grad_out[0, 0, 0, 0] = gradient
    values[0, 0, :2] = 0.0
    values[0, 0, :2, 0] = torch.tensor([value, -value])
    assert K / 2 * gradient * value > torch.finfo(torch.float16).max
    _, grads = run(tensors, grad_out, scale=1.0)
    leaves = [None if t is None else t.cpu().double().requires_grad_() for t in tensors]
    wanted = oracle(leaves, 1.0)[0]
    expected = torch.autograd.grad(wanted, leaves[1:], grad_out.cpu().double())
    for name, actual, want in zip(NAMES[1:], grads[1:], expected, strict=True):
        assert actual.isfinite().all(), name
        assert relative(actual, want) < 8 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("K", [9, 40])
def test_out_is_the_same_without_parts(K, device):
    from vtclip.kernels.rational_attn import rational_attn_fwd

    tensors, _ = problem(2, 2, K, 12, device=device)
    with_parts = rational_attn_fwd(*tensors, 0.4, True)
    out, parts, image_out, stats = rational_attn_fwd(*tensors, 0.4, False)
    assert parts.shape == (0, 2, 2, K, 12)
    assert torch.equal(out, with_parts[0])
    assert torch.equal(image_out, with_parts[2])
    assert torch.equal(stats, with_parts[3])


def test_large_scores_are_remade_exactly(device):
    """Scores of thousands: a maximum that is rounded on its way through `stats` would show."""
    tensors, grad_out = problem(1, 1, 40, 8, kinds=("text", "pair"), device=device)
    for tensor in tensors[1:4]:
        tensor.copy_(tensor.round())  # integers: scores are exact
    outputs, grads = run(tensors, grad_out, scale=256.0)
    assert outputs[3][1:, 0].max() > 2000
    leaves = [None if t is None else t.cpu().double().requires_grad_() for t in tensors]
    wanted = oracle(leaves, 256.0)[0]
    assert relative(outputs[0], wanted.detach()) < 64 * 2**-24
    (d_value,) = torch.autograd.grad(wanted, leaves[4], grad_out.cpu().double())
    # the product of a score and log2 e is rounded: one step of some thousands, within the exponent
    assert relative(grads[4], d_value) < 4096 * 2**-24


def test_negative_and_zero_scales(device):
    for scale in (-0.7, 0.0):
        tensors, grad_out = problem(1, 2, 40, 8, device=device)
        outputs, grads = run(tensors, grad_out, scale=scale)
        leaves = [tensor.cpu().double().requires_grad_() for tensor in tensors]
        wanted = oracle(leaves, scale)[0]
        assert relative(outputs[0], wanted.detach()) < 64 * 2**-24
        expected = torch.autograd.grad(wanted, leaves, grad_out.cpu().double())
        for actual, want in zip(grads, expected, strict=True):
            assert (actual.cpu().double() - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_one_tile_takes_one_launch_forward(device, launches):
    tensors, grad_out = problem(3, 2, 9, 8, device=device)
    with launches() as names:
        run(tensors, grad_out)
    assert names == [
        "rational_attn_fwd_kernel",
        "rational_attn_one_bwd_kernel",
        "sum_partials_kernel",
    ]


def test_several_tiles_launches(device, launches):
    tensors, grad_out = problem(3, 2, 300, 8, device=device)
    with launches() as names:
        run(tensors, grad_out)
    assert names[:5] == [
        "rational_attn_fwd_kernel",
        "rational_attn_combine_kernel",
        "rational_attn_bwd_sums_kernel",
        "rational_attn_bwd_key_kernel",
        "sum_partials_kernel",
    ]
    assert names[5] == "rational_attn_bwd_query_kernel"
    assert len(names) <= 7


@pytest.mark.parametrize("K", [9, 40])
def test_memory_layout(K, device):
    tensors, grad_out = problem(2, 3, K, 8, device=device)
    (out, parts, image_out, stats), grads = run(tensors, grad_out)
    d_image, d_text, *d_pairs = grads
    for tensor in (out, *parts, d_image, d_text):
        assert tensor.transpose(1, 2).is_contiguous()
    packed = torch.stack([grad.transpose(1, 2) for grad in d_pairs], 2)  # [B, K, 3, H, d]
    for i, grad in enumerate(d_pairs):  # one memory for all three
        assert grad.transpose(1, 2).stride() == packed[:, :, i].stride()
        assert grad.data_ptr() == d_pairs[0].data_ptr() + i * packed.stride(2) * grad.itemsize
    assert parts.transpose(2, 3).is_contiguous()
    assert image_out.is_contiguous()
    assert stats.is_contiguous()
    assert image_out.dtype == stats.dtype == torch.float32


def test_an_image_does_not_depend_on_the_others(device):
    """Where no query is shared, a batch is its images, bit by bit."""
    tensors, grad_out = problem(3, 2, 40, 8, shared=False, device=device)
    (out, *_), grads = run(tensors, grad_out)
    (alone, *_), grads_alone = run([t[1:2] for t in tensors], grad_out[1:2])
    assert torch.equal(out[1:2], alone)
    for name, one, other in zip(NAMES, grads, grads_alone, strict=True):
        assert torch.equal(one[1:2], other), name


@pytest.mark.parametrize("axis", ["B", "H", "K", "d", "Kd"])
def test_empty(axis, device):
    sizes = {"B": 2, "H": 2, "K": 3, "d": 4} | dict.fromkeys(axis, 0)
    tensors, grad_out = problem(**sizes, device=device)
    outputs, grads = run(tensors, grad_out)
    assert outputs[0].shape == grad_out.shape
    for tensor, grad in zip(tensors, grads, strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()
    assert outputs[3].isfinite().all()
