"""Every encoding on two targets against PyTorch in every mode, past its switches, and broken twins that must fail.

The six basic encodings stand in ``test_parity.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import runnable_dtype

import pe_onnx
from pe_onnx import discovery
from pe_onnx.bundle import read_bundle
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding
from pe_onnx.models.decoder import Decoder
from pe_onnx.parity import GREEDY, MODES, check_parity, resolve_reference
from pe_onnx.reference import CachedReference, plain_with_cache

Bundles = Callable[..., Path]
BASIC = {"none", "learned", "sinusoidal", "rope", "t5_bias", "alibi"}
ENCODINGS = [name for name in discovery.names("encodings") if name not in BASIC]
TARGETS = ("ort", "portable")
SWITCHED = {"num_key_value_heads": 2, "max_position_embeddings": 160}
"""The default rows have 160 tokens and greedy decoding goes on to 144: with these parameters past every switch."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "rope_dynamic": {"factor": 2.0},
    "rope_longrope": {"long_factor": "1;1.5;2;3;4;5;6;8", "original_max_position_embeddings": 90},
    "rope_yarn": {"truncate": "false"},
    "t5_bias_per_layer": {"max_distance": 90},
    "fire": {"threshold": 40},
    "fire_shared": {"threshold": 40},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rope_dynamic": {**SWITCHED, "max_position_embeddings": 70},
    "alibi_falcon": {**SWITCHED, "num_attention_heads": 6, "head_dim": 16},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it does, many times more on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder(bundles: Bundles, name: str, target: str = "ort", **options: Any) -> Path:
    options |= {"config": CONFIGS.get(name, SWITCHED)}
    if name in PARAMETERS:
        options["encoding_parameters"] = PARAMETERS[name]
    return bundles(name, target, **options)


FAST = {
    "ort": {
        *("learned_offset", "alibi_falcon", "t5_bias_per_layer", "fire", "kerple_log", "xpos"),
        *("rope_yarn", "rope_dynamic", "rope_longrope", "rope_two_bases", "rope_interleaved"),
    },
    "portable": {"alibi_falcon", "fire", "rope_nope"},
}
"""One of each kind; the others are a sweep."""


def swept(names: Iterable[str], target: str = "ort", of: Callable[[str], str] = str) -> list[Any]:
    """of: the encoding that a name is about."""
    return [pytest.param(name, marks=() if of(name) in FAST[target] else pytest.mark.slow) for name in names]


CASES = [
    pytest.param(*case.values, target, marks=case.marks) for target in TARGETS for case in swept(ENCODINGS, target)
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_every_mode_agrees_with_pytorch(bundles: Bundles, name: str, target: str, provider: str) -> None:
    options = runnable_dtype(provider, target)
    report = check_parity(folder(bundles, name, target, **options), threads=1, provider=provider)
    expected = [mode for mode in (*MODES, GREEDY) if target == "portable" or not mode.endswith("_padding")]
    assert [mode.mode for mode in report.modes] == expected
    assert report.passed, report.to_dict()
    greedy = report.modes[-1]
    assert greedy.positions == 4 * 64
    if not options:
        assert report.relative_error < 2e-5
        assert greedy.top1_agreement == 1.0
    assert bool(report.angles) == (name.startswith("rope") or name == "xpos")
    assert max((error.max_ulps for error in report.angles), default=0) < 1.6, report.angles
    assert {i for error in report.angles for i in error.layers} <= {0, 1}
    said = read_bundle(folder(bundles, name, target)).manifest["encoding"]["path_dependent"]
    assert said == (name in ("rope_dynamic", "rope_longrope"))


@pytest.mark.parametrize("name", swept(name for name in ENCODINGS if not name.startswith("learned")))
def test_past_the_trained_length(bundles: Bundles, name: str) -> None:
    """400 tokens with a trained length of 160, or 70: a prompt in chunks, then steps, in a cache that grows."""
    bundle = folder(bundles, name)
    rows = np.random.default_rng(0).integers(0, 256, (1, 400)).tolist()
    report = check_parity(bundle, rows=rows, modes=["chunks", "steps"], threads=1)
    assert report.relative_error < 5e-5, report.to_dict()
    assert (read_bundle(bundle).trained_length or 0) < 400


def test_256_greedy_tokens_past_every_switch(bundles: Bundles) -> None:
    """The path-dependent ones, whose steps each move the frequencies: token by token as PyTorch chooses."""
    for name in ("rope_dynamic", "rope_longrope"):
        bundle = folder(bundles, name)
        prompt = np.random.default_rng(1).integers(0, 256, 20).tolist()
        made = pe_onnx.load(bundle).generate(prompt, max_new_tokens=256).tokens
        reference, described = resolve_reference(read_bundle(bundle))
        assert "run by run" in described
        assert not callable(reference)
        path = [{0: np.array(prompt)}, *({0: np.array([token])} for token in made[:-1])]
        logits = reference.follow(path)[0][len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == made


# --------------------------------------------------------------------------------------------------------- broken twins

Break = Callable[[PositionalEncoding], None]


def plain_frequencies(encoding: Any) -> None:
    encoding.inverse_frequency = encoding.theta**-encoding.exponent


def no_growth(encoding: Any) -> None:
    encoding.factor = 1.0
    encoding.power = 0.0


def always_short(encoding: Any) -> None:
    encoding.long_frequency = encoding.inverse_frequency


def one_base(encoding: Any) -> None:
    encoding.layers = torch.nn.ModuleList([encoding.layer(0)] * len(encoding.layers))


def no_scale(encoding: Any) -> None:
    encoding.decay = encoding.decay * 0


def halved(encoding: Any) -> None:
    encoding.slopes = encoding.slopes / 2


def zero(attribute: str, value: float = 0) -> Break:
    return lambda encoding: setattr(encoding, attribute, value)


def scale_weight(name: str, factor: float) -> Break:
    return lambda encoding: encoding.get_parameter(name).data.mul_(factor)


TWINS: dict[str, tuple[str, Break]] = {
    "linear: factor dropped": ("rope_linear", plain_frequencies),
    "ntk: factor dropped": ("rope_ntk", plain_frequencies),
    "llama3: scaling dropped": ("rope_llama3", plain_frequencies),
    "yarn: scaling dropped": ("rope_yarn", plain_frequencies),
    "yarn: attention factor dropped": ("rope_yarn", zero("attention_factor", 1.0)),
    "proportional: all pairs turn": ("rope_proportional", plain_frequencies),
    "dynamic: no growth": ("rope_dynamic", no_growth),
    "longrope: no switch": ("rope_longrope", always_short),
    "longrope: attention factor dropped": ("rope_longrope", zero("attention_factor", 1.0)),
    "interleaved: half-split": ("rope_interleaved", zero("interleaved", False)),
    "partial: whole head's exponent": (
        "rope_partial",
        lambda e: setattr(e, "inverse_frequency", e.inverse_frequency**0.25),
    ),
    "two bases: one": ("rope_two_bases", one_base),
    "nope: every layer turns": ("rope_nope", one_base),
    "xpos: no decay": ("xpos", no_scale),
    "xpos: half-split": ("xpos", zero("interleaved", False)),
    "learned: offset dropped": ("learned_offset", zero("offset")),
    "fairseq: offset dropped": ("sinusoidal_fairseq", zero("offset")),
    "bloom: other slopes": ("alibi_bloom", halved),
    "mpt: other slopes": ("alibi_mpt", halved),
    "falcon: score scale dropped": ("alibi_falcon", zero("score_scale", 1.0)),
    "t5: one table for all layers": ("t5_bias_per_layer", one_base),
    "fire: one network for all layers": ("fire", one_base),
    "fire: half the threshold": ("fire_shared", scale_weight("c_and_threshold", 0.5)),
    "kerple: another r2": ("kerple_log", scale_weight("r2", 0.5)),
    "kerple: another power": ("kerple_power", scale_weight("r2", 0.9)),
}


@pytest.mark.parametrize("twin", swept(TWINS, of=lambda twin: TWINS[twin][0]))
def test_a_broken_twin_fails(bundles: Bundles, twin: str) -> None:
    """The bundle against a PyTorch decoder in which one thing is broken. Whole, it passes in every mode, above."""
    name, break_it = TWINS[twin]
    bundle = folder(bundles, name)
    decoder = Decoder(DecoderConfig.from_dict(read_bundle(bundle).manifest["source"]["config"]))
    break_it(decoder.encoding)
    reference = CachedReference(lambda: plain_with_cache(decoder))
    report = check_parity(bundle, reference, modes=["whole"], threads=1)
    assert not report.passed
    assert report.relative_error > 0.01


def test_every_new_encoding_has_a_broken_twin() -> None:
    assert {name for name, _ in TWINS.values()} == set(ENCODINGS)
