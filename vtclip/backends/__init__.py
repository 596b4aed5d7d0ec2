# SPDX-License-Identifier: Apache-2.0
"""Adaptors from the operators to their implementations; each loads its own on first use."""
