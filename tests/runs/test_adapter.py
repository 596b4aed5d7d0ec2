# SPDX-License-Identifier: Apache-2.0
"""Adapter files: what was saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import python
from safetensors.torch import load_file, save_file

from vtclip.data.records import Records
from vtclip.files import json_digest, only_writer, tensors_digest, to_json, write_atomic
from vtclip.heads import HEADS, RAda
from vtclip.runs import adapter as adapters
from vtclip.runs.adapter import CONFIG, TENSORS, Adapter, load_adapter, save_adapter

FEATURES = {"model": None, "weights_digest": None, "spatial": "raw", "width": 16}


def make(records: Records, fill: float = 0.25) -> Adapter:
    head = HEADS["vtclip"](records.text, spatial_dim=16, ffn_dim=8, logit_scale=20.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(fill)
    return Adapter(head, records.class_names, 0.75, FEATURES)


@pytest.fixture
def saved(records: Records, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "run", make(records))
    return tmp_path / "run"


def test_an_adapter_with_separate_projections_loads(records, tmp_path):
    """As vtclip wrote RAda before pair query, key and value were one matrix."""

    class Older(RAda):
        def state_dict(self, *, destination: Any = None, prefix: str = "", **_: Any) -> Any:
            apart = self.apart(super().state_dict())
            found = {} if destination is None else destination
            found.update({f"{prefix}{name}": value for name, value in apart.items()})
            return found

    rada = {"method": "rada", "options": {"logit_scale": 20.0}, "temperature": 1.0}
    other = {**rada, "method": "clip-adapter"}
    image = torch.randn(3, 16)
    head = Older(records.text, logit_scale=20.0)
    both = HEADS["auto"](records.text, members=[other, rada])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    both.heads[1] = head
    both.options = lambda: {"members": [other, rada]}  # type: ignore[method-assign, assignment]
    for name, one, inside in (("run", head, ""), ("auto", both, "heads.1.")):
        save_adapter(tmp_path / name, Adapter(one, records.class_names, 0.75, FEATURES))
        assert f"head.{inside}pair_query.weight" in load_file(tmp_path / name / TENSORS)
        loaded = load_adapter(tmp_path / name).head
        assert not any(isinstance(part, Older) for part in loaded.modules())
        assert torch.equal(loaded(image), one(image))
    tensors = load_file(tmp_path / "run" / TENSORS)
    tensors["head.key.weight"] = tensors["head.key.weight"][:3]
    digest = tensors_digest(tensors)
    save_file(tensors, tmp_path / "run" / TENSORS, {"digest": digest})
    edit_config(
        tmp_path / "run", lambda config: config.update(tensors_digest=digest), redigest=True
    )
    with pytest.raises(ValueError, match=r"rada' do not match: missing pairs.weight, extra key"):
        load_adapter(tmp_path / "run")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None], *, redigest: bool) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    change(config)
    if redigest:
        config.pop("config_digest")
        config["config_digest"] = json_digest(config)
    (folder / CONFIG).write_bytes(to_json(config))


def test_every_cut_is_noticed(saved):
    for name in (TENSORS, CONFIG):
        whole = (saved / name).read_bytes()
        for cut in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2]:
            (saved / name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="not a vtclip adapter"):
                load_adapter(saved)
        (saved / name).write_bytes(whole)
    assert load_adapter(saved).temperature == 0.75


def test_every_flipped_bit_is_noticed(saved):
    """Flips that leave the parsed content as it was (spacing, case of hex) are no change."""
    draw = random.Random(5)
    for name in (TENSORS, CONFIG):
        whole = (saved / name).read_bytes()
        for _ in range(150):
            place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            damaged = bytearray(whole)
            damaged[place] ^= bit
            (saved / name).write_bytes(bytes(damaged))
            try:
                back = load_adapter(saved)
            except (ValueError, FileNotFoundError):
                continue
            # only the name of a metadata key nobody reads may change unnoticed
            assert back.class_names == ["ant", "bee", "cat", "dog"]
            assert back.temperature == 0.75
            assert all(bool((value == 0.25).all()) for value in back.head.parameters())
        (saved / name).write_bytes(whole)


def test_a_flipped_bit_in_any_tensor_is_noticed(saved):
    whole = (saved / TENSORS).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (saved / TENSORS).write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="do not have the digest"):
            load_adapter(saved)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"<html><body>404 not found</body></html>",
        _npy(),
        pickle.dumps(Bomb()),
        b"\xff" * 64,
        b"PK\x03\x04" + b"\0" * 60,
    ],
    ids=["empty", "one byte", "html", "npy", "pickle", "huge header", "zip"],
)
@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_other_formats_are_refused_in_plain_words(saved, name, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a vtclip adapter") as error:
        load_adapter(saved)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_missing_parts_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_adapter(tmp_path)
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json does not exist"):
        load_adapter(saved)
    (saved / CONFIG).mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        load_adapter(saved)


def test_a_newer_format_is_refused_naming_both_versions(saved):
    edit_config(
        saved, lambda config: config.update(format_version=2, vtclip_version="9.9"), redigest=True
    )
    with pytest.raises(
        ValueError,
        match=r"format version 2 \(written by vtclip 9.9\), this vtclip "
        r"0\.1\.0 reads up to 1",
    ):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["class_names"].reverse(), "was changed after it was written"),
        (lambda c: c.update(temperature=2.0), "was changed after it was written"),
        (lambda c: c["options"].update(num_heads=4), "was changed after it was written"),
    ],
    ids=["class order", "temperature", "options"],
)
def test_an_edited_config_is_refused(saved, change, message):
    edit_config(saved, change, redigest=False)
    with pytest.raises(ValueError, match=message):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(method="vtclop"), "unknown method 'vtclop'"),
        (lambda c: c["class_names"].pop(), "3 class names but 4 class texts"),
        (lambda c: c["options"].update(rank=3), "options do not fit method 'vtclip'"),
        (lambda c: c["options"].update(ffn_dim=12), r"weight layers.0.linear1.weight must be"),
        (lambda c: c["options"].update(num_layers=2), "missing layers.1.linear1.bias"),
        (lambda c: c["tensors"].pop("head.text"), "extra head.text"),
        (lambda c: c.update(tensors_digest="0" * 64), "adapter_config.json wants 000000000000"),
    ],
    ids=["method", "classes", "option", "shape", "layers", "tensor list", "digest"],
)
def test_a_mismatch_is_named(saved, change, message):
    edit_config(saved, change, redigest=True)
    with pytest.raises(ValueError, match=message):
        load_adapter(saved)


def test_another_dtype_is_refused_not_cast(saved):
    tensors = load_file(saved / TENSORS)
    tensors["head.layers.0.linear1.bias"] = tensors["head.layers.0.linear1.bias"].double()
    digest = tensors_digest(tensors)
    save_file(tensors, saved / TENSORS, {"digest": digest})
    edit_config(saved, lambda config: config.update(tensors_digest=digest), redigest=True)
    with pytest.raises(
        ValueError, match=r"linear1.bias must be torch.float32 \[8\], got torch.float64"
    ):
        load_adapter(saved)


def test_weights_that_are_not_finite_are_not_saved(records, tmp_path):
    with pytest.raises(ValueError, match="must be dense and finite"):
        save_adapter(tmp_path, make(records, fill=float("nan")))
    assert not list(tmp_path.iterdir())


def test_permissions_follow_the_umask_and_links_stay(records, tmp_path):
    old = os.umask(0o022)
    try:
        save_adapter(tmp_path / "run", make(records))
        assert (tmp_path / "run" / TENSORS).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)
    real = tmp_path / "elsewhere.json"
    real.write_text("{}")
    (tmp_path / "link.json").symlink_to(real)
    write_atomic(tmp_path / "link.json", b"[1]")
    assert (tmp_path / "link.json").is_symlink()
    assert real.read_bytes() == b"[1]"
    assert not list(tmp_path.glob("*.new"))


def test_one_writer_per_folder(tmp_path):
    with (
        only_writer(tmp_path / "run"),
        pytest.raises(FileExistsError, match="being written by another run"),
        only_writer(tmp_path / "run"),
    ):
        pass
    with only_writer(tmp_path / "run"):
        pass


CHILD = """
import os, signal, sys, time, random, errno, resource
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from vtclip.runs.adapter import load_adapter, save_adapter, Adapter
from vtclip.heads import HEADS, RAda

def make(fill):
    head = HEADS["vtclip"](torch.eye(4, 16), spatial_dim=16, ffn_dim=512)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(fill)
    return Adapter(head, list("abcd"), None, {{}})

def value(folder):
    head = load_adapter(folder).head
    return {{float(v) for p in head.parameters() for v in p.detach().reshape(-1).unique()}}

folder = Path({folder!r})
"""


def run_child(folder: Path, body: str) -> str:
    """A fresh interpreter with one thread, so that its forks are safe."""
    here = str(Path(adapters.__file__).parents[2])
    code = CHILD.format(here=here, folder=str(folder)) + body
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_25_kills_while_saving_leave_a_loadable_adapter(tmp_path):
    """Saves in a loop, killed at a random moment; after each kill an old or a new adapter loads."""
    out = run_child(
        tmp_path / "run",
        """
save_adapter(folder, make(0.0))
draw, last, moved, between = random.Random(3), 0.0, 0, 0
adapter = make(0.0)
for kill in range(25):
    saved, saves = os.pipe()  # a new one: the last child may have left notes of further saves
    child = os.fork()
    if child == 0:
        number = last
        while True:
            number += 1.0
            with torch.no_grad():
                for parameter in adapter.head.parameters():
                    parameter.fill_(number)
            save_adapter(folder, adapter)
            os.write(saves, b"s")
    os.read(saved, 1)  # one save is done, the next has begun
    time.sleep(0.02 * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved)
    os.close(saves)
    between += any(path.name.startswith(".") for path in folder.iterdir())
    found = value(folder)
    assert len(found) == 1 and min(found) >= last, (found, last)
    moved += min(found) > last
    last = min(found)
print(moved, between)
""",
    )
    moved, between = map(int, out.split())
    assert moved == 25
    assert between >= 3


def test_a_result_of_another_adapter_is_refused_by_name(records, tmp_path):
    digest = save_adapter(tmp_path, make(records, fill=1.0))
    for result in ({"digests": {"adapter": digest}}, {}, {"digests": None}):
        write_atomic(tmp_path / "result.json", to_json(result))
        assert load_adapter(tmp_path).temperature == 0.75
    other = {"digests": {"adapter": "0" * 64}}
    for how in ({"result": other}, {}):
        with pytest.raises(ValueError, match=r"result.json \(of adapter 0{12}\) belong to differ"):
            load_adapter(tmp_path, **how)
        write_atomic(tmp_path / "result.json", to_json(other))


def test_a_full_disk_keeps_the_old_adapter(tmp_path):
    out = run_child(
        tmp_path / "run",
        """
save_adapter(folder, make(1.0))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    save_adapter(folder, make(2.0))
except OSError as error:
    print("refused:", error.errno == errno.EFBIG, "cannot write" in str(error))
    print("names the folder:", str(folder) in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(value(folder), sorted(path.name for path in folder.iterdir()))
save_adapter(folder, make(3.0))
print(value(folder))
""",
    )
    assert out.splitlines() == [
        "refused: True True",
        "names the folder: True",
        f"{{1.0}} ['{TENSORS}', '{CONFIG}']".replace(
            f"'{TENSORS}', '{CONFIG}'", ", ".join(map(repr, sorted([TENSORS, CONFIG])))
        ),
        "{3.0}",
    ]
