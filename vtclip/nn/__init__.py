# SPDX-License-Identifier: Apache-2.0
"""Modules for any PyTorch project, built on the operators of `vtclip.ops`."""

from vtclip.nn.shared_query_attention import SharedQueryAttention

__all__ = ["SharedQueryAttention"]
