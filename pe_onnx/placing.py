"""A folder that appears whole: written beside its place and renamed.

A run that is killed at any moment leaves what was there before or nothing; the next one clears up behind it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pe_onnx.errors import ConfigError, ExportError, system_reason
from pe_onnx.machine import umask


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """Give a folder to write files into; when the block ends well, put it in place of ``folder``.

    Ask ``check_place`` first. Raises ExportError with the system's reason (a full disk, say); nothing is left then.
    """
    folder = folder.resolve()
    partial = None
    created = _missing_parents(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-{os.getpid()}-", dir=folder.parent))
        yield partial
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            _sync(path)
        partial.chmod(0o777 & ~umask())
        _put_in_place(partial, folder)
    except OSError as error:
        raise ExportError(f"cannot write {folder}: {system_reason(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in created:  # innermost first; those that hold something stay
            with suppress(OSError):
                parent.rmdir()


def check_place(folder: Path, force: bool, kind: str, holds: Callable[[Path], bool]) -> None:
    """Raises ConfigError where ``folder`` cannot be written, or holds what may not be replaced.

    holds: whether a folder is of the ``kind``, a noun; with ``force`` such a one may be replaced.
    """
    try:
        parents = folder.absolute().parents
        blocking = next((p for p in parents if p.exists() and not p.is_dir()), None)
        exists = folder.exists()
        if exists and folder.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ConfigError(f"output {folder} is the working directory or above it; name a folder of its own")
        if not exists and blocking is None and folder.is_symlink():
            raise ConfigError(f"output {folder} is a link to what does not exist")
        empty = exists and folder.is_dir() and not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"output {folder} cannot be written: {system_reason(error)}") from None
    if blocking is not None:
        raise ConfigError(f"output {folder} cannot be written: {blocking} is not a folder")
    if not exists or empty:
        return
    if not force:
        raise ConfigError(f"output {folder} exists; give another -o, or --force to replace it")
    if not holds(folder):
        raise ConfigError(f"output {folder} exists and is not a {kind}; --force replaces {kind}s only")


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has none, or both lie on two."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _missing_parents(folder: Path) -> list[Path]:
    """Parents that do not exist yet, innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename, or exchange with what is there: at no moment is there half a folder."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    if not _exchange(partial, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-{os.getpid()}-", dir=folder.parent))
        os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except OSError:
            os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step where the system can (Linux renameat2); False elsewhere."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
    except (OSError, AttributeError):
        return False


def _remove_stale(folder: Path) -> None:
    """Clear up what killed runs left beside ``folder``; an old one whose successor never came is put back."""
    for kind in ("old", "partial"):
        for path in folder.parent.glob(f".{glob.escape(folder.name)}.{kind}-*"):
            pid = path.name.rpartition(f".{kind}-")[2].partition("-")[0]
            if not pid.isdecimal() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if kind == "old" and not folder.exists():
                os.replace(path, folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
