# SPDX-License-Identifier: Apache-2.0
"""Whatever a file holds, reading it ends in its contents or in a documented error of one line.

Each reader is given a sound file with a few changes: values of other kinds in its JSON, with
digests made again so that the contents themselves are met, or flipped, cut and repeated bytes. A
few dozen files of each by default; VTCLIP_FUZZ_SECONDS=60 goes on with others for a minute for each
reader:

    VTCLIP_FUZZ_SECONDS=60 pytest -s tests/runs/test_fuzz.py
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vtclip.bench.page import markdown_page
from vtclip.bench.report import make_report, read_benchmark
from vtclip.bench.rows import read_bench, read_rows
from vtclip.clip import load_clip
from vtclip.clip.loading import DEMO_ASSETS
from vtclip.clip.transformers_folders import read_model
from vtclip.data.featureset import FeatureSet
from vtclip.data.npz import open_npz
from vtclip.files import json_digest, safetensors_digest, sealed, to_json
from vtclip.runs.adapter import load_adapter
from vtclip.runs.exported_file import check_exported
from vtclip.runs.result import Run
from vtclip.train.checkpoint import Checkpoint

OLD = Path(__file__).with_name("old")
SECONDS = float(os.environ.get("VTCLIP_FUZZ_SECONDS", "0"))
EXAMPLES = 30
DOCUMENTED = (ValueError, TypeError, OSError, NotImplementedError)
Draw = random.Random

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, -1e308, 1e-320, "", "x"),
    *("\0", "\ud800", "../../x", "é" * 300, [], {}, [[]], [None], {"": {}}, [0] * 50, ["a", 1]),
)


def changed(value: Any, draw: Draw) -> Any:
    """`value` with one to three of its places deleted, replaced, repeated or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            here = stack.pop()
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            for key in keys[:200]:
                places.append((here, key))
                if isinstance(here[key], dict | list):
                    stack.append(here[key])
        if not places:
            return draw.choice(ODD)
        where, key = draw.choice(places)
        way = draw.randrange(6)
        if way == 0:
            del where[key]
        elif way == 1 and isinstance(where, list):
            where.append(copy.deepcopy(where[key]))
        elif way == 2:
            other, name = draw.choice(places)
            try:
                where[key] = copy.deepcopy(other[name])
            except (KeyError, IndexError):
                continue
        else:
            where[key] = copy.deepcopy(draw.choice(ODD))
    return value


def damaged(data: bytes, draw: Draw) -> bytes:
    """`data` with flipped, cut or repeated bytes, most of them where its header is."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not out:
            break
        at = draw.randrange(min(len(out), 400) if draw.random() < 0.7 else len(out))
        way = draw.randrange(5)
        if way == 0:
            out[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            out[at] = draw.choice(b'\0\xff"{}[]:,-9')
        elif way == 2:
            del out[at : at + draw.randint(1, 30)]
        elif way == 3:
            out[at:at] = out[at : at + draw.randint(1, 30)]
        else:
            out = out[:at] if draw.random() < 0.2 else out
    return bytes(out)


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


class Readers:
    """For each kind of file: write a changed one into `folder`, and read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = Path(shutil.copytree(OLD / "rada", folder / "run"))
        self.whole_result = json.loads((self.run / "result.json").read_text())
        self.whole_config = json.loads((self.run / "adapter_config.json").read_text())
        self.whole_config.pop("config_digest")
        self.tensors = (self.run / "adapter.safetensors").read_bytes()
        self.head = nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.head.parameters())
        self.head(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.saved = Checkpoint(folder / "checkpoint.safetensors", {"method": "rada"})
        self.saved.save(self.head, self.optimizer, 10, 1.5)
        self.whole_checkpoint = self.saved.path.read_bytes()
        self.features_folder = folder / "features"
        self.features_folder.mkdir()
        self.manifest_of = self._features()
        file = io.BytesIO()
        np.savez(file, image=np.ones((4, 3), "f4"), label=np.arange(4) % 2, text=np.eye(2, 3),
                 classname=np.array(["a", "b"]), spatial=np.ones((4, 2, 3), "f2"))  # fmt: skip
        self.npz_bytes = file.getvalue()
        self.model = Path(shutil.copytree(DEMO_ASSETS, folder / "model"))
        self.model_config = json.loads((self.model / "open_clip_config.json").read_text())
        self.hf = folder / "hf"
        self.hf.mkdir()
        program = torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),)).run_decompositions({})
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        self.pt2 = buffer.getvalue()

    def _features(self) -> dict[str, Any]:
        manifest = {
            "format": "vtclip-features", "version": 1, "key": "k",
            "fields": {"class_names": ["a", "b"], "templates": ["{}"], "spatial": None,
                       "augment_passes": 0, "model": {}, "transform": {}, "images": "0",
                       "weights": "0"},
            "model_name": "demo", "logit_scale": 100.0, "width": 3, "spatial_tokens": None,
            "spatial_width": None, "names": ["1", "2"], "label": [0, 1], "sizes": [1, 1],
            "digests": ["x", "y"], "roles": None, "pixels": [None, None], "perceptual": ["", None],
            "notes": {}, "skipped": [["n", "why"]], "labels": [[0], [0, 1]],
        }  # fmt: skip
        from vtclip.data.shards import write_tensors

        manifest["text"] = write_tensors(
            self.features_folder / "text.safetensors", {"text": torch.eye(2, 3)}
        )
        entry = write_tensors(
            self.features_folder / "shard-00000.safetensors", {"image": torch.ones(2, 1, 3)}
        )
        manifest["shards"] = [{**entry, "rows": 2}]
        return manifest

    def result(self, draw: Draw) -> None:
        value = changed(self.whole_result, draw)
        data = to_json(sealed(value)) if isinstance(value, dict) else text(value)
        (self.run / "result.json").write_bytes(damaged(data, draw) if draw.random() < 0.2 else data)
        run = Run.load(self.run)
        repr(run), run.table()

    def adapter(self, draw: Draw) -> None:
        value = changed(self.whole_config, draw)
        if isinstance(value, dict):
            value["config_digest"] = json_digest(value)
        (self.run / "adapter_config.json").write_bytes(text(value))
        data = damaged(self.tensors, draw) if draw.random() < 0.2 else self.tensors
        (self.run / "adapter.safetensors").write_bytes(data)
        load_adapter(self.run)

    def checkpoint(self, draw: Draw) -> None:
        data = damaged(self.whole_checkpoint, draw)
        if draw.random() < 0.7:
            tensors = safetensors.torch.load(self.whole_checkpoint)
            size = int.from_bytes(self.whole_checkpoint[:8], "little")
            header = json.loads(self.whole_checkpoint[8 : 8 + size])["__metadata__"]
            state = json.dumps(changed(json.loads(header["state"]), draw))
            if draw.random() < 0.5:
                name = draw.choice(sorted(tensors))
                tensors[draw.choice([name, "x", "optimizer.9.step", "optimizer.x", "head."])] = (
                    torch.zeros(draw.randint(0, 3))
                )
            metadata = {"state": state}
            metadata["digest"] = safetensors_digest(tensors, metadata)
            data = safetensors.torch.save(tensors, metadata)
        self.saved.path.write_bytes(data)
        self.saved.load(self.head, self.optimizer)

    def manifest(self, draw: Draw) -> None:
        value = changed(self.manifest_of, draw)
        if isinstance(value, dict):
            value["digest"] = json_digest(value)
        (self.features_folder / "manifest.json").write_bytes(to_json(value))
        features = FeatureSet.open(self.features_folder)
        records = features.records()
        features.verify()
        records.batch(torch.arange(len(records)))

    def npz(self, draw: Draw) -> None:
        data = self.npz_bytes
        if draw.random() < 0.8:  # changed members in a sound archive
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
                chosen = draw.choice(old.namelist())
                for name in old.namelist():
                    content = old.read(name)
                    if name == chosen:
                        huge = b"'shape': (" + draw.choice([b"9" * 30, b"-1", b"1e9"])
                        content = content.replace(b"'shape': (4", huge)
                        if draw.random() < 0.6:
                            content = damaged(old.read(name), draw)
                        name = name.removesuffix(".npy") if draw.random() < 0.1 else name
                    new.writestr(name, content)
            data = out.getvalue()
        else:
            data = damaged(data, draw)
        (self.folder / "t.npz").write_bytes(data)
        records = open_npz(self.folder / "t.npz", need_spatial=draw.random() < 0.5)
        records.batch(torch.arange(len(records)))

    def rows(self, draw: Draw) -> None:
        out = self.folder / "bench"
        out.mkdir(exist_ok=True)
        head = {"key": "k", "source": "s", "shots": 4, "seed": 1, "time": 1.0}
        lines = [
            sealed(changed({**self.whole_result, **head}, draw)),
            sealed({**self.whole_result, **head}),
        ]
        data = b"".join(text(line) + b"\n" for line in lines)
        (out / "results.jsonl").write_bytes(damaged(data, draw) if draw.random() < 0.2 else data)
        bench = {"format": "vtclip-bench", "version": 2, "settings": {}, "sources": {"s": {}}}
        bench = changed(bench, draw)
        bench = sealed(bench) if isinstance(bench, dict) else bench
        (out / "bench.json").write_bytes(text(bench))
        read_rows(out)
        found, notes = read_benchmark(out, strict=False)
        markdown_page(make_report(found, notes), "title", None)
        read_bench(out)

    def model_folder(self, draw: Draw) -> None:
        config = changed(self.model_config, draw)
        (self.model / "open_clip_config.json").write_bytes(text(config))
        load_clip(f"local-dir:{self.model}")

    def transformers_folder(self, draw: Draw) -> None:
        tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vocab_size": 9,
                 "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # fmt: skip
        config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 8,
                  "vision_config": tower, "text_config": dict(tower)}  # fmt: skip
        (self.hf / "config.json").write_bytes(text(changed(config, draw)))
        safetensors.torch.save_file({"x": torch.ones(1)}, self.hf / "model.safetensors")
        preprocess = {"image_mean": [0, 0, 0], "size": {"shortest_edge": 8}, "resample": 3}
        (self.hf / "preprocessor_config.json").write_bytes(text(changed(preprocess, draw)))
        read_model(self.hf)

    def exported(self, draw: Draw) -> None:
        if draw.random() < 0.2:
            check_exported(damaged(self.pt2, draw))
            return
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.pt2)) as old, zipfile.ZipFile(out, "w") as new:
            chosen = draw.choice([name for name in old.namelist() if name.endswith(".json")])
            for name in old.namelist():
                content = old.read(name)
                new.writestr(
                    name, text(changed(json.loads(content), draw)) if name == chosen else content
                )
        check_exported(out.getvalue())


KINDS = [name for name in vars(Readers) if not name.startswith("_")]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(tmp_path_factory.mktemp("fuzz"))


def meet(read: Callable[[Draw], None], draw: Draw) -> bool:
    """Whether the file was refused; any other end than a documented error of one line fails."""
    try:
        read(draw)
    except DOCUMENTED as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, repr(message)  # noqa: PT018
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_only_documented_errors_escape(kind, readers, capsys):
    read = getattr(readers, kind)
    logging.disable(logging.CRITICAL)
    try:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.integers(0, 2**32))
        def some(seed: int) -> None:
            meet(read, Draw(seed))

        some()
        end, done, refused = time.monotonic() + SECONDS, 0, 0
        while time.monotonic() < end:
            seed = random.SystemRandom().randrange(2**48)
            try:
                refused += meet(read, Draw(seed))
            except Exception as error:
                raise AssertionError(f"{kind}: seed {seed}") from error
            done += 1
    finally:
        logging.disable(logging.NOTSET)
    if done:
        with capsys.disabled():
            sys.stdout.write(f"\n{kind}: {done} files, {refused} refused, the others read\n")
