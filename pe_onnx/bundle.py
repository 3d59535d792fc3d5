"""The bundle: a folder with ``model.onnx``, its weights, a manifest, configuration and tokenizer files.

That of an encoder-decoder has ``encoder_model.onnx`` and ``decoder_model.onnx`` instead, over one file of weights.
Written beside its place and renamed: a run that is killed at any moment leaves the old bundle or none. The manifest
holds the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_onnx import contract, prepared
from pe_onnx.errors import BundleError, system_reason
from pe_onnx.placing import check_place, placed
from pe_onnx.position_channels import CHANNELS, USED

MANIFEST = "manifest.json"
MODEL = "model.onnx"
ENCODER = "encoder_model.onnx"
DECODER = "decoder_model.onnx"
MERGED = "decoder_model_merged.onnx"
"""The decoder of an encoder-decoder once more: under this name optimum looks for one graph of all steps."""
PROMPT = "prompt.onnx"
"""The decoder of a quantized bundle once more, for many tokens at once, over the same weights."""
RUNTIME = "runtime.onnx"
"""The decoder once more, with rotations inside attention: what our runtime runs on the CPU, over the same weights."""
CUDA = "cuda.onnx"
"""The decoder once more, with what CUDA can record as a graph: what our runtime runs there, over the same weights."""
WEIGHTS = "model.onnx.data"
FORMAT = 3


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The decoder's file."""
        return self.folder / (MODEL if self.crossing is None else DECODER)

    @property
    def crossing(self) -> contract.Crossing | None:
        """What the decoder knows of its encoder; None where it has none."""
        encoder = self.manifest["model"]["encoder"]
        return encoder and contract.Crossing(encoder["width"], tuple((K, D) for K, D in encoder["caches"]))

    @property
    def graphs(self) -> dict[str, tuple[contract.Shapes, contract.Shapes]]:
        """Inputs and outputs of each ONNX file."""
        crossing, decoder = self.crossing, self._decoder(self.caches)
        return {MODEL: decoder} if crossing is None else {ENCODER: contract.encoder_shapes(crossing), DECODER: decoder}

    def tensors(self, graph: str) -> tuple[contract.Shapes, contract.Shapes]:
        """Inputs and outputs of any of the folder's ONNX files."""
        return self.graphs.get(graph) or self._decoder(self.caches_of(graph))

    def _decoder(self, caches: Sequence[contract.CacheShape]) -> tuple[contract.Shapes, contract.Shapes]:
        crossing = self.crossing
        return (
            contract.input_shapes(caches, crossing),
            contract.output_shapes(caches, self.shape["vocab_size"], self.logits, crossing),
        )

    @property
    def start_token(self) -> int | None:
        """The token with which the decoder of an encoder-decoder begins; None where its configuration names none."""
        return (self.manifest["model"]["encoder"] or {}).get("start_token")

    @property
    def target(self) -> str:
        return self.manifest["target"]

    @property
    def logits(self) -> str:
        return self.manifest["logits"]

    @property
    def shape(self) -> Mapping[str, int]:
        """vocab_size, score_heads, trained_length, max_length."""
        return self.manifest["model"]

    @property
    def caches(self) -> list[contract.CacheShape]:
        """K and D of each layer's cache."""
        return [(heads, size) for heads, size in self.manifest["model"]["caches"]]

    def graph_on(self, provider: str) -> str:
        """The ONNX file of the decoder that our sessions run: on ``cpu``, ``cuda`` or another provider."""
        name = {"cpu": RUNTIME, "cuda": CUDA}.get(provider)
        return name if name and (self.folder / name).exists() else self.model.name

    def caches_of(self, graph: str) -> list[contract.CacheShape]:
        """K and D of each layer's cache in one of the ONNX files: in that for CUDA heads may hold positions too."""
        positions = self.positions_of(graph)
        return self.caches if positions is None else [(K, D + CHANNELS) for K, D in self.caches]

    def positions_of(self, graph: str) -> int | None:
        """The bits of a digit of the positions that a file's caches hold (`position_channels`); None without such."""
        return self.manifest["model"].get("cuda_position_bits") if graph == CUDA else None

    @property
    def windows(self) -> list[int]:
        """Of each layer the tokens to which its cache may be cut; 0 where it must hold all."""
        return self.manifest["model"].get("windows", [0] * len(self.manifest["model"]["caches"]))

    @property
    def depth(self) -> int:
        """Layers that a token's logits have gone through, those of an encoder included."""
        caches = len(self.manifest["model"]["caches"])
        return self.manifest["model"].get("layers", caches if self.crossing is None else 2 * caches)

    @property
    def dtype(self) -> str:
        """Of activations, numpy's name."""
        return contract.DTYPES[self.manifest["dtype"]]

    @property
    def cache_dtype(self) -> str:
        """Of keys and values, numpy's name."""
        return (self.quantization or {}).get("cache") or self.dtype

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How it was rounded: bits (None where weights were not), block, symmetric, accuracy_level, cache; None where
        nothing was."""
        return self.manifest.get("quantization")

    @property
    def path_dependent(self) -> bool:
        """Whether the logits depend on the chunks in which a text is run: its frequencies switch with the length."""
        return self.manifest["encoding"]["path_dependent"]

    @property
    def score_heads(self) -> int:
        """H of the tensors [H, T, S] that a run holds; 0 where attention is fused and has no bias, or nothing says."""
        return self.manifest["model"].get("score_heads", 0)

    @property
    def max_length(self) -> int | None:
        """Tokens the encoding can take at all."""
        return self.manifest["model"]["max_length"]

    @property
    def trained_length(self) -> int | None:
        return self.manifest["model"]["trained_length"]

    @property
    def cache_bytes_per_token(self) -> int:
        return self.bytes_per_token(self.caches)

    def cache_bytes_on(self, provider: str) -> int:
        """Per token, as our sessions have it: on ``cpu``, ``cuda`` or another provider."""
        return self.bytes_per_token(self.caches_of(self.graph_on(provider)))

    def bytes_per_token(self, caches: Iterable[contract.CacheShape]) -> int:
        """Of keys and values of these layers."""
        itemsize = contract.storage_dtype(self.cache_dtype).itemsize
        return 2 * itemsize * sum(heads * size for heads, size in caches)

    def verify(self, remembered: bool = False) -> None:
        """Raises BundleError for a file that is missing, of another size, or whose SHA-256 differs.

        remembered: take the word of an earlier check for files that have not changed since, and remember this one
        (`prepared`): for a bundle whose bytes would take a noticeable time to read.
        """
        files = self.manifest["files"]
        remembered = remembered and prepared.worth(self.folder, files)
        known = prepared.checked_files(self.folder) if remembered else {}
        checked: dict[str, tuple[str, prepared.State]] = {}
        for name, entry in files.items():
            path = self.folder / name
            if not path.is_file():
                raise BundleError(f"bundle {self.folder} is incomplete: {name} is missing; export it again")
            if path.stat().st_size != entry["bytes"]:
                have = path.stat().st_size
                raise BundleError(
                    f"bundle {self.folder} is corrupted: {name} has {have} bytes, the manifest says {entry['bytes']}"
                )
            before = prepared.state(path)
            checked[name] = entry["sha256"], before
            if known.get(name) == [entry["sha256"], *before]:
                continue
            if sha256(path) != entry["sha256"]:
                raise BundleError(f"bundle {self.folder} is corrupted: the checksum of {name} does not match")
            if prepared.state(path) != before:
                del checked[name]
        if remembered and any(known.get(name) != [digest, *one] for name, (digest, one) in checked.items()):
            prepared.remember_checked(self.folder, checked)


def read_bundle(folder: str | Path, verify: bool = True, remembered: bool = False) -> Bundle:
    """Read and check a bundle. Raises BundleError for what is no bundle, incomplete or corrupted.

    verify: check the SHA-256 of every file too. remembered: only of those that changed since they were last checked.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"its {MANIFEST} cannot be read ({system_reason(error)})"
        if isinstance(error, FileNotFoundError):
            what = f"it has no {MANIFEST}" if folder.exists() else "it does not exist"
        raise BundleError(f"{folder} is not a bundle: {what}; make one with `pe-onnx export -o DIR`") from None
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"bundle {folder} is corrupted: {MANIFEST} is not JSON ({error})") from None
    if not _is_manifest(manifest):
        raise BundleError(f"bundle {folder} is corrupted: {MANIFEST} has no format and contract")
    version, kinds = manifest["format"], manifest["contract"]
    if version != FORMAT or kinds != contract.VERSION:
        raise BundleError(
            f"bundle {folder} has format {version}, contract {kinds}; this pe-onnx reads format {FORMAT}, contract "
            f"{contract.VERSION}: export it again"
        )
    _check_manifest(folder, manifest)
    bundle = Bundle(folder, manifest)
    if verify:
        bundle.verify(remembered)
    return bundle


def _is_manifest(value: Any) -> bool:
    return isinstance(value, dict) and {"format", "contract"} <= value.keys()


def _check_manifest(folder: Path, m: dict[str, Any]) -> None:
    """Raises BundleError that names the first entry which is missing or not what it should be."""

    def require(good: bool, name: str) -> None:
        if not good:
            raise BundleError(f"bundle {folder} is corrupted: {MANIFEST} has no valid {name!r}")

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    for name, accepted in (("target", contract.TARGETS), ("dtype", contract.DTYPES), ("logits", contract.LOGITS)):
        require(isinstance(m.get(name), str) and m[name] in accepted, name)
    for name in ("model", "encoding", "source", "graph", "tools", "proof", "files"):
        require(isinstance(m.get(name), dict), name)
    require(count(m["model"].get("vocab_size")), "model.vocab_size")

    def sizes(caches: Any) -> bool:
        pairs = isinstance(caches, list) and all(isinstance(c, list) and len(c) == 2 for c in caches)
        return bool(caches) and pairs and all(count(size) for cache in caches for size in cache)

    require(sizes(m["model"].get("caches")), "model.caches")
    encoder = m["model"].get("encoder", False)
    if encoder is not None:
        require(isinstance(encoder, dict) and count(encoder.get("width")), "model.encoder.width")
        same = sizes(encoder.get("caches")) and len(encoder["caches"]) == len(m["model"]["caches"])
        require(same, "model.encoder.caches")
        start = encoder.get("start_token")
        require(start is None or (isinstance(start, int) and not isinstance(start, bool)), "model.encoder.start_token")
    for name in ("trained_length", "max_length"):
        require(name in m["model"] and (m["model"][name] is None or count(m["model"][name])), f"model.{name}")
    heads = m["model"].get("score_heads", 0)
    require(heads == 0 or count(heads), "model.score_heads")
    require(count(m["model"].get("layers", 1)), "model.layers")
    require(m["model"].get("cuda_position_bits") in (None, *USED), "model.cuda_position_bits")
    windows = m["model"].get("windows", [0] * len(m["model"]["caches"]))
    require(isinstance(windows, list) and len(windows) == len(m["model"]["caches"]), "model.windows")
    require(all(window == 0 or count(window) for window in windows), "model.windows")
    require(isinstance(m["encoding"].get("name"), str), "encoding.name")
    require(isinstance(m["encoding"].get("parameters"), dict), "encoding.parameters")
    require(isinstance(m["encoding"].get("path_dependent"), bool), "encoding.path_dependent")
    require(
        all(isinstance(x, dict) and {"value", "origin"} <= x.keys() for x in m["encoding"]["parameters"].values()),
        "encoding.parameters",
    )
    require(isinstance(m["source"].get("kind"), str), "source.kind")
    for name, kind in (("opsets", dict), ("operators", dict), ("functions", list), ("weight_bytes", int)):
        require(isinstance(m["graph"].get(name), kind), f"graph.{name}")
    require(isinstance(m["proof"].get("verified"), bool), "proof.verified")
    require("tokenizer" in m and (m["tokenizer"] is None or isinstance(m["tokenizer"], dict)), "tokenizer")
    for name in (MODEL,) if encoder is None else (ENCODER, DECODER):
        require(name in m["files"], f"files.{name}")
    for name, entry in m["files"].items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        whole = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        require(inside and whole, f"files.{name}")


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
    check_output(Path(folder), force)
    with placed(Path(folder)) as partial:
        yield partial
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest["files"] = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_output(folder: Path, force: bool) -> None:
    """Raises ConfigError where a bundle may not or cannot be written to ``folder``."""
    check_place(folder, force, "bundle", _holds_bundle)


def _holds_bundle(folder: Path) -> bool:
    """A manifest of ours, or the ruins of one beside a model."""
    try:
        return _is_manifest(json.loads((folder / MANIFEST).read_text("utf-8")))
    except OSError:
        return False
    except ValueError:
        return any((folder / name).is_file() for name in (MODEL, DECODER))
