# SPDX-License-Identifier: Apache-2.0
"""The bundled demonstration: drawn scenes, the small CLIP trained on them, and the run on both."""
