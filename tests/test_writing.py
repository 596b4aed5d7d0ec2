# SPDX-License-Identifier: Apache-2.0
"""Writes: one step per file, one step for files that belong together, whatever ends the writer."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import python

from vtclip import writing
from vtclip.writing import (
    JOURNAL,
    NewFiles,
    is_leftover,
    locked,
    only_writer,
    read_settled,
    replacing,
    settle,
    write_atomic,
    write_together,
)

LEFT = ".a.0123456789abcdef.new"


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_planted_name_is_neither_followed_nor_overwritten(tmp_path, monkeypatch):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    precious.write_bytes(b"precious")
    (folder / "a.new").symlink_to(precious)
    (folder / "b.new").write_bytes(b"mine")
    write_atomic(folder / "a", b"1")
    write_together({folder / "a": b"2", folder / "b": b"3"})
    assert precious.read_bytes() == b"precious"
    assert held(folder) == {"a": b"2", "b": b"3", "a.new": b"precious", "b.new": b"mine"}
    # not even a name that somebody guessed
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "0123456789abcdef")
    (folder / LEFT).symlink_to(precious)
    for write in (write_atomic, lambda path, data: write_together({path: data})):
        with pytest.raises(OSError, match="cannot write 1 bytes to .*: File exists"):
            write(folder / "a", b"4")
    assert precious.read_bytes() == b"precious"
    assert (folder / "a").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_a_write_that_is_stopped_leaves_nothing(name, stop, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def stopped(*_: Any) -> None:
        raise stop

    monkeypatch.setattr(os, name, stopped)
    for write in (
        lambda: write_atomic(tmp_path / "a", b"new"),
        lambda: write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"}),
    ):
        with pytest.raises((KeyboardInterrupt, OSError)) as seen:
            write()
        if isinstance(stop, OSError):
            assert "No space left" in str(seen.value)
    monkeypatch.undo()
    settle(tmp_path)
    with only_writer(tmp_path):
        pass
    assert held(tmp_path) == {"a": b"old"}


def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def moved(*paths: Any, **options: Any) -> None:
        done.append("rename")
        replace(*paths, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    write_atomic(tmp_path / "a", b"1")
    assert done == ["file", "rename", "folder"]
    done.clear()
    write_together({tmp_path / "a": b"2", tmp_path / "b": b"2"})
    first, last = done.index("rename"), len(done) - done[::-1].index("rename")
    assert done[:first].count("file") >= 2
    assert "folder" in done[last:]


def test_what_is_no_file_is_refused_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        for write in (write_atomic, lambda path, data: write_together({path: data})):
            with pytest.raises(OSError, match=f"cannot write 1 bytes to .*{name}: it is not a"):
                write(tmp_path / name, b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    for letter, times in (("a", 255), ("\N{SNOWMAN}", 85)):
        write_atomic(tmp_path / (letter * times), b"1")
    assert len(held(tmp_path)) == 2


def test_another_library_may_write_the_new_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with replacing(tmp_path / "a") as fresh:
        fresh.write_bytes(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
    assert held(tmp_path) == {"a": b"new"}
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a") as fresh:
        fresh.rename(tmp_path / "elsewhere").unlink()
    assert held(tmp_path) == {"a": b"new"}


def test_files_are_replaced_and_removed_together(tmp_path):
    write_together({tmp_path / "a": b"1", tmp_path / "gone": b"1"})
    (tmp_path / "stays").write_bytes(b"1")
    with NewFiles(tmp_path) as new:
        new.write("a", b"2")
        new.write("b", b"2")
        new.remove("gone", "never there", "b")  # a file that is written is not removed
        assert new.names == {"a", "b"}
        assert (tmp_path / "a").read_bytes() == b"1"
        new.commit()
    assert held(tmp_path) == {"a": b"2", "b": b"2", "stays": b"1"}
    with NewFiles(tmp_path) as new:
        new.write("a", b"3")
    assert held(tmp_path)["a"] == b"2"


CHILD = """
import os, signal, sys
from collections.abc import Iterator
from pathlib import Path
from vtclip.writing import NewFiles, only_writer, read_settled, settle
folder = Path(sys.argv[1])

def write(mark):
    with NewFiles(folder) as new:
        for name in "abc":
            new.write(name, mark * 3000)
        new.remove("odd" if mark == b"2" else "even")
        new.write("even" if mark == b"2" else "odd", b"")
        new.commit()

def killing(at, action):
    done = 0
    for name in ("open", "write", "fsync", "replace", "unlink"):
        def call(*args, real=getattr(os, name), name=name, **options):
            nonlocal done
            done += 1
            if done == at:
                if name == "write":
                    real(args[0], bytes(args[1])[:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        setattr(os, name, call)
    action()

def killed(at, action):
    child = os.fork()
    if child == 0:
        try:
            killing(at, action)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def test_a_kill_at_any_call_of_the_system_leaves_all_files_old_or_all_new(tmp_path):
    """Also where the process that finishes the write is killed in turn, at each of its calls."""
    code = """
def look():
    marks = {(folder / name).read_bytes()[:1] for name in "abc"}
    assert len(marks) == 1, marks
    (mark,) = marks
    assert (folder / "even").exists() == (mark == b"2"), mark
    assert (folder / "odd").exists() == (mark == b"1"), mark
    assert {len((folder / name).read_bytes()) for name in "abc"} == {3000}
    return mark

found, journals, at = [], 0, 0
while True:
    write(b"1")
    at += 1
    if not killed(at, lambda: write(b"2")):
        break
    again = 0
    journal = (folder / ".vtclip-journal").exists()
    journals += journal
    while journal and killed(again := again + 1, lambda: settle(folder)):
        pass
    settle(folder)
    found.append(look())
    with only_writer(folder):
        pass
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
print(len(found), found.count(b"1"), found.count(b"2"), journals)
assert found == sorted(found)
"""
    done = python("-c", CHILD + code, tmp_path)
    assert done.returncode == 0, done.stderr
    kills, old, new, journals = map(int, done.stdout.split())
    assert kills == old + new >= 30
    assert old >= 15
    assert new >= journals >= 5


@pytest.mark.parametrize("look", range(1, 7))
@pytest.mark.parametrize("write", [write_atomic, lambda path, data: write_together({path: data})])
def test_a_file_that_another_process_removes_meanwhile_is_written(
    tmp_path, monkeypatch, write, look
):
    """It is removed behind one of the looks that a write takes at it."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    looks = 0

    def then_removed(one):
        def looked(place, *arguments, **options):
            nonlocal looks
            found = one(place, *arguments, **options)
            if not isinstance(place, int) and os.fspath(place) == str(path):
                looks += 1
                if looks == look:
                    path.unlink()
            return found

        return looked

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, then_removed(getattr(os, name)))
    write(path, b"new")
    monkeypatch.undo()
    assert held(tmp_path) == {"a": b"new"}
    assert looks >= 1


def test_two_writers_and_a_reader_never_mix(tmp_path):
    code = """
def read():
    marks = {(folder / name).read_bytes() for name in "abc"}
    if len(marks) != 1:
        raise ValueError("mixed")
    assert marks <= {b"1" * 3000, b"2" * 3000}, "cut"

write(b"1")
children = []
for mark in (b"1", b"2"):
    child = os.fork()
    if child == 0:
        for _ in range(60):
            write(mark)
        os._exit(0)
    children.append(child)
reads, running = 0, set(children)
while running:
    read_settled(folder, read)
    reads += 1
    for child in list(running):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            running.discard(child)
print(reads, sorted(os.listdir(folder)))
"""
    done = python("-c", CHILD + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1].strip() in (
        "['a', 'b', 'c', 'even']", "['a', 'b', 'c', 'odd']"
    )  # fmt: skip


def journal(folder: Path, *, move: Any, remove: Any = ()) -> None:
    body = {"format": writing.JOURNAL_FORMAT, "move": move, "remove": list(remove)}
    (folder / JOURNAL).write_bytes(writing._sealed(body))


def test_a_journal_that_is_damaged_or_leads_elsewhere_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious").write_bytes(b"precious")
    (folder / LEFT).write_bytes(b"new")
    digest = hashlib.sha256(b"new").hexdigest()
    journal(folder, move={"a": [LEFT, digest]})
    whole = (folder / JOURNAL).read_bytes()
    damaged = [whole[:-1], b"", b"{}", bytes([whole[0] ^ 1]) + whole[1:], whole + b" "]
    damaged += [writing._sealed(json.loads(text)) for text in ("{}", "[]", '{"format": 1}')]
    for move, remove in (
        ({"../precious": [LEFT, digest]}, ()),
        ({"a": ["../precious", digest]}, ()),
        ({"a": ["precious", digest]}, ()),
        ({"a": [LEFT, "0" * 64]}, ()),
        ({"a": [LEFT.replace("a", "b"), digest]}, ()),
        ({"a": LEFT}, ()),
        ({}, ("../precious",)),
        ({}, ("",)),
        ({}, (3,)),
    ):
        journal(folder, move=move, remove=remove)
        damaged.append((folder / JOURNAL).read_bytes())
    for data in damaged:
        (folder / JOURNAL).write_bytes(data)
        for act in (settle, lambda place: only_writer(place).__enter__()):
            with pytest.raises(ValueError, match=r"journal is damaged or its files are gone; remo"):
                act(folder)
    assert held(tmp_path / "run").keys() == {LEFT, JOURNAL}
    assert (tmp_path / "precious").read_bytes() == b"precious"
    (folder / JOURNAL).write_bytes(whole)
    assert settle(folder) == {"a"}
    assert held(folder) == {"a": b"new"}


def test_a_planted_link_is_not_moved_by_a_journal(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / LEFT).symlink_to(tmp_path / "elsewhere")
    journal(tmp_path, move={"a": [LEFT, hashlib.sha256(b"new").hexdigest()]})
    with pytest.raises(ValueError, match="damaged"):
        settle(tmp_path)
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_finished_here_says_so_in_one_line(code, tmp_path, monkeypatch):
    (tmp_path / LEFT).write_bytes(b"new")
    journal(tmp_path, move={"a": [LEFT, hashlib.sha256(b"new").hexdigest()]})

    def refused(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match=r"was cut off and cannot be finished here \(") as seen:
        settle(tmp_path)
    assert "\n" not in str(seen.value)
    monkeypatch.undo()
    assert settle(tmp_path) == {"a"}


def test_what_killed_writers_left_goes_where_the_folder_is_locked(tmp_path):
    stays = ["a.new", ".a.new", ".a.0123.new", "a.0123456789abcdef.new"]
    for name in (LEFT, *stays):
        (tmp_path / name).write_bytes(b"")
    with replacing(tmp_path / "b") as living:
        with only_writer(tmp_path):
            pass
        assert held(tmp_path).keys() == {*stays, living.name}
        assert is_leftover(living.name)
    assert [name for name in stays if is_leftover(name)] == []
    (tmp_path / LEFT).symlink_to(tmp_path / "a.new")
    with only_writer(tmp_path):
        assert (tmp_path / LEFT).is_symlink()


def test_a_lock_waits_for_others_and_not_for_its_own_thread(tmp_path):
    said: list[str] = []
    with only_writer(tmp_path):
        with locked(tmp_path), locked(tmp_path, 0.0):
            pass
        with pytest.raises(FileExistsError, match="being written"), only_writer(tmp_path):
            pass

        def other() -> None:
            with pytest.raises(FileExistsError, match="being written"), locked(tmp_path, 0.02):
                pass
            said.append("refused")
            with locked(tmp_path):
                said.append("waited")

        thread = threading.Thread(target=other)
        thread.start()
        while not said:
            pass
        assert said == ["refused"]
    thread.join()
    assert said == ["refused", "waited"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_too(code, tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.fcntl, "flock", none)
    (tmp_path / LEFT).write_bytes(b"")
    with only_writer(tmp_path):
        write_together({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    assert held(tmp_path) == {"a": b"1", "b": b"1", LEFT: b""}  # may be a living writer's


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path):
    write_together({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    reads = []

    def read() -> set[bytes]:
        found = {(tmp_path / "a").read_bytes()}
        if not reads:
            os.utime(tmp_path, ns=(0, 0))  # clocks of file systems are coarse
            write_together({tmp_path / "a": b"2", tmp_path / "b": b"2"})
        reads.append(found | {(tmp_path / "b").read_bytes()})
        if len(reads[-1]) > 1:
            raise ValueError("mixed")
        return reads[-1]

    assert read_settled(tmp_path, read) == {b"2"}
    assert len(reads) == 2

    def damaged() -> None:
        reads.append(set())
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read_settled(tmp_path, damaged)
    assert len(reads) == 3


def test_a_kill_while_another_waits_frees_the_lock(tmp_path):
    code = """
with only_writer(folder):
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python("-c", CHILD + code, tmp_path)
    assert done.returncode == -signal.SIGKILL
    with locked(tmp_path, 0.0):
        pass


def test_a_file_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, swept = writing.lock, []

    def lock(handle: int, wait_s: float) -> bool:
        if not swept:
            swept.extend(tmp_path.glob(".a.*.new"))
            swept[0].unlink()
        return real(handle, wait_s)

    monkeypatch.setattr(writing, "lock", lock)
    write_atomic(tmp_path / "a", b"1")
    assert len(swept) == 1
    assert held(tmp_path) == {"a": b"1"}


def test_a_disk_that_is_full_at_the_journal_is_the_error_and_nothing_changes(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    real = writing._Fresh.write

    def write(self: Any, data: bytes) -> None:
        if self.path.name == JOURNAL:
            raise OSError(errno.ENOSPC, "No space left")
        real(self, data)

    monkeypatch.setattr(writing._Fresh, "write", write)
    with pytest.raises(OSError, match="No space left"):
        write_together({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert held(tmp_path) == {"a": b"old"}


def test_a_journal_that_another_finished_meanwhile_names_no_file(tmp_path, monkeypatch):
    real = writing.locked

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        with real(folder):
            (folder / JOURNAL).unlink()
            yield

    (tmp_path / JOURNAL).write_bytes(b"of another")
    monkeypatch.setattr(writing, "locked", late)
    assert settle(tmp_path) == set()
