# SPDX-License-Identifier: Apache-2.0
"""The loops of the CUDA kernels, compiled for the host with ASan and UBSan, against the reference.

What runs here is the code a block runs on a GPU, with one lane. What does not: the launch, the
warp shuffles, and the half types.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vtclip import ops, testing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("blocks") / "cosine_logits_host"
    source = ROOT / "tests" / "ops" / "cosine_logits_host.cpp"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    done = subprocess.run(
        [compiler, *flags, *sanitize, include, str(source), "-o", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize(
    ("B", "K", "D", "size"), [(3, 5, 17, 1.0), (1, 1, 1, 1.0), (0, 3, 4, 1.0), (2, 7, 33, 1e30)]
)
def test_block_code_matches_the_reference(program, B, K, D, size, per_image):
    image = (size * torch.randn(B, D)).requires_grad_()
    text = (size * torch.randn((B, K, D) if per_image else (K, D))).requires_grad_()
    if B > 1:
        with torch.no_grad():
            image[0] = 0
    d_logits = torch.randn(B, K)
    wide = [t.detach().double().requires_grad_() for t in (image, text)]
    oracle = ops.cosine_logits(*wide, scale=3.0, impl="reference")
    oracle_grads = torch.autograd.grad(oracle, wide, d_logits.double())
    peer = ops.cosine_logits(image, text, scale=3.0, impl="reference")
    peer_grads = torch.autograd.grad(peer, (image, text), d_logits)
    values = torch.cat([t.detach().reshape(-1).double() for t in (image, text, d_logits)]).tolist()
    fed = f"{B} {K} {D} {int(per_image)} 3.0\n" + "\n".join(f"{v:.17g}" for v in values)
    done = subprocess.run([program], input=fed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = torch.tensor([float(line) for line in done.stdout.split()], dtype=torch.float64)
    logits, d_image, d_text = printed.split([B * K, image.numel(), text.numel()])
    factor = testing.GRADIENT_FACTOR
    for actual, oracle64, peer32 in (
        (logits, oracle, peer),
        (d_image, oracle_grads[0], peer_grads[0]),
        (d_text, oracle_grads[1], peer_grads[1]),
    ):
        testing.assert_within_budget(
            actual.reshape(oracle64.shape).float(),
            oracle64.detach(),
            peer32.detach(),
            factor=factor,
        )
