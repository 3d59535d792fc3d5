"""On a CUDA device: half precision against PyTorch, recorded steps, and nothing of the cache copied to the host.

Parity in every mode is tested with that on the CPU (``test_parity.py``, ``test_parity_encodings.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_script import script
from conftest import Bundles

import pe_onnx
from pe_onnx.bundle import read_bundle
from pe_onnx.errors import ProviderError
from pe_onnx.kv_cache import make_cache
from pe_onnx.parity import check_parity
from pe_onnx.session import Session
from pe_onnx.tolerance import tolerance_for

pytestmark = pytest.mark.cuda
ENCODINGS = ("none", "learned", "sinusoidal", "rope", "t5_bias", "alibi")
GROUPED = {"num_key_value_heads": 2}
Array = np.ndarray[Any, Any]


def half(bundles: Bundles, encoding: str, dtype: str = "fp16", **options: Any) -> Path:
    return bundles(encoding, "ort", dtype=dtype, config=GROUPED, **options)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bfloat16_agrees_with_pytorch(bundles: Bundles, encoding: str) -> None:
    report = check_parity(half(bundles, encoding, "bf16"), provider="cuda")
    assert report.passed, report.to_dict()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_steps_are_recorded(bundles: Bundles, encoding: str, dtype: str) -> None:
    session = Session(read_bundle(half(bundles, encoding, dtype)), "cuda")
    assert session.not_captured is None


def scripted(session: Session) -> list[Array]:
    return script(make_cache(session, 3, 700), 40)


@pytest.mark.parametrize("encoding", ["none", "rope", "t5_bias", "alibi", "kerple_log", "rope_yarn"])
def test_recorded_steps_are_what_the_cpu_computes(bundles: Bundles, encoding: str) -> None:
    bundle = read_bundle(half(bundles, encoding))
    allowed = 2 * tolerance_for("fp16", bundle.depth).error
    for have, want in zip(scripted(Session(bundle, "cuda")), scripted(Session(bundle)), strict=True):
        np.testing.assert_allclose(have, want, atol=allowed * want.std())


def test_recorded_steps_are_the_same_each_time(bundles: Bundles) -> None:
    bundle = read_bundle(half(bundles, "rope"))
    first, second = (np.concatenate(scripted(Session(bundle, "cuda"))[1:40]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_cache_is_copied_to_the_host(bundles: Bundles, encoding: str, tmp_path: Path) -> None:
    """In the profile of unrecorded steps every copy is of a few numbers: lengths and sizes."""
    bundle = read_bundle(half(bundles, encoding))
    session = Session(bundle, "cuda", graph=bundle.graph_on("cuda"), profile=tmp_path / "profile")
    cache = make_cache(session, 1, 300)
    cache.prefill([list(range(200))])
    for _ in range(3):
        cache.decode([7])
    events = json.loads(session.end_profile().read_text("utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node"]
    assert nodes
    copied = [e["args"] for e in nodes if e["args"].get("op_name", "").startswith("Memcpy")]
    assert all(int(args.get("output_size", 0)) <= 64 for args in copied), copied
    on_cpu = {node.operator for node in session.placement() if node.provider == "cpu"}
    assert not any("Attention" in operator or "MatMul" in operator for operator in on_cpu)


def test_float32_attention_is_refused(bundles: Bundles) -> None:
    with pytest.raises(ProviderError, match=r"GroupQueryAttention in float32.*bf16, or with --target portable"):
        pe_onnx.load(bundles("rope", "ort"), provider="cuda")


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_a_cache_is_saved_and_loaded(bundles: Bundles, encoding: str, tmp_path: Path) -> None:
    for dtype in ("fp16", "bf16"):
        model = pe_onnx.load(half(bundles, encoding, dtype), provider="cuda")
        cache = model.cache(1, 200)
        cache.prefill([list(range(50))])
        cache.save(tmp_path / dtype)
        other = model.load_cache(tmp_path / dtype)
        np.testing.assert_array_equal(other.decode([3]), cache.decode([3]))


def test_a_cache_goes_on_on_the_cpu(bundles: Bundles, tmp_path: Path) -> None:
    """On the device ALiBi's keys hold positions, here they do not."""
    folder = half(bundles, "alibi")
    there, here = (pe_onnx.load(folder, provider=p) for p in ("cuda", "cpu"))
    cache = there.cache(1, 200)
    cache.prefill([list(range(50))])
    cache.save(tmp_path / "cache")
    want, have = cache.decode([3]).copy(), here.load_cache(tmp_path / "cache").decode([3])
    np.testing.assert_allclose(have, want, atol=2 * tolerance_for("fp16", there.bundle.depth).error * want.std())


def test_a_quantized_bundle(bundles: Bundles, tmp_path: Path) -> None:
    """A long prompt and steps behind it run in one graph: that for prompts is the CPU's."""
    bundle = pe_onnx.quantize(half(bundles, "alibi"), tmp_path / "q")
    ids, made = np.random.default_rng(0).integers(0, 256, 300).tolist(), []
    for provider in ("cuda", "cpu"):
        cache = make_cache(Session(bundle, provider), 1, 310)
        made.append(np.concatenate([*cache.prefill([ids]), *cache.decode([3])]))
    assert np.abs(made[0] - made[1]).max() < 0.1 * made[1].std()


def test_generate_says_nothing_else_than_on_the_cpu(bundles: Bundles) -> None:
    folder = half(bundles, "alibi")
    prompt = list(range(40))
    made = [pe_onnx.load(folder, provider=p).generate(prompt, max_new_tokens=24).tokens for p in ("cuda", "cpu")]
    assert made[0][:4] == made[1][:4]
    assert len(made[0]) == len(made[1]) == 24


def test_an_encoder_decoder(t5_bundles: Bundles, tmp_path: Path) -> None:
    checkpoint = t5_bundles("flan_untied", "ort").parent / "checkpoint"
    pe_onnx.export(model=checkpoint, output=tmp_path / "b", dtype="fp16")
    report = check_parity(tmp_path / "b", provider="cuda")
    assert report.passed, report.to_dict()


def test_doctor_finds_the_device() -> None:
    from pe_onnx.doctor import examine

    found = examine()
    assert [entry["name"] for entry in found["providers"] if entry["works"]] == ["cpu", "cuda"]
    assert found["cuda"]["devices"][0]["memory_bytes"] > 1 << 30
    assert all(found["cuda"]["libraries"].values())
