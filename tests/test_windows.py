# SPDX-License-Identifier: Apache-2.0
"""Whole commands under what Windows refuses (tests/helpers/windows.py)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip  # noqa: F401 - as other libraries, imported where it finds its own system
import pictures
import pytest
import windows
from commands import call, json_of
from tables import animal_features

from vtclip import files

QUICK = ("--method", "proker", "--shots", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return pictures.dots(tmp_path / "dots")


@pytest.fixture
def on_windows(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    if not Path("/proc/self/maps").exists():
        pytest.skip("the simulation reads /proc/self/maps")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USERNAME", "somebody")  # libraries read it in place of getuid
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        windows.as_windows(patch)
        yield patch


def test_the_simulation_refuses_what_windows_refuses(tmp_path, on_windows):
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    with open(tmp_path / "a", "wb"):
        with pytest.raises(PermissionError):
            (tmp_path / "a").unlink()
        (tmp_path / "b").write_bytes(b"")
        with pytest.raises(PermissionError):
            os.replace(tmp_path / "b", tmp_path / "a")
    mapped = np.memmap(tmp_path / "c", np.uint8, "w+", shape=4096)
    with pytest.raises(PermissionError):
        (tmp_path / "c").unlink()
    del mapped
    (tmp_path / "c").unlink()
    with pytest.raises(OSError, match="syntax"):
        (tmp_path / "ViT-B-32:openai").mkdir()


def test_pictures_from_fit_to_export(capsys, tmp_path, source, on_windows):
    assert call("fit", source, *QUICK, "--out", "run") == 0
    assert json_of(capsys, "evaluate", "run")
    assert json_of(capsys, "predict", "run", source / "red dot" / "0.png")
    for number in range(2):
        grey = np.full((16, 16, 3), 200 + number)
        pictures.save(grey, tmp_path / "white dot" / f"{number}.png")
    assert call("extend", "run", tmp_path / "white dot", "--out", "run2") == 0
    assert call("repeat", "run", "--out", "again") == 0
    # again over the same folder, and from the cache
    assert call("fit", source, *QUICK, "--out", "run", "--overwrite") == 0
    assert call("features", source, "--out", "features", "--spatial", "default") == 0
    assert call("features", source, "--out", "features", "--spatial", "default") == 0
    assert call("fit", "features", "--method", "vtclip", *QUICK[2:], "--epochs", "2") == 0
    assert call("export", "run", "--out", "run.pt2") == 0


def test_damaged_features_are_built_again(tmp_path, source, on_windows):
    """The files of the damaged ones are mapped when they are found to be damaged."""
    assert call("fit", source, *QUICK, "--out", "run") == 0
    (shard,) = (tmp_path / "cache").rglob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert call("fit", source, *QUICK, "--out", "run2") == 0


def test_tables_and_a_benchmark_that_goes_on(tmp_path, on_windows):
    np.savez("animals.npz", **animal_features())
    assert call("fit", "animals.npz", *QUICK, "--out", "run") == 0
    assert call("evaluate", "run") == 0
    words = ("bench", "animals.npz", "--methods", "zeroshot,proker", "--seeds", "1", "--out", "b")
    assert call(*words, "--shots", "1", "--device", "cpu", "--threads", "1") == 0
    assert call(*words, "--shots", "1", "--device", "cpu", "--threads", "1") == 0


def test_elsewhere_a_folder_that_cannot_be_flushed_is_an_error(tmp_path, monkeypatch):
    def refuse(*_args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        files.write_atomic(tmp_path / "a.json", b"[]")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_a_flush_of_folders_will_do(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "a.json", b"[]")
    assert (tmp_path / "a.json").read_bytes() == b"[]"
