"""A KV cache in a file: the tokens in use of each row, in safetensors' format (huggingface/safetensors, README).

Eight bytes with the length of a JSON header, the header, and the tensors one behind another: ``{b}.tokens`` int64
``[n]`` and ``{b}.past_key_values.{i}.key``, ``.value`` ``[K, m, D]`` for each row b, where m is n, or less in a layer
with a window, which holds the last m tokens. The header's metadata names the bundle and the checksum of the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pe_onnx import contract
from pe_onnx.bundle import WEIGHTS, Bundle
from pe_onnx.errors import CacheFileError, system_reason
from pe_onnx.machine import umask

Array = np.ndarray[Any, Any]

VERSION = "1"
DTYPES = {"int64": "I64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""numpy's names to those of the format."""
MOST_HEADER_BYTES = 100 << 20
"""A greater length is none: the format's own limit."""


def identity(bundle: Bundle) -> str:
    """SHA-256 over the checksums of the bundle's graphs and weights."""
    files = bundle.manifest["files"]
    parts = {name: files[name]["sha256"] for name in (*bundle.graphs, WEIGHTS) if name in files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises CacheFileError where ``write`` would fail for want of a folder, ahead of the work."""
    path = Path(path)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise CacheFileError(
            f"cannot write the cache to {path}: name a file in a folder that exists and can be written"
        )


def write(
    path: str | os.PathLike[str],
    bundle: Bundle,
    tokens: Sequence[Sequence[int]],
    held: Iterable[Sequence[Array]],
) -> None:
    """tokens: of each row. held: for each of the past tensors the rows' values ``[K, m, D]``.

    The file is written beside its place and renamed. Raises CacheFileError where it cannot be written.
    """
    path = Path(path)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
            partial = Path(file.name)
            _write(file, bundle, tokens, held)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~umask())
        os.replace(partial, path)
    except OSError as error:
        raise CacheFileError(f"cannot write the cache to {path}: {system_reason(error)}") from None
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()


def _write(file: Any, bundle: Bundle, tokens: Sequence[Sequence[int]], held: Iterable[Sequence[Array]]) -> None:
    """The shapes are known when the data has been written: the header, of a length known before, comes last."""
    shapes: dict[str, tuple[int, ...]] = {f"{b}.tokens": (len(row),) for b, row in enumerate(tokens)}
    names = contract.past_names(len(bundle.caches))
    longest = {
        f"{b}.{name}": (bundle.caches[i // 2][0], len(row), bundle.caches[i // 2][1])
        for i, name in enumerate(names)
        for b, row in enumerate(tokens)
    }
    room = len(_header(bundle, tokens, {**shapes, **longest}, "0" * 64))
    file.write(b" " * (8 + room))
    digest = hashlib.sha256()

    def append(values: Array) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        digest.update(data)
        file.write(data)

    for row in tokens:
        append(np.array(row, np.int64))
    for name, rows in zip(names, held, strict=True):
        for b, values in enumerate(rows):
            shapes[f"{b}.{name}"] = values.shape
            append(values)
    header = _header(bundle, tokens, shapes, digest.hexdigest())
    file.seek(0)
    file.write(struct.pack("<Q", room) + header.ljust(room))


def _header(
    bundle: Bundle, tokens: Sequence[Sequence[int]], shapes: Mapping[str, tuple[int, ...]], checksum: str
) -> bytes:
    metadata = {
        "format": "pe_onnx.cache",
        "version": VERSION,
        "bundle": identity(bundle),
        "target": bundle.target,
        "encoding": bundle.manifest["encoding"]["name"],
        "lengths": json.dumps([len(row) for row in tokens]),
        "data_sha256": checksum,
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        dtype = "int64" if name.endswith(".tokens") else bundle.cache_dtype
        begin, end = end, end + math.prod(shape) * contract.storage_dtype(dtype).itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(entries, separators=(",", ":")).encode()


class Saved(NamedTuple):
    """A file whose header has been checked against the bundle."""

    tokens: list[list[int]]
    """What each row holds."""
    shapes: dict[str, tuple[int, ...]]
    bundle: Bundle
    file: BufferedReader

    def values(self) -> Iterator[list[Array]]:
        """Past tensor after past tensor, the rows' values ``[K, m, D]``; once."""
        for name in contract.past_names(len(self.bundle.caches)):
            shapes = [self.shapes[f"{b}.{name}"] for b in range(len(self.tokens))]
            yield [_array(self.file, shape, self.bundle.cache_dtype) for shape in shapes]


@contextmanager
def opened(path: str | os.PathLike[str], bundle: Bundle) -> Iterator[Saved]:
    """A file of a cache of this bundle. Raises CacheFileError for any other, and for one that is not whole."""
    try:
        with open(path, "rb") as file:
            shapes, tokens = _read_header(path, file, bundle)
            yield Saved(tokens, shapes, bundle, file)
    except OSError as error:
        raise CacheFileError(f"cannot read the cache {path}: {system_reason(error)}") from None


def _read_header(path: Any, file: BufferedReader, bundle: Bundle) -> tuple[dict[str, tuple[int, ...]], list[list[int]]]:
    """Shapes by name, and tokens; the file stands at the first of the keys and values then."""
    size = os.fstat(file.fileno()).st_size
    room = int.from_bytes(file.read(8), "little")
    try:
        if not 0 < room <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError
        entries = json.loads(file.read(room))
        metadata, lengths = entries["__metadata__"], json.loads(entries["__metadata__"]["lengths"])
        if metadata["format"] != "pe_onnx.cache" or not all(type(n) is int and 0 <= n <= size for n in lengths or [-1]):
            raise ValueError
        shapes = {name: tuple(e["shape"]) for name, e in entries.items() if name != "__metadata__"}
        checksum = metadata["data_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CacheFileError(
            f"{path} is not a saved cache, or the beginning of one; make it with --save-cache"
        ) from None
    if metadata.get("version") != VERSION:
        raise CacheFileError(f"{path} is a cache of version {metadata.get('version')}; this pe-onnx reads {VERSION}")
    if metadata.get("bundle") != identity(bundle):
        raise CacheFileError(
            f"{path} is the cache of another bundle than {bundle.folder}: model and weights differ; make it anew"
        )
    rows = [range(n) for n in lengths]
    wanted = _wanted(bundle, lengths)
    fitting = list(shapes) == list(wanted) and all(
        len(shapes[name]) == len(shape) and all(n in allowed for n, allowed in zip(shapes[name], shape, strict=True))
        for name, shape in wanted.items()
    )
    if not fitting or json.loads(_header(bundle, rows, shapes, checksum)) != entries:
        raise CacheFileError(f"{path} is corrupted: its tensors are not those of a cache of {bundle.folder}")
    data = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    if size != 8 + room + data:
        raise CacheFileError(f"{path} is corrupted: it has {size} bytes and should have {8 + room + data}")
    if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
        raise CacheFileError(f"{path} is corrupted: the checksum of its data does not match")
    file.seek(8 + room)
    tokens = [_array(file, (n,), "int64").tolist() for n in lengths]
    return shapes, tokens


def _wanted(bundle: Bundle, lengths: Sequence[int]) -> dict[str, tuple[range, ...]]:
    """In order of the file, the sizes that each tensor may have."""

    def just(n: int) -> range:
        return range(n, n + 1)

    wanted: dict[str, tuple[range, ...]] = {f"{b}.tokens": (just(n),) for b, n in enumerate(lengths)}
    for i, name in enumerate(contract.past_names(len(bundle.caches))):
        (K, D), window = bundle.caches[i // 2], bundle.windows[i // 2]
        for b, n in enumerate(lengths):
            wanted[f"{b}.{name}"] = (just(K), range(min(n, window) if window else n, n + 1), just(D))
    return wanted


def _array(file: BufferedReader, shape: tuple[int, ...], dtype: str) -> Array:
    values = np.empty(shape, contract.storage_dtype(dtype))
    if values.size and file.readinto(values.data.cast("B")) != values.nbytes:
        raise OSError("it ends before its data")
    return values
