# SPDX-License-Identifier: Apache-2.0
"""CoOp: learned context vectors go through the frozen text encoder in place of a prompt's words.

    t_k    = g(v_1 .. v_M, name_k)       v: `context`, shared by the classes or one row set for each
    logits = s * cos(image, t_k)

arXiv 2109.01134, eq. 2 and 3. The text encoder is not part of the head and is not saved: the
class texts it gave last are the buffer `text`, which is all that prediction needs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads._check import check_least
from vtclip.heads._head import ImageHead, NewClasses, TextModel
from vtclip.heads._prompts import TextTower
from vtclip.heads.config import FitConfig
from vtclip.names import POSITIONS, option

logger = logging.getLogger(__name__)
NUM_CONTEXT = 16
SPREAD = 0.02  # standard deviation of random vectors


class CoOp(ImageHead):
    """text [K, C]: the class texts to start from, and after training those that were learned.

    num_context: M learned vectors; None takes 16, fewer where the text encoder has no room
        for them, or as many as `init` has tokens.
    class_specific: vectors of their own for each class, `context` [K, M, W] instead of [M, W].
    class_position: of the class name: "end", "middle" (of the vectors) or "front".
    init: words whose embeddings the vectors start at, such as "a photo of a", in place of random
        ones of standard deviation 0.02.
    context_width: W, the text encoder's; 0 until `set_text_encoder`, which makes the vectors.

    In training mode the logits are of freshly encoded class texts; `eval()` after training stores
    these in `text`. Without a text encoder the head is the decision by `text`.
    """

    method = "coop"
    multi_label = True
    needs_text_encoder = True
    any_classes = True

    def __init__(
        self,
        text: Tensor,
        *,
        num_context: int | None = None,
        class_specific: bool = False,
        class_position: str = "end",
        init: str | None = None,
        context_width: int = 0,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(text, logit_scale=logit_scale)
        if class_position not in POSITIONS:
            raise ValueError(
                f"CoOp: class_position must be {', '.join(POSITIONS)}, got {class_position!r}"
            )
        if num_context is not None:
            check_least("CoOp", 1, num_context=num_context)
        if init is not None and not init.strip():
            raise ValueError("CoOp: init must hold words, got none")
        check_least("CoOp", 0, context_width=context_width)
        self.num_context = num_context
        self.class_specific = bool(class_specific)
        self.class_position = class_position
        self.init = init
        self._tower: TextTower | None = None
        self.context = nn.Parameter(text.new_zeros(*self._rows(num_context or 0), context_width))

    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        """The published schedule: SGD at 2e-3, batch 32, one epoch of warm-up, 50 to 200 epochs.

        ImageNet is trained for 50 whatever the shots: `--epochs 50`. arXiv 2109.01134, section 4.1.

        Expected: 52.0 / 53.8 / 55.4 % from 50.0 % zero-shot with 1 / 4 / 16 shots, mean of seeds
            1-3, on the 576 test images of the demo's 24 classes. --context-init "a photo of a"
            gives 50.1 / 50.1 / 53.9 %, --class-specific 44.7 / 39.7 / 42.0 %.
        Cost: 2 / 2 / 10 s of one CPU core; all class texts are encoded in every step.
        Command: vtclip demo && vtclip fit vtclip-demo/images --method coop --shots 16
        """
        return FitConfig(epochs=50 if shots <= 1 else 100 if shots <= 4 else 200)

    @property
    def context_width(self) -> int:
        """The width of a learned context vector, that of the text encoder's tokens."""
        return self.context.shape[-1]

    def set_text_encoder(self, clip: TextModel, class_names: Sequence[str]) -> None:
        """Train through the text side of `clip`; vectors that exist already stay as they are.

        class_names: K names in the order of `text`; an underscore is read as a space.
        """
        if len(class_names) != self.num_classes:
            raise ValueError(
                f"CoOp: class_names must be {self.num_classes}, got {len(class_names)}"
            )
        tower = TextTower(clip)
        if not self.context_width:
            self.context = nn.Parameter(self._first_context(tower, class_names))
        elif self.context_width != tower.width:
            raise ValueError(
                f"CoOp: the text encoder must be {self.context_width} wide, got {tower.width}"
            )
        M = self.context.shape[-2]
        shared = not self.class_specific
        self._prompts = tower.prompts(class_names, M, self.class_position, shared=shared)
        self._tower = tower

    def train(self, mode: bool = True) -> CoOp:
        """As every module's; leaving training mode stores the learned class texts in `text`."""
        if self.training and not mode and self._tower is not None:
            with torch.no_grad():
                self.text.copy_(self.class_texts())
        return super().train(mode)

    def class_texts(self) -> Tensor:
        """Unit rows [K, C] of the context as it is, differentiable in it."""
        if self._tower is None:
            raise ValueError("CoOp: class_texts needs the text encoder; call set_text_encoder")
        rows = self._tower.class_texts(self.context.to(self._tower.device), self._prompts)
        return rows.to(self.text)

    def image_logits(self, image: Tensor) -> Tensor:
        live = self.training and self._tower is not None
        text = self.class_texts() if live else self.text
        return ops.cosine_logits(image, text, scale=self.logit_scale)

    def with_names(self, clip: TextModel, class_names: Sequence[str]) -> CoOp:
        """The same shared context before other class names, encoded by `clip`."""
        if self.class_specific:
            raise ValueError("CoOp: class_specific context belongs to its classes, not to others")
        text = self.text.new_zeros(len(class_names), self.text.shape[1])
        head = type(self)(text, **self.options())
        head.load_state_dict({"text": head.text, "context": self.context.detach()})
        head.set_text_encoder(clip, class_names)
        return head.eval()

    def with_new_classes(self, new: NewClasses) -> CoOp:
        texts_new = self.with_names(new.clip(), new.class_names).text
        head = type(self)(torch.cat([self.text, texts_new]), **self.options())
        head.load_state_dict({**self.state_dict(), "text": head.text})
        return head

    def _first_context(self, tower: TextTower, class_names: Sequence[str]) -> Tensor:
        """Vectors to start from; sets num_context where it was left open."""
        words = tower.words(self.init) if self.init is not None else []
        if self.num_context is None:
            self.num_context = self._fitting_context(tower, class_names)
            if not words and self.num_context < NUM_CONTEXT:
                logger.warning(
                    "coop: %d context vectors instead of %d, as many as the text encoder's %d "
                    "places leave next to the class names",
                    self.num_context, NUM_CONTEXT, tower.context_length,
                )  # fmt: skip
        else:
            self._fitting_context(tower, class_names)
        shape = *self._rows(self.num_context), tower.width
        if words:
            return tower.embed(torch.tensor(words)).to(self.text).expand(shape).clone()
        return torch.empty(shape).normal_(std=SPREAD).to(self.text)

    def check_names(self, clip: TextModel, class_names: Sequence[str]) -> None:
        self._fitting_context(TextTower(clip), class_names)

    def _fitting_context(self, tower: TextTower, class_names: Sequence[str]) -> int:
        """How many vectors there will be, or a ValueError where the encoder has no place for them.

        As many as `num_context` or `init` say, else NUM_CONTEXT or as many as there is room for.
        """
        words = tower.words(self.init) if self.init is not None else []
        if self.init is not None and self.num_context not in (None, len(words)):
            raise ValueError(
                f"CoOp: {option('num_context')} must be {len(words)}, as many as "
                f"{option('init')} {self.init!r} has tokens, got {self.num_context}"
            )
        room, wanted = tower.room(class_names), self.num_context or len(words)
        if room < max(1, wanted):
            longest = max(class_names, key=lambda name: tower.context_length - tower.room([name]))
            places = f"class {longest!r} leaves {max(0, room)} of the text encoder's "
            places += f"{tower.context_length} places"
            if room < 1:
                raise ValueError(
                    f"CoOp: {places} for context vectors; at least 1 is needed: give the class a "
                    f"shorter name, in its folder or by {option('class_names')}"
                )
            name = option("init" if words else "num_context")
            raise ValueError(f"CoOp: {name} can be at most {room}: {places}, got {wanted}")
        return wanted or min(NUM_CONTEXT, room)

    def _rows(self, M: int) -> tuple[int, ...]:
        return (self.num_classes, M) if self.class_specific else (M,)
