"""Work of known size, measured beside a bundle: a chain of plain matrix products, and a copy.

A time from another day or machine says little; a time relative to work that is bound by the same thing says more. So
the products have as many bytes of weights as the bundle has and go through them once a step, bound by memory at one
row and by arithmetic at a prompt's rows; and the copy is of as many bytes as the bundle's cache. The sizes are
stored with a baseline: a bundle that has changed is measured against the same work.

What was tried, on two cores that other processes kept busy (spread over fresh processes, 5 layers of preset small):

- onnxruntime's MatMul or numpy's: numpy's threads can be set before it is imported only and wait spinning; on busy
  cores they took 15 times as long and spread by 120 %. With one thread numpy took half of onnxruntime's time, which a
  bundle's products take as well: it is bound by something else. onnxruntime's has the threads of its session.
- wall or processor time: a step of 8 ms on busy cores is preempted about once whatever its length, so that 20 % more
  work read as 8 % more wall time, spread by 11 %; in processor time as 14 to 21 %, spread by 2 to 6 %.
- weights as inputs or as constants: constants are packed and take the kernel that a bundle's take. Beside inputs, steps
  of an unchanged bundle read as 5 % faster to 15 % slower in 10 runs of the gate, beside constants as 2 % faster to as
  fast in 5, under less load. Matrices of equal content onnxruntime holds once, so that all 32 came from the cache in
  a third of the time: each is another.
- one thread or two: with two, ratios of wall times spread by 8 to 36 %, whether waiting threads spin or not, and
  processor time counts the waiting too.
- neighbours' ratios or quotients of medians, quartiles or least times: the first spread least for prompts (3 % against
  11 to 16 %), since cores change their speed for longer than a step, and as little as any for steps.
- one process or several: in each, pages fall elsewhere, and one in five is off by a tenth throughout: the median is
  taken over several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pe_onnx.providers import PROVIDERS, onnxruntime
from pe_onnx.yardstick_model import product_chain, weight_names

PRODUCTS = 32
FACTORS = [1 + i / 1024 for i in range(PRODUCTS)]
"""Each product takes equal numbers to this multiple of them: no two matrices are equal, and nothing grows much."""
MULTIPLE = 16


class Sizes(NamedTuple):
    """What a yardstick measures against, and at which lengths."""

    weight_bytes: int
    """Of all products' weights together, before rounding to whole widths."""
    copy_bytes: int
    depth_tokens: int
    """Tokens in the cache at a decode step."""
    prompt_tokens: int
    """Rows of the products beside a prompt."""

    @property
    def width(self) -> int:
        return max(int((self.weight_bytes / 4 / PRODUCTS) ** 0.5) // MULTIPLE, 1) * MULTIPLE


class Yardstick:
    """The work, allocated: about ``2 * (weight_bytes + copy_bytes)``, since onnxruntime packs the weights."""

    def __init__(self, sizes: Sizes, provider: str = "cpu", threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        names = [PROVIDERS[provider]] if provider == "cpu" else [PROVIDERS[provider], PROVIDERS["cpu"]]
        self.sizes, self.provider = sizes, provider
        W = sizes.width
        self._weights = [
            onnxruntime.OrtValue.ortvalue_from_numpy(np.full((W, W), factor / W, np.float32)) for factor in FACTORS
        ]
        options.add_external_initializers(weight_names(PRODUCTS), self._weights)
        self.session = onnxruntime.InferenceSession(product_chain(PRODUCTS, W), options, providers=names)
        self.source = np.ones(max(sizes.copy_bytes // 4, 1), np.float32)
        self.target = np.empty_like(self.source)
        self.results: list[Any] = []
        """What the products are written to, in the order in which they were asked for."""

    def step(self) -> Callable[[], None]:
        """The work beside a decode step: one row through all products, and the copy."""
        product = self._product(1)

        def work() -> None:
            product()
            np.copyto(self.target, self.source)

        return work

    def prompt(self) -> Callable[[], None]:
        """The work beside a prompt: ``prompt_tokens`` rows through all products."""
        return self._product(self.sizes.prompt_tokens)

    def _product(self, rows: int) -> Callable[[], None]:
        x = self._on_device(np.ones((rows, self.sizes.width), np.float32))
        y = self._on_device(np.zeros((rows, self.sizes.width), np.float32))
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        self.results.append(y)
        held = (x, y)  # a binding does not hold what is bound to it

        def work(held: Any = held) -> None:
            self.session.run_with_iobinding(binding)

        return work

    def _on_device(self, values: np.ndarray[Any, Any]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, self.provider, 0)
