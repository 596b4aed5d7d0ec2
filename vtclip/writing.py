# SPDX-License-Identifier: Apache-2.0
"""Writes that survive a kill and a full disk, and one writer per folder.

A write goes to a new file of a random name, `.NAME.RANDOM.new`, in the same folder, is flushed to
the disk, and then replaces `NAME` in one step, so that a reader finds either the old bytes or the
new ones, whoever else writes. A symbolic link is followed: the file it points to is replaced and
the link stays. Permissions follow the umask.

Files that belong together (`NewFiles`) are all written under such names first. Then `JOURNAL`,
which lists them with their digests, appears in one step: from then on they count, and whoever comes
next, reader or writer, does the renames that a killed writer left (`settle`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl as _fcntl

    fcntl: Any = _fcntl
except ImportError:  # Windows has no flock; there the folder is not locked
    fcntl = None

JOURNAL, JOURNAL_FORMAT = ".vtclip-journal", "vtclip-journal 1"
FRESH = re.compile(r"\..+\.[0-9a-f]{16}\.new", re.DOTALL)
NAME_KEPT = 50  # letters of a name in that of its new file, which systems allow 255 bytes
LOCK_WAIT_S = 60.0
READS = 5
# of file systems without locks, where all goes on without them, as on Windows
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class _Fresh:
    """A new file beside `path`, under a name that nobody can know before, to take its place.

    It is locked while its writer lives, which tells it from what a killed writer left.
    """

    def __init__(self, path: Path) -> None:
        if not _may_be_replaced(path):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        while True:
            self.place = path.with_name(f".{path.name[:NAME_KEPT]}.{secrets.token_hex(8)}.new")
            self._handle: int | None = os.open(self.place, flags, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks
                lock(self._handle, 0.0)
            if fcntl is None or os.fstat(self._handle).st_nlink:  # else swept before it was locked
                return
            self.close()

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and self._handle is not None:
            rest = rest[os.write(self._handle, rest) :]

    def finish(self) -> None:
        """Flush the contents to the disk, also where another library has written them."""
        handle = os.open(self.place, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if fcntl is None:  # Windows moves no open file
            self.close()

    def replace(self) -> None:
        os.replace(self.place, self.path)
        self.close()
        _flush_entries(self.path.parent)

    def discard(self) -> None:
        self.close()
        self.place.unlink(missing_ok=True)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _may_be_replaced(path: Path) -> bool:
    """Whether it is a file, a link or nothing: by one look, for others may remove it meanwhile."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # the open that follows names the latter
        return True
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that a killed writer may have left."""
    return name == JOURNAL or FRESH.fullmatch(name) is not None


@contextlib.contextmanager
def _named(path: Path, size: int) -> Iterator[None]:
    """Errors of the system that say what was written where."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {size} bytes to {path}: {error.strerror or error}"
        raise OSError(error.errno, message, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The place of a new file, which takes that of `path` when the body ends; of none that fails.

    For libraries that write files themselves; `write_atomic` takes the bytes.
    """
    fresh = _Fresh(Path(os.path.realpath(path)))
    try:
        yield fresh.place
        fresh.finish()
        fresh.replace()
    except BaseException:
        fresh.discard()
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the contents of `path` in one step."""
    path = Path(os.path.realpath(path))
    with _named(path, len(data)):
        fresh = _Fresh(path)
        try:
            fresh.write(data)
            fresh.finish()
            fresh.replace()
        except BaseException:
            fresh.discard()
            raise


class NewFiles:
    """Files of one folder that are replaced and removed together, by `commit` and not before.

        with NewFiles(folder) as new:
            new.write("a.json", data)
            new.remove("b.json")
            new.commit()

    Whenever the process is killed, readers that call `settle` find all of them or none. A link of
    that name is replaced, not followed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(os.path.realpath(folder))
        self._fresh: dict[str, tuple[_Fresh, str]] = {}
        self._gone: set[str] = set()

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for fresh, _digest in self._fresh.values():
            fresh.discard()

    @property
    def names(self) -> set[str]:
        """What was written so far."""
        return set(self._fresh)

    def write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        with _named(path, len(data)):
            fresh = _Fresh(path)
            try:
                fresh.write(data)
                fresh.finish()
            except BaseException:
                fresh.discard()
                raise
        self._fresh[name] = fresh, hashlib.sha256(data).hexdigest()

    def remove(self, *names: str) -> None:
        self._gone.update(names)

    def commit(self) -> None:
        """The one step after which the new files count, and then their renames."""
        body = {
            "format": JOURNAL_FORMAT,
            "move": {name: [new.place.name, sha] for name, (new, sha) in self._fresh.items()},
            "remove": sorted(self._gone - set(self._fresh)),
        }
        data = _sealed(body)
        with locked(self._folder):
            _finish_journal(self._folder)
            journal = _Fresh(self._folder / JOURNAL)
            try:
                with _named(journal.path, len(data)):
                    journal.write(data)
                    journal.finish()
            except BaseException:
                journal.discard()
                raise
            # once it is there the files are the journal's, whatever interrupts this process
            fresh, self._fresh = self._fresh, {}
            try:
                journal.replace()
                _move(self._folder, body)
            except BaseException:
                if os.path.lexists(journal.place):
                    journal.discard()
                    self._fresh = fresh
                raise
            finally:
                for new, _digest in fresh.values():
                    new.close()


def write_together(files: Mapping[Path, bytes]) -> None:
    """Replace every file; those of one folder together. Where a write fails none is replaced."""
    with contextlib.ExitStack() as stack:
        folders: dict[Path, NewFiles] = {}
        for path, data in files.items():
            real = Path(os.path.realpath(path))
            if real.parent not in folders:
                folders[real.parent] = stack.enter_context(NewFiles(real.parent))
            folders[real.parent].write(real.name, data)
        for new in folders.values():
            new.commit()


def settle(folder: Path) -> set[str]:
    """Finish what a killed `NewFiles.commit` had begun in `folder`; the names of its files.

    Whoever reads files that belong together calls this first; it looks for one file.
    """
    folder = Path(os.path.realpath(folder))
    if not os.path.lexists(folder / JOURNAL):
        return set()
    try:
        with locked(folder):
            return _finish_journal(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        message = (
            f"the last write into {folder} was cut off and cannot be finished here "
            f"({error.strerror}); read the folder once where it can be written to"
        )
        raise OSError(error.errno, message) from None


Read = TypeVar("Read")


def read_settled(folder: Path, read: Callable[[], Read]) -> Read:
    """What `read` makes of files that belong together; again where they were replaced meanwhile."""
    for _ in range(READS):
        settle(folder)
        before = os.stat(folder).st_mtime_ns if folder.is_dir() else 0
        try:
            return read()
        except (OSError, ValueError):
            if not folder.is_dir() or os.stat(folder).st_mtime_ns == before:
                raise
    return read()


def _finish_journal(folder: Path) -> set[str]:
    """Do what the journal says, where its files are those it means; the folder is locked."""
    path = folder / JOURNAL
    if not os.path.lexists(path):
        return set()
    body = None if path.is_symlink() else _unsealed(path.read_bytes())
    if body is None or not all(_is_there(folder, *item) for item in body["move"].items()):
        raise ValueError(f"{path} is damaged or its files are gone; remove it and write them again")
    _move(folder, body)
    return {*body["move"], *body["remove"]}


def _sealed(body: dict[str, Any]) -> bytes:
    """The bytes of a journal: its digest and itself."""
    text = json.dumps(body).encode("ascii")
    return hashlib.sha256(text).hexdigest().encode("ascii") + b" " + text


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """What was sealed; None where it is damaged, of another format, or leaves its folder."""
    digest, _, text = data.partition(b" ")
    if digest.decode("latin-1") != hashlib.sha256(text).hexdigest():
        return None
    try:
        body: dict[str, Any] = json.loads(text)
        right = body["format"] == JOURNAL_FORMAT
        right &= all(FRESH.fullmatch(fresh) for fresh, _digest in body["move"].values())
        names = [*body["move"], *(fresh for fresh, _ in body["move"].values()), *body["remove"]]
        right &= all(name and Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return body if right else None


def _is_there(folder: Path, name: str, entry: tuple[str, str]) -> bool:
    """Whether the file of a journal's entry is the one it means, moved or not yet."""
    fresh, digest = entry
    file = folder / (fresh if os.path.lexists(folder / fresh) else name)
    return file.is_file() and not file.is_symlink() and _sha256(file) == digest


def _move(folder: Path, body: dict[str, Any]) -> None:
    """The renames and removals of a journal, again where they were cut off, then the journal."""
    for name, (fresh, _digest) in body["move"].items():
        with contextlib.suppress(FileNotFoundError):  # moved before
            os.replace(folder / fresh, folder / name)
    for name in body["remove"]:
        (folder / name).unlink(missing_ok=True)
    _flush_entries(folder)
    (folder / JOURNAL).unlink(missing_ok=True)
    _flush_entries(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush_entries(folder: Path) -> None:
    """Flushes a folder's list of files to the disk, on the systems that can.

    Windows opens no folders, and some network file systems have no such flush; there the rename
    is all that can be done. Any other failure is an error.
    """
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


_held: set[tuple[int, int, int]] = set()  # device and number of folders, and the thread


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks `folder` against a second writer; the lock ends with the process, however it ends.

    What killed writers left in it is finished or removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, 0.0, again=False):
        _finish_journal(folder)
        if fcntl is not None:
            _sweep(folder)
        yield


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Holds `folder` for a short work, after waiting for others; a thread may hold it already."""
    with _locked(folder, wait_s, again=True):
        yield


@contextlib.contextmanager
def _locked(folder: Path, wait_s: float, *, again: bool) -> Iterator[None]:
    if fcntl is None:  # Windows opens no folders
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        about = os.fstat(handle)
        key = about.st_dev, about.st_ino, threading.get_ident()
        if again and key in _held:
            yield
            return
        try:
            free = lock(handle, wait_s)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            free = True
        if not free:
            raise FileExistsError(f"{folder} is being written by another run")
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
    finally:
        os.close(handle)


def lock(handle: int, wait_s: float) -> bool:
    """Whether an open file or folder could be locked; True where the system has no locks."""
    deadline = time.monotonic() + wait_s
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        else:
            break
    return True


def _sweep(folder: Path) -> None:
    """Remove the new files that killed writers left in a folder that is locked.

    In folders without a lock they stay: they are hidden, and no name is used twice.
    """
    for entry in os.scandir(folder):
        if not FRESH.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(entry.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle, 0.0):  # else its writer lives
                    os.unlink(entry.path)
            finally:
                os.close(handle)
