# SPDX-License-Identifier: Apache-2.0
"""What features are asked for, as one value that travels from the caller to the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vtclip.clip import Clip


@dataclass(frozen=True)
class FeatureOptions:
    """How the features of a source are made, and where they are cached.

    spatial: the spatial option by name; None takes the model's default where `need_spatial`, else
        no spatial features.
    prompt: one prompt of an .npz table; tables take no templates.
    templates: None takes the model's or the data set's own; see vtclip.clip.texts.
    augment_passes: augmented views of every training image.
    dtype: of the spatial features; global features are always float32.
    class_names: from the names that a source gives its classes to those that stand for them.
    follow_links: scan linked folders of an image folder too.
    every_class: each class must have an image that can be read; an evaluation does without.
    """

    model: str | Path | Clip = "demo"
    spatial: str | None = None
    need_spatial: bool = False
    prompt: str | None = None
    templates: str | Sequence[Any] | None = None
    augment_passes: int = 0
    class_names: Mapping[str, str] | None = None
    cache_dir: str | Path | None = None
    device: str | torch.device = "cpu"
    progress: bool = True
    dtype: str = "float16"
    batch_size: int = 64
    follow_links: bool = False
    every_class: bool = True

    @property
    def spatial_option(self) -> str | None:
        """The spatial option to extract with; "default" leaves it to the model."""
        return self.spatial or ("default" if self.need_spatial else None)


@dataclass(frozen=True)
class Draw:
    """Which images of a data set are drawn for training (vtclip.data.coop_sampling).

    pool: the whole training list instead of a draw, and no validation images.
    """

    shots: int = 0
    seed: int = 1
    pool: bool = False
