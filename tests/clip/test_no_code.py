# SPDX-License-Identifier: Apache-2.0
"""A model folder that asks to run code of its own is refused by the setting's name, every way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from commands import refused
from safetensors.torch import save_file

from vtclip.clip import ClipNotFound, load_clip
from vtclip.clip.architecture import build_clip
from vtclip.clip.loading import DEMO_ASSETS
from vtclip.clip.no_code import check_no_code

PICTURES = Path(__file__).parents[1] / "runs" / "old" / "pictures"
MARK = "from pathlib import Path\nPath('ran').mkdir()\n"
TOKENIZER = {"tokenizer_class": "Mark", "auto_map": {"AutoTokenizer": ["mark.Mark", None]}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model, whose folder holds Python that makes the folder `ran`."""
    monkeypatch.chdir(tmp_path)
    copied = Path(shutil.copytree(DEMO_ASSETS, tmp_path / "model"))
    (copied / "mark.py").write_text(MARK)
    return copied


def edit(folder: Path, **text_cfg: Any) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= text_cfg
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        (
            {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"trust_remote_code": True}},
            "text_cfg.tokenizer_kwargs.trust_remote_code asks to run code",
        ),
        (
            {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"tokenizer_file": "/etc/passwd"}},
            "text_cfg.tokenizer_kwargs.tokenizer_file is passed on to other libraries",
        ),
        ({"hf_model_name": "./model"}, "text_cfg.hf_model_name must be the name of a repository"),
        ({"hf_model_name": "model"}, "text_cfg.hf_model_name 'model' is a folder here"),
        ({"hf_tokenizer_name": "/tmp/x"}, "text_cfg.hf_tokenizer_name must be the name of a repo"),
        ({"auto_map": {"AutoModel": "mark.Mark"}}, "text_cfg.auto_map asks to run code"),
        ({"tokenizer_kwargs": [1]}, "text_cfg.tokenizer_kwargs must be an object"),
    ],
)
def test_such_a_setting_is_refused_by_name(folder, text_cfg, message, capsys):
    edit(folder, **text_cfg)
    with pytest.raises(ClipNotFound) as error:
        load_clip(f"local-dir:{folder}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    shutil.copytree(PICTURES, "images")
    line = refused(capsys, "features", "images", "--out", "f", "--model", f"local-dir:{folder}")
    assert message in line
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_so_are_those_in_files_that_transformers_reads_by_itself(folder, name):
    edit(folder, hf_tokenizer_name="x/y")
    (folder / name).write_text(json.dumps(TOKENIZER))
    with pytest.raises(ClipNotFound, match=rf"{name}: auto_map asks to run code"):
        load_clip(f"local-dir:{folder}")
    assert not Path("ran").exists()


def test_so_are_those_of_a_folder_of_transformers(folder, capsys):
    (folder / "open_clip_config.json").unlink()
    config = {"model_type": "clip", "auto_map": {"AutoModel": "mark.Mark"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClipNotFound, match=r"config\.json: auto_map asks to run code"):
        load_clip(f"local-dir:{folder}")
    assert "auto_map asks to run code" in refused(capsys, "convert", folder)
    assert not Path("ran").exists()


def test_so_are_those_in_the_metadata_of_a_file(folder, capsys):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_model_name"] = "../elsewhere"
    facts = {"format_version": 1, "architecture": "", "model_cfg": config, "preprocess_cfg": {}}
    save_file({"x": torch.zeros(2)}, "m.safetensors", {"vtclip": json.dumps(facts)})
    with pytest.raises(ValueError, match=r"text_cfg\.hf_model_name must be the name of a repo"):
        load_clip(str(Path("m.safetensors").resolve()))
    line = refused(capsys, "convert", "m.safetensors", "--out", "n.safetensors")
    assert "text_cfg.hf_model_name must be the name of a repository" in line
    with pytest.raises(ValueError, match=r"vision_cfg\.timm_model_name must be the name of one"):
        build_clip({**config, "vision_cfg": {"timm_model_name": "hf-hub:x/y"}, "text_cfg": {}})


def test_a_run_that_names_such_a_folder_is_refused_too(folder):
    """`predict` takes the model that the run names; it goes the same way."""
    edit(folder, tokenizer_kwargs={"trust_remote_code": 1})
    with pytest.raises(ClipNotFound, match="trust_remote_code asks to run code"):
        load_clip(str(folder))


def test_the_settings_of_known_models_pass():
    for name in open_clip.list_models():
        check_no_code(open_clip.get_model_config(name), name)
    check_no_code({"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "lower"}}}}, "here")


def test_the_folder_itself_loads(folder):
    assert load_clip(f"local-dir:{folder}").width == load_clip("demo").width


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model_cfg": 1}', '{"model_cfg": {"embed_dim": NaN}}',
     '{"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": 1e400}}}',
     '{"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": "x"}, "text_cfg": {}}}',
     "[" * 100_000],
)  # fmt: skip
def test_other_contents_are_one_line(folder, content):
    (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(ClipNotFound) as error:
        load_clip(f"local-dir:{folder}")
    assert "\n" not in str(error.value)
