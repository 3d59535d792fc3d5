"""Training of the small decoders: the same weights again, in one sitting or two, by the reference's own attention."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import ROOT
from click.testing import CliRunner

from pe_onnx import trained_weights
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import CheckpointError, ConfigError, ExportError
from pe_onnx.models import training, training_text
from pe_onnx.models.attention import PlainStep
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.muon import Muon, orthogonal
from pe_onnx.models.train import SHIPPED, command
from pe_onnx.models.training import Progress, Run, Settings, TrainingStep, bits_per_byte, forward, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
SHORT = Settings(steps=30, rows=3, other_rate=0.05, warm_up_steps=3, validate_every=10, validation_windows=5)
TEXT = b"".join(b"%d and %d are %d. " % (i % 97, i % 89, i % 97 + i % 89) for i in range(60_000))


@pytest.fixture(autouse=True)
def _settings() -> object:
    """Deterministic algorithms are for the whole process; other tests have them as they were."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def weights(folder: Path, encoding: str = "rope") -> bytes:
    return (folder / f"{encoding}.safetensors").read_bytes()


@pytest.mark.parametrize("shape", [(7, 7), (33, 12), (5, 64)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Against a singular value decomposition."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(matrix).numpy()
    u, _, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (found * (u @ v)).sum() / np.linalg.norm(found) / np.linalg.norm(u @ v) > 0.97


def test_muon_moves_by_its_rate() -> None:
    parameter = torch.nn.Parameter(torch.zeros(12, 3))
    parameter.grad = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    optimizer = Muon([parameter], lr=0.1)
    optimizer.step()
    first = parameter.detach().clone()
    assert (first * parameter.grad).sum() < 0
    assert 0.3 < first.norm(2) / (0.1 * (12 / 3) ** 0.5 * 3**0.5) < 1.3
    parameter.grad = torch.zeros(12, 3)  # the average outlives its gradient
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), 2 * first)


@pytest.mark.parametrize("encoding", SHIPPED)
def test_the_step_is_the_reference(encoding: str) -> None:
    """Its logits and its gradients; another mask would give others."""
    decoder = Decoder(DecoderConfig(encoding=encoding, **SMALL))
    tokens = torch.randint(256, (3, 19), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(19).expand(3, 19)

    def both(step: PlainStep) -> tuple[torch.Tensor, list[torch.Tensor]]:
        decoder.zero_grad()
        logits = decoder(tokens, positions, step)
        logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]

    mask = torch.ones_like(tokens)
    expected, gradients = both(PlainStep(mask))
    logits, found = both(TrainingStep(mask))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(found) == len(gradients) == len(list(decoder.parameters()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert not torch.allclose(both(PlainStep(mask, causal=False))[0], expected, atol=1e-2)


def test_what_has_no_fused_kernel_takes_the_formula() -> None:
    decoder = Decoder(DecoderConfig(num_key_value_heads=1, attention_softcap=5.0, **SMALL))
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = decoder(tokens, torch.arange(9).expand(2, 9), PlainStep(torch.ones_like(tokens)))
    assert torch.equal(forward(decoder, tokens), expected)


def test_bits_per_byte() -> None:
    """Against the sum over windows in NumPy; the first byte of a window counts nowhere."""
    decoder = Decoder(DecoderConfig(**SMALL))
    text = torch.tensor(list(TEXT[:500]))
    bits = []
    for start in range(0, 480, 24):
        window = text[start : start + 24][None]
        with torch.no_grad():
            logits = decoder(window, torch.arange(24)[None], PlainStep(torch.ones_like(window)))[0].double().numpy()
        for i in range(23):
            bits.append(
                math.log2(np.exp(logits[i] - logits[i].max()).sum())
                - (logits[i, window[0, i + 1]] - logits[i].max()) / math.log(2)
            )
    assert bits_per_byte(decoder, text, 24) == pytest.approx(np.mean(bits), rel=1e-5)
    assert bits_per_byte(decoder, text, 24, windows=2) == pytest.approx(np.mean(bits[:23] + bits[230:253]), rel=1e-5)


def test_it_learns_and_gives_the_same_weights_again(tmp_path: Path) -> None:
    seen: list[Progress] = []
    log = train("rope", TEXT, tmp_path / "a", SHORT, SMALL, progress=seen.append)
    assert [made.step for made in seen] == list(range(1, 31))
    assert [made.step for made in seen if made.validation_bits is not None] == [10, 20, 30]
    counts = np.bincount(np.frombuffer(TEXT, np.uint8)) / len(TEXT)
    alone = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
    assert log["validation_bits_per_byte"] < alone < seen[0].bits == pytest.approx(8)
    assert (
        json.loads((tmp_path / "a/rope.json").read_text())["validation_bits_per_byte"]
        == log["validation_bits_per_byte"]
    )
    made = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert made == ["heldout.txt", "rope.json", "rope.safetensors"]
    assert (tmp_path / "a/heldout.txt").read_bytes() == training_text.split(TEXT)[1]
    train("rope", TEXT, tmp_path / "b", SHORT, SMALL)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train("rope", TEXT, tmp_path / "c", replace(SHORT, seed=1), SMALL)
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


@pytest.mark.parametrize("encoding", ["learned", "t5_bias"])
def test_a_run_that_was_stopped_goes_on(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 7)
    train(encoding, TEXT, tmp_path / "whole", SHORT, SMALL)

    def stop(made: Progress) -> None:
        if made.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(encoding, TEXT, tmp_path / "parts", SHORT, SMALL, progress=stop)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f".{encoding}.state"]
    for other in ({"steps": 31}, {"seed": 2}):
        with pytest.raises(ConfigError, match="other settings"):
            train(encoding, TEXT, tmp_path / "parts", replace(SHORT, **other), SMALL)
    with pytest.raises(ConfigError, match="another text"):
        train(encoding, TEXT + b"!", tmp_path / "parts", SHORT, SMALL)
    seen: list[Progress] = []
    train(encoding, TEXT, tmp_path / "parts", SHORT, SMALL, progress=seen.append)
    assert seen[0].step == 15
    assert weights(tmp_path / "parts", encoding) == weights(tmp_path / "whole", encoding)
    made = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert made == sorted(["heldout.txt", f"{encoding}.json", f"{encoding}.safetensors"])
    losses = [json.loads((tmp_path / name / f"{encoding}.json").read_text())["losses"] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "rope.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="--force"):
        train("rope", TEXT, tmp_path, SHORT, SMALL)
    assert weights(tmp_path) == b"mine"
    (tmp_path / ".rope.state").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="no state of a training run"):
        train("rope", TEXT, tmp_path, SHORT, SMALL, force=True)
    assert weights(tmp_path) == b"mine"


def test_what_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    """The script's six after one another, stopped and begun again, and the text that the weights never saw."""
    log = train("rope", TEXT, tmp_path, SHORT, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen: list[Progress] = []
    assert train("rope", TEXT, tmp_path, SHORT, SMALL, progress=seen.append) == json.loads(json.dumps(log))
    with pytest.raises(ConfigError, match="of another run; --force"):
        train("rope", TEXT, tmp_path, replace(SHORT, steps=31), SMALL)
    for encoding, force in (("rope", False), ("alibi", False), ("alibi", True)):
        with pytest.raises(ConfigError, match=r"weights of another text, rope\.safetensors"):
            train(encoding, TEXT + b"!", tmp_path, SHORT, SMALL, force=force)
    assert seen == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    train("rope", TEXT + b"!", tmp_path, SHORT, SMALL, force=True)
    assert (tmp_path / "heldout.txt").read_bytes() == training_text.split(TEXT + b"!")[1]


def test_a_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 5)

    def full(*args: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExportError, match=r"cannot write .*\.rope\.state"):
        train("rope", TEXT, tmp_path, SHORT, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_characters_stay_whole() -> None:
    text = "aé🙂".encode() * 100_000
    for shift in range(7):
        before, held_out = training_text.split(text + b"x" * shift)
        before.decode()
        held_out.decode()
        assert before + held_out == text + b"x" * shift
        assert training_text.HELD_OUT_BYTES - 4 < len(held_out) <= training_text.HELD_OUT_BYTES


def test_a_table_starts_as_sinusoids() -> None:
    run = Run(DecoderConfig(encoding="learned", **SMALL), SHORT, TEXT)
    table = run.decoder.encoding.table.weight.detach()
    assert table[5, 0] == pytest.approx(math.sin(5), abs=1e-6)
    assert table[5, 1] == pytest.approx(math.cos(5), abs=1e-6)
    assert table[5, 31] == pytest.approx(math.cos(5 * 10000 ** (-30 / 32)), abs=1e-6)


def test_the_rates_rise_and_fall() -> None:
    settings = Settings(steps=100, warm_up_steps=10, falling_from=0.5)
    assert [settings.rate(step) for step in (0, 9, 50, 75)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert 0 < settings.rate(99) < 0.03


def program(folder: Path, text: str) -> None:
    folder.mkdir()
    path = folder / "bible"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_bible_of_the_installed_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "import sys; print('Ge1:1 In the beginning\\n1Sam2:3 And ' + sys.argv[-1])")
    monkeypatch.setattr(training_text, "HELD_OUT_BYTES", 3)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert training_text.read(None) == b"In the beginning\nAnd gen1:1-rev22:21\n"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="the Bible of this system holds 37 bytes"):
        training_text.read(None)
    program(tmp_path / "broken", "raise SystemExit(255)")
    monkeypatch.setenv("PATH", str(tmp_path / "broken"))
    with pytest.raises(ConfigError, match="--data FILE"):
        training_text.read(None)


def test_without_debian_a_text_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be had from Debian.*--data FILE"):
        training_text.read(None)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        training_text.read(tmp_path / "absent")
    (tmp_path / "short").write_bytes(b"a" * 1000)
    with pytest.raises(ConfigError, match="1,000 bytes"):
        training_text.read(tmp_path / "short")


@pytest.mark.slow
def test_the_weights_that_come_with_pe_onnx_are_trained_again(tmp_path: Path) -> None:
    """The first of all steps, to the log's loss within 2 %; to its end they were, once, to the byte."""
    try:
        text = training_text.read(None)
    except ConfigError as error:
        pytest.skip(f"the text is not to be had: {error}")
    log = trained_weights.log("rope")
    settings = Settings()
    run = Run(DecoderConfig(encoding="rope", **training.ARCHITECTURE), settings, text)
    assert run.digest == log["text"]["sha256"]
    assert run.identity == log["identity"]
    made = next(made for made in run.steps() if made.validation_bits is not None)
    assert made.step == log["losses"][0][0] == 200
    assert made.validation_bits == pytest.approx(log["losses"][0][2], rel=0.02)


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT[:500_000])
    line = [sys.executable, str(ROOT / "models/train.py"), "--data", "text", "-o", "out"]
    line += ["--encoding", "alibi", "--steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out/alibi.safetensors: ")
    assert (tmp_path / "out/heldout.txt").read_bytes() == TEXT[:500_000][-training_text.HELD_OUT_BYTES :]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--encoding", "alibi"), "of another run; --force"),
        (("--encoding", "alibis"), "did you mean 'alibi'?"),
        (("--data", "absent"), "cannot be read"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_what_the_script_refuses(
    args: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(TEXT[:500_000])
    Path("out").mkdir()
    Path("out/alibi.safetensors").write_bytes(b"mine")
    done = CliRunner().invoke(command, ["--data", "text", "-o", "out", *args])
    assert done.exit_code == 2
    assert words in done.output
    assert done.output.count("\n") == 1 or args[0] == "--seed"  # click's own has the usage before it
    assert Path("out/alibi.safetensors").read_bytes() == b"mine"
