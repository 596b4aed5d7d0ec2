# SPDX-License-Identifier: Apache-2.0
"""vtclip's kernels under the PTX executor: hooks, cases, coverage, mutants (docs/ptx.md)."""
