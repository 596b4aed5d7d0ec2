# SPDX-License-Identifier: Apache-2.0
"""Another project's attention block, with its scaled_dot_product_attention replaced.

python docs/examples/drop_in_cross_attn.py                         # under a minute
torchrun --nproc-per-node 2 docs/examples/drop_in_cross_attn.py    # DDP: half of the images each
"""

import time

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from vtclip import ops
from vtclip.nn import SharedQueryAttention

B, K, L, DIM, HEADS = 32, 128, 196, 256, 4  # images, queries, tokens of an image, width, heads


class Pooling(nn.Module):
    """Learned queries that read the tokens of an image; many projects have such a class."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.query = fused, nn.Parameter(torch.randn(K, DIM))
        self.q, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(3))
        self.k = nn.Linear(DIM, DIM, bias=False)  # a bias of the keys changes no weight

    def forward(self, tokens):
        projected = self.q(self.query)[None], self.k(tokens), self.v(tokens)
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in projected)
        if self.fused:
            out = ops.cross_attn(q, k, v)  # the line that changes; q stays [1, H, K, d]
        else:
            out = F.scaled_dot_product_attention(q.expand(len(tokens), -1, -1, -1), k, v)
        return self.out(out.transpose(1, 2).flatten(2))


def step(model, tokens):
    model.zero_grad()
    (out := model(tokens)).square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


def compare(what, found, wanted, limit):
    pairs = zip(found, wanted, strict=True)  # differences as shares of the largest value
    worst = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    print(f"{what}: differs by {worst:.1e}, {limit:.0e} is allowed\n", end="", flush=True)
    if not worst < limit:
        raise SystemExit(1)


torch.set_num_threads(1)
torch.manual_seed(0)
theirs, ours, tokens = Pooling(fused=False), Pooling(fused=True), torch.randn(B, L, DIM)
ours.load_state_dict(theirs.state_dict())
expected = step(theirs, tokens)
if dist.is_torchelastic_launched():  # by torchrun
    dist.init_process_group("gloo")
    found = step(nn.parallel.DistributedDataParallel(ours), tokens.chunk(2)[dist.get_rank()])
    compare(f"DDP, gradients of process {dist.get_rank()}", found[1:], expected[1:], 1e-4)
    dist.destroy_process_group()
    raise SystemExit
compare("eager, outputs and gradients", step(ours, tokens), expected, 1e-4)
compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
compare("compiled, outputs and gradients", step(compiled, tokens), expected, 1e-4)
module, multihead = SharedQueryAttention(K, DIM, HEADS), nn.MultiheadAttention(DIM, HEADS)
module.load_multihead_attention(multihead, theirs.query)
with torch.no_grad():
    wanted = multihead(theirs.query[:, None].expand(-1, B, -1), *[tokens.transpose(0, 1)] * 2)[0]
    compare("nn.SharedQueryAttention", [module(tokens)], [wanted.transpose(0, 1)], 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        compare("bfloat16 autocast, output", [ours(tokens)], [theirs(tokens)], 0.05)
for name, model in (("sdpa", theirs), ("cross_attn", ours)):
    start = time.process_time()
    [step(model, tokens) for _ in range(9)]
    mean = (time.process_time() - start) / 9
    print(f"{name}: {1e3 * mean:.1f} ms of one thread, forward and backward, mean of 9")
