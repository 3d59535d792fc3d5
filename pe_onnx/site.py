"""A static page that runs a bundle in the browser with onnxruntime-web.

The folder holds the page (``pe_onnx/web``), the bundle's decoder, weights and tokenizer, the encoding cut out of the
decoder for the page's picture, and npm packages of pinned versions. It is served by any server of static files, and
asks nothing of any other. ``site.json`` is its record: what the page is to load, and the mark by which ``force`` knows
a folder of ours.

What was found with onnxruntime-web 1.30.0 in Chromium (tiny models, logits against onnxruntime's):

- WASM computes every encoding on both targets to 1e-6 of the logits, and int8 caches; MatMulNBits it unpacks at each
  product, a second a token for 135M weights: they are unpacked once, when the page loads (``unpacked_products``).
- WebGPU computes target ``portable`` to 3e-6. GroupQueryAttention there is right without a bias and wrong by a third
  of the logits' spread with one, and takes no int8 cache: refused. The build ``asyncify``, onnxruntime's newer WebGPU,
  has no float64, and its GroupQueryAttention was wrong without a bias too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pe_onnx import __version__, npm_packages
from pe_onnx.bundle import MODEL, WEIGHTS, Bundle, read_bundle
from pe_onnx.errors import ConfigError, PeOnnxError, needs
from pe_onnx.placing import check_place, copy_file, link_or_copy, placed
from pe_onnx.tokenizer import Tokenizer, load_tokenizer

RECORD = "site.json"
KIND = "pe-onnx site"
FORMAT = 1
PAGE = Path(__file__).resolve().parent / "web"
PLACES = {"onnxruntime-web.LICENSE": "vendor/onnxruntime-web/LICENSE"}
"""Of the page's files those that do not stand at its top: the package comes without its licence."""
UNPACKED = "unpacked.onnx"
ENCODING = "encoding.onnx"
MOST_WEIGHT_BYTES = 2 << 30
"""WebAssembly has 4 GiB, and weights stand in it beside the copy that is made for the kernels."""
MOST_UNPACKED_BYTES = 3 << 29
"""Of weights that are unpacked to floats; beyond, products stay packed and slow."""
SAMPLES = (
    "Hello, world! It's 3.14% of 1,000.",
    "  two  spaces\n\n\ttab and newline\r\n ",
    "naïve café — “quotes” … ½ €",
    "日本語の文章と한국어, Ελληνικά, русский текст, עברית",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 \u00a0\u200b",
    "def f(x):\n    return x ** 2  # comment",
    "don't won't I'll we've they're 123456789 0x1F",
    "<|im_start|>user\n</s><s>[INST] <unk>",
)
"""Texts on which the page compares its tokenizer with ours when it loads."""

Progress = Callable[[str], None]


def write_site(
    bundle: str | Path,
    output: str | Path,
    *,
    title: str | None = None,
    npm_folder: str | Path | None = None,
    copy: bool = False,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> dict[str, Any]:
    """Write the page for a bundle to the folder ``output`` and return its record.

    title: shown on the page; default the name of what the bundle was made from. npm_folder: npm packages installed
    there; nothing is fetched then. copy: no hard links. force: replace a site. Raises, before anything is fetched,
    ConfigError for a bundle that no browser runs and MissingDependencyError without onnx-ir; and what
    ``npm_packages.copy_package`` and ``placed`` raise.
    """
    with needs("a page for a browser", "'pe-onnx[export]'"):
        import onnx_ir  # noqa: F401  before anything is fetched
    made = read_bundle(bundle)
    check_bundle(made)
    check_place(Path(output), force, "site", holds_site)
    packages = _packages(made)
    with placed(Path(output)) as folder:
        progress("npm packages")
        for name, package in packages.items():
            place = folder / "vendor" / name
            npm_packages.copy_package(package, place, Path(npm_folder) if npm_folder is not None else None)
        progress("bundle")
        for path in sorted(PAGE.iterdir()):
            shutil.copyfile(path, folder / PLACES.get(path.name, path.name))
        record = _record(made, title, folder, copy)
        progress("write")
        record["files"] = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return record


def check_bundle(bundle: Bundle) -> None:
    """Raises ConfigError, with the reason, for what onnxruntime-web does not run."""
    reason = None
    if bundle.crossing is not None:
        reason = "an encoder-decoder; the page runs decoders"
    elif bundle.manifest["dtype"] == "bf16":
        reason = "in bf16, for which no browser has kernels; export it with --dtype fp32 or fp16"
    elif any(bundle.windows):
        reason = (
            "made for caches cut to their window, which onnxruntime-web cannot keep in place; export it with "
            "--target portable"
        )
    else:
        size = sum(entry["bytes"] for name, entry in bundle.manifest["files"].items() if name in (MODEL, WEIGHTS))
        if size > MOST_WEIGHT_BYTES:
            limit = MOST_WEIGHT_BYTES >> 30
            reason = f"of {size / 2**30:.1f} GiB; WebAssembly takes {limit} GiB of weights: try pe-onnx quantize"
    if reason is not None:
        raise ConfigError(f"bundle {bundle.folder} is {reason}")


def webgpu_refusal(bundle: Bundle) -> str | None:
    """Why a bundle is not run on WebGPU; None where it is."""
    if bundle.cache_dtype == "int8":
        return "attention on WebGPU takes no int8 cache"
    if bundle.target == "ort" and bundle.score_heads:
        return "onnxruntime-web's attention on WebGPU adds a bias wrongly; export with --target portable"
    return None


def _packages(bundle: Bundle) -> dict[str, npm_packages.Package]:
    packages = {"onnxruntime-web": npm_packages.ONNXRUNTIME}
    if (bundle.manifest["tokenizer"] or {}).get("kind") == "tokenizer.json":
        packages["tokenizers"] = npm_packages.TOKENIZERS
        if load_tokenizer(bundle.folder, bundle.manifest["tokenizer"]).chat_template is not None:
            packages["jinja"] = npm_packages.JINJA
    return packages


def _record(bundle: Bundle, title: str | None, folder: Path, copy: bool) -> dict[str, Any]:
    """What the page reads; writes the graphs, weights and tokenizer files that it names."""
    from pe_onnx.encoding_graph import write_encoding_graph

    source = bundle.manifest["source"]
    named = Path(source["path"]).name if source.get("path") else bundle.folder.resolve().name
    place = folder / "bundle"
    place.mkdir()
    graph = _place_decoder(bundle, place, copy)
    picture = write_encoding_graph(bundle, folder / ENCODING)
    encoding = bundle.manifest["encoding"]
    return {
        "kind": KIND,
        "format": FORMAT,
        "pe_onnx": __version__,
        "title": title or named,
        "decoder": {
            "graph": f"bundle/{graph}",
            "weights": f"bundle/{WEIGHTS}" if (place / WEIGHTS).is_file() else None,
            "target": bundle.target,
            "vocab_size": bundle.shape["vocab_size"],
            "caches": bundle.caches,
            "cache_dtype": bundle.cache_dtype,
            "path_dependent": bundle.path_dependent,
            "max_length": bundle.max_length,
            "trained_length": bundle.trained_length,
            "precision": _precision(bundle),
            "webgpu_refusal": webgpu_refusal(bundle),
        },
        "tokenizer": _tokenizer(bundle, place),
        "encoding": {
            "name": encoding["name"],
            "parameters": {name: entry["value"] for name, entry in encoding["parameters"].items()},
            "picture": picture,
        },
    }


def _place_decoder(bundle: Bundle, place: Path, copy: bool) -> str:
    """Graph and weights; the graph's name."""
    import onnx_ir as ir

    from pe_onnx import external_weights
    from pe_onnx.passes.unpacked_products import UnpackedProducts

    put = copy_file if copy else link_or_copy
    if WEIGHTS in bundle.manifest["files"]:
        put(bundle.folder / WEIGHTS, place / WEIGHTS)
    if bundle.quantization and bundle.quantization.get("bits"):
        model, unpack = external_weights.load(bundle.model), UnpackedProducts()
        unpack(model)
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[name]
        if unpack.unpacked_bytes <= MOST_UNPACKED_BYTES:
            external_weights.move(model, place / WEIGHTS)
            ir.save(model, place / UNPACKED)
            return UNPACKED
    put(bundle.model, place / MODEL)
    return MODEL


def _precision(bundle: Bundle) -> str:
    held = bundle.quantization or {}
    weights = f"int{held['bits']} weights" if held.get("bits") else bundle.manifest["dtype"]
    return f"{weights}, int8 cache" if bundle.cache_dtype == "int8" else weights


def _tokenizer(bundle: Bundle, place: Path) -> dict[str, Any]:
    """Kind, end tokens and chat template, and texts with their ids, by which the page proves its own tokenizer."""
    spec = bundle.manifest["tokenizer"]
    tokenizer = load_tokenizer(bundle.folder, spec)
    entry: dict[str, Any] = {"kind": (spec or {}).get("kind"), "eos": sorted(tokenizer.eos_token_ids)}
    if spec is None:
        return entry
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        if name in bundle.manifest["files"]:
            shutil.copyfile(bundle.folder / name, place / name)
    return {
        **entry,
        "has_config": (place / "tokenizer_config.json").is_file(),
        "special_tokens": tokenizer.special_tokens,
        "silent": [i for i in range(bundle.shape["vocab_size"]) if tokenizer.is_silent(i)],
        "unfinished": [i for i in range(bundle.shape["vocab_size"]) if tokenizer.is_unfinished(i)],
        "chat_template": tokenizer.chat_template,
        "samples": list(_samples(tokenizer)),
    }


def _samples(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for text in SAMPLES:
        with suppress(PeOnnxError):  # a vocabulary without these characters
            ids = tokenizer.encode(text)
            yield {"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}


def holds_site(folder: Path) -> bool:
    """Whether a folder has a record of ours."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("kind") == KIND
