"""Six encodings on two targets against PyTorch, and their broken twins, which must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import runnable_dtype

import pe_onnx
from pe_onnx.config import DecoderConfig
from pe_onnx.encodings.alibi import Alibi
from pe_onnx.encodings.learned import Learned
from pe_onnx.encodings.rope import Rope
from pe_onnx.encodings.sinusoidal import Sinusoidal
from pe_onnx.encodings.t5_bias import T5Bias
from pe_onnx.errors import CheckpointError, ConfigError
from pe_onnx.models.attention import CompactStep, MaskedStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder
from pe_onnx.parity import GREEDY, MODES, check_parity
from pe_onnx.parity_report import ParityReport
from pe_onnx.tolerance import tolerance_for

ENCODINGS = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi")
TARGETS = ("ort", "portable")
GROUPED = {"num_key_value_heads": 2}
UNGROUPED = ("none", "learned", "sinusoidal")
"""Of those that do nothing to keys, the bundles that other tests have; the others are grouped."""
Bundles = Callable[..., Path]


SLOW = pytest.mark.slow
BOTH = [
    pytest.param(name, target, marks=() if target == "ort" or name in ("learned", "t5_bias") else SLOW)
    for name in ENCODINGS
    for target in TARGETS
]


def basic(bundles: Bundles, encoding: str, target: str = "ort", **options: str) -> Path:
    return bundles(encoding, target, **({} if encoding in UNGROUPED else {"config": GROUPED}), **options)


@pytest.mark.parametrize(("encoding", "target"), BOTH)
def test_every_mode_agrees_with_pytorch(bundles: Bundles, encoding: str, target: str, provider: str) -> None:
    options = runnable_dtype(provider, target)
    report = check_parity(
        basic(bundles, encoding, target, **options), tolerance=None if options else 2e-5, provider=provider
    )
    expected = [mode for mode in (*MODES, GREEDY) if target == "portable" or not mode.endswith("_padding")]
    assert [mode.mode for mode in report.modes] == expected
    assert all(mode.positions > 0 for mode in report.modes)
    assert report.passed, report.to_dict()
    greedy = report.modes[-1]
    assert (greedy.mode, greedy.positions) == ("greedy", 4 * 64)
    if not options:
        assert (greedy.top1_agreement, greedy.near_ties) == (1.0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_other_lengths_and_an_odd_one(bundles: Bundles, target: str) -> None:
    for tokens in (2, 37):
        assert check_parity(bundles("t5_bias", target, config=GROUPED), tokens=tokens, tolerance=2e-5).passed


@pytest.mark.parametrize(
    "encoding", ["rope", *(pytest.param(name, marks=SLOW) for name in ("t5_bias", "alibi", "sinusoidal", "none"))]
)
def test_past_the_trained_length(encoding: str, tmp_path: Path) -> None:
    """Nothing in the graph limits these: 300 tokens with a trained length of 64."""
    bundle = tmp_path / "bundle"
    pe_onnx.export(encoding=encoding, output=bundle, config={"max_position_embeddings": 64})
    model = pe_onnx.load(bundle)
    reference = PlainDecoder(Decoder(DecoderConfig.preset("tiny", encoding=encoding, max_position_embeddings=64)))
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids, torch.ones_like(ids), torch.arange(300)[None])[0].numpy()
    cache = model.cache(1, max_length=300)
    error = np.abs(cache.prefill([ids[0, :299].tolist()])[0] - expected[298]).max()
    error = max(error, np.abs(cache.decode([int(ids[0, 299])])[0] - expected[299]).max())
    assert error <= 2e-5 * expected.std()


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        *(("neox", "ort"), ("gpt2", "portable"), ("soft-capped", "ort")),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (("neox", "portable"), ("gpt2", "ort"), ("soft-capped", "portable"))
        ),
    ],
)
def test_other_architectures(architecture: str, target: str, tmp_path: Path) -> None:
    configs = {
        "neox": {"norm": "layer", "mlp": "plain", "hidden_act": "gelu", "attention_bias": True, "output_bias": True}
        | {"mlp_bias": True, "parallel_residual": True, "tie_word_embeddings": False},
        "gpt2": {"norm": "layer", "mlp": "plain", "hidden_act": "gelu_tanh", "mlp_bias": True, "embedding_scale": 8.0},
        "soft-capped": {"attention_softcap": 3.0, "logit_softcap": 6.0, "score_scale": 0.5, "head_dim": 32},
    }
    parameters = {"neox": {"rotary_dim": 8}, "gpt2": {"interleaved": True}, "soft-capped": {"theta": 500.0}}
    pe_onnx.export(
        encoding="rope",
        encoding_parameters=parameters[architecture],
        config=configs[architecture],
        target=target,
        output=tmp_path / "bundle",
    )
    assert check_parity(tmp_path / "bundle", tolerance=2e-5).passed


@pytest.mark.parametrize(
    ("encoding", "target"),
    [
        ("t5_bias", "portable"),
        *(pytest.param(*case, marks=SLOW) for case in (("alibi", "ort"), ("alibi", "portable"), ("t5_bias", "ort"))),
    ],
)
def test_a_bias_under_a_soft_cap(encoding: str, target: str, tmp_path: Path) -> None:
    """The bias is added after the soft-cap, in both targets."""
    pe_onnx.export(encoding=encoding, config={"attention_softcap": 2.0}, target=target, output=tmp_path / "bundle")
    assert check_parity(tmp_path / "bundle", tolerance=2e-5).passed


@pytest.mark.parametrize(("logits", "target"), [("all", "ort"), ("last", "portable")])
def test_the_other_kind_of_logits(logits: str, target: str, tmp_path: Path) -> None:
    """Than the target's own, which all the others have."""
    pe_onnx.export(encoding="rope", preset="tiny", target=target, logits=logits, output=tmp_path / "bundle")
    assert check_parity(tmp_path / "bundle", tolerance=2e-5).passed


@pytest.mark.parametrize(
    "encoding", [pytest.param(name, marks=() if name in ("rope", "t5_bias") else SLOW) for name in ENCODINGS]
)
def test_half_precision_keeps_to_its_row(bundles: Bundles, encoding: str) -> None:
    """Against float32 PyTorch with the unrounded weights."""
    folder = bundles(encoding, "ort", dtype="fp16")
    report = check_parity(folder)
    assert report.tolerance == tolerance_for("fp16", 2)
    assert report.passed, report.to_dict()
    assert min(mode.top1_agreement for mode in report.modes) >= 0.99
    assert not check_parity(folder, tolerance=tolerance_for("fp32", 2).error, modes=["steps"]).passed


Break = Callable[[pytest.MonkeyPatch], None]


def broken(encoding: str, folder: Path, break_it: Break, target: str = "ort") -> ParityReport:
    """Parity of a bundle that was exported while something was broken, against the whole decoder."""
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        pe_onnx.export(encoding=encoding, config=GROUPED, target=target, output=folder / "bundle", verify=False)
    return check_parity(folder / "bundle")


def against_broken(bundle: Path, break_it: Break) -> ParityReport:
    """Parity of a whole bundle against a decoder in which something is broken: the same, and nothing to export."""
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        return check_parity(bundle)


def off(patch: pytest.MonkeyPatch) -> None:
    for cls in (Learned, Sinusoidal):
        patch.setattr(cls, "embed", lambda self, p: torch.zeros(*p.shape, 64))
    patch.setattr(Rope, "rotate", lambda self, q, k, tables: (q, k))
    for cls in (Alibi, T5Bias):
        original = cls.bias
        patch.setattr(cls, "bias", lambda self, *args, f=original: f(self, *args) * 0)


def test_what_is_exported_broken_fails(tmp_path: Path) -> None:
    report = broken("rope", tmp_path, off)
    assert not report.passed
    assert report.relative_error > 0.1


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "none"])
def test_switched_off_fails(bundles: Bundles, encoding: str) -> None:
    report = against_broken(basic(bundles, encoding), off)
    assert not report.passed
    assert report.relative_error > 0.1


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "none"])
def test_positions_shifted_by_one_fail(bundles: Bundles, encoding: str) -> None:
    """Absolute positions all by one; where only the distance counts, the query's by one."""

    def shift(patch: pytest.MonkeyPatch) -> None:
        for cls in (Learned, Sinusoidal):
            original = cls.embed
            patch.setattr(cls, "embed", lambda self, p, f=original: f(self, p + 1))
        tables = Rope.tables
        patch.setattr(Rope, "tables", lambda self, p: (*tables(self, p), *tables(self, p + 1)))
        patch.setattr(Rope, "rotate", lambda self, q, k, t: (self.turn(q, t[2:]), self.turn(k, t[:2])))
        for cls in (Alibi, T5Bias):
            bias = cls.bias
            patch.setattr(cls, "bias", lambda self, q, k, n, f=bias: f(self, q + 1, k, n))

    report = against_broken(basic(bundles, encoding), shift)
    if encoding == "alibi":  # a constant in every row of scores, which softmax ignores: the definition, no fault
        assert report.passed
        return
    assert not report.passed
    assert report.relative_error > 0.01


def test_wrong_rotation_pairing_fails(bundles: Bundles) -> None:
    def pair_wrongly(patch: pytest.MonkeyPatch) -> None:
        original = Rope.__init__

        def init(
            self: Rope, config: DecoderConfig, *, theta: float = 1e4, interleaved: bool = False, rotary_dim: int = 0
        ):
            original(self, config, theta=theta, interleaved=not interleaved, rotary_dim=rotary_dim)

        patch.setattr(Rope, "__init__", init)

    assert against_broken(bundles("rope", config=GROUPED), pair_wrongly).relative_error > 0.1


@pytest.mark.parametrize("encoding", ["alibi", "t5_bias"])
def test_bias_with_the_other_sign_fails(bundles: Bundles, encoding: str) -> None:
    def flip(patch: pytest.MonkeyPatch) -> None:
        for cls in (Alibi, T5Bias):
            original = cls.bias
            patch.setattr(cls, "bias", lambda self, *args, f=original: -f(self, *args))

    assert against_broken(basic(bundles, encoding), flip).relative_error > 0.1


@pytest.mark.parametrize("target", ["portable", pytest.param("ort", marks=SLOW)])
def test_mask_ignored_fails(target: str, tmp_path: Path) -> None:
    """Only a batch shows it: the modes of a single row still pass."""

    def ignore(patch: pytest.MonkeyPatch) -> None:
        for cls in (CompactStep, MaskedStep):
            original = cls.__init__

            def init(self, mask, new, past, f=original):  # type: ignore[no-untyped-def]
                f(self, torch.ones_like(mask), new, past)

            patch.setattr(cls, "__init__", init)

    report = broken("rope", tmp_path, ignore, target)
    results = {mode.mode: mode for mode in report.modes}
    assert results["whole"].passed
    assert results["steps"].passed
    assert results["ragged"].relative_error > 0.1
    assert results["ragged"].first_difference is not None
    if target == "portable":
        assert results["left_padding"].relative_error > 0.1
        assert results["interior_padding"].relative_error > 0.1


def test_another_theta_fails(bundles: Bundles) -> None:
    config = DecoderConfig.preset("tiny", encoding="rope", encoding_parameters={"theta": 9000.0}, **GROUPED)
    report = check_parity(bundles("rope", config=GROUPED), PlainDecoder(Decoder(config)))
    assert not report.passed


def test_a_reference_of_ones_own(bundles: Bundles) -> None:
    folder = bundles("rope", config=GROUPED)
    decoder = PlainDecoder(Decoder(DecoderConfig.preset("tiny", encoding="rope", **GROUPED)))
    assert check_parity(folder, decoder).passed

    def halved(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
            return decoder(torch.from_numpy(ids), torch.ones(ids.shape), positions).numpy() / 2

    assert not check_parity(folder, halved, modes=["whole"]).passed


def test_figures_are_what_they_say(bundles: Bundles) -> None:
    """Max abs error, spread, KL and near-ties against a reference with a known offset."""
    folder = bundles("rope", config=GROUPED)
    decoder = PlainDecoder(Decoder(DecoderConfig.preset("tiny", encoding="rope", **GROUPED)))

    def offset(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
            logits = decoder(torch.from_numpy(ids), torch.ones(ids.shape), positions).numpy()
        logits[..., 0] += 0.5
        return logits

    mode = check_parity(folder, offset, modes=["steps"], tokens=20).modes[0]
    assert mode.max_abs_error == pytest.approx(0.5, abs=1e-3)
    assert mode.positions == 20
    assert mode.first_difference == "row 0, position 0"
    assert 0 < mode.kl < 0.1


def swapped(ids: np.ndarray) -> np.ndarray:
    """The two likeliest tokens change places."""
    decoder = PlainDecoder(Decoder(DecoderConfig.preset("tiny", encoding="rope", **GROUPED)))
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        logits = decoder(torch.from_numpy(ids), torch.ones(ids.shape), positions).numpy()
    first, second = np.argsort(logits, -1)[..., -1:], np.argsort(logits, -1)[..., -2:-1]
    high, low = np.take_along_axis(logits, first, -1), np.take_along_axis(logits, second, -1)
    np.put_along_axis(logits, first, low, -1)
    np.put_along_axis(logits, second, high, -1)
    return logits


def test_another_token_is_a_disagreement_unless_nearly_tied(bundles: Bundles) -> None:
    """Nearly tied: further apart in the reference than both may have moved it cannot be."""
    folder = bundles("rope", config=GROUPED)
    mode = check_parity(folder, swapped, modes=["steps"]).modes[0]
    assert (mode.disagreements, mode.near_ties, mode.top1_agreement) == (160, 0, 0.0)
    assert not mode.passed
    first = mode.first_disagreement
    assert first is not None
    assert first.where == "row 0, position 0"
    assert first.expected != first.chosen
    assert f"token {first.chosen} for {first.expected}, {first.gap:.1e} of the spread" in first.text
    some = check_parity(folder, swapped, modes=["steps"], tolerance=0.1).modes[0]
    assert min(some.near_ties, some.disagreements) > 20
    assert some.near_ties + some.disagreements == 160
    assert not some.passed
    all_tied = check_parity(folder, swapped, modes=["steps"], tolerance=10.0).modes[0]
    assert (all_tied.near_ties, all_tied.disagreements, all_tied.top1_agreement) == (160, 0, 1.0)
    assert all_tied.passed


def test_what_cannot_be_compared_is_refused(bundles: Bundles) -> None:
    folder = bundles("rope", config=GROUPED)
    with pytest.raises(ConfigError, match="did you mean 'whole'"):
        check_parity(folder, modes=["whol"])
    with pytest.raises(ConfigError, match="portable"):
        check_parity(folder, modes=["left_padding"])
    with pytest.raises(CheckpointError, match="must be a checkpoint"):
        check_parity(folder, 17)


def test_the_report_is_plain_data(bundles: Bundles) -> None:
    values = check_parity(bundles("rope", config=GROUPED), modes=["whole"], tokens=9).to_dict()
    assert values["passed"] is True
    assert set(values["tolerance"]) == {"error", "near_tie", "rule"}
    assert {"mode", "kl", "near_ties", "disagreements", "first_difference"} <= set(values["modes"][0])
    assert {"position", "max_ulps", "layers"} <= set(values["angles"][0])
    assert dataclasses.is_dataclass(pe_onnx.parity.ModeResult)  # type: ignore[attr-defined]
