# SPDX-License-Identifier: Apache-2.0
"""Training: rows, losses, loops, and what validation images choose; no files but checkpoints."""
