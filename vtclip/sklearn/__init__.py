# SPDX-License-Identifier: Apache-2.0
"""Methods as scikit-learn classifiers over features; needs `pip install 'vtclip[sklearn]'`."""

try:
    import sklearn as _sklearn
except ImportError:
    raise ImportError(
        "vtclip.sklearn needs scikit-learn, which is not installed: pip install 'vtclip[sklearn]'"
    ) from None

from vtclip.sklearn.estimator import FewShotClassifier as FewShotClassifier

del _sklearn
__all__ = ["FewShotClassifier"]
