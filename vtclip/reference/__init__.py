# SPDX-License-Identifier: Apache-2.0
"""The specification of every operator: plain torch, any device and dtype, differentiable."""
