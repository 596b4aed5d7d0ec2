# SPDX-License-Identifier: Apache-2.0
"""A fitted adapter with its image encoder: pictures in, classes and probabilities out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, cast, overload

import torch
from PIL import Image
from torch import Tensor

from vtclip.data.decode import ImageError, open_image
from vtclip.data.threads import ahead, decode_pool
from vtclip.heads import VTCLIP
from vtclip.machine import BatchSize, choose_device
from vtclip.names import index_of
from vtclip.runs import multi_label
from vtclip.runs.adapter import CONFIG, TENSORS, Adapter, check_model, load_adapter
from vtclip.runs.answers import UNKNOWN, Answer, Prediction, Rule
from vtclip.runs.encoders import ENCODERS, LORA, load_encoders, save_with_encoders
from vtclip.runs.heat_map import side_by_side, to_image, under_attention
from vtclip.runs.notebook import classifier_html
from vtclip.runs.pictures import Picture, as_pictures, in_memory, rgb_of
from vtclip.runs.together import answer_together, check_together
from vtclip.train.calibration import forward_both

if TYPE_CHECKING:
    from vtclip.clip import Clip


class Decided(NamedTuple):
    """Of B images: logits and evidence [B, K] (vtclip.train.calibration), features image [B, C]."""

    logits: Tensor
    evidence: Tensor
    image: Tensor


def joined(parts: Iterable[Decided]) -> Decided:
    return Decided(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Classifier:
    """Predicts with a run's adapter; probabilities are softmax(logits / temperature).

    Of a run on several labels per image they are sigmoids, one per class (vtclip.train.sigmoid).

    Several threads may call one classifier.
    """

    def __init__(self, adapter: Adapter, clip: Clip, device: torch.device) -> None:
        check_model(adapter, clip)
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

        `model` names another place of the same model (see vtclip.clip); one with other weights,
        architecture or preprocessing is refused.
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
        cls,
        repo_or_folder: str | Path,
        *,
        model: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> Classifier:
        """`load` for a folder; anything else names a hub repository that holds the adapter."""
        if Path(repo_or_folder).expanduser().is_dir():
            return cls.load(repo_or_folder, model=model, device=device)
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            str(repo_or_folder), allow_patterns=[TENSORS, CONFIG, ENCODERS, LORA]
        )
        return cls.load(folder, model=model, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter's two files, and that of the encoders if they were trained."""
        save_with_encoders(Path(folder).expanduser(), self.adapter, lambda: self.clip)

    @property
    def class_names(self) -> list[str]:
        """The K class names, in the order of the columns of `predict_proba` and `logits`."""
        return self.adapter.class_names

    @property
    def classes_(self) -> list[str]:
        """`class_names`, as scikit-learn calls them."""
        return self.class_names

    def __repr__(self) -> str:
        return (
            f"Classifier(method={self.adapter.head.method!r}, classes={len(self.class_names)}, "
            f"model={self.clip.name!r}, device={str(self.device)!r})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: method, model, and the classes."""
        head = self.adapter.head
        facts = [("method", head.method), ("model", self.clip.name), ("device", str(self.device))]
        return classifier_html(facts, self.class_names)

    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        images: Picture,
        topk: int = 5,
        *,
        batch_size: int = 64,
        unknown: float | None = None,
        together: bool = False,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        images: Iterable[Picture],
        topk: int = 5,
        *,
        batch_size: int = 64,
        unknown: float | None = None,
        together: bool = False,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        images: Picture | Iterable[Picture],
        topk: int = 5,
        *,
        batch_size: int = 64,
        unknown: float | None = None,
        together: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The min(topk, K) most probable classes, best first: of one image, or of each of many.

        images: one `Picture`, or any iterable of them, mixed as you like; a tensor [B, 3, H, W] and
            an array [B, H, W, 3] count as B images, an iterable without any gives []. The first
            unreadable one is an ImageError.
        batch_size: images at a time through the model; files are decoded meanwhile, in threads.
        unknown: of images of the run's classes, the share in 0..1 that may be refused as unknown.
            Before the classes of a refused image stands Prediction("unknown", p), where p is its
            p-value, at most `unknown`: see vtclip.train.conformal for what is guaranteed. Below
            1 / (n + 1) for n validation images it is a ValueError, and where the run has none.
        together: decide all images as one batch (vtclip.runs.together): what they look like among
            each other counts, so that an answer changes with the other images of the call. Their
            features and logits are all held. A ValueError with `unknown`.
        """
        pictures, single = as_pictures(images)
        found = []
        for answer in self.answer_each(
            pictures, topk, batch_size=batch_size, unknown=unknown, together=together
        ):
            if isinstance(answer, ImageError):
                raise answer
            refused = [Prediction(UNKNOWN, answer.p_value or 0.0)] if answer.unknown else []
            found.append(refused + answer.predictions)
        return found[0] if single else found

    def predict_sets(
        self,
        images: Picture | Iterable[Picture],
        coverage: float = 0.95,
        *,
        batch_size: int = 64,
    ) -> list[str] | list[list[str]]:
        """The set of classes that holds the true one with probability `coverage`, best first.

        Of one image, or of each of many, as `predict` takes them. A set may be empty; what is
        guaranteed, and why, is in vtclip.train.conformal. Above n / (n + 1) for n validation images
        `coverage` is a ValueError, and where the run has none.
        """
        pictures, single = as_pictures(images)
        found = []
        for answer in self.answer_each(pictures, 1, batch_size=batch_size, coverage=coverage):
            if isinstance(answer, ImageError):
                raise answer
            found.append([one.label for one in answer.set or []])
        return found[0] if single else found

    def predict_proba(
        self,
        images: Picture | Iterable[Picture],
        *,
        batch_size: int = 64,
        together: bool = False,
    ) -> Tensor:
        """Probabilities [B, K] float64 on the CPU, columns as `class_names`; B = 1 for one image.

        images, batch_size, together: as for `predict`. softmax(logits / the run's temperature).
        """
        if not together:
            return self._softmax(self.logits(images, batch_size=batch_size))
        check_together(self.adapter, {})
        pictures, _ = as_pictures(images)
        probabilities, items = self._together(pictures, batch_size)
        for item in items:
            if isinstance(item, ImageError):
                raise item
        return probabilities

    def score(
        self,
        images: Picture | Iterable[Picture],
        labels: str | SupportsIndex | Iterable[str | SupportsIndex],
        *,
        batch_size: int = 64,
    ) -> float:
        """The share 0..1 of `images` whose most probable class is their label.

        images: as for `predict`. labels: one of each image, the name of a class or its place in
        `class_names`. An unknown one, another number of them, or a run of several labels per image
        is a ValueError.
        """
        if "multi_label" in self.adapter.features:
            raise ValueError("score: the run has several labels per image and no accuracy")
        given = (
            [labels]
            if isinstance(labels, str) or not isinstance(labels, Iterable)
            else list(labels)
        )
        wanted = [self._place(label) for label in given]
        logits = self.logits(images, batch_size=batch_size)
        if len(logits) != len(wanted) or not wanted:
            fact = f"got {len(logits)} and {len(wanted)}"
            raise ValueError(f"score: images and labels must be as many, and at least 1, {fact}")
        return float((logits.argmax(dim=1) == torch.tensor(wanted)).double().mean())

    def _place(self, label: str | SupportsIndex) -> int:
        """The column of a class that is named or numbered."""
        if isinstance(label, str):
            return index_of(label, self.class_names)
        try:
            k = operator.index(label)
        except TypeError:
            kind = type(label).__name__
            raise TypeError(f"score: a label must be a class name or an int, got {kind}") from None
        if not 0 <= k < len(self.class_names) or isinstance(label, bool):
            raise ValueError(
                f"score: a label must be in 0..{len(self.class_names) - 1}, got {label!r}"
            )
        return k

    def logits(self, images: Picture | Iterable[Picture], *, batch_size: int = 64) -> Tensor:
        """What the head computes, [B, K] float32 on the CPU, columns as `class_names`.

        images, batch_size: as for `predict`.
        """
        pictures, _ = as_pictures(images)
        rows = []
        for batch in self._batches(pictures, batch_size):
            for item in batch:
                if isinstance(item, ImageError):
                    raise item
            pixels = [item for item in batch if isinstance(item, Tensor)]
            rows.append(self._decide(torch.stack(pixels)).logits)
        return torch.cat(rows) if rows else torch.empty(0, len(self.class_names))

    def predict_each(
        self, images: Iterable[Picture], topk: int = 5, *, batch_size: int = 64
    ) -> Iterator[list[Prediction] | ImageError]:
        """`predict` of each image in turn; an unreadable one gives its ImageError, not a stop.

        Takes from `images` what two batches need and no more, so that a generator of any length
        does.
        """
        answers = self.answer_each(images, topk, batch_size=batch_size)
        return (one if isinstance(one, ImageError) else one.predictions for one in answers)

    def answer_each(
        self,
        images: Iterable[Picture],
        topk: int = 5,
        *,
        batch_size: int = 64,
        unknown: float | None = None,
        coverage: float | None = None,
        together: bool = False,
    ) -> Iterator[Answer | ImageError]:
        """`predict_each` with all that is asked for: see `Answer`, `predict`, `predict_sets`.

        Of images that are decided together all are taken before the first answer.
        """
        for name, value in ("topk", topk), ("batch_size", batch_size):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(images, Tensor) and images.ndim != 4:
            as_pictures(images)
        topk = min(topk, len(self.class_names))
        if together:
            check_together(self.adapter, {"unknown": unknown, "coverage": coverage})
            return self._answers_together(images, topk, batch_size)
        rule = Rule(self.adapter, unknown, coverage)
        return self._answers(images, topk, batch_size, rule)

    def _batches(
        self, images: Iterable[Picture], batch_size: int
    ) -> Iterator[list[Tensor | ImageError]]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        with decode_pool() as pool:
            loaded = ahead(pool, self._pixels, map(in_memory, images), 2 * batch_size)
            while batch := list(islice(loaded, batch_size)):
                yield batch

    def _answers(
        self, images: Iterable[Picture], topk: int, batch_size: int, rule: Rule
    ) -> Iterator[Answer | ImageError]:
        for batch in self._batches(images, batch_size):
            pixels = [item for item in batch if isinstance(item, Tensor)]
            best = iter(self._answered(torch.stack(pixels), topk, rule) if pixels else [])
            yield from (item if isinstance(item, ImageError) else next(best) for item in batch)

    def _answers_together(
        self, images: Iterable[Picture], topk: int, batch_size: int
    ) -> Iterator[Answer | ImageError]:
        probabilities, items = self._together(images, batch_size)
        best = map(Answer, self._best(probabilities, topk))
        yield from (next(best) if item is None else item for item in items)

    def _together(
        self, images: Iterable[Picture], batch_size: int
    ) -> tuple[Tensor, list[ImageError | None]]:
        """Probabilities [n, K] of the images that can be read; of each, or its error, its place."""
        items: list[ImageError | None] = []
        decided = []
        for batch in self._batches(images, batch_size):
            items += [item if isinstance(item, ImageError) else None for item in batch]
            pixels = [item for item in batch if isinstance(item, Tensor)]
            if pixels:
                decided.append(self._decide(torch.stack(pixels)))
        if not decided:
            return torch.empty(0, len(self.class_names), dtype=torch.float64), items
        rows = joined(decided)
        return answer_together(self.adapter, rows.logits, rows.image), items

    def _answered(self, pixels: Tensor, topk: int, rule: Rule) -> list[Answer]:
        """pixels [B, 3, H, W] -> the topk classes of each, and what `rule` asks for."""
        decided = self._decide(pixels)
        rows = self._best(self._softmax(decided.logits), topk)
        return rule.answers(rows, decided.logits, decided.evidence)

    def _best(self, probabilities: Tensor, topk: int) -> list[list[Prediction]]:
        """Of probabilities [B, K] the topk classes of each row, best first."""
        best = probabilities.topk(topk, dim=1)
        return [
            [Prediction(self.class_names[k], value) for k, value in zip(row, values, strict=True)]
            for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, H, W] -> probabilities [B, K] on the CPU."""
        return self._softmax(self._decide(pixels).logits)

    def _softmax(self, logits: Tensor) -> Tensor:
        several = multi_label.probabilities(self.adapter.features, logits)
        if several is not None:
            return several
        return (logits.double() / (self.adapter.temperature or 1.0)).softmax(dim=1)

    def _decide(self, pixels: Tensor) -> Decided:
        """Preprocessed pixels [B, 3, H, W] -> what is said of them, on the CPU.

        Fewer than B images at a time where memory does not hold as many.
        """
        return joined(self._at_a_time.map(self._decide_at_once, pixels))

    @torch.no_grad()
    def _decide_at_once(self, pixels: Tensor) -> Decided:
        image, spatial = self.encode(pixels)
        logits, evidence = forward_both(self.adapter.head, image, spatial)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("predict: logits must be finite, got NaN or infinity")
        return Decided(*(rows.float().cpu() for rows in (logits, evidence, image)))

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
        model_view, weights = self._attention(head, pixels, k)
        caption = f"{self.class_names[k]}  {100 * float(probability[k]):.1f} %"
        return side_by_side(picture, model_view, weights, caption)

    def heat_map(self, image: Image.Image, class_name: str) -> Image.Image | None:
        """What the model saw under the attention of one class, by vtclip or by a pool's vtclip;
        None of a run without it.
        """
        heads = self.adapter.head.member_heads
        head = next((one for one in heads if isinstance(one, VTCLIP)), None)
        if head is None:
            return None
        k = index_of(class_name, self.class_names)
        return under_attention(*self._attention(head, self.clip.preprocess(image), k))

    @torch.no_grad()
    def _attention(self, head: VTCLIP, pixels: Tensor, k: int) -> tuple[Image.Image, Tensor]:
        """pixels [3, H, W] -> what the model saw, and the weights [L] of class k."""
        _, spatial = self.encode(pixels[None])
        weights = head.attention(cast("Tensor", spatial))[0, k].cpu()
        cfg = self.clip.preprocess_cfg
        return to_image(pixels, cfg["mean"], cfg["std"]), weights

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Preprocessed pixels [B, 3, H, W] -> image [B, C], and spatial if the head reads it."""
        spatial = self.adapter.features.get("spatial") if self.adapter.head.needs_spatial else None
        return self.clip.encode_image(pixels.to(self.device), spatial)

    def _pixels(self, picture: object) -> Tensor | ImageError:
        """One image as the model takes it, [3, H, W] float32 on the CPU."""
        if isinstance(picture, Tensor):
            return self._checked(picture)
        image = rgb_of(picture)
        return image if isinstance(image, ImageError) else self.clip.preprocess(image)

    def _checked(self, pixels: Tensor) -> Tensor:
        size = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if list(pixels.shape) != [3, height, width]:
            wish, fact = f"[3, {height}, {width}]", list(pixels.shape)
            raise ValueError(f"predict: a tensor must be {wish}, preprocessed, got {fact}")
        if not pixels.is_floating_point():
            raise TypeError(f"predict: a tensor must be floating-point, got {pixels.dtype}")
        return pixels.detach().to("cpu", torch.float32)
