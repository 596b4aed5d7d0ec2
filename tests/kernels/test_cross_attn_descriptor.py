# SPDX-License-Identifier: Apache-2.0
"""The variant with tensor descriptors gives what cross_attn_fwd gives, and no op calls it."""

from pathlib import Path

import pytest
import torch

from vtclip.kernels import cross_attn
from vtclip.kernels import cross_attn_descriptor as variant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("B", "H", "K", "L", "d"),
    [(2, 2, 4, 8, 16), (3, 2, 17, 49, 24), (5, 1, 40, 130, 8), (1, 1, 1, 1, 8), (2, 1, 3, 64, 128)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity(B, H, K, L, d, dtype, device):
    query = torch.randn(1, H, K, d, device=device).to(dtype)
    # as a projection to keys and values leaves them: strided, [B, L, 2, H, d] in memory
    packed = torch.randn(B, L, 2, H, d, device=device).to(dtype)
    key, value = packed.transpose(1, 3).unbind(2)
    assert key.shape == (B, H, L, d)
    expected = cross_attn.cross_attn_fwd(query, key, value, None, 0.3)
    found = variant.cross_attn_descriptor_fwd(query, key, value, 0.3)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        # the same sums; shrunk by exp2(-inf) once more where all columns are in one tile
        assert (a - b).abs().max() <= 2 * torch.finfo(a.dtype).eps * b.abs().max()


def test_what_descriptors_cannot_describe():
    query, key = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 6, 8)
    rows = torch.randn(2, 1, 8, 6).transpose(2, 3)
    odd = torch.randn(2, 1, 6, 9)[..., :8]
    for bad in (rows, odd, key[:0], key[:1].expand(2, 1, 6, 8)):
        assert not variant.usable(bad)
        with pytest.raises(NotImplementedError, match="16-byte aligned"):
            variant.cross_attn_descriptor_fwd(query, bad, key, 1.0)
    with pytest.raises(NotImplementedError, match="shared query"):
        variant.cross_attn_descriptor_fwd(torch.randn(2, 1, 4, 8), key, key, 1.0)


def test_no_default_path_takes_it():
    users = [
        path
        for folder in ("vtclip", "kernels")
        for path in (ROOT / folder).glob("**/*.py")
        if "cross_attn_descriptor" in path.read_text()
    ]
    assert {path.name for path in users} == {"cross_attn_descriptor.py"}
