# SPDX-License-Identifier: Apache-2.0
"""CoOp: prompts through the text transformer, training through it, prediction without it."""

from __future__ import annotations

import itertools
import json
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from commands import refused
from pictures import noise
from torch import nn
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.clip import Clip, build_clip, load_clip
from vtclip.clip.loading import DEMO_ASSETS
from vtclip.clip.word_tokenizer import WordTokenizer, build_vocab
from vtclip.data.records import Records
from vtclip.distributed import Interrupted
from vtclip.heads import CoOp, _prompts
from vtclip.heads._prompts import TextTower
from vtclip.runs.adapter import load_adapter
from vtclip.runs.classifier import Classifier
from vtclip.train.methods import text_encoder

NAMES = ["red circle", "blue_square", "tree"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("demo")


def small_clip(**text: object) -> Clip:
    """A CustomTextCLIP of two small towers, whose tokens are <start> words <end> <pad>."""
    vocab = build_vocab(["a", "photo", "of", "red", "circle", "blue", "square", "tree"])
    config = {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8,
                       "layers": 1},
        "text_cfg": {"context_length": 12, "vocab_size": len(vocab), "width": 24, "heads": 3,
                     "layers": 2, **text},
    }  # fmt: skip
    model = build_clip(config)
    for parameter in model.parameters():  # no zeros: every part of the tower must matter
        nn.init.normal_(parameter, std=0.3)
    return Clip(model, WordTokenizer(vocab, 12), config)


TOWERS = {
    "plain": {},
    "eos": {"pool_type": "eos", "eos_id": 18},
    "first": {"pool_type": "first", "no_causal_mask": True},
    "last": {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    "last-causal": {"pool_type": "last"},
    "no-projection": {"proj_type": "none", "width": 16, "heads": 2},
}


@pytest.mark.parametrize("kind", ["demo", *TOWERS])
@pytest.mark.parametrize("position", ["end", "front"])
def test_known_tokens_in_the_places_give_encode_text(clip: Clip, kind: str, position: str) -> None:
    """Vectors that are the embeddings of words make the prompt of these words."""
    model = clip if kind == "demo" else small_clip(**TOWERS[kind])
    tower = TextTower(model)
    words = "a photo of a"
    made = tower.prompts(NAMES, 4, position)
    context = tower.embed(torch.tensor(tower.words(words)))
    names = [name.replace("_", " ") for name in NAMES]
    lines = [f"{words} {n}." if position == "end" else f"{n} {words}." for n in names]
    wanted = F.normalize(model.model.encode_text(model.tokenizer(lines)), dim=-1)
    found = tower.class_texts(context, made)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    other = tower.class_texts(context.flip(0), made)
    assert float((other - wanted).abs().amax()) > 1e-3  # the vectors and their order matter


def test_prompts_put_the_vectors_around_the_name(clip: Clip) -> None:
    tower = TextTower(clip)
    vocab = clip.tokenizer.vocab
    start, end = vocab["<start>"], vocab["<end>"]
    name = tower.words("red circle")
    assert name == [vocab["red"], vocab["circle"]]
    rows = {position: tower.prompts(["red circle", "tree"], 3, position, shared=False)
            for position in ("end", "middle", "front")}  # fmt: skip
    assert rows["end"].ids[0].tolist() == [start, 0, 0, 0, *name, end]
    assert rows["middle"].ids[0].tolist() == [start, 0, *name, 0, 0, end]
    assert rows["front"].ids[0].tolist() == [start, *name, 0, 0, 0, end]
    assert rows["middle"].slots.tolist() == [[1, 4, 5], [1, 3, 4]]
    assert rows["end"].read.tolist() == [[6], [5]]


@pytest.mark.parametrize("kind", ["demo", "plain", "eos"])
@pytest.mark.parametrize("position", ["end", "middle"])
@pytest.mark.parametrize("K", [1, 3, 11])
def test_classes_in_one_row_are_those_in_rows_of_their_own(
    clip: Clip, kind: str, position: str, K: int
) -> None:
    model = clip if kind == "demo" else small_clip(**TOWERS[kind])
    model = deepcopy(model)
    model.model.double()
    tower = TextTower(model)
    words = ["red", "blue", "tree", "circle red", "square blue tree", "photo of a tree"]
    names = [words[k % 6] + " a" * (k // 6) for k in range(K)]
    context = torch.randn(5, tower.width, dtype=torch.float64, requires_grad=True)
    way = torch.randn(K, 1, dtype=torch.float64)
    found = []
    for shared in (True, False):
        made = tower.prompts(names, 5, position, shared=shared)
        assert made.read.numel() >= K
        if shared and K > 1:
            assert len(made.ids) < K  # there is something to compare
            assert made.ids.numel() < tower.prompts(names, 5, position, shared=False).ids.numel()
        texts = tower.class_texts(context, made)
        found.append((texts, *torch.autograd.grad((texts * way).sum(), context)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert float(found[0][1].abs().amax()) > 1e-3


def test_a_dot_after_the_vectors_where_the_name_is_in_front() -> None:
    """A tokenizer with punctuation, as CLIP's own has."""
    import open_clip

    clip = small_clip()
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=12)
    tower = TextTower(clip)
    (row,) = tower.prompts(["dog"], 2, "front").ids.tolist()
    dog, dot = tower.words("dog."), tower.words(".")
    assert len(dog) == 2
    assert row == [49406, dog[0], 0, 0, *dot, 49407]
    (row,) = tower.prompts(["c++"], 1, "front").ids.tolist()  # "++." is one token
    assert row == [49406, *tower.words("c++."), 0, 49407]


def test_a_long_class_name_is_refused_with_what_would_fit(clip: Clip) -> None:
    name = " ".join(["tree"] * 5)
    with pytest.raises(ValueError, match=r"take 23 places.*has 20; num_context can be at most 13"):
        TextTower(clip).prompts(["tree", name], 16, "end")
    head = CoOp(torch.randn(2, 128))
    head.set_text_encoder(clip, ["tree", name])  # an open number takes what fits
    assert head.num_context == 13


def test_other_text_towers_are_refused(clip: Clip) -> None:
    with pytest.raises(ValueError, match="plain text transformer, got TextTransformer"):
        TextTower(small_clip(embed_cls=True))
    masked, foreign = small_clip(no_causal_mask=True), small_clip()
    masked.model.text.use_pad_mask = True  # type: ignore[union-attr,assignment]
    with pytest.raises(ValueError, match="plain text transformer, got TextTransformer"):
        TextTower(masked)
    foreign.model.text = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="plain text transformer, got Linear"):
        TextTower(foreign)


def started(clip: Clip, **options: object) -> CoOp:
    torch.manual_seed(3)
    head = CoOp(F.normalize(torch.randn(3, clip.width), dim=-1), logit_scale=20.0, **options)  # type: ignore[arg-type]
    head.set_text_encoder(clip, NAMES)
    return head


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_gradient_of_the_context_is_that_of_finite_differences(
    specific: bool, position: str
) -> None:
    clip = small_clip()
    clip.model.double()
    head = CoOp(torch.randn(3, 16, dtype=torch.float64), num_context=3, class_specific=specific,
                class_position=position, logit_scale=5.0)  # fmt: skip
    head.set_text_encoder(clip, NAMES)
    assert head.context.shape == ((3, 3, 24) if specific else (3, 24))
    image, label = torch.randn(4, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def loss() -> torch.Tensor:
        return F.cross_entropy(head(image), label)

    loss().backward()
    assert head.context.grad is not None
    way, step = torch.randn_like(head.context), 1e-5
    with torch.no_grad():
        head.context += step * way
        up = loss()
        head.context -= 2 * step * way
        down = loss()
    numeric = float((up - down) / (2 * step))
    assert float((head.context.grad * way).sum()) == pytest.approx(numeric, rel=1e-5)
    assert abs(numeric) > 1e-4
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_class_specific_vectors_move_their_own_class_only(clip: Clip) -> None:
    head = started(clip, num_context=2, class_specific=True)
    before = head.class_texts().detach()
    with torch.no_grad():
        head.context[1] += torch.randn(2, 96)
    moved = (head.class_texts().detach() - before).abs().amax(dim=1) > 1e-6
    assert moved.tolist() == [False, True, False]


def kept_bytes(head: CoOp) -> int:
    """Bytes of distinct memory that a forward pass keeps for its backward, but for the weights."""
    weights = {p.data_ptr() for p in head._tower._tower.parameters()}  # type: ignore[union-attr]
    seen: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        head.class_texts()
    return sum(seen.values())


@pytest.mark.parametrize("specific", [True, False])
def test_chunks_change_memory_and_nothing_else(
    clip: Clip, monkeypatch: pytest.MonkeyPatch, specific: bool
) -> None:
    names = [f"{a} {b}" for a, b in itertools.product(["red", "blue", "tree", "dog"], repeat=2)]
    monkeypatch.setattr(TextTower, "_together", lambda self, P, S, K: 2)
    torch.manual_seed(3)
    head = CoOp(torch.randn(16, clip.width), num_context=8, class_specific=specific)
    head.set_text_encoder(clip, names)
    way = torch.randn(16, clip.width)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        head.zero_grad()
        texts = head.class_texts()
        (texts * way).sum().backward()
        assert head.context.grad is not None
        return texts.detach(), head.context.grad.clone()

    tower = TextTower(clip)
    R, L = head._prompts.ids.shape
    one = tower.bytes_kept(L)
    wanted = gradient()
    whole = kept_bytes(head)
    assert whole <= R * one  # the estimate is a bound
    assert whole > 0.3 * R * one  # and not an idle one
    assert R > 6
    monkeypatch.setattr(_prompts, "TOWER_BYTES", R // 5 * one)
    found = gradient()
    assert kept_bytes(head) < whole / 4
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_starts_at_words_or_at_small_random_vectors(clip: Clip) -> None:
    head = started(clip, init="a photo of a")
    tower = TextTower(clip)
    assert torch.equal(
        head.context.detach(), tower.embed(torch.tensor(tower.words("a photo of a")))
    )
    assert head.options()["num_context"] == 4
    wanted = clip.encode_text(NAMES, ["a photo of a {}."])
    torch.testing.assert_close(head.eval().text, wanted, rtol=0, atol=1e-6)
    random = started(clip, num_context=16)
    assert random.context.shape == (16, 96)
    assert float(random.context.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(random.context, started(clip, num_context=16).context)  # by the seed alone
    with pytest.raises(ValueError, match="num_context must be 4, as many as init .* got 3"):
        started(clip, init="a photo of a", num_context=3)


def test_eval_stores_the_texts_that_prediction_needs(clip: Clip) -> None:
    head = started(clip, num_context=4)
    image = torch.randn(5, clip.width)
    live = head(image).detach()
    assert float((live - head.eval()(image)).abs().amax()) < 1e-5
    again = CoOp(torch.zeros_like(head.text), **head.options())
    again.load_state_dict(head.state_dict())
    assert set(head.state_dict()) == {"text", "context"}
    assert torch.equal(again.eval()(image), head(image))
    again.train()  # without an encoder there is nothing to encode
    assert torch.equal(again(image), head(image))


def test_a_shared_context_serves_other_names_and_a_specific_one_does_not(clip: Clip) -> None:
    head = started(clip, init="a photo of a").eval()
    other = head.with_names(clip, ["dog", "house"])
    wanted = clip.encode_text(["dog", "house"], ["a photo of a {}."])
    torch.testing.assert_close(other.text, wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="class_specific"):
        started(clip, num_context=2, class_specific=True).with_names(clip, ["dog"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("pictures") / "shapes", [*NAMES, "zebra"], 6)


def test_command_trains_saves_and_predicts_without_the_text_side(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    command = ["fit", str(images), "--method", "coop", "--shots", "2", "--epochs", "2"]
    command += ["--context-length", "4", "--class-specific", "--class-position", "middle"]
    assert main([*command, "--out", str(out), "--cache-dir", str(cache)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    kept = {"num_context": 4, "class_specific": True, "class_position": "middle"}
    assert kept.items() <= config["options"].items()
    assert config["tensors"]["head.context"][1] == [4, 4, 96]
    result = json.loads((out / "result.json").read_text())
    monkeypatch.setattr(TextTower, "encode", None)  # no text encoder from here on
    assert vtclip.evaluate(out, cache_dir=cache)["accuracy"] == result["accuracy"]
    found = Classifier.load(out).predict([images / "tree" / "0.png"])
    assert len(found) == 1


def test_a_run_repeats_itself_and_resumes_from_words(images: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "head": {"init": "a photo of a"}}
    runs = [
        vtclip.fit(images, method="coop", shots=2, overrides=options, out=tmp_path / str(i),
                cache_dir=tmp_path / "cache")
        for i in range(2)
    ]  # fmt: skip
    one, two = ((run.folder / "adapter.safetensors").read_bytes() for run in runs)
    assert one == two
    head = load_adapter(runs[0].folder).head
    assert head.options()["num_context"] == 4
    start = TextTower(load_clip("demo"))
    assert not torch.equal(head.context, start.embed(torch.tensor(start.words("a photo of a"))))


def test_a_stopped_run_resumes_to_the_same_bytes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(name: str, **options: bool) -> Path:
        run = vtclip.fit(
            images, method="coop", shots=2, overrides={"epochs": 4, "checkpoint_every": 2},
            cache_dir=tmp_path / "cache", out=tmp_path / name, **options,
        )  # fmt: skip
        return run.folder / "adapter.safetensors"

    wanted = fitted("whole").read_bytes()
    steps = itertools.count(1)
    texts = TextTower.class_texts

    def stop_in_the_third(self: TextTower, *args: object) -> torch.Tensor:
        if torch.is_grad_enabled() and next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return texts(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TextTower, "class_texts", stop_in_the_third)
        with pytest.raises(Interrupted):
            fitted("stopped")
    assert not (tmp_path / "stopped" / "adapter.safetensors").exists()
    assert fitted("stopped", resume=True).read_bytes() == wanted


def test_a_table_without_a_model_is_refused_and_nothing_is_written(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    message = refused(capsys, "fit", npz, "--method", "coop", "--shots", "1", "--out", out)
    assert "method coop needs the text encoder, which an .npz table" in message
    assert not out.exists()


def test_another_models_weights_are_refused() -> None:
    info = {"model_name": str(DEMO_ASSETS), "model": {}, "digests": {"weights": "f" * 64}}
    rows = torch.randn(2, 8)
    records = Records.from_tensors(rows, torch.arange(2), rows, ["a", "b"], info=info)
    with pytest.raises(ValueError, match="the features were made by ffffffffffff"):
        text_encoder(records, torch.device("cpu"))


def test_base_to_new_encodes_the_new_names_with_the_shared_context(
    images: Path, tmp_path: Path
) -> None:
    options = {"epochs": 2, "head": {"init": "a photo of a"}}
    cache, out = tmp_path / "cache", tmp_path / "run"
    common = {"method": "coop", "shots": 2, "base_to_new": True, "cache_dir": cache}
    run = vtclip.fit(images, overrides=options, out=out, **common)
    assert (run.result["classes"], run.result["new"]["classes"]) == (
        ["blue_square", "red circle"], ["tree", "zebra"],
    )  # fmt: skip
    assert load_adapter(out).head.text.shape == (2, 128)
    again = vtclip.evaluate(run, cache_dir=cache)
    assert again["new"]["nll"] > 0
    assert again["new"]["nll"] == run.result["new"]["adapted"]["nll"]
    specific = {"head": {"class_specific": True}}
    with pytest.raises(ValueError, match="class_specific context belongs to its own classes"):
        vtclip.fit(images, overrides=specific, out=tmp_path / "none", **common)
    assert not (tmp_path / "none").exists()
