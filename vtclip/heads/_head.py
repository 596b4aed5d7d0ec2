# SPDX-License-Identifier: Apache-2.0
"""What every head is: its class texts, its recipe, and what the rest of the package may ask of it.

A method is one file, a subclass of `Head`, and one line in `heads/__init__.py`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vtclip.heads._check import check_image, check_text
from vtclip.heads._contributions import Contributions
from vtclip.heads.config import FitConfig
from vtclip.ops.rational_head import RationalLogits

Options = dict[str, Any]
"""Arguments of a head's constructor besides the texts, all JSON: what `Head.options` returns."""


class Support(NamedTuple):
    """A few labelled images: image [N, C] of length 1, label [N]; spatial [N, L, Cs] or None.

    A head may keep them (`fit_support`) or choose its hyper-parameters by them (`choose`).
    """

    image: Tensor
    label: Tensor
    spatial: Tensor | None = None

    def rows(self, index: Tensor) -> Support:
        """Those of the images [n]."""
        spatial = None if self.spatial is None else self.spatial[index]
        return Support(self.image[index], self.label[index], spatial)


class TextModel(Protocol):
    """What a head needs of a `vtclip.clip.Clip`, whose text side it trains through."""

    model: nn.Module
    name: str

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """From sentences to their tokens [n, length]."""


@dataclass(frozen=True)
class NewClasses:
    """K' classes to be added: text [K', C] and text_views [K', M, C], of each of M templates.

    support: images of the new classes for heads that keep them, labels from K on. clip: the text
    encoder, asked for only by heads with a learned prompt.
    """

    class_names: list[str]
    text: Tensor
    text_views: Tensor
    support: Support | None
    clip: Callable[[], TextModel]


class Head(nn.Module):
    """Class texts [K, C], the buffer `text`; a subclass turns image features into logits [B, K]:

        forward(image [B, C], spatial [B, L, Cs] or None, spatial_mask [B, L] or None)

    In a fit a head meets, in this order: `set_text_views`, `set_text_encoder`, `fit_support`, the
    training of its parameters by `recipe`, `choose`. Each gets what its name says and nothing of
    the test images; those that a subclass leaves out do nothing. Options of the constructor are
    keywords, all with a default, and attributes of the same names; where `needs_spatial` is true
    one of them is `spatial_dim`.
    """

    method: ClassVar[str]
    needs_spatial: bool = False  # forward takes spatial features; a head of heads decides for each
    needs_text_encoder: ClassVar[bool] = False  # training goes through the model's text side
    learns: ClassVar[bool] = True  # from labelled images, by training or by keeping them
    any_classes: ClassVar[bool] = False  # nothing trained belongs to its classes: `with_text`
    class_specific: bool = False  # its parameters belong to its classes: none can be added
    mixes_classes: ClassVar[bool] = False  # trained logits of a class depend on the others
    multi_label: ClassVar[bool] = False  # may be fitted to images of more than one class
    # whether a subclass has its own `fit_support`, `choose`, `extend`, `forward_with_penalty`,
    # `contributions`
    takes_support: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    keeps_images: ClassVar[bool] = False
    has_penalty: ClassVar[bool] = False
    has_contributions: ClassVar[bool] = False
    trains_keys: ClassVar[bool] = False  # the images that it keeps are parameters
    text: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.takes_support = cls.fit_support is not Head.fit_support
        cls.chooses = cls.choose is not Head.choose
        cls.keeps_images = cls.extend is not Head.extend
        cls.has_penalty = cls.forward_with_penalty is not Head.forward_with_penalty
        cls.has_contributions = cls.contributions is not Head.contributions

    def __init__(self, text: Tensor, *, logit_scale: float = 100.0) -> None:
        super().__init__()
        check_text(type(self).__name__, text)
        self.logit_scale = float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))

    if TYPE_CHECKING:

        def __call__(
            self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
        ) -> Tensor: ...

    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        """The settings to fit `shots` images per class with; here no training."""
        del shots
        return FitConfig(epochs=0)

    @property
    def member_heads(self) -> list[Head]:
        """The heads that this one averages; of any other, itself."""
        return [self]

    @property
    def num_classes(self) -> int:
        """K, the number of class texts."""
        return self.text.shape[0]

    def options(self) -> Options:
        """What the constructor needs next to `text`, as plain numbers and strings."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name != "text"}

    def forward_with_penalty(self, image: Tensor) -> RationalLogits:
        """image [B, C] -> logits [B, K] and penalty [B], both differentiable."""
        raise NotImplementedError(f"{type(self).__name__}: forward_with_penalty: it has no penalty")

    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        """What each training image and each class text adds to the logits of image [B, C].

        The sum is the logits [B, K], to the rounding of the head's dtype. It holds B N K numbers.
        """
        fact = "its logits are no sum over training images"
        raise NotImplementedError(f"{type(self).__name__}: contributions: {fact}")

    def set_text_views(self, views: Tensor) -> None:
        """Take class texts [K, M, C] of M templates, before anything else."""

    def set_text_encoder(self, clip: TextModel, class_names: Sequence[str]) -> None:
        """Train through the text side of `clip`, the model that made `text`, over K names."""

    def fit_support(self, support: Support) -> None:
        """Take in the labelled images; of a head without training, all there is."""

    def check_names(self, clip: TextModel, class_names: Sequence[str]) -> None:
        """Refuse class names that leave no room for what the head learns beside them."""

    def choose(self, val: Support) -> None:
        """Set what validation images decide, after training; without any the defaults stay."""

    def chosen_by(self, val: Support, parts: Sequence[Tensor]) -> Iterator[Head]:
        """One copy for each of `parts`, row numbers of `val`, by which that copy chose."""
        for rows in parts:
            head = copy.deepcopy(self)
            head.choose(val.rows(rows))
            yield head

    def with_text(self, text: Tensor) -> Head:
        """A head of the same parameters, copied, over other classes [K', C]."""
        if self.needs_text_encoder or not self.any_classes:
            fact = "the head belongs to its own classes"
            if self.needs_text_encoder:
                fact = "other classes need their names and the text encoder: with_names"
            raise NotImplementedError(f"{type(self).__name__}: with_text: {fact}")
        head = type(self)(text.to(self.text), **self.options())
        head.load_state_dict({**self.state_dict(), "text": head.text})
        return head

    def with_names(self, clip: TextModel, class_names: Sequence[str]) -> Head:
        """The same where `needs_text_encoder` is true: `clip` makes the texts of other classes."""
        raise NotImplementedError(f"{type(self).__name__}: with_names: it has no learned prompt")

    def extend(self, text_new: Tensor, support: Support) -> Head:
        """A head over K old and K' new classes: text_new [K', C], support.label in K..K+K'-1."""
        raise NotImplementedError(f"{type(self).__name__}: extend: the head keeps no images")

    def with_new_classes(self, new: NewClasses) -> Head:
        """A head over the K classes and the K' of `new` behind them.

        Without parameters to train it is the head that a fit of all classes would give with the
        same hyper-parameters; with them they stay as trained on the old classes.
        """
        if not self.keeps_images:
            return self.with_text(torch.cat([self.text, new.text.to(self.text)]))
        if new.support is None:
            raise ValueError(f"{type(self).__name__}: support of the new classes must be given")
        return self.extend(new.text.to(self.text), new.support)


class ImageHead(Head):
    """A head of image features alone: `forward` accepts spatial features and ignores them."""

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> logits [B, K]; spatial features are accepted and ignored."""
        check_image(type(self).__name__, image, self.text)
        return self.image_logits(image)

    def image_logits(self, image: Tensor) -> Tensor:
        """Checked image features [B, C] -> logits [B, K]."""
        raise NotImplementedError
