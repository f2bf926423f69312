"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Iterator
from typing import IO, Any

_TEMPORARY = re.compile(r"\.fastopt-[0-9a-f]{32}\.tmp")


@contextlib.contextmanager
def replacing(target: str) -> Iterator[IO[bytes]]:
    """A new file beside ``target``, which takes its place when the block is left without an error.

    An error leaves an older file as it was and removes the new one. One that a killed process left in the folder is
    removed by the next call. The older file's permissions stay, and its owner and group where this user may give files
    away.

    Raises:
        OSError: The file cannot be written, or what is at ``target`` is no regular file.
    """
    folder = os.path.dirname(target)
    older = check_replaceable(target)
    _remove_strays(folder)
    with _open_temporary(folder, 0o666 if older is None else 0o600) as file:  # 0600: until it has the older one's mode
        try:
            yield file
            file.flush()
            if older is not None:
                _inherit(file.fileno(), older)
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
    _sync(folder)


def check_replaceable(target: str) -> os.stat_result | None:
    """The status of the file at ``target``, None where there is none; refuses what is no regular file."""
    os.stat(os.path.dirname(target))  # an error that names the folder, where there is none
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return None
    check_regular(status, target)
    return status


def check_regular(status: os.stat_result, path: str) -> None:
    """Refuse a folder, and what reading would wait for or replacing would destroy."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "needed is a regular file, not a pipe, socket, device or loop of links", path)


def _open_temporary(folder: str, mode: int) -> IO[bytes]:
    """A new file, locked for as long as it is open: so other processes know that it is in use."""
    while True:
        name = os.path.join(folder, f".fastopt-{uuid.uuid4().hex}.tmp")
        file = open(name, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115 - returned
        with contextlib.suppress(OSError):  # a file system without locks: nothing is taken for a stray there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(name):  # else another process took it for a stray before it was locked
            return file
        file.close()


def _remove_strays(folder: str) -> None:
    """Remove temporary files that nobody has locked: their processes were killed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)


def _inherit(descriptor: int, older: os.stat_result) -> None:
    mode = stat.S_IMODE(older.st_mode)
    try:
        os.fchown(descriptor, older.st_uid, older.st_gid)
    except PermissionError:
        try:
            os.fchown(descriptor, -1, older.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # they were meant for another group
    os.fchmod(descriptor, mode)


def _sync(folder: str) -> None:
    """Wait until the entries of a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def safetensors_package() -> Any:
    """The package that knows the format of checkpoints."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("Checkpoints need the package safetensors: pip install safetensors") from error
    return safetensors
