# SPDX-License-Identifier: Apache-2.0
"""A fitted adapter with its image encoder: pictures in, classes and probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from PIL import Image
from torch import Tensor

from .adapter import CONFIG, TENSORS, Adapter, check_weights, load_adapter, save_adapter
from .choices import index_of
from .data.images import open_image
from .encoders import ENCODERS, load_encoders, saved_encoders
from .explain import side_by_side, to_image
from .settings import choose_device

if TYPE_CHECKING:
    from .clip import Clip

Picture = str | Path | Image.Image | Tensor
"""A path, a PIL image, or a tensor [3, H, W] that went through the model's own preprocessing."""


class Prediction(NamedTuple):
    label: str
    probability: float


class Classifier:
    """Predicts with a run's adapter; probabilities are softmax(logits / temperature)."""

    def __init__(self, adapter: Adapter, clip: Clip, device: torch.device) -> None:
        check_weights(adapter, clip.weights_digest, clip.name)
        self.adapter = adapter
        self.clip = clip
        self.device = device

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> Classifier:
        """The adapter in the folder `path` with the image encoder it was fitted on.

        `model` names another place of the same weights (see vtclip.clip); others are refused.
        """
        where = choose_device(device)
        adapter = load_adapter(path, device=where)
        if adapter.features.get("weights_digest") is None:
            raise ValueError(
                f"{path} was fitted on a table of features and has no image encoder; "
                "it can be evaluated on features, not on images"
            )
        return cls(adapter, load_encoders(path, adapter, model, where), where)

    @classmethod
    def from_pretrained(
        cls, repo_or_folder: str | Path, *, device: str | torch.device | None = None
    ) -> Classifier:
        """`load` for a folder; anything else names a hub repository that holds the adapter."""
        if Path(repo_or_folder).expanduser().is_dir():
            return cls.load(repo_or_folder, device=device)
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(repo_or_folder), allow_patterns=[TENSORS, CONFIG, ENCODERS])
        return cls.load(folder, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all that `from_pretrained` needs.

        That is adapter.safetensors and adapter_config.json, and encoders.safetensors where the
        encoders were trained too.
        """
        folder = Path(folder).expanduser()
        if self.adapter.features.get("encoders") is None:
            save_adapter(folder, self.adapter)
            return
        with saved_encoders(folder, self.clip):
            save_adapter(folder, self.adapter)

    @property
    def class_names(self) -> list[str]:
        return self.adapter.class_names

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: Picture, topk: int = 5
    ) -> list[Prediction]: ...
    @overload
    def predict(self, images: Sequence[Picture], topk: int = 5) -> list[list[Prediction]]: ...

    def predict(
        self, images: Picture | Sequence[Picture], topk: int = 5
    ) -> list[Prediction] | list[list[Prediction]]:
        """The min(topk, K) most probable classes, best first: of one image, or of each in a list.

        A tensor [B, 3, H, W] counts as a list of B images.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        one = isinstance(images, (str, Path, Image.Image))
        one = one or (isinstance(images, Tensor) and images.ndim == 3)
        given: Any = images
        pictures: list[Any] = [given] if one else list(given)
        found = []
        for start in range(0, len(pictures), 64):
            pixels = torch.stack([self._pixels(one) for one in pictures[start : start + 64]])
            best = self.probabilities(pixels).topk(min(topk, len(self.class_names)), dim=1)
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = [self.class_names[k] for k in labels]
                found.append([Prediction(*pair) for pair in zip(names, values, strict=True)])
        return found[0] if one else found

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, H, W] -> probabilities [B, K] on the CPU."""
        image, spatial = self._encode(pixels)
        head = self.adapter.head
        logits: Tensor = head(image, spatial) if head.needs_spatial else head(image)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("predict: logits must be finite, got NaN or infinity")
        return (logits.double() / (self.adapter.temperature or 1.0)).softmax(dim=1).cpu()

    def explain(
        self, image: str | Path | Image.Image, class_name: str | None = None
    ) -> Image.Image:
        """The image beside what the model saw, under the attention of one class (the predicted)."""
        head = self.adapter.head
        if not hasattr(head, "attention"):
            raise ValueError(f"method {head.method} has no attention to show; fit with vtclip")
        k = None if class_name is None else index_of(class_name, self.class_names)
        picture = image if isinstance(image, Image.Image) else open_image(image)
        pixels = self.clip.preprocess(picture)
        probability = self.probabilities(pixels[None])[0]
        k = int(probability.argmax()) if k is None else k
        attention: Any = head.attention
        weights = attention(self._encode(pixels[None])[1])[0, k].cpu()
        cfg = self.clip.preprocess_cfg
        seen = to_image(pixels, cfg["mean"], cfg["std"])
        caption = f"{self.class_names[k]}  {100 * float(probability[k]):.1f} %"
        return side_by_side(picture, seen, weights, caption)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        spatial = self.adapter.features["spatial"] if self.adapter.head.needs_spatial else None
        return self.clip.encode_image(pixels.to(self.device), spatial)

    def _pixels(self, picture: Any) -> Tensor:
        if isinstance(picture, Tensor):
            if picture.ndim != 3:
                raise ValueError(f"predict: a tensor must be [3, H, W], got {list(picture.shape)}")
            return picture
        if isinstance(picture, (str, Path)):
            picture = open_image(picture)
        elif not isinstance(picture, Image.Image):
            kind = type(picture).__name__
            raise TypeError(f"predict: an image must be a path, PIL image or tensor, got {kind}")
        return self.clip.preprocess(picture)
