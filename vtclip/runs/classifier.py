# SPDX-License-Identifier: Apache-2.0
"""A fitted adapter with its image encoder: pictures in, classes and probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast, overload

import torch
from PIL import Image
from torch import Tensor

from vtclip.data.decode import ImageError, as_rgb, open_image
from vtclip.data.threads import ahead, decode_pool
from vtclip.heads import VTCLIP
from vtclip.machine import BatchSize, choose_device
from vtclip.names import index_of
from vtclip.runs.adapter import CONFIG, TENSORS, Adapter, check_weights, load_adapter
from vtclip.runs.encoders import ENCODERS, load_encoders, save_with_encoders
from vtclip.runs.heat_map import side_by_side, to_image

if TYPE_CHECKING:
    from vtclip.clip import Clip

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
        self._at_a_time = BatchSize()

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
        """Write the adapter's two files, and encoders.safetensors if the encoders were trained."""
        save_with_encoders(Path(folder).expanduser(), self.adapter, lambda: self.clip)

    @property
    def class_names(self) -> list[str]:
        return self.adapter.class_names

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: Picture, topk: int = 5, *, batch_size: int = 64
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self, images: Iterable[Picture], topk: int = 5, *, batch_size: int = 64
    ) -> list[list[Prediction]]: ...

    def predict(
        self, images: Picture | Iterable[Picture], topk: int = 5, *, batch_size: int = 64
    ) -> list[Prediction] | list[list[Prediction]]:
        """The min(topk, K) most probable classes, best first: of one image, or of each of many.

        images: one, or any iterable of them, mixed as you like; a tensor [B, 3, H, W] counts as B
            images, an iterable without any gives []. The first unreadable one is an ImageError.
        batch_size: images at a time through the model; files are decoded meanwhile, in threads.
        """
        single = isinstance(images, (str, Path, Image.Image))
        single = single or (isinstance(images, Tensor) and images.ndim == 3)
        pictures = cast("Iterable[Picture]", [images] if single else images)
        predictions = []
        for best in self.predict_each(pictures, topk, batch_size=batch_size):
            if isinstance(best, ImageError):
                raise best
            predictions.append(best)
        return predictions[0] if single else predictions

    def predict_each(
        self, images: Iterable[Picture], topk: int = 5, *, batch_size: int = 64
    ) -> Iterator[list[Prediction] | ImageError]:
        """`predict` of each image in turn; an unreadable one gives its ImageError, not a stop.

        Takes from `images` what two batches need and no more, so that a generator of any length
        does.
        """
        for name, value in ("topk", topk), ("batch_size", batch_size):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(images, Tensor) and images.ndim != 4:
            wish = "[3, H, W] or [B, 3, H, W]"
            raise ValueError(f"predict: a tensor must be {wish}, got {list(images.shape)}")
        return self._predicted(images, min(topk, len(self.class_names)), batch_size)

    def _predicted(
        self, images: Iterable[Picture], topk: int, batch_size: int
    ) -> Iterator[list[Prediction] | ImageError]:
        with decode_pool() as pool:
            loaded = ahead(pool, self._pixels, map(_in_memory, images), 2 * batch_size)
            while batch := list(islice(loaded, batch_size)):
                pixels = [item for item in batch if isinstance(item, Tensor)]
                best = iter(self._best(torch.stack(pixels), topk) if pixels else [])
                yield from (item if isinstance(item, ImageError) else next(best) for item in batch)

    def _best(self, pixels: Tensor, topk: int) -> list[list[Prediction]]:
        """pixels [B, 3, H, W] -> the topk classes of each."""
        best = self.probabilities(pixels).topk(topk, dim=1)
        return [
            [Prediction(self.class_names[k], value) for k, value in zip(row, values, strict=True)]
            for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, H, W] -> probabilities [B, K] on the CPU.

        Fewer than B images at a time where memory does not hold as many.
        """
        return torch.cat(self._at_a_time.map(self._probabilities, pixels))

    def _probabilities(self, pixels: Tensor) -> Tensor:
        image, spatial = self.encode(pixels)
        logits = self.adapter.head(image, spatial)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("predict: logits must be finite, got NaN or infinity")
        return (logits.double() / (self.adapter.temperature or 1.0)).softmax(dim=1).cpu()

    def explain(
        self, image: str | Path | Image.Image, class_name: str | None = None
    ) -> Image.Image:
        """The image next to the model's view of it, under the attention of one class."""
        head = self.adapter.head
        if not isinstance(head, VTCLIP):
            raise ValueError(f"method {head.method} has no attention to show; fit with vtclip")
        k = None if class_name is None else index_of(class_name, self.class_names)
        picture = image if isinstance(image, Image.Image) else open_image(image)
        pixels = self.clip.preprocess(picture)
        probability = self.probabilities(pixels[None])[0]
        k = int(probability.argmax()) if k is None else k
        _, spatial = self.encode(pixels[None])
        weights = head.attention(cast("Tensor", spatial))[0, k].cpu()
        cfg = self.clip.preprocess_cfg
        model_view = to_image(pixels, cfg["mean"], cfg["std"])
        caption = f"{self.class_names[k]}  {100 * float(probability[k]):.1f} %"
        return side_by_side(picture, model_view, weights, caption)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Preprocessed pixels [B, 3, H, W] -> image [B, C], and spatial if the head reads it."""
        spatial = self.adapter.features["spatial"] if self.adapter.head.needs_spatial else None
        return self.clip.encode_image(pixels.to(self.device), spatial)

    def _pixels(self, picture: object) -> Tensor | ImageError:
        """One image as the model takes it, [3, H, W] float32 on the CPU."""
        if isinstance(picture, Tensor):
            return self._checked(picture)
        if isinstance(picture, ImageError):
            return picture
        if not isinstance(picture, (str, Path, Image.Image)):
            kind = type(picture).__name__
            raise TypeError(f"predict: an image must be a path, PIL image or tensor, got {kind}")
        try:
            if isinstance(picture, Image.Image):
                return self.clip.preprocess(as_rgb(picture))
            return self.clip.preprocess(open_image(picture))
        except ImageError as error:
            return error

    def _checked(self, pixels: Tensor) -> Tensor:
        size = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if list(pixels.shape) != [3, height, width]:
            wish, fact = f"[3, {height}, {width}]", list(pixels.shape)
            raise ValueError(f"predict: a tensor must be {wish}, preprocessed, got {fact}")
        if not pixels.is_floating_point():
            raise TypeError(f"predict: a tensor must be floating-point, got {pixels.dtype}")
        return pixels.detach().to("cpu", torch.float32)


def _in_memory(picture: object) -> object:
    """A PIL image that was only opened reads its file here: no two threads may do so at once."""
    if isinstance(picture, Image.Image):
        try:
            picture.load()
        except Exception as error:  # decoders raise many kinds for damaged data
            name = getattr(picture, "filename", "") or "a PIL image"
            return ImageError(name, f"damaged: {' '.join(str(error).split())[:160]}")
    return picture
