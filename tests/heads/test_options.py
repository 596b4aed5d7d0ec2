# SPDX-License-Identifier: Apache-2.0
"""Options that a head refuses: one line that begins with the head and names option and value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig

TEXT = torch.randn(7, 32, dtype=torch.float64)
ZERO_ROW = torch.cat([TEXT[:2], torch.zeros(1, 32, dtype=torch.float64)])
TIPS = ("tip-adapter", "tip-adapter-f")
NO_SIZES = (0.0, -1.0, math.inf, math.nan)
# method, options, what is said after the name of the head
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mm-adapter", {"ratio": 2.0}, r"ratio must lie in 0\.\.1, got 2.0$"),
    ("mm-adapter", {"num_heads": 5}, "num_heads must divide hidden = 128, got 5$"),
    ("mm-adapter", {"num_heads": 0}, "num_heads must divide hidden = 128, got 0$"),
    ("mm-adapter", {"hidden": 0}, "num_heads must divide hidden = 0, got 4$"),
    ("autoclip", {"entropy": 1.1}, r"entropy must lie in 0\.\.1, got 1.1$"),
    ("autoclip", {"num_views": 0}, "num_views must be at least 1, got 0$"),
    ("autoclip", {"inner_scale": 0.0}, "inner_scale must be finite and above 0, got 0.0$"),
    ("clip-adapter", {"ratio": -0.1}, r"ratio must lie in 0\.\.1, got -0.1$"),
    ("clip-adapter", {"ratio": 1.5}, r"ratio must lie in 0\.\.1, got 1.5$"),
    ("clip-adapter", {"ratio": math.nan}, r"ratio must lie in 0\.\.1, got nan$"),
    ("clip-adapter", {"reduction": 0}, "reduction must be at least 1, got 0$"),
    ("calip", {"beta2": -1.0}, "beta2 must be finite and at least 0, got -1.0"),
    ("calip", {"beta3": math.nan}, "beta3 must be finite and at least 0, got nan"),
    ("calip", {"spatial_dim": 2048}, ".*of width 32, got 2048 .try spatial projected or pooled.$"),
    *(("linear-probe", {"l2": l2}, "l2 must be finite and above 0, got ") for l2 in NO_SIZES),
    *((tip, {"alpha": -1.0}, "alpha must be finite and at least 0, got -1") for tip in TIPS),
    *((tip, {"alpha": math.nan}, "alpha must be finite and at least 0, got nan") for tip in TIPS),
    *((tip, {"beta": 0.0}, "beta must be finite and above 0, got 0") for tip in TIPS),
    *((tip, {"num_support": -1}, "num_support must be at least 0, got -1") for tip in TIPS),
    ("tip-x", {"gamma": -1.0}, "gamma must be finite and at least 0, got -1"),
    ("tip-x", {"slope": math.nan}, "slope must be finite, got nan"),
    *(
        ("proto-clip", {"alpha": a}, r"alpha must lie in 0\.\.1, got")
        for a in (-0.1, 1.1, math.nan)
    ),
    ("proto-clip", {"beta": 0.0}, "beta must be finite and above 0, got 0"),
    *(
        ("proker", {name: size}, f"{name} must be finite and above 0")
        for name in ("alpha", "beta", "lam", "logit_scale")
        for size in NO_SIZES
    ),
    *(("prolip", {"lam": lam}, "lam must be finite and above 0, got ") for lam in NO_SIZES),
    *(("cross-modal", {"l2": l2}, "l2 must be finite and above 0, got ") for l2 in NO_SIZES),
    ("gda", {"alpha": -1.0}, "alpha must be finite and at least 0, got -1"),
    ("lp++", {"num_steps": 0}, "num_steps must be at least 1, got 0"),
    *(("taskres", {"alpha": a}, "alpha must be finite and above 0, got ") for a in NO_SIZES),
    *(
        (method, {"text_length": length}, "text_length must be finite and above 0, got ")
        for method in ("zs-lp", "clap")
        for length in NO_SIZES
    ),
    ("ape", {"gamma": -1.0}, "gamma must be finite and at least 0, got -1"),
    *(
        (method, {name: 1.1}, rf"{name} must lie in 0\.\.1, got 1.1$")
        for method in ("ape", "ape-t")
        for name in ("share", "variance_weight")
    ),
    ("proker", {"lam": 1e-9}, "lam must be at least 1e-06, got 1e-09$"),
    *(
        ("takl", {name: size}, f"{name} must be finite and above 0")
        for name in ("lam", "zero_shot_temperature", "logit_scale")
        for size in NO_SIZES
    ),
    *(
        ("takl", {"beta": b}, "beta must be finite and at least 0")
        for b in (-1.0, math.inf, math.nan)
    ),
    ("takl", {"lam": 1e-9}, "lam must be at least 1e-06, got 1e-09$"),
    ("rada", {"num_heads": 3}, "num_heads must divide D = 32, got 3"),
    ("rada", {"temperature": 0.0}, "temperature must be finite and above 0, got 0"),
    ("rada", {"temperature": math.nan}, "temperature must be finite and above 0"),
    ("rada", {"logit_scale": -1.0}, "logit_scale must be finite and above 0, got -1"),
    ("rada", {"logit_bias": math.inf}, "logit_bias must be finite, got inf"),
    ("rada", {"queries": ("image", "txt")}, ".*image, text, pair, each once, got im"),
    ("rada", {"queries": ()}, ".*each once, got none"),
    ("rada", {"queries": ("pair", "pair")}, ".*each once, got pair, pair"),
    ("rada", {"penalty": "l2"}, "penalty must be one of none, l1, mse, linf"),
    ("rada", {"text": ZERO_ROW}, ".*non-zero length, got length 0.0 in row 2"),
    ("rada", {"text": ZERO_ROW + torch.nan}, ".*got length nan in row 0"),
    ("vtclip", {"num_heads": 5}, "num_heads must divide C = 32, got 5"),
    ("vtclip", {"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ("vtclip", {"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ("vtclip", {"ffn_dim": 0}, "ffn_dim must be at least 1, got 0"),
    ("vtclip", {"spatial_dim": -2}, "spatial_dim must be at least 1, got -2"),
    ("vtclip", {"residual": math.nan}, "residual must be finite, got nan"),
    ("vtclip", {"logit_scale": math.inf}, "logit_scale must be finite, got inf"),
    ("vtclip", {"init": "aligned", "spatial_dim": 8}, ".*C = 32 where init is aligned, got 8"),
    ("vtclip", {"init": "ones"}, "init must be .*, got 'ones'"),
    ("coop", {"class_position": "left"}, "class_position must be end, middle, front, got 'left'"),
    ("coop", {"num_context": 0}, "num_context must be at least 1, got 0"),
    ("coop", {"init": " "}, "init must hold words"),
]


@pytest.mark.parametrize(("method", "options", "message"), REFUSED)
def test_options_are_refused_by_name(method, options, message):
    text = options.get("text", TEXT)
    given = {name: value for name, value in options.items() if name != "text"}
    with pytest.raises(ValueError, match=f"^{HEADS[method].__name__}: {message}") as caught:
        HEADS[method](text, **given)
    assert "\n" not in str(caught.value)


def test_the_learning_rate_of_every_step():
    """warmup "linear": up by equal steps, then a half cosine over the rest, step by step."""
    config = FitConfig(4, lr=8.0, warmup="linear", warmup_epochs=1)
    found = [config.rate(number, 4) for number in range(16)]
    falling = [4 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert found == pytest.approx([2.0, 4.0, 6.0, 8.0, *falling])
    # else: one rate in the first epochs, then a half cosine, epoch by epoch
    config = FitConfig(4, lr=8.0, warmup_epochs=1, warmup_lr=0.5)
    found = [config.rate(number, 2) for number in range(8)]
    falling = [4 * (1 + math.cos(math.pi * i / 4)) for i in range(3)]
    assert found == pytest.approx([0.5, 0.5, *(rate for rate in falling for _ in range(2))])
