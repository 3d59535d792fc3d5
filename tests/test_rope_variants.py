"""Every RoPE variant against transformers' frequencies, rotations and whole models; path dependence included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_onnx import discovery
from pe_onnx.config import DecoderConfig
from pe_onnx.encoding import PositionalEncoding, build_encoding, declared_parameters
from pe_onnx.encodings.rope import Rope
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.parity import check_parity
from pe_onnx.reference import CachedReference

HEAD = {"hidden_size": 128, "num_attention_heads": 2}
D = 64
LENGTH = 4096
"""The config's max_position_embeddings."""
VARIANTS = [name for name in discovery.names("encodings") if name.startswith("rope") or name == "xpos"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it does, many times more on a machine that is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, parameters: dict[str, Any] | None = None, **config: Any) -> Any:
    fields = {**HEAD, "max_position_embeddings": LENGTH, **config}
    return build_encoding(DecoderConfig(encoding=name, encoding_parameters=parameters or {}, **fields))


def theirs(kind: str, seq_len: int | None = None, **parameters: Any) -> tuple[np.ndarray, float]:
    """transformers' inverse frequencies and attention factor."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **parameters}
    config = LlamaConfig(**HEAD, max_position_embeddings=LENGTH, rope_parameters=rope)
    length = None if seq_len is None else torch.tensor(seq_len)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return frequencies.double().numpy(), factor


FACTORS = np.linspace(1.0, 3.0, D // 2).tolist()
LONG_FACTORS = np.geomspace(1.0, 40.0, D // 2).tolist()
ORIGINAL = {"original_max_position_embeddings": 1024}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("rope_linear", "linear", {"factor": 3.5}),
    "yarn": ("rope_yarn", "yarn", {"factor": 4.0, **ORIGINAL}),
    "yarn-betas": ("rope_yarn", "yarn", {"factor": 8.0, "beta_fast": 20.0, "beta_slow": 2.0, **ORIGINAL}),
    "yarn-truncate": ("rope_yarn", "yarn", {"factor": 4.0, "truncate": False, **ORIGINAL}),
    "yarn-factor": ("rope_yarn", "yarn", {"factor": 4.0, "attention_factor": 0.75, **ORIGINAL}),
    "yarn-mscale": ("rope_yarn", "yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2, **ORIGINAL}),
    "yarn-one-mscale": ("rope_yarn", "yarn", {"factor": 40.0, "mscale": 0.707, **ORIGINAL}),
    "yarn-short": ("rope_yarn", "yarn", {"factor": 2.0, "original_max_position_embeddings": 8}),
    "llama3": (
        "rope_llama3",
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    ),
    "llama3-others": (
        "rope_llama3",
        "llama3",
        {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 7.5, "original_max_position_embeddings": 333},
    ),
    "proportional": ("rope_proportional", "proportional", {"partial_rotary_factor": 0.25}),
    "proportional-odd": ("rope_proportional", "proportional", {"partial_rotary_factor": 0.7, "factor": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    """To float32's precision, theirs; no case is plain RoPE, which would hide a scaling that is dropped."""
    name, kind, parameters = CASES[case]
    ours = make(name, parameters)
    want, factor = theirs(kind, **parameters)
    np.testing.assert_allclose(ours.frequencies(torch.zeros(1, 1).long()), want, rtol=2e-6)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    plain = make("rope").inverse_frequency.numpy()
    assert np.abs(want / plain - 1).max() > 0.1


@pytest.mark.parametrize("name", ["rope_yarn", "rope_llama3", "rope_longrope"])
def test_the_original_length_is_the_trained_one_over_the_factor(name: str) -> None:
    given = make(name, {"factor": 4.0, "original_max_position_embeddings": 1024})
    left_out = make(name, {"factor": 4.0})
    torch.testing.assert_close(left_out.inverse_frequency, given.inverse_frequency, rtol=0, atol=0)
    assert left_out.attention_factor == given.attention_factor


@pytest.mark.parametrize("length", [1, 1000, LENGTH, LENGTH + 1, 3 * LENGTH, 20 * LENGTH])
def test_dynamic_follows_the_length_of_the_step(length: int) -> None:
    ours = make("rope_dynamic", {"factor": 3.0})
    positions = torch.tensor([[0, 3], [length // 2, length - 1]])
    want, _ = theirs("dynamic", length, factor=3.0)
    np.testing.assert_allclose(ours.frequencies(positions), want, rtol=5e-6)
    is_plain = torch.allclose(ours.frequencies(positions), make("rope").inverse_frequency, rtol=1e-12)
    assert is_plain == (length <= LENGTH)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_is_the_dynamic_one_at_a_fixed_growth(factor: float) -> None:
    """Their base grows by (f n / N - (f - 1)); with n = (2f - 1) / f N that is f."""
    length = round((2 * factor - 1) / factor * LENGTH)
    want, _ = theirs("dynamic", length, factor=factor)
    np.testing.assert_allclose(make("rope_ntk", {"factor": factor}).inverse_frequency, want, rtol=1e-5)
    lowest = make("rope").inverse_frequency[-1] / make("rope_ntk", {"factor": factor}).inverse_frequency[-1]
    assert float(lowest) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("given", [{}, {"attention_factor": 1.19}])
@pytest.mark.parametrize("length", [1, 1024, 1025, 9000])
def test_longrope_switches_past_the_original_length(length: int, given: dict[str, float]) -> None:
    factors = {"short_factor": FACTORS, "long_factor": LONG_FACTORS, **ORIGINAL, **given}
    ours = make("rope_longrope", {"factor": 4.0, **factors})
    want, factor = theirs("longrope", length, **factors)
    np.testing.assert_allclose(ours.frequencies(torch.tensor([[0, length - 1], [0, 1]])), want, rtol=1e-6)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


def test_lists_are_read_as_the_command_line_has_them() -> None:
    text = ";".join(map(str, FACTORS))
    a, b = (make("rope_longrope", {"short_factor": given}) for given in (text, FACTORS))
    assert a.parameters_used["short_factor"] == tuple(FACTORS) == b.parameters_used["short_factor"]
    torch.testing.assert_close(a.inverse_frequency, b.inverse_frequency, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_partial_is_transformers_partial_rotary(share: float) -> None:
    want, _ = theirs("linear", factor=1.0, partial_rotary_factor=share)
    ours = make("rope_partial", {"partial_rotary_factor": share})
    np.testing.assert_allclose(ours.inverse_frequency, want, rtol=1e-6)
    assert ours.rotary_size == D * share


def test_the_attention_factor_is_on_cosines_and_sines() -> None:
    positions = torch.tensor([[0, 1, 77]])
    cos, sin = make("rope_yarn", {"factor": 4.0}).tables(positions)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, (0.1 * math.log(4.0) + 1) ** 2))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_theta_and_a_pairing(name: str) -> None:
    """theta in all; interleaved and a part of the head wherever they are not the variant itself."""
    parameters = declared_parameters(type(make(name)))
    assert "theta" in parameters
    assert "interleaved" in parameters or name == "rope_interleaved"
    assert "rotary_dim" in parameters or name == "rope_partial"
    if not {"interleaved", "rotary_dim"} <= parameters.keys():
        return
    x = torch.randn(1, 5, 2 * D, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 50, 51, 77, 1000]])
    turned: list[torch.Tensor] = []
    for interleaved in (False, True):
        made = make(name, {"interleaved": interleaved, "rotary_dim": 16}).layer(0)
        out, _ = made.rotate(x, x, made.tables(positions))
        heads, given = out.unflatten(-1, (2, D)), x.unflatten(-1, (2, D))
        torch.testing.assert_close(heads[..., 16:], given[..., 16:], rtol=0, atol=0)
        assert (heads - given).abs().max() > 0.5
        turned.append(out)
    assert (turned[0] - turned[1]).abs().max() > 0.5


def test_interleaved_turns_neighbours() -> None:
    made = make("rope_interleaved")
    x = torch.randn(1, 7, 2 * D, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7)[None] * 100
    got = torch.view_as_complex(made.rotate(x, x, made.tables(positions))[1].double().unflatten(-1, (2, D // 2, 2)))
    given = torch.view_as_complex(x.double().unflatten(-1, (2, D // 2, 2)))
    angle = positions[0].double()[:, None] * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
    torch.testing.assert_close(
        got[0], given[0] * torch.polar(torch.ones_like(angle), angle)[:, None], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("every", "wide"), [(2, [1, 3, 5]), (6, [5]), (1, [0, 1, 2, 3, 4, 5])])
def test_two_bases_by_layer(every: int, wide: list[int]) -> None:
    parameters = {"global_every": every, "theta": 1e6, "local_theta": 5e3, "factor": 8.0}
    made = make("rope_two_bases", parameters, num_hidden_layers=6)
    local, _ = theirs("linear", factor=1.0, rope_theta=5e3)
    far, _ = theirs("linear", factor=8.0, rope_theta=1e6)
    for i in range(6):
        np.testing.assert_allclose(made.layer(i).inverse_frequency, far if i in wide else local, rtol=1e-6)
    assert len({id(made.layer(i)) for i in range(6)}) == (1 if every == 1 else 2)  # tables are made once for each


@pytest.mark.parametrize(("interval", "without"), [(2, [1, 3]), (4, [3]), (5, []), (1, [0, 1, 2, 3])])
def test_nope_layers(interval: int, without: list[int]) -> None:
    made = make("rope_nope", {"no_rope_layer_interval": interval}, num_hidden_layers=4)
    assert [i for i in range(4) if made.layer(i).hook == "none"] == without
    turned = [made.layer(i) for i in range(4) if i not in without]
    assert all(isinstance(encoding, Rope) for encoding in turned)
    assert len(set(turned)) <= 1


# --------------------------------------------------------------------------- whole models, cached, against transformers

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48}
NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".mlp_norm.": ".post_attention_layernorm.",
    ".attention.": ".self_attn.",
    "head.": "lm_head.",
}
HALF = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0],
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_dynamic": ({"factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}),
    "rope_longrope": (
        {**HALF, "factor": 1.5, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", **HALF, "factor": 1.5, "original_max_position_embeddings": 32},
    ),
    "rope_yarn": (
        {"factor": 3.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
    ),
}


def llama(name: str, parameters: dict[str, Any] | None = None) -> CachedReference:
    """transformers' Llama with our decoder's weights, run chunk by chunk with its own cache."""
    config = DecoderConfig(encoding=name, encoding_parameters=MODELS[name][0], **SMALL)
    rope = {"rope_theta": 10_000.0, **(MODELS[name][1] if parameters is None else parameters)}
    fields = {"vocab_size": 256, "intermediate_size": config.intermediate_size, "rms_norm_eps": config.norm_eps}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **fields, num_hidden_layers=2, rope_parameters=rope)).eval()
    weights = {}
    for key, tensor in Decoder(config).state_dict().items():
        theirs = "model.norm.weight" if key == "norm.weight" else key
        for old, new in NAMES.items():
            theirs = theirs.replace(old, new)
        weights[theirs] = tensor
    assert not model.load_state_dict(weights).missing_keys
    fresh = {key: value for key, value in vars(model.model.rotary_emb).items() if key == "max_seq_len_cached"}
    buffers = {key: value.clone() for key, value in model.model.rotary_emb.named_buffers()}

    def start() -> Callable[..., torch.Tensor]:
        cache = DynamicCache()
        vars(model.model.rotary_emb).update(fresh)  # their dynamic NTK remembers the longest text it ever saw
        for key, value in buffers.items():
            model.model.rotary_emb.register_buffer(key, value.clone(), persistent=False)
        return lambda ids, mask, positions: (
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        )

    return CachedReference(start)


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mode_is_transformers_with_its_cache(bundles: Callable[..., Path], name: str, target: str) -> None:
    """Past every switch, in the bundle's own chunks, single rows and ragged batches."""
    folder = bundles(name, target, encoding_parameters=MODELS[name][0], config=SMALL)
    report = check_parity(folder, llama(name), tokens=81, threads=1)
    assert report.passed, report.to_dict()
    assert report.relative_error < 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_scaling_dropped_is_seen(bundles: Callable[..., Path], name: str) -> None:
    folder = bundles(name, "ort", encoding_parameters=MODELS[name][0], config=SMALL)
    report = check_parity(folder, llama(name, {"rope_type": "default"}), tokens=81, modes=["whole", "ragged"])
    assert all(mode.relative_error > 0.1 for mode in report.modes)


@pytest.mark.parametrize("name", ["rope_dynamic", "rope_longrope"])
def test_chunks_matter_past_the_switch_and_not_before(name: str) -> None:
    decoder = Decoder(DecoderConfig(encoding=name, encoding_parameters=MODELS[name][0], **SMALL))
    assert decoder.encoding.path_dependent
    ids = torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))

    def logits(count: int, chunk: int) -> torch.Tensor:
        past: Any = ()
        with torch.no_grad():
            for begin in range(0, count, chunk):
                end = min(begin + chunk, count)
                step = PlainStep(torch.ones(1, end, dtype=torch.int64), past=past)
                out = decoder(ids[:, begin:end], torch.arange(begin, end)[None], step)
                past = step.presents
        return out[0, -1]

    switch = {"rope_dynamic": 48, "rope_longrope": 32}[name]
    spread = float(logits(switch, switch).std())
    assert (logits(switch, switch) - logits(switch, 7)).abs().max() < 1e-5 * spread
    assert (logits(90, 90) - logits(90, 7)).abs().max() > 0.1 * spread


def test_other_encodings_do_not_depend_on_the_path() -> None:
    dependent = {
        name for name in discovery.names("encodings") if build_encoding(DecoderConfig(encoding=name)).path_dependent
    }
    assert dependent == {"rope_dynamic", "rope_longrope"}


def test_a_mix_is_path_dependent_where_a_layer_is() -> None:
    from pe_onnx.encoding import PerLayer

    config = DecoderConfig()
    plain, dynamic = (build_encoding(DecoderConfig(encoding=name)) for name in ("rope", "rope_dynamic"))
    assert PerLayer(config, [plain, dynamic]).path_dependent
    assert not PerLayer(config, [plain, plain]).path_dependent
    assert isinstance(PerLayer(config, [plain]), PositionalEncoding)
    assert isinstance(plain, nn.Module)
