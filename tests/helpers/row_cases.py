# SPDX-License-Identifier: Apache-2.0
"""Sizes (B, K, D) at which operators over the rows of images and classes are compared."""

CASES = {
    "ordinary": (4, 7, 64),
    "odd": (3, 17, 59),
    "wide": (2, 3, 1025),
    "many-classes": (2, 131, 16),
    "one-class": (3, 1, 8),
    "one-of-each": (1, 1, 1),
    "no-images": (0, 3, 8),
    "no-classes": (3, 0, 8),
    "no-width": (2, 3, 0),
}
