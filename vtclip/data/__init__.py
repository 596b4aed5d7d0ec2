# SPDX-License-Identifier: Apache-2.0
"""Sources of features and images: folders, feature sets, .npz files, and few-shot splits."""

from vtclip.data.records import Batch, Records
from vtclip.data.sources import open_source
from vtclip.data.splits import Split, few_shot_split

__all__ = ["Batch", "Records", "Split", "few_shot_split", "open_source"]
