# SPDX-License-Identifier: Apache-2.0
"""`vtclip tune`: the tiles of Triton kernels timed on the GPU at hand, and the table of winners."""
