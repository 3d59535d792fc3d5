"""A bundle's graph as onnxruntime optimised it, kept in the folder ``.prepared``: later starts need not do it again.

It is onnxruntime's own file (``optimized_model_filepath``, written while the first session opens): functions inlined,
nodes fused, and the weights where they were, in the bundle's file, which is mapped into memory. Its name holds a key
and the checksum of its content. The key stands for all it depends on: the checksum and the state of every file of the
bundle, onnxruntime's build and the processor's features, to which it optimises.

Weights in the order that kernels read (``session.save_external_prepacked_constant_initializers``) are not kept:
onnxruntime 1.32 packs them again to find them by their hash, so that no start is faster, and the file would be as large
as the weights (``benchmarks/session.py`` measures it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import onnxruntime

from pe_onnx import prepared
from pe_onnx.bundle import Bundle
from pe_onnx.machine import processor_features

VERSION = 1
MOST_BYTES = 32 << 20
"""A larger one holds weights: to read and check it costs what it saves."""
FREE_BYTES = 2 * MOST_BYTES
"""On the disk, without which it is not tried."""
UNFIT = "unfit"
"""In place of a checksum: onnxruntime cannot write this graph, or it is too large."""


class PreparedGraph(NamedTuple):
    """The place of one graph, whether anything is there or not."""

    bundle: Bundle
    graph: str
    """Its file in the bundle."""
    key: str

    def read(self) -> bytes | None:
        """The optimised graph; empty where there can be none, None where it is to be made. A broken one goes."""
        for path in sorted(self._folder.glob(f"{self._stem}-{self.key}-*")):
            digest = path.name.rpartition("-")[2]
            if digest == UNFIT:
                return b""
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if content and digest == _digest(content):
                return content
            prepared.remove(path)
        return None

    def scratch(self) -> Path | None:
        """Where onnxruntime may write the graph; None where that cannot be done."""
        with suppress(OSError):
            if shutil.disk_usage(self.bundle.folder).free > FREE_BYTES:
                return prepared.scratch(self.bundle.folder)
        return None

    def keep(self, unfinished: Path, whole: bool = True) -> None:
        """Put the file in its place if it is ``whole``, and remove those of other keys.

        Nothing is kept where the bundle's files have changed since the key was made.
        """
        try:
            content = unfinished.read_bytes() if whole else b""
            fit = 0 < len(content) <= MOST_BYTES
            if not fit:
                unfinished.write_bytes(b"")
            name = f"{self._stem}-{self.key}-{_digest(content) if fit else UNFIT}"
            if prepared_graph(self.bundle, self.graph) != self:
                raise OSError
            os.replace(unfinished, self._folder / name)
            for other in self._folder.glob(f"{self._stem}-*"):
                if other.name != name:
                    prepared.remove(other)
        except OSError:
            prepared.remove(unfinished)

    def refuse(self, unfinished: Path | None) -> None:
        """Note that there can be none, in place of what is there."""
        if (marker := unfinished or self.scratch()) is not None:
            self.keep(marker, whole=False)

    @property
    def _folder(self) -> Path:
        return self.bundle.folder / prepared.FOLDER

    @property
    def _stem(self) -> str:
        return Path(self.graph).stem


def prepared_graph(bundle: Bundle, graph: str) -> PreparedGraph | None:
    """The place of a graph; None where preparing is not worth it, or files have only just changed or are missing."""
    files = bundle.manifest["files"]
    if not prepared.worth(bundle.folder, files):
        return None
    try:
        states = {name: prepared.state(bundle.folder / name) for name in files}
    except OSError:
        return None
    if not prepared.settled(list(states.values()), time.time_ns()):
        return None
    depends = {
        "version": VERSION,
        "onnxruntime": [onnxruntime.__version__, onnxruntime.get_build_info()],
        "processor": processor_features(),
        "files": {name: [entry["sha256"], *states[name]] for name, entry in files.items()},
    }
    return PreparedGraph(bundle, graph, _digest(json.dumps(depends, sort_keys=True).encode()))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
