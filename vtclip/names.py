# SPDX-License-Identifier: Apache-2.0
"""Names that users type, each list written once; nothing is imported."""

PENALTIES = ("none", "l1", "mse", "linf")  # of RAda's mask; the position is the code in schemas
