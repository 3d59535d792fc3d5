"""Transformers.js 4.3: config.json, tokenizer.json and ``onnx/model*.onnx``, one file for each kind of weights.

It names the files by ``dtype`` (its ``utils/dtypes.js``), their weights ``<file>_data``, and makes the first cache from
the shapes in the graph. Each variant is a bundle of its own, of one model.
"""

from __future__ import annotations

from pathlib import Path

from pe_onnx.bundle import MODEL, WEIGHTS, Bundle
from pe_onnx.errors import ConfigError, needs
from pe_onnx.packages import Package, need_decoder, need_numbers, need_target
from pe_onnx.packages._stand_in import known_config, write_source
from pe_onnx.packages._texts import read_json, special_ids, write_json, write_tokenizer

REASON = "a cache that grows and any padding"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
"""Its dtype to what it adds to the file's name."""
VARIANTS = {
    ("float32", None): "fp32",
    ("float16", None): "fp16",
    ("float32", 8): "q8",
    ("float32", 4): "q4",
    ("float16", 4): "q4f16",
}
"""Activations and bits of a weight to its dtype."""


class Transformersjs(Package):
    """For ``pipeline("text-generation", folder)``."""

    accepts = ("eos",)
    several = True

    def check(self) -> None:
        seen: dict[str, Bundle] = {}
        for bundle in self.bundles:
            need_decoder(bundle, "transformersjs", "make a package for optimum of it")
            need_target(bundle, "portable", "transformersjs", REASON)
            need_numbers(bundle, "transformersjs")
            if (dtype := variant(bundle)) in seen:
                raise ConfigError(f"{seen[dtype].folder} and {bundle.folder} are both {dtype!r}: give one of them")
            seen[dtype] = bundle
            for part in ("model", "encoding", "tokenizer"):
                if bundle.manifest[part] != self.bundle.manifest[part]:
                    raise ConfigError(
                        f"{bundle.folder} is another model than {self.bundle.folder}: their {part} differ"
                    )

    def write(self, folder: Path) -> None:
        (folder / "onnx").mkdir()
        for bundle in self.bundles:
            self._write_graph(bundle, folder / "onnx" / f"model{SUFFIXES[variant(bundle)]}.onnx")
        write_tokenizer(self.bundle, folder, self.notes)
        ids = special_ids(self.bundle, self.options.eos)
        own = read_json(self.bundle.folder / "generation_config.json")
        write_json(folder / "generation_config.json", {**own, **ids})
        config, stands_in = known_config(self.bundle, ids)
        outside = {path.name.removesuffix("_data"): 1 for path in (folder / "onnx").glob("*.onnx_data")}
        config["transformers.js_config"] = {
            "dtype": variant(self.bundle),
            **({"use_external_data_format": outside} if outside else {}),
        }
        write_json(folder / "config.json", config)
        if stands_in:
            write_source(self.bundle, folder, self.notes)

    def _write_graph(self, bundle: Bundle, target: Path) -> None:
        """The graph under another name; where its weights are a file, they get the name that belongs to it."""
        if WEIGHTS not in bundle.manifest["files"]:
            self.place(bundle.folder / MODEL, target)
            return
        with needs("renaming a graph's weights", "'pe-onnx[export]'"):
            import onnx_ir as ir

            from pe_onnx import external_weights
        weights = target.with_name(f"{target.name}_data")
        self.place(bundle.folder / WEIGHTS, weights)
        model = ir.load(bundle.folder / MODEL)
        external_weights.move(model, weights)
        ir.save(model, target)

    def loading(self, folder: Path) -> str:
        return (
            "node -e \"import('@huggingface/transformers').then(async t => { t.env.localModelPath = "
            f"'{folder.parent}'; t.env.allowRemoteModels = false; "
            f"const run = await t.pipeline('text-generation', '{folder.name}') }})\""
        )


def variant(bundle: Bundle) -> str:
    """Its dtype. Raises ConfigError where it has no name for what the bundle holds."""
    bits = (bundle.quantization or {}).get("bits")
    found = VARIANTS.get((bundle.dtype, bits))
    if found is None:
        raise ConfigError(
            f"transformersjs has no name for {bits}-bit weights in {bundle.dtype}, as {bundle.folder} has them: "
            "quantize a bundle in fp32"
        )
    return found
