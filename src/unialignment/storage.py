"""Writing files and folders so that a crash, Ctrl-C or a full disk leaves nothing half-written.

Everything is written under a temporary name beside its destination, flushed to disk, then renamed. Knows nothing of
what is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unialignment.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def storage_error(path: Path, error: BaseException) -> StorageError:
    """Turn a failed write into a one-line :class:`StorageError` that names the destination and the remedy."""
    number = getattr(error, "errno", None)
    if number in _FULL or any(text in str(error) for text in ("No space left", "File too large", "quota")):
        reason = "the disk is full or a size limit was reached; free some space or choose another place"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "no permission to write there; choose another place"
    else:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return StorageError(f"could not write {path}: {reason}. Nothing was left half-written")


def _flush_folder(folder: Path) -> None:
    # A rename survives a power cut only once the folder itself is on disk. Not every file system can do it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _usual_mode(directory: bool) -> int:
    # tempfile creates private files; a saved picture should have the permissions of any other file the user creates.
    umask = os.umask(0)
    os.umask(umask)
    return (0o777 if directory else 0o666) & ~umask


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only if the block ends without an error.

    Args:
        path: Destination; its parent folders are created. An existing file is replaced.

    Raises:
        StorageError: It can't be written. The destination is then what it was before.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise StorageError(f"could not write {path}: it is a folder; give a file name inside it")
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _usual_mode(directory=False))
        os.replace(temporary, path)
        temporary = None
        _flush_folder(path.parent)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` only if the block ends without an error.

    An existing folder is replaced as a whole, so that old and new files never mix.

    Raises:
        StorageError: It can't be written. The destination is then what it was before.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise StorageError(f"could not write {path}: it is a file; give the name of a folder")
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent))
        yield temporary
        os.chmod(temporary, _usual_mode(directory=True))
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name[:80]}.", suffix=".old", dir=path.parent))
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        temporary = None
        _flush_folder(path.parent)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically.

    Raises:
        StorageError: See :func:`atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically, indented, with a final newline.

    Raises:
        StorageError: See :func:`atomic_file`.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
