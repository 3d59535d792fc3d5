"""Triton's onnxruntime backend: a model repository with a stateful and a stateless model over one file of weights.

The stateful one keeps keys and values in Triton (implicit state): a client sends tokens. Their first slot is Triton's
own and holds zeros, which a mask that begins with 0 leaves out; target ``portable`` takes such a mask.
"""

from __future__ import annotations

import re
from pathlib import Path

from pe_onnx.bundle import MODEL
from pe_onnx.errors import ConfigError
from pe_onnx.packages import Package, need_decoder, need_numbers, need_target
from pe_onnx.packages._repository import SEQUENCES, stateful, stateless
from pe_onnx.placing import link_or_copy

REASON = "a cache that grows and a mask with zeros"

README = """A Triton model repository: tritonserver --model-repository=THIS_FOLDER

{name}: keys and values stay in Triton. Each text is a sequence of requests with one sequence id, batch 1.

    of n tokens, the first request      sequence_start = true
        input_ids       int64 [1, n]        the tokens
        attention_mask  int64 [1, 1 + n]    0, then n ones
        position_ids    int64 [1, n]        0 .. n-1
    each further token                  after p tokens
        input_ids       int64 [1, 1]        the token
        attention_mask  int64 [1, 2 + p]    0, then p + 1 ones
        position_ids    int64 [1, 1]        p
    the last request                    sequence_end = true

    The next token is the largest of the last row of logits {logits}. The leading 0 is for the slot of zeros with which
    Triton begins a state; a mask without it gives other logits. {rows} sequences may be open at once.

{name}_stateless: keys and values come back as present.* and go in again as past_key_values.*, at first of length 0,
    or of length 1 under a leading 0 of the mask. Rows of a batch may be padded anywhere; padding is 0 in the mask.

The graph is of ONNX opset {opset}, for an onnxruntime backend that has it.
"""


class Triton(Package):
    """For ``tritonserver --model-repository``."""

    accepts: tuple[str, ...] = ("name",)

    def check(self) -> None:
        need_decoder(self.bundle, "triton", "make a package for optimum of it")
        need_target(self.bundle, "portable", "triton", REASON)
        need_numbers(self.bundle, "triton")
        if self.options.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.options.name):
            raise ConfigError(f"name = {self.options.name!r}: accepted are letters, digits and _ . -")

    @property
    def name(self) -> str:
        """The model's; by default the bundle's folder."""
        own = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.bundle.folder.resolve().name).lstrip("_.-")
        return self.options.name or own or "decoder"

    def write(self, folder: Path) -> None:
        second = f"{self.name}_stateless"
        self.place_graph(MODEL, folder / self.name / "1" / MODEL)
        (folder / second / "1").mkdir(parents=True)
        for path in (folder / self.name / "1").iterdir():
            link_or_copy(path, folder / second / "1" / path.name)
        (folder / self.name / "config.pbtxt").write_text(stateful(self.bundle, self.name), "utf-8")
        (folder / second / "config.pbtxt").write_text(stateless(self.bundle, second), "utf-8")
        shape = f"[1, {'T' if self.bundle.logits == 'all' else 1}, {self.bundle.shape['vocab_size']}]"
        opset = self.bundle.manifest["graph"]["opsets"].get("", "unknown")
        text = README.format(name=self.name, logits=shape, rows=SEQUENCES, opset=opset)
        (folder / "README.txt").write_text(text, "utf-8")

    def loading(self, folder: Path) -> str:
        return f"tritonserver --model-repository={folder}"
