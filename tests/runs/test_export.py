# SPDX-License-Identifier: Apache-2.0
"""Exported runs: the numbers of the run, without vtclip, and no file where they would differ."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commands import json_of, python, refused
from pictures import SIDE, WIDTH, colours, small_model
from sealing import opened

import vtclip
from vtclip.backends import native
from vtclip.cli import main
from vtclip.heads import HEADS, Support
from vtclip.runs import export, export_program
from vtclip.runs.classifier import Classifier
from vtclip.runs.result import Run
from vtclip.train.methods import VOTES

METHODS = ("vtclip", "rada", "zeroshot")
NO_ONNX = "the extra vtclip[onnx] is not installed"
HAVE_ONNX = all(importlib.util.find_spec(name) for name in export.ONNX_PACKAGES)
# first without vtclip, from the two files alone: the class and the probability of each picture;
# then another program, with vtclip's own operators
ALONE = """
import json, sys
sys.modules["vtclip"] = None
import numpy as np, torch
from PIL import Image
about = json.load(open(sys.argv[2]))
cfg = about["preprocess"]
side, mean, std = cfg["size"], *(torch.tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
batch = []
for path in sys.argv[4:]:
    picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    batch.append((torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std)
module = torch.export.load(sys.argv[1]).module()
found = module(torch.stack(batch))
assert not [name for name in sys.modules if name.startswith("vtclip.")]
rows = [[about["class_names"][row.argmax()], row.max().item()] for row in found]
del sys.modules["vtclip"]
import vtclip
own = vtclip.load_exported(sys.argv[3])
print(json.dumps({"rows": rows, "own": own(torch.ones(1, 16))[0].tolist()}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain colours with noise, and a small model with random weights."""
    root = tmp_path_factory.mktemp("export")
    colours(root / "images", 8, (40, 40))
    small_model(root / "model")
    return root


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    for method in METHODS:
        overrides = {} if method == "zeroshot" else {"epochs": 8, "lr": 1e-2}
        vtclip.fit(
            place / "images", method=method, shots=2, model=str(place / "model"), device="cpu",
            out=place / method, cache_dir=place / "cache", overrides=overrides,
        )  # fmt: skip
    return {method: place / method for method in METHODS}


class Exported(NamedTuple):
    file: Path
    about: dict[str, Any]
    classifier: Classifier

    def module(self) -> Any:
        return torch.export.load(self.file).module()


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes each export once, because tracing takes a second."""

    @functools.cache
    def make(method: str, kind: str, portable: bool = True) -> Exported:
        file = tmp_path_factory.mktemp(f"{method}-{kind}") / "model.pt2"
        about = vtclip.export(runs[method], file, kind=kind, portable=portable)
        return Exported(file, about, Classifier.load(runs[method], device="cpu"))

    return make


def pixels_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))


def test_the_program_gives_the_probabilities_of_the_run_at_any_batch(exported):
    file, about, classifier = one = exported("vtclip", "image")
    assert set(about["parity"]["pt2"]["cases"]) == {
        f"{name}, batch {size}" for name in ("random", "real") for size in (1, 3)
    }
    module = one.module()
    for count in (1, 2, 5, 17):
        found = module(pixels_of(count))
        assert found.dtype == torch.float32
        assert (found - classifier.probabilities(pixels_of(count))).abs().max() < 1e-5
    program = torch.export.load(file)
    names = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in names if name.startswith("vtclip")]
    assert not [name for name in program.state_dict if "text" in name and "head" not in name]


@pytest.mark.parametrize("method", ["vtclip", "rada"])
def test_features_to_logits(exported, method):
    _, about, classifier = one = exported(method, "features")
    head: Any = classifier.adapter.head
    assert list(about["inputs"]) == (["image", "spatial"] if head.needs_spatial else ["image"])
    assert about["output"]["name"] == "logits"
    assert about["temperature_applied"] is False
    module = one.module()
    for count in (1, 4):
        given = [part for part in classifier.encode(pixels_of(count)) if part is not None]
        wanted = head(*given)
        assert (module(*given) - wanted).abs().max() < 1e-5 * wanted.abs().max()


SLOW = {"autoclip": pytest.mark.slow}  # its bisection is unrolled
OTHERS = [name for name in HEADS if name not in METHODS]
VOTING = [name for name in HEADS if VOTES in inspect.signature(HEADS[name]).parameters]
# Tip-X stretches differences between features to a range, which of these, nearly alike as they are
# behind random weights, leaves little but rounding
SHARP = [name for name in VOTING if name != "tip-x"]


@pytest.mark.parametrize(
    ("method", "votes"),
    [pytest.param(name, None, marks=SLOW.get(name, ())) for name in OTHERS]
    + [(name, 2.5) for name in VOTING],
)
def test_every_other_head_is_traced_for_any_batch(method, votes):
    views = torch.nn.functional.normalize(torch.randn(4, 3, WIDTH), dim=-1)
    options = {} if votes is None else {VOTES: votes}
    head: Any = HEADS[method](torch.nn.functional.normalize(views.mean(1), dim=-1), **options)
    head.set_text_views(views)
    label = torch.arange(4).repeat_interleave(3)
    rows = slice(None) if votes is None else slice(2, None)  # the first class has one image left
    head.fit_support(Support(views.flatten(0, 1)[rows], label[rows]))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    given = (torch.randn(3, WIDTH), torch.randn(3, 5, WIDTH))[: 1 + bool(head.needs_spatial)]
    program = export_program.FeatureProgram(head)
    job = export_program.ExportJob(
        Any, SimpleNamespace(head=head), program, {"x": given}, head, None
    )
    module = export.traced(job, True, None).module()
    for count in (1, 8):
        rows = [one[:1].repeat(count, *(1,) * (one.ndim - 1)) for one in given]
        rows = [one + 0.1 * torch.randn(one.shape) for one in rows]
        wanted = head(*rows)
        assert wanted.shape == (count, 4)
        assert (module(*rows) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of all images of classes of 4 to 10, whose votes count alike."""
    root = tmp_path_factory.mktemp("unequal")
    for number, folder in enumerate(sorted(colours(root / "images", 10, (40, 40)).iterdir())):
        for file in sorted(folder.iterdir())[4 + 2 * number :]:
            file.unlink()
    small_model(root / "model")
    for method in SHARP:
        vtclip.fit(
            root / "images", method=method, shots="all", model=str(root / "model"),
            device="cpu", out=root / method, cache_dir=root / "cache", refit=False,
            overrides={"epochs": 2} if HEADS[method].recipe(1).epochs else {},
        )  # fmt: skip
    return {method: root / method for method in SHARP}


@pytest.mark.parametrize(
    "form", ["pt2", pytest.param("onnx", marks=pytest.mark.skipif(not HAVE_ONNX, reason=NO_ONNX))]
)
@pytest.mark.parametrize("method", SHARP)
def test_votes_of_unequal_classes_are_exported(unequal, tmp_path, method, form):
    file = tmp_path / f"m.{form}"
    path, onnx = (file, None) if form == "pt2" else (None, file)
    vtclip.export(unequal[method], path, onnx=onnx, kind="features")
    classifier = Classifier.load(unequal[method], device="cpu")
    head: Any = classifier.adapter.head
    counts = head.label.bincount()
    assert counts.min() < head.votes_per_class < counts.max()
    image = classifier.encode(pixels_of(5))[0]
    wanted = head(image)
    if form == "pt2":
        found = torch.export.load(file).module()(image)
    else:
        import onnxruntime

        found = onnxruntime.InferenceSession(file).run(None, {"image": image.numpy()})[0]
        found = torch.from_numpy(found)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    head.votes_per_class = None
    head.fit_support(Support(head.keys.detach(), head.label))
    assert (found - head(image)).abs().max() > 1e-3 * wanted.abs().max()


def test_a_run_without_an_encoder_exports_its_head(npz, tmp_path):
    with np.load(npz) as table:
        image, text = table["image"], table["text"]
    run = vtclip.fit(npz, method="zeroshot", shots=2, out=tmp_path / "run")
    about = vtclip.export(run, tmp_path / "head.pt2", kind="features")
    assert about["preprocess"] is None
    module = torch.export.load(tmp_path / "head.pt2").module()
    unit = [torch.nn.functional.normalize(torch.from_numpy(rows), dim=1) for rows in (image, text)]
    assert torch.allclose(module(torch.from_numpy(image)), 20 * unit[0] @ unit[1].T, atol=1e-4)
    with pytest.raises(ValueError, match="has no image encoder"):
        vtclip.export(run, tmp_path / "image.pt2")
    assert not (tmp_path / "image.pt2").exists()


@pytest.mark.skipif(bool(native.load_cpu()), reason="the compiled operators are not built")
def test_one_runs_where_vtclip_is_not_installed_and_the_other_by_its_operators(exported, place):
    file, about, classifier = exported("vtclip", "image")
    own, own_about, own_classifier = exported("rada", "features", portable=False)
    assert (about["portable"], own_about["portable"]) == (True, False)
    targets = {str(node.target) for node in torch.export.load(own).graph.nodes}
    assert {"vtclip.rational_attn_fwd.default", "vtclip.rational_head_fwd.default"} <= targets
    paths = sorted((place / "images").glob("*/00.png"))
    words = [str(file), str(file.with_suffix(".json")), str(own), *map(str, paths)]
    done = python("-c", ALONE, *words, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for (name, share), best in zip(found["rows"], classifier.predict(paths, 1), strict=True):
        assert name == best[0].label
        assert share == pytest.approx(best[0].probability, abs=1e-5)
    wanted = own_classifier.adapter.head(torch.ones(1, WIDTH))[0].tolist()
    assert found["own"] == pytest.approx(wanted, abs=1e-4)


def test_the_file_names_no_place_of_this_machine(exported, place):
    file, about, _ = exported("vtclip", "image")
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            for private in (str(Path(vtclip.__file__).parent), str(place)):
                assert private.encode() not in archive.read(name)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == about["files"]["model.pt2"]


def test_what_lies_beside_it(runs, tmp_path):
    about = vtclip.export(runs["rada"], tmp_path / "m.pt2", kind="features", fixed_batch=2)
    written = opened(tmp_path / "m.json")
    assert written == json.loads(json.dumps(about))
    result = json.loads((runs["rada"] / "result.json").read_text())
    config = json.loads((runs["rada"] / "adapter_config.json").read_text())
    assert written["class_names"] == config["class_names"]
    assert written["temperature"] == config["temperature"]
    assert written["digests"]["adapter"] == config["tensors_digest"]
    assert written["digests"]["weights"] == result["digests"]["weights"]
    wanted = config["features"]["model_config"]["preprocess_cfg"]
    assert written["preprocess"] == wanted
    assert {"size", "mean", "std", "interpolation"} <= set(wanted)
    assert written["inputs"]["image"]["shape"] == [2, WIDTH]
    module = torch.export.load(tmp_path / "m.pt2").module()
    assert module(torch.randn(2, WIDTH)).shape == (2, 3)
    with pytest.raises((RuntimeError, AssertionError)):
        module(torch.randn(3, WIDTH))


def test_a_program_that_differs_leaves_no_file(runs, tmp_path, monkeypatch, capsys):
    def off(data: bytes, portable: bool) -> Any:
        module = load(data, portable)
        return lambda *given: module(*given) + 2e-4

    load = export.load_bytes
    monkeypatch.setattr(export, "load_bytes", off)
    words = ["export", runs["zeroshot"], "--out", tmp_path / "m.pt2", "--features"]
    assert "m.pt2 differs from the run by 0.000" in refused(capsys, *words, status=1)
    assert list(tmp_path.iterdir()) == []


def test_the_source_may_be_gone(runs, place):
    run, classifier = Run.load(runs["zeroshot"]), Classifier.load(runs["zeroshot"], device="cpu")
    images = place / "images"
    real = export_program.real_pixels(run, classifier)
    assert real is not None
    assert real.shape == (3, 3, SIDE, SIDE)
    images.rename(place / "away")
    try:
        assert export_program.real_pixels(run, classifier) is None
    finally:
        (place / "away").rename(images)


def test_the_command(runs, tmp_path, capsys):
    words = ["export", str(runs["zeroshot"]), "--out", str(tmp_path / "m.pt2"), "--features"]
    assert main([*words, "--dynamic-batch"]) == 0
    out = capsys.readouterr().out
    assert f"image ['batch', {WIDTH}] -> logits ['batch', 3]" in out
    assert "largest error" in out
    assert json_of(capsys, *words, "--overwrite")["kind"] == "features"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out FILE.pt2 or --onnx FILE.onnx must be given"),
        (["--out", "m.pt"], "--out must end in .pt2, got 'm.pt'"),
        (["--onnx", "m.pt2"], "--onnx must end in .onnx"),
        (["--out", "there.pt2"], "--out: there.pt2 exists; --overwrite, or give another name"),
        (["--out", "no/m.pt2"], "the folder no does not exist"),
        (["--out", "m.pt2", "--fixed-batch", "0"], "--fixed-batch: must be in"),
        (["--out", "m.pt2", "--fixed-batch", "2", "--dynamic-batch"], "not allowed with"),
        (["--out", "m.pt2", "--model", "nowhere"], "neither a folder nor a known"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    runs, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt2").write_bytes(b"mine")
    assert message in refused(capsys, "export", runs["zeroshot"], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"


def test_onnx_that_is_not_installed_is_named_with_its_extra(runs, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    with pytest.raises(ValueError, match=r"onnx needs .*onnxruntime; pip install 'vtclip\[onnx\]'"):
        vtclip.export(runs["zeroshot"], tmp_path / "m.pt2", onnx=tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAVE_ONNX, reason=NO_ONNX)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["image", "features"])
def test_onnx_gives_the_same_numbers(runs, tmp_path, method, kind):
    import onnxruntime

    about = vtclip.export(runs[method], None, onnx=tmp_path / "m.onnx", kind=kind)
    assert set(about["parity"]) == {"onnx"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.onnx"]
    classifier = Classifier.load(runs[method], device="cpu")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [given.name for given in session.get_inputs()] == list(about["inputs"])
    for count in (1, 6):
        pixels = pixels_of(count)
        if kind == "image":
            given, wanted = [pixels], classifier.probabilities(pixels)
        else:
            given = [one for one in classifier.encode(pixels) if one is not None]
            wanted = classifier.adapter.head(*given)
        arrays = {name: one.numpy() for name, one in zip(about["inputs"], given, strict=True)}
        found = torch.from_numpy(session.run(None, arrays)[0])
        assert (found - wanted).abs().max() < 1e-4
