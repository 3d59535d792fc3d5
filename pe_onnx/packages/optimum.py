"""optimum-onnx 0.1 (optimum 2.1): ``ORTModelForCausalLM``, and ``ORTModelForSeq2SeqLM`` for an encoder-decoder.

transformers' ``generate`` pads a batch on the left and hands over the mask: target ``portable`` takes it as it is.
"""

from __future__ import annotations

from pathlib import Path

from pe_onnx.bundle import DECODER, ENCODER, MERGED, MODEL
from pe_onnx.packages import Package, copy_asset, need_numbers, need_target, one_cache_shape
from pe_onnx.packages._stand_in import known_config, write_source
from pe_onnx.packages._texts import read_json, special_ids, write_json, write_tokenizer

REASON = "a cache that grows and padding on the left"


class Optimum(Package):
    """For ``from_pretrained(folder)``."""

    accepts = ("eos",)

    def check(self) -> None:
        need_target(self.bundle, "portable", "optimum", REASON)
        need_numbers(self.bundle, "optimum")
        if self.bundle.crossing is None:
            one_cache_shape(self.bundle, "optimum")

    def write(self, folder: Path) -> None:
        bundle = self.bundle
        write_tokenizer(bundle, folder, self.notes)
        ids = special_ids(bundle, self.options.eos)
        write_json(folder / "generation_config.json", {**read_json(bundle.folder / "generation_config.json"), **ids})
        if bundle.crossing is not None:
            for name in (ENCODER, DECODER, MERGED):
                self.place_graph(name, folder / name)
            copy_asset(bundle, "config.json", folder)
            if any(bundle.crossing.width != K * D for K, D in (*bundle.caches, *bundle.crossing.caches)):
                self.notes.append("optimum takes d_kv to be d_model / num_heads: load with use_io_binding=False")
            return
        self.place_graph(MODEL, folder / MODEL)
        config, stands_in = known_config(bundle, ids)
        write_json(folder / "config.json", config)
        if stands_in:
            write_source(bundle, folder, self.notes)

    def loading(self, folder: Path) -> str:
        kind = "ORTModelForCausalLM" if self.bundle.crossing is None else "ORTModelForSeq2SeqLM"
        return f"python -c \"from optimum.onnxruntime import {kind}; model = {kind}.from_pretrained('{folder}')\""
