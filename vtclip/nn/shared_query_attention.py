# SPDX-License-Identifier: Apache-2.0
"""`SharedQueryAttention`: learned queries that attend to the tokens of every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtclip.ops import cross_attn, cross_attn_weights


def _expect_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"SharedQueryAttention: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"SharedQueryAttention: {name} must be at least 1, got {value}")


class SharedQueryAttention(nn.Module):
    """num_queries learned queries, shared by all images, that attend to each image's tokens.

        Q = query W_q^T + b_q       K_b = tokens_b W_k^T + b_k       V_b = tokens_b W_v^T + b_v
        head_bh = softmax(Q_h K_bh^T / sqrt(dim / heads)) V_bh
        out_b = concat_h(head_bh) W_o^T + b_o

    The multi-head attention of Vaswani et al. 2017 (arXiv 1706.03762, section 3.2.2) with learned
    vectors for its queries: the seed vectors of Set Transformer's pooling (arXiv 1810.00825,
    section 3.2), the latents of Perceiver's first cross-attention (arXiv 2103.03206, section 3.1),
    the queries of BLIP-2's Q-Former (arXiv 2301.12597, section 3.1). Norms, residuals and
    feed-forward layers around it are yours to add.

    Equal to `nn.MultiheadAttention` with the queries expanded to the batch, but they are projected
    once, neither expanded nor copied, and their gradient is summed over the images in the kernel.

    Args:
        num_queries: K, at least 1.
        dim: width of queries and outputs, a multiple of heads.
        heads: H, at least 1.
        token_dim: width C of the tokens, dim by default.
        dropout: probability in [0, 1) with which a weight is dropped in training. Above 0 training
            runs through the reference, as `ops.cross_attn` says, and stores weights [B, H, K, L].
        bias: whether the four projections have biases.
        out_proj: False leaves the heads side by side, without W_o and b_o.
        device, dtype: of the parameters, "meta" too (`to_empty`, then `reset_parameters`).

    Parameters: query [K, dim]; q_proj, k_proj, v_proj and out_proj, each with a weight [out, in]
    and, with biases, a bias. These are the names in the state dict.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value, in one line.
    """

    def __init__(
        self,
        num_queries: int,
        dim: int,
        heads: int,
        *,
        token_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        out_proj: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        token_dim = dim if token_dim is None else token_dim
        counts = {"num_queries": num_queries, "dim": dim, "heads": heads, "token_dim": token_dim}
        for name, count in counts.items():
            _expect_count(name, count)
        if dim % heads:
            raise ValueError(
                f"SharedQueryAttention: dim must be a multiple of heads = {heads}, got {dim}"
            )
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"SharedQueryAttention: dropout must be in [0, 1), got {dropout}")
        self.num_queries, self.dim, self.heads, self.token_dim = num_queries, dim, heads, token_dim
        self.dropout = float(dropout)
        self.query = nn.Parameter(torch.empty(num_queries, dim, device=device, dtype=dtype))
        self.q_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(token_dim, dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(token_dim, dim, bias=bias, device=device, dtype=dtype)
        self.out_proj: nn.Linear | None = None
        if out_proj:
            self.out_proj = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries from a normal distribution of deviation 0.02; projections as Glorot, biases 0."""
        nn.init.normal_(self.query, std=0.02)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """What the queries read from each image.

        Args:
            tokens: [B, L, C].
            key_mask: [B|1, L] bool, True = the token takes part, as in `ops.cross_attn`.
            key_padding_mask: [B|1, L] bool, True = padding, the opposite, as in
                `nn.MultiheadAttention`. One of the two at most.
            attn_mask: broadcasts to [B, H, K, L]; bool, True = takes part, or floats that are
                added to the scores, as in `ops.cross_attn` and
                `F.scaled_dot_product_attention`; `nn.MultiheadAttention` has bools the other way.

        Returns:
            [B, K, dim]. An image without a visible token, or L = 0, reads zeros: its rows are the
            bias of out_proj, and its tokens get no gradient.

        Raises:
            TypeError, ValueError: as `ops.cross_attn`.
        """
        key = self._heads_of(self.k_proj, tokens)
        value = self._heads_of(self.v_proj, tokens)
        out = cross_attn(
            self._queries(), key, value, key_mask=_visible(key_mask, key_padding_mask),
            attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0,
        )  # [B, H, K, d]  # fmt: skip
        side_by_side = out.transpose(1, 2).flatten(2)
        return side_by_side if self.out_proj is None else self.out_proj(side_by_side)

    def weights(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The maps [B, H, K, L] of `forward`, without dropout; `.mean(1)` averages the heads.

        Rows sum to 1, or are 0 where no token is visible. Arguments and errors as `forward`.
        """
        key = self._heads_of(self.k_proj, tokens)
        visible = _visible(key_mask, key_padding_mask)
        return cross_attn_weights(self._queries(), key, key_mask=visible, attn_mask=attn_mask)

    def load_multihead_attention(self, attention: nn.MultiheadAttention, query: Tensor) -> None:
        """Copies the weights of an `nn.MultiheadAttention` and its queries [K, dim].

        Raises ValueError where its sizes, biases or options (bias_k, add_zero_attn) are not those
        of this module.
        """
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "SharedQueryAttention: attention must have neither bias_k nor add_zero_attn"
            )
        if attention.num_heads != self.heads:
            raise ValueError(
                f"SharedQueryAttention: attention must have {self.heads} heads, "
                f"got {attention.num_heads}"
            )
        given, own = {"query": query, **_projections_of(attention)}, self.state_dict()
        for name in sorted({*given, *own}):
            wanted, got = _shape(own, name), _shape(given, name)
            if wanted != got:
                raise ValueError(f"SharedQueryAttention: {name} must be {wanted}, got {got}")
        self.load_state_dict(given)

    def extra_repr(self) -> str:
        """Sizes, as `repr` shows them."""
        return (
            f"num_queries={self.num_queries}, dim={self.dim}, heads={self.heads}, "
            f"token_dim={self.token_dim}, dropout={self.dropout}"
        )

    def _queries(self) -> Tensor:
        """[1, H, K, d], whatever the batch."""
        projected: Tensor = self.q_proj(self.query)
        return projected.view(self.num_queries, self.heads, self.dim // self.heads).transpose(0, 1)[
            None
        ]

    def _heads_of(self, layer: nn.Linear, tokens: Tensor) -> Tensor:
        """[B, H, L, d]."""
        if tokens.dim() != 3 or tokens.shape[-1] != self.token_dim:
            raise ValueError(
                f"SharedQueryAttention: tokens must be [B, L, {self.token_dim}], "
                f"got {list(tokens.shape)}"
            )
        B, L, _ = tokens.shape
        projected: Tensor = layer(tokens)
        return projected.view(B, L, self.heads, self.dim // self.heads).transpose(1, 2)


def _visible(key_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """The key mask of either."""
    if key_padding_mask is None:
        return key_mask
    if key_mask is not None:
        raise ValueError(
            "SharedQueryAttention: key_mask and key_padding_mask are opposites, give one of them"
        )
    if key_padding_mask.dtype != torch.bool:
        dtype = str(key_padding_mask.dtype).removeprefix("torch.")
        raise TypeError(
            f"SharedQueryAttention: key_padding_mask must be bool (True = padding), got {dtype}"
        )
    return ~key_padding_mask


def _shape(state: dict[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None


def _projections_of(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The state of q_proj, k_proj, v_proj and out_proj."""
    names = "q_proj", "k_proj", "v_proj"
    if attention.kdim == attention.vdim == attention.embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    state = {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}
    if attention.in_proj_bias is not None:
        biases = attention.in_proj_bias.chunk(3)
        state |= {f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)}
    state |= {f"out_proj.{name}": value for name, value in attention.out_proj.state_dict().items()}
    return {name: value.detach() for name, value in state.items()}
