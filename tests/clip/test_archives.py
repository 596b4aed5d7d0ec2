# SPDX-License-Identifier: Apache-2.0
"""TorchScript archives: the same tensors as torch's own reader gives, and nothing of them runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vtclip.clip.archives import is_torchscript, read_torchscript


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).half()
        self.norm = nn.BatchNorm1d(3).half()
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) * self.mask.sum()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.again = self.inner
        self.wide = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)  # not contiguous
        self.register_buffer("input_resolution", torch.tensor(224))
        self.context_length = 77

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.wide.half().sum()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Outer().eval(), torch.zeros(2, 4).half()).save(str(path))
    return path


def test_tensors_equal_those_of_torch(archive: Path) -> None:
    assert is_torchscript(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(archive)).state_dict()
    found, numbers = read_torchscript(archive)
    assert set(expected) <= set(found)
    assert {"inner.linear.weight", "wide", "input_resolution"} <= set(found)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert "training" in numbers


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a zip in which `change` gives the new bytes of each entry, or None to leave it out.

    Compression stays.
    """
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data, compress_type=info.compress_type)
    return out


def with_pickle(archive: Path, out: Path, data: bytes) -> Path:
    return rewritten(archive, out, lambda name, old: data if name.endswith("/data.pkl") else old)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def frames(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


ONE_STORAGE = b"(" + word("storage") + named("torch", "FloatStorage") + word("0") + word("cpu")
HOSTILE = {
    "another function": frames(named("builtins", "eval"), b"(", word("1"), b"tR"),
    "a function of os": frames(named("posix", "system"), b"(", word("touch trapped"), b"tR"),
    "dotted": frames(named("torch", "os.system"), b"(", word("touch trapped"), b"tR"),
    "a function of torch": frames(named("torch.hub", "load"), b"(", word("x"), b"tR"),
    "a loader of torch": frames(named("torch", "load"), b"(", word("x"), b"tR"),
    "a storage called": frames(named("torch", "FloatStorage"), b")R"),
    "object by class": frames(b"(", named("os", "getcwd"), b"o"),
    "instance": frames(b"(ios\ngetcwd\n"),
    "extension": frames(b"\x82\x01"),
    "names from the stack": b"\x80\x04" + word("os") + word("getcwd") + b"\x93)R.",
    "huge index": frames(named("__torch__", "M"), b"r\xff\xff\xff\xff", b")\x81"),
    "no module": frames(b"K\x01"),
    "a list": frames(b"]"),
    "nested": frames(b"(" * 100_000, b"t" * 100_000),
    "shared without end": frames(
        named("__torch__", "M"), b"q\x00)\x81q\x01",
        *(b"h\x00)\x81}(" + word("a") + b"h\x01" + word("b") + b"h\x01ubq\x01" for _ in range(60)),
    ),
    "cut": frames(named("__torch__", "M"))[:-3],
    "empty": b"",
    "unknown storage": frames(
        named("__torch__", "M"), b")\x81}", word("w"), named("torch._utils", "_rebuild_tensor_v2"),
        b"(" + ONE_STORAGE.replace(word("0"), word("77")) + b"K\x02tQ",
        b"K\x00K\x02\x85K\x01\x85\x89}tRsb",
    ),
    "wrong size": frames(
        named("__torch__", "M"), b")\x81}", word("w"), named("torch._utils", "_rebuild_tensor_v2"),
        b"(" + ONE_STORAGE + b"J\xff\xff\xff\x7ftQK\x00K\x02\x85K\x01\x85\x89}tR", b"sb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_one_line_and_runs_nothing(
    archive: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = with_pickle(archive, tmp_path / "bad.pt", HOSTILE[kind])
    with pytest.raises(ValueError, match="TorchScript archive") as caught:
        read_torchscript(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 260
    assert sorted(os.listdir(tmp_path)) == ["bad.pt"]


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_trap_in_place_of_a_module_is_never_sprung(
    archive: Path, tmp_path: Path, protocol: int
) -> None:
    data = pickle.dumps({"model": Trap(tmp_path / "trapped")}, protocol=protocol)
    path = with_pickle(archive, tmp_path / "bad.pt", data)
    with pytest.raises(ValueError, match="unsafe TorchScript archive"):
        read_torchscript(path)
    assert not (tmp_path / "trapped").exists()


def test_code_in_the_archive_is_not_read(archive: Path, tmp_path: Path) -> None:
    path = rewritten(
        archive,
        tmp_path / "code.pt",
        lambda name, old: b"import os; os.abort()" if "/code/" in name else old,
    )
    found, _ = read_torchscript(path)
    assert torch.equal(found["wide"], read_torchscript(archive)[0]["wide"])


def test_damaged_archives_are_one_line(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    path = tmp_path / "bad.pt"
    for data in (b"", whole[: len(whole) // 2], whole[200:], b"PK\x03\x04" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="TorchScript archive") as caught:
            read_torchscript(path)
        assert "\n" not in str(caught.value)
    rewritten(archive, path, lambda name, old: None if name.endswith("/data/0") else old)
    with pytest.raises(ValueError, match="data/0"):
        read_torchscript(path)
    rewritten(archive, path, lambda name, old: old[:-1] if name.endswith("/data/0") else old)
    with pytest.raises(ValueError, match="storage 0 must have"):
        read_torchscript(path)
    rewritten(archive, path, lambda name, old: b"big" if name.endswith("byteorder") else old)
    with pytest.raises(ValueError, match="big-endian"):
        read_torchscript(path)


def test_a_compressed_storage_is_not_blown_up(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, data, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="storage"):
        read_torchscript(path)


def test_every_cut_of_the_pickle_and_every_flipped_byte_is_an_error_or_harmless(
    archive: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(archive) as file:
        data = next(file.read(n) for n in file.namelist() if n.endswith("/data.pkl"))
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "bad.pt"
    for _ in range(200):
        place = int(torch.randint(len(data), (1,), generator=generator))
        value = int(torch.randint(256, (1,), generator=generator))
        with_pickle(archive, path, data[:place] + bytes([value]) + data[place + 1 :])
        try:
            read_torchscript(path)
        except ValueError as error:
            assert "TorchScript" in str(error)  # noqa: PT017


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save({"x": torch.ones(2)}, plain)
    assert not is_torchscript(plain)
    buffer = tmp_path / "text.pt"
    buffer.write_bytes(io.BytesIO(b"hello").getvalue())
    assert not is_torchscript(buffer)
    assert not is_torchscript(tmp_path / "missing")
