"""Who else runs a bundle: one file a consumer, found by its name; the class in it is the name in PascalCase.

A package is a folder that a consumer loads as it stands. Graphs and weights are the bundle's own files under the names
that the consumer looks for; around them stands the configuration that it reads. What it cannot run exactly is refused.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_onnx import discovery
from pe_onnx.bundle import WEIGHTS, Bundle
from pe_onnx.errors import ConfigError

Place = Callable[[Path, Path], None]
"""Gives a file, the first, a second name or copies it there."""


@dataclass(frozen=True)
class Options:
    """What a consumer may be told; None where it was not."""

    eos: tuple[int, ...] | None = None
    """Token ids that end a text."""
    context: int | None = None
    """Tokens that the cache can be asked to hold."""
    name: str | None = None
    """Of the served model."""
    storage_uri: str | None = None
    """Where the cluster finds the folder."""


class Package(ABC):
    """What one consumer wants of a bundle."""

    accepts: tuple[str, ...] = ()
    """The names of the Options that mean something here."""
    several = False
    """Whether it takes more than one bundle."""

    def __init__(self, bundles: Sequence[Bundle], options: Options, place: Place) -> None:
        self.bundles = list(bundles)
        self.bundle = self.bundles[0]
        self.options = options
        self.place = place
        self.notes: list[str] = []
        """For the record: what a reader of the folder would not expect."""

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError for a bundle that this consumer cannot run exactly."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Fill the folder."""

    @abstractmethod
    def loading(self, folder: Path) -> str:
        """The shortest code or command that runs what stands in ``folder``."""

    def place_graph(self, name: str, target: Path) -> None:
        """A graph of the bundle as ``target``, its weights beside it."""
        bundle = self.bundle
        target.parent.mkdir(parents=True, exist_ok=True)
        self.place(bundle.folder / name, target)
        if WEIGHTS in bundle.manifest["files"] and not (weights := target.with_name(WEIGHTS)).exists():
            self.place(bundle.folder / WEIGHTS, weights)


def load_kind(consumer: str, options: Options, count: int) -> type[Package]:
    """The consumer's class. Raises ConfigError for a name that none has, an option or a count of bundles it has no
    use for."""
    module = discovery.load("packages", consumer)
    name = "".join(part.capitalize() for part in consumer.split("_"))
    kind: type[Package] | None = getattr(module, name, None)
    if kind is None:
        raise ConfigError(f"{module.__file__} must hold a class {name}, and has none")
    given = [name for name, value in vars(options).items() if value is not None]
    if astray := [option for option in given if option not in kind.accepts]:
        accepted = ", ".join(kind.accepts) or "none"
        raise ConfigError(f"{astray[0]} is no option of a package for {consumer} (options: {accepted})")
    if count > 1 and not kind.several:
        raise ConfigError(f"a package for {consumer} is made of one bundle; received {count}")
    return kind


def need_target(bundle: Bundle, target: str, consumer: str, reason: str) -> None:
    """Raises ConfigError for a bundle of another target."""
    if bundle.target != target:
        raise ConfigError(
            f"{consumer} needs target = {target!r}, {reason}; {bundle.folder} has {bundle.target!r}: export it again "
            f"with --target {target}"
        )


def need_decoder(bundle: Bundle, consumer: str, instead: str) -> None:
    """Raises ConfigError for an encoder-decoder."""
    if bundle.crossing is not None:
        raise ConfigError(
            f"{bundle.folder} is an encoder-decoder, and a package for {consumer} is a decoder; {instead}"
        )


def need_numbers(bundle: Bundle, consumer: str, caches: tuple[str, ...] = ("float32", "float16")) -> None:
    """Raises ConfigError for weights or a cache in numbers that the consumer has no arrays for."""
    if bundle.dtype == "bfloat16":
        raise ConfigError(f"{consumer} runs float32 and float16; {bundle.folder} has bf16: export it with --dtype fp16")
    if bundle.cache_dtype not in caches:
        raise ConfigError(
            f"{consumer} knows no cache in {bundle.cache_dtype}, as {bundle.folder} has it: quantize without --cache"
        )


def need_whole_cache(bundle: Bundle, consumer: str) -> None:
    """Raises ConfigError for a cache that is cut to the window of a layer."""
    if any(bundle.windows):
        raise ConfigError(
            f"{bundle.folder} keeps the window of a layer only, and {consumer} hands it a cache that holds all tokens: "
            "export it without --window-cache"
        )


def one_cache_shape(bundle: Bundle, consumer: str) -> tuple[int, int]:
    """K and D, the same for all layers; ConfigError where they differ."""
    shapes = sorted(set(bundle.caches))
    if len(shapes) > 1:
        found = ", ".join(f"{K} x {D}" for K, D in shapes)
        raise ConfigError(f"{consumer} knows one cache shape for all layers; {bundle.folder} has heads of {found}")
    return shapes[0]


def checked_ids(ids: Sequence[int], bundle: Bundle) -> list[int]:
    """Raises ConfigError for an id outside the vocabulary."""
    vocab_size = bundle.shape["vocab_size"]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"eos = {token}: accepted are the ids of the vocabulary, 0..{vocab_size - 1}; give --eos")
    return list(ids)


def described(bundle: Bundle) -> dict[str, Any]:
    """The record's entry on what a package was made of."""
    kept = ("target", "dtype", "logits", "quantization", "source", "tools")
    files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    return {
        "encoding": bundle.manifest["encoding"]["name"],
        **{name: bundle.manifest.get(name) for name in kept},
        "files": files,
    }


def copy_asset(bundle: Bundle, name: str, folder: Path) -> bool:
    """A small file of the bundle, which a user may edit in the package; whether there is one."""
    if found := (bundle.folder / name).is_file():
        shutil.copyfile(bundle.folder / name, folder / name)
    return found
