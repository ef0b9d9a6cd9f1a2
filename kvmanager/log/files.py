"""Files: the few file operations that a journal is made of, and nothing else, so that somebody else's can be put in their place.

`Files` are the operating system's. `MemoryFiles` are in memory, know what of them has been synced, and stop at any operation that a
test or the simulator names: that is how a manager is killed, or its host lost, in the middle of a write.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Files", "MemoryFiles", "Stopped"]


class Files:
    """What a journal needs of a file system. Paths are strings; a handle is whatever `create` and `extend` give. Raises OSError."""

    def make_folder(self, folder: str) -> None:
        """Make a folder, for this user alone, if there is none; its parent must exist."""
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
        else:
            self.sync_folder(os.path.dirname(os.path.abspath(folder)))

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def read(self, path: str) -> bytes:
        """The whole file."""
        with open(path, "rb") as file:
            return file.read()

    def create(self, path: str) -> Any:
        """A new, empty file to append to. Raises FileExistsError."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def extend(self, path: str) -> Any:
        """A file that exists, to append to."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, handle: Any, data: bytes) -> int:
        """Append; gives how many bytes were taken, which may be fewer than there are."""
        return os.write(handle, data)

    def truncate(self, handle: Any, size: int) -> None:
        os.ftruncate(handle, size)

    def sync(self, handle: Any) -> None:
        """Return once everything written to the file outlives the loss of the host."""
        os.fsync(handle)

    def close(self, handle: Any) -> None:
        os.close(handle)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name in the same folder, at once and whole."""
        os.replace(old, new)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def sync_folder(self, folder: str) -> None:
        """Return once names made, changed and removed in the folder outlive the loss of the host."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def lock(self, path: str) -> Any:
        """Hold a lock file until `close` or the end of this process. Raises BlockingIOError if somebody else holds it."""
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle


class Stopped(BaseException):
    """The process was killed here. Not an Exception: nothing may catch it and go on, as nothing can after SIGKILL."""


@dataclass(slots=True, eq=False)
class _MemoryFile:
    """data: what a reader sees. data[:synced] is durable; `ghost` was durable behind it, and is until the truncation is synced."""

    data: bytearray
    synced: int = 0
    ghost: bytes = b""
    path: str = ""


@dataclass(slots=True, eq=False)
class _Handle:
    file: _MemoryFile | None
    path: str


class MemoryFiles(Files):
    """A file system of one flat folder, in memory.

    fault  called before each operation with its name, the path's last part and the number of bytes it writes. It may raise: OSError for
           a full disk or a broken one, `Stopped` for a process that dies before the operation. For "write" it may give a number: so many
           bytes are written, then `Stopped` is raised, or OSError(ENOSPC) if the number is negative (~k: k bytes, then the disk is full).

    What follows is `killed()`: the process is gone, its files are as it left them; or `lost(...)`: the host is gone, and of what was
    not synced only as much is there as the caller says. Both give new MemoryFiles for the next life; old handles are void.
    """

    def __init__(self) -> None:
        self.fault: Callable[[str, str, int], int | None] = lambda operation, name, size: None
        self.operations = 0
        self._files: dict[str, _MemoryFile] = {}
        self._durable: dict[str, _MemoryFile] = {}  # names as of the last sync_folder
        self._locked: dict[str, _Handle] = {}

    # --- what can happen -----------------------------------------------------------------------------------------------------

    def killed(self) -> MemoryFiles:
        """The file system after the process that used it was killed."""
        after = MemoryFiles()
        after._files, after._durable = self._files, self._durable
        return after

    def lost(self, keep: Callable[[str, int], int] = lambda name, unsynced: 0, *, names: bool = False) -> MemoryFiles:
        """The file system after its host was lost.

        keep(name, n)  how many of n unsynced bytes at a file's end made it to the disk all the same
        names          whether unsynced names (created, renamed, removed) did
        """
        after = MemoryFiles()
        for name, file in (self._files if names else self._durable).items():
            if file.ghost:  # a truncation that was not synced is undone
                data = bytearray(file.data[: file.synced] + file.ghost)
            else:
                unsynced = len(file.data) - file.synced
                data = file.data[: file.synced + min(unsynced, max(0, keep(name, unsynced)))]
            after._files[name] = _MemoryFile(data, len(data), path=file.path)
        after._durable = dict(after._files)
        return after

    def damage(self, name: str, offset: int, mask: int) -> None:
        """Flip bits of one byte, as a dying disk would."""
        self._files[name].data[offset] ^= mask

    def cut(self, name: str, size: int) -> None:
        """Take a file's end away, synced or not."""
        file = self._files[name]
        del file.data[size:]
        file.synced, file.ghost = min(file.synced, size), b""

    @contextmanager
    def stop_at(self, operation: int) -> Iterator[None]:
        """Within: `Stopped` instead of the operation with this number, counted from 0 at entry."""
        before, first = self.fault, self.operations

        def fault(name: str, path: str, size: int) -> int | None:
            if self.operations - first > operation:
                raise Stopped
            return before(name, path, size)

        self.fault = fault
        try:
            yield
        finally:
            self.fault = before

    # --- operations ----------------------------------------------------------------------------------------------------------

    def _begin(self, operation: str, path: str, size: int = 0) -> int | None:
        self.operations += 1
        return self.fault(operation, _name(path), size)

    def _find(self, path: str) -> _MemoryFile:
        found = self._files.get(_name(path))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def _open(self, handle: _Handle) -> _MemoryFile:
        if handle.file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), handle.path)
        return handle.file

    def make_folder(self, folder: str) -> None:
        self._begin("make_folder", folder)

    def names(self, folder: str) -> list[str]:
        self._begin("names", folder)
        return sorted(self._files)

    def read(self, path: str) -> bytes:
        self._begin("read", path)
        return bytes(self._find(path).data)

    def create(self, path: str) -> Any:
        self._begin("create", path)
        if _name(path) in self._files:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        file = self._files[_name(path)] = _MemoryFile(bytearray(), path=path)
        return _Handle(file, path)

    def extend(self, path: str) -> Any:
        self._begin("extend", path)
        return _Handle(self._find(path), path)

    def write(self, handle: Any, data: bytes) -> int:
        file = self._open(handle)
        count = self._begin("write", file.path, len(data))
        if count is None:
            file.data += data
            return len(data)
        file.data += data[: count if count >= 0 else ~count]
        if count >= 0:
            raise Stopped
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.path)

    def truncate(self, handle: Any, size: int) -> None:
        file = self._open(handle)
        self._begin("truncate", file.path)
        if size < file.synced:
            file.ghost = bytes(file.data[size : file.synced]) + file.ghost
            file.synced = size
        del file.data[size:]

    def sync(self, handle: Any) -> None:
        file = self._open(handle)
        self._begin("sync", file.path)
        file.synced, file.ghost = len(file.data), b""

    def close(self, handle: Any) -> None:
        file = self._open(handle)
        self._begin("close", file.path)
        handle.file = None
        self._locked = {name: held for name, held in self._locked.items() if held is not handle}

    def rename(self, old: str, new: str) -> None:
        self._begin("rename", new)
        file = self._find(old)
        del self._files[_name(old)]
        file.path = new
        self._files[_name(new)] = file

    def remove(self, path: str) -> None:
        self._begin("remove", path)
        self._find(path)
        del self._files[_name(path)]

    def sync_folder(self, folder: str) -> None:
        self._begin("sync_folder", folder)
        self._durable = dict(self._files)

    def lock(self, path: str) -> Any:
        self._begin("lock", path)
        if _name(path) in self._locked:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), path)
        self._files.setdefault(_name(path), _MemoryFile(bytearray(), path=path))
        handle = _Handle(self._files[_name(path)], path)
        self._locked[_name(path)] = handle
        return handle


def _name(path: str) -> str:
    return path.rpartition("/")[2]
