"""The bundle: a folder with ``model.onnx``, its weights, a manifest, configuration and tokenizer files.

Written beside its place and renamed: a run that is killed at any moment leaves the old bundle or none. The manifest
holds the SHA-256 of every other file.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_onnx import contract
from pe_onnx.errors import BundleError, ConfigError, ExportError

MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def target(self) -> str:
        return self.manifest["target"]

    @property
    def logits(self) -> str:
        return self.manifest["logits"]

    @property
    def shape(self) -> Mapping[str, int]:
        """layers, kv_heads, head_size, vocab_size."""
        return self.manifest["model"]

    @property
    def cache_dtype(self) -> str:
        """numpy's name."""
        return contract.DTYPES[self.manifest["dtype"]]

    @property
    def max_length(self) -> int | None:
        """Tokens the encoding can take at all."""
        return self.manifest["model"]["max_length"]

    @property
    def trained_length(self) -> int | None:
        return self.manifest["model"]["trained_length"]

    @property
    def cache_bytes_per_token(self) -> int:
        s = self.shape
        itemsize = {"float32": 4, "float16": 2}[self.cache_dtype]
        return 2 * s["layers"] * s["kv_heads"] * s["head_size"] * itemsize

    def verify(self) -> None:
        """Raises BundleError for a file that is missing, of another size, or whose SHA-256 differs."""
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"bundle {self.folder} is incomplete: {name} is missing; export it again")
            if path.stat().st_size != entry["bytes"]:
                have = path.stat().st_size
                raise BundleError(
                    f"bundle {self.folder} is corrupted: {name} has {have} bytes, the manifest says {entry['bytes']}"
                )
            if sha256(path) != entry["sha256"]:
                raise BundleError(f"bundle {self.folder} is corrupted: the checksum of {name} does not match")


def read_bundle(folder: str | Path, verify: bool = True) -> Bundle:
    """Read and check a bundle. Raises BundleError for what is no bundle, incomplete or corrupted."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise BundleError(f"{folder} is not a bundle: it {what}; make one with `pe-onnx export -o {folder}`")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, kinds = manifest["format"], manifest["contract"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"bundle {folder} is corrupted: manifest.json cannot be read ({error})") from None
    if version != FORMAT or kinds != contract.VERSION:
        raise BundleError(
            f"bundle {folder} has format {version}, contract {kinds}; this pe-onnx reads format {FORMAT}, contract "
            f"{contract.VERSION}: export it again"
        )
    bundle = Bundle(folder, manifest)
    if verify:
        bundle.verify()
    return bundle


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def write_bundle(folder: str | Path, manifest: dict[str, Any], force: bool = False) -> Iterator[Path]:
    """Give a folder to write files into; when the block ends well, add the manifest and put it in place of ``folder``.

    Raises ConfigError where ``folder`` exists: without ``force``, or with it where it is not a bundle. Raises
    ExportError with the system's reason (a full disk, say); nothing is left then.
    """
    folder = Path(folder)
    check_output(folder, force)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        partial.mkdir()
        yield partial
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest["files"] = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for path in (*files, partial / MANIFEST):
            _sync(path)
        _put_in_place(partial, folder)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ExportError(f"cannot write {folder}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(folder: Path, force: bool) -> None:
    """Raises ConfigError where a bundle may not be written to ``folder``."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise ConfigError(f"output {folder} exists; give another -o, or --force to replace it")
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"output {folder} exists and is not a bundle; --force replaces bundles only")


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename, or exchange with what is there and remove that: at no moment is there a half bundle."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    if not _exchange(partial, folder):
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        os.replace(folder, old)
        os.replace(partial, folder)
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
    """Remove what killed runs left beside ``folder``."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and not _alive(int(pid)):
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
