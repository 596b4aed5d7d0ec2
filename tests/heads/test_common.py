# SPDX-License-Identifier: Apache-2.0
"""What every head of HEADS promises, whatever its method: the contract of `Head`, once."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import HEADS, Auto, Head, Support
from vtclip.heads.config import FitConfig
from vtclip.ops._select import only_reference

C, L, B = 16, 4, 3
# to be told apart from the defaults by a head that is rebuilt from its options
OPTIONS: dict[str, dict[str, Any]] = {
    "vtclip": {"num_heads": 4, "num_layers": 2, "ffn_dim": 24, "residual": 0.5, "init": "torch"},
    "rada": {"num_heads": 4, "queries": ("text", "image"), "temperature": 2.0, "adapters": True},
    "tip-adapter": {"alpha": 3.0, "beta": 4.0},
    "tip-adapter-f": {"alpha": 3.0, "beta": 4.0},
    "proker": {"alpha": 3.0, "beta": 0.5, "lam": 0.3},
    "takl": {"beta": 0.5, "lam": 0.3, "zero_shot_temperature": 1.5},
    "tip-x": {"alpha": 3.0, "beta": 4.0, "gamma": 2.0, "slope": 1.5, "offset": 0.1},
    "proto-clip": {"alpha": 0.6, "beta": 3.0},
    "cross-modal": {"l2": 0.3},
    "gda": {"alpha": 0.3},
    "lp++": {"num_steps": 20.0},
    "taskres": {"alpha": 0.7},
    "zs-lp": {"text_length": 2.0},
    "clap": {"text_length": 2.0},
    "ape": {"gamma": 0.5, "share": 0.5, "variance_weight": 0.6},
    "ape-t": {"alpha": 3.0, "beta": 4.0, "share": 0.5, "variance_weight": 0.6},
    "prolip": {"lam": 0.3},
    "coop": {"num_context": 3, "class_position": "middle", "context_width": 6},
    "clip-adapter": {"ratio": 0.4, "reduction": 8},
    "linear-probe": {"l2": 0.3},
    "mm-adapter": {"ratio": 0.4, "hidden": 8, "num_heads": 2},
    "autoclip": {"entropy": 0.6, "inner_scale": 3.0},
    "calip": {"spatial_dim": C, "beta2": 1.1, "beta3": 0.07},
    "zeroshot": {},
    "auto": {
        "members": [
            {"method": "tip-adapter-f", "options": {}, "temperature": 0.5, "weight": 3.0},
            {"method": "vtclip", "options": {"ffn_dim": 8}, "temperature": 2.0, "weight": 1.0},
        ]
    },
}
TRAINED = {"vtclip", "rada", "tip-adapter-f", "coop", "clip-adapter", "mm-adapter"}
TRAINED |= {"taskres", "zs-lp", "clap", "ape-t"}
every_head = pytest.mark.parametrize("method", list(HEADS))


def rows(K: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """text [K, C], image [B, C], spatial [B, L, C]."""
    text = F.normalize(torch.randn(K, C, dtype=torch.float64), dim=-1).to(dtype)
    return text, torch.randn(B, C).to(dtype), torch.randn(B, L, C).to(dtype)


def shots(text: Tensor, each: int = 2) -> Support:
    label = torch.arange(len(text)).repeat_interleave(each)
    image = F.normalize(text.double()[label] + 0.3 * torch.randn(len(label), C), dim=-1)
    return Support(image.to(text), label, torch.randn(len(label), L, C).to(text))


def fitted(method: str, text: Tensor) -> Head:
    """The head after everything that a fit does with it, its training replaced by noise."""
    head = HEADS[method](text, logit_scale=20.0, **OPTIONS[method])
    head.set_text_views(text[:, None] + 0.1 * torch.randn(len(text), 3, C).to(text))
    head.fit_support(shots(text))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    head.choose(shots(text, each=1))
    return head.eval()


def call(head: Head, image: Tensor, spatial: Tensor) -> Tensor:
    with torch.no_grad():
        return head(image, spatial) if head.needs_spatial else head(image)


def test_each_method_has_its_options_here():
    assert set(OPTIONS) == set(HEADS)
    assert all(HEADS[name].method == name for name in HEADS)


@every_head
@pytest.mark.parametrize("K", [1, 2, 5])
def test_any_number_of_classes_and_images(method, K):
    text, image, spatial = rows(K)
    head = fitted(method, text)
    assert head.num_classes == K
    logits = call(head, image, spatial)
    assert logits.shape == (B, K)
    assert bool(logits.isfinite().all())
    assert call(head, image[:0], spatial[:0]).shape == (0, K)
    for i in range(B):  # an image's logits do not depend on its batch
        alone = call(head, image[i : i + 1], spatial[i : i + 1])[0]
        torch.testing.assert_close(alone, logits[i], rtol=1e-4, atol=1e-4)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_the_texts_is_that_of_the_head(method, dtype):
    text, image, spatial = rows(5, dtype)
    head = fitted(method, text)
    logits = call(head, image, spatial)
    # an average of heads is taken in float32, whatever theirs
    assert logits.dtype == (torch.float32 if method == "auto" else dtype)
    assert bool(logits.isfinite().all())
    assert all(value.dtype in (dtype, torch.long) for value in head.state_dict().values())


@pytest.mark.filterwarnings("ignore:.*recompute through:UserWarning")
@pytest.mark.parametrize("method", sorted(TRAINED))
def test_a_penalty_on_gradients_is_that_of_the_reference(method):
    text, image, spatial = rows(5, torch.float64)
    head = fitted(method, text)

    def penalised() -> list[Tensor]:
        leaf = image.clone().requires_grad_()
        wanted = [leaf, *(weight for weight in head.parameters() if weight.requires_grad)]
        score = (head(leaf, spatial) if head.needs_spatial else head(leaf))[:, 0].sum()
        (grad,) = torch.autograd.grad(score, leaf, create_graph=True)
        loss = score + 10 * grad.square().sum()
        return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))

    actual = penalised()
    with only_reference():
        expected = penalised()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@every_head
def test_spatial_features_are_ignored_where_they_are_not_needed(method):
    text, image, spatial = rows(5)
    head = fitted(method, text)
    with torch.no_grad():
        if not head.needs_spatial:
            assert torch.equal(head(image, spatial), head(image))
        with pytest.raises(ValueError, match=rf"image must be \[B, {C}\], got \[{B}, {C - 1}\]$"):
            head(image[:, 1:], spatial)
        with pytest.raises(TypeError, match="image must be torch.float32 like the head, got"):
            head(image.double(), spatial)


@every_head
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.ones(2, 3, 4), ValueError, r"text must be \[K, C\] with K, C >= 1, got \[2, 3, 4\]"),
        (torch.ones(0, 4), ValueError, r"text must be \[K, C\] with K, C >= 1, got \[0, 4\]"),
        (torch.ones(2, 4).int(), TypeError, r"text must be a floating-point tensor \[K, C\], got"),
        (torch.ones(4), ValueError, r"text must be \[K, C\] with K, C >= 1, got \[4\]"),
        ("words", TypeError, r"text must be a floating-point tensor \[K, C\], got str"),
    ],
)
def test_bad_texts_are_refused(method, text, error, message):
    with pytest.raises(error, match=rf"^{HEADS[method].__name__}: {message}"):
        HEADS[method](text)


@every_head
def test_the_texts_are_a_copy(method):
    text = rows(5)[0]
    head = HEADS[method](text)
    before = head.text.clone()
    text.zero_()
    assert torch.equal(head.text, before)
    assert not head.text.requires_grad


@every_head
def test_options_and_state_restore_the_head(method):
    text, image, spatial = rows(5)
    head = fitted(method, text)
    options = json.loads(json.dumps(head.options()))  # plain numbers and strings
    for name, value in OPTIONS[method].items():
        # `choose` may have changed a number, a member's options are filled up
        assert isinstance(options.get(name, value), type(value)) or name == "queries"
    again = HEADS[method](rows(5)[0], **options)
    again.load_state_dict(head.state_dict())
    assert torch.equal(call(again.eval(), image, spatial), call(head, image, spatial))
    assert json.loads(json.dumps(again.options())) == options


@every_head
def test_an_adapter_file_holds_all_of_it(method, tmp_path):
    pytest.importorskip("safetensors")
    from vtclip.runs.adapter import Adapter, load_adapter, save_adapter

    text, image, spatial = rows(5)
    head = fitted(method, text)
    features = {"model": None, "templates": ["a {}."]}
    save_adapter(tmp_path, Adapter(head, list("abcde"), None, features))
    back = load_adapter(tmp_path)
    assert (back.class_names, back.temperature, back.features) == (list("abcde"), None, features)
    loaded = back.head
    assert type(loaded) is type(head)
    assert not loaded.training
    assert torch.equal(call(loaded, image, spatial), call(head, image, spatial))
    assert loaded.options() == head.options()


@every_head
def test_copies_and_pickles_are_heads_of_their_own(method):
    text, image, spatial = rows(5)
    head = fitted(method, text)
    wanted = call(head, image, spatial)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for copy in (
        deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(call(copy, image, spatial), wanted)
        assert copy.options() == head.options()
        with torch.no_grad():
            for value in copy.state_dict().values():
                value.zero_()
        assert torch.equal(call(head, image, spatial), wanted)


@every_head
def test_it_moves_as_a_whole(method):
    text, image, spatial = rows(5)
    head = fitted(method, text)
    wide = deepcopy(head).to(torch.float64)
    assert all(v.dtype in (torch.float64, torch.long) for v in wide.state_dict().values())
    found = call(wide, image.double(), spatial.double())
    torch.testing.assert_close(
        found.double(), call(head, image, spatial).double(), rtol=1e-3, atol=1e-2
    )
    away = deepcopy(head).to("meta")
    assert all(value.device.type == "meta" for value in away.state_dict().values())


@every_head
@pytest.mark.parametrize("shots_per_class", [0, 1, 2, 4, 8, 16, 100])
def test_the_recipe_is_valid_for_any_shots(method, shots_per_class):
    config = HEADS[method].recipe(shots_per_class)
    assert isinstance(config, FitConfig)
    assert bool(config.epochs) == (method in TRAINED)
    head = HEADS[method](rows(5)[0], **config.head)
    assert not config.penalty_weight or head.has_penalty
    assert not config.epochs or method == "coop" or any(True for _ in head.parameters())


@every_head
def test_other_classes_keep_the_parameters(method):
    text, image, spatial = rows(5)
    head = fitted(method, text)
    others = F.normalize(torch.randn(3, C), dim=-1)
    if not head.any_classes or head.needs_text_encoder:
        with pytest.raises(NotImplementedError, match=rf"^{type(head).__name__}: with_text: "):
            head.with_text(others)
        return
    before = {name: value.clone() for name, value in head.state_dict().items()}
    other = head.with_text(others).eval()
    assert torch.equal(other.text, others)
    assert other.options() == head.options()
    for name, value in other.state_dict().items():
        if name.rpartition(".")[2] not in ("text", "views"):
            assert torch.equal(value, before[name]), name
    back = other.with_text(text).eval()
    logits = call(head, image, spatial)
    torch.testing.assert_close(call(back, image, spatial), logits)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = head.with_text(text[order]).eval()
    torch.testing.assert_close(call(moved, image, spatial), logits[:, order])
    if method in TRAINED:
        part = call(head.with_text(text[[4, 1]]).eval(), image, spatial)
        away = float((part - logits[:, [4, 1]]).abs().max())
        assert (away > 1e-3) == head.mixes_classes
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())


@every_head
def test_what_a_head_does_not_do_is_left_out_or_refused(method):
    text, image, _ = rows(5)
    head = fitted(method, text)
    name = type(head).__name__
    if not head.has_penalty:
        with pytest.raises(NotImplementedError, match=f"^{name}: forward_with_penalty: "):
            head.forward_with_penalty(image)
    if not head.keeps_images:
        with pytest.raises(NotImplementedError, match=f"^{name}: extend: "):
            head.extend(text, shots(text))
    if not head.needs_text_encoder:
        with pytest.raises(NotImplementedError, match=f"^{name}: with_names: "):
            head.with_names(None, ["ant"])
    before, options = {n: v.clone() for n, v in head.state_dict().items()}, head.options()
    if not head.chooses:
        head.choose(shots(text))
    if not head.takes_support:
        head.fit_support(shots(text))
    assert head.options() == options
    assert all(torch.equal(head.state_dict()[n], value) for n, value in before.items())


@pytest.mark.parametrize(
    ("method", "C", "options"),
    [
        ("clip-adapter", 8, {"ratio": 0.5}),
        ("linear-probe", 5, {}),
        ("taskres", 5, {"alpha": 0.7}),
        ("zs-lp", 5, {}),
        ("clap", 5, {}),
        ("mm-adapter", 6, {"hidden": 4, "num_heads": 2}),
    ],
)
def test_gradcheck(record, method, C, options):
    text, image, _ = record(B=2, K=3, C=C)
    head = HEADS[method](text, logit_scale=2.0, **options)
    if method == "linear-probe":  # which starts at 0
        torch.nn.init.normal_(head.weight)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def logits(image: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (image,))

    assert torch.autograd.gradcheck(logits, (image.requires_grad_(), *parameters))


def test_the_flags_are_those_of_the_methods():
    def those(flag: str) -> set[str]:
        return {name for name in HEADS if getattr(HEADS[name], flag)}

    keeping = {"tip-adapter", "tip-adapter-f", "proker", "takl", "tip-x", "proto-clip"}
    keeping |= {"cross-modal", "gda", "lp++", "ape", "ape-t", "prolip"}
    assert those("keeps_images") == keeping
    assert those("takes_support") == keeping | {"linear-probe", "clap"}
    assert those("chooses") == keeping | {"linear-probe", "calip"}
    assert those("has_penalty") == {"rada", "clap"}
    sums = keeping - {"proto-clip", "gda", "lp++", "prolip"}
    assert those("has_contributions") == sums | {"zeroshot", "auto"}
    assert those("trains_keys") == {"tip-adapter-f"}
    assert those("needs_text_encoder") == {"coop"}
    assert set(HEADS) - those("learns") == {"zeroshot", "autoclip"}
    assert not those("class_specific") & those("any_classes")


def test_a_head_of_ones_own_needs_a_forward_and_no_more():
    class Nearest(Head):
        method = "nearest"

        def forward(self, image: Tensor) -> Tensor:
            return self.logit_scale * image @ self.text.mT

    text, image, _ = rows(5)
    head = Nearest(text, logit_scale=2.0)
    assert head.options() == {"logit_scale": 2.0}
    assert (head.num_classes, head.learns, head.chooses) == (5, True, False)
    torch.testing.assert_close(head(image), 2 * image @ text.T)
    assert "nearest" not in HEADS


def sources() -> Iterator[Path]:
    return (Path(__file__).parents[2] / "vtclip").rglob("*.py")


def test_nothing_asks_a_head_what_it_has():
    """The contract is a class: `hasattr` and `getattr` on a head would bring the guessing back."""
    asked = re.compile(r"\b(hasattr|getattr)\((\w+\.)*(head|heads|HEADS|member|kind)\b")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources()
        for line in path.read_text().splitlines()
        if asked.search(line)
    ]
    assert not found


def test_an_average_of_heads_is_made_of_heads():
    head = fitted("auto", rows(5)[0])
    assert isinstance(head, Auto)
    assert head.members == ["tip-adapter-f", "vtclip"]
    assert head.needs_spatial
    assert [type(member) for member in head.member_heads] == [HEADS[m] for m in head.members]
