"""The peers' benchmark: its tables, its bounds, its quality figures, and the worker's protocol on a bundle of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peer_bounds
import peer_checkpoints
import peer_contestants
import peer_gguf
import peer_quality
import peer_speed
import peer_tables
import peers
import pytest
import readme_tables
import torch
from peer_artefacts import Artefacts, SetupError
from peer_environments import last_error
from peer_processes import WorkerError, WorkerProcess

import pe_onnx

TINY = peer_contestants.Contestant("ours_tiny", "pe-onnx tiny", 32, "ours", "peer_ours.py", "tiny", 4)
SHAPE = peer_bounds.Shape(layers=3, heads=4, kv_heads=2, head_size=8, width=32, mlp_width=48, vocab_size=99)


def test_bounds_count_what_a_step_and_a_prompt_need() -> None:
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q, k and v, o
    assert SHAPE.block_weights == 3 * (attention + 3 * 32 * 48)
    assert SHAPE.cache_numbers(7) == 3 * 2 * 2 * 8 * 7
    multiplied = 7 * SHAPE.block_weights + 32 * 99
    scored = 3 * 4 * 8 * 7 * 7 / 2 * 2  # half of the square is masked; scores and their product with the values
    assert SHAPE.prompt_operations(7) == 2 * (multiplied + scored)
    assert peer_bounds.decode_bound_ms(3_000_000, 1_000_000, 1e9) == pytest.approx(4)
    assert peer_bounds.prefill_bound_s(SHAPE, 7, SHAPE.prompt_operations(7)) == pytest.approx(1)


def test_a_table_that_is_looked_up_is_not_read(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table, weight = np.zeros((11, 4), np.float32), np.zeros((4, 3), np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    for tied, numbers in ((False, 12), (True, 12 + 44)):
        extra = [helper.make_node("Identity", ["table"], ["head"])] if tied else []
        tensors = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")]
        model = helper.make_model(helper.make_graph(nodes + extra, "g", inputs, outputs, tensors))
        onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
        assert peer_bounds.step_bytes(tmp_path) == 4 * numbers
        (tmp_path / "model.onnx").unlink()


def test_quality_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    p, q = 3 * rng.standard_normal((2, 131, 17)).astype(np.float32)
    targets = rng.integers(0, 17, 131)
    quality = peer_quality.Quality()
    quality.add(p[:70], q[:70], targets[:70])
    quality.add(p[70:], q[70:], targets[70:])
    a, b = torch.from_numpy(p).log_softmax(-1), torch.from_numpy(q).log_softmax(-1)
    figures = quality.figures(text_bytes=500)
    kl = torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean")
    nats = torch.nn.functional.cross_entropy(torch.from_numpy(q), torch.from_numpy(targets), reduction="sum")
    assert figures["kl_nats_per_token"] == pytest.approx(kl.item(), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats.item() / np.log(2) / 500, rel=1e-5)
    same = peer_quality.Quality()
    same.add(p, p, targets)
    assert same.figures(500)["kl_nats_per_token"] == 0


def test_windows_predict_every_token_once() -> None:
    ids = list(range(1, 1300))
    cut = peer_quality.windows(ids, 0)
    assert [token for window in cut for token in window[1:]] == ids
    assert {window[0] for window in cut} == {0}
    assert max(map(len, cut)) == peer_quality.WINDOW_TOKENS


def test_the_text_is_20_kb_and_the_same_each_time() -> None:
    text, origin = peer_checkpoints.held_out_text()
    assert len(text.encode()) == peer_checkpoints.TEXT_BYTES
    assert peer_checkpoints.held_out_text() == (text, origin)


def test_gguf_pairs_are_neighbours() -> None:
    assert peer_gguf.gguf_name("model.layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert peer_gguf.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    rows = np.arange(12)[:, None]  # two heads of six channels
    assert peer_gguf.permuted(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_contestants_have_recipes_and_names_of_their_own() -> None:
    names = [contestant.name for contestant in peer_contestants.CONTESTANTS]
    assert len(set(names)) == len(names)
    made = {"checkpoint", *peer_contestants.RECIPES}
    for contestant in peer_contestants.CONTESTANTS:
        assert contestant.artefact in made
        assert (peer_contestants.HERE / contestant.script).exists()
    assert set(peer_contestants.QUALITY) <= set(names)
    with pytest.raises(ValueError, match="'llama' is no contestant; there are ours_fp32"):
        peer_contestants.select("ours_fp32, llama")


def test_a_command_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w'); raise ValueError('no such kernel')"]
    recipe = peer_contestants.Recipe((), "ours", lambda places, output: [*command, str(output)])
    monkeypatch.setitem(peer_contestants.RECIPES, "broken", recipe)
    monkeypatch.setattr("peer_artefacts.packaged_gguf", lambda: Path("none.gguf"))
    artefacts = Artefacts(tmp_path, "model", 1)
    for _ in range(2):
        with pytest.raises(SetupError, match="ValueError: no such kernel"):
            artefacts.path("broken")
    assert not (artefacts.folder / "broken").exists()
    log = "a\nERROR: no version of x fits, see https://index.example/simple/x and /home/me/.cache/pip/x.whl\nb"
    assert last_error(log) == "ERROR: no version of x fits, see (address) and x.whl"


def test_memory_makes_groups() -> None:
    needed = {"a": 5, "b": 4, "c": 3, "d": 20}
    assert peer_speed.groups(needed, 10) == [["a"], ["b", "c"], ["d"]]
    assert peer_speed.groups(needed, None) == [["a", "b", "c", "d"]]


def test_figures_of_one_contestant_become_json_and_tables(tmp_path: Path) -> None:
    fast = peer_speed.Times(decode={7: [[0.002, 0.004, 0.003], [0.006] * 3]}, prefill={7: [0.5, 0.25, 1.0]})
    slow = peer_speed.Times(decode={7: [[0.006] * 3, [0.018] * 3]}, prefill={7: [1.0]}, idle_shares=[0.01, 0.02])
    contestants = peer_contestants.select("ours_fp32,llama_cpp_f32,llama_cpp_q4_0")
    described = {c.name: {"label": c.label, "bits": c.bits, "weight_bytes_of_a_step": 10**6} for c in contestants}
    described["llama_cpp_q4_0"]["error"] = "no compiler"
    rates = {"read_bytes_per_s": 1e9, "gemm_operations_per_s": float(SHAPE.prompt_operations(7))}
    peers.add_speed(described, {"ours_fp32": fast, "llama_cpp_f32": slow}, contestants, SHAPE, rates)
    assert described["ours_fp32"]["decode"]["7"]["ms"] == pytest.approx(4.5)
    assert described["ours_fp32"]["prefill"]["7"]["tokens_per_s"] == pytest.approx(14)
    assert described["ours_fp32"]["prefill"]["7"]["bound_share"] == pytest.approx(2)
    assert described["llama_cpp_f32"]["decode"]["7"]["ratio_to_ours"] == pytest.approx(2.5)
    assert described["llama_cpp_f32"]["greatest_idle_share"] == 0.02
    result = {
        "threads": 2,
        "prompts": [7],
        "contexts": [7],
        "machine_rates": rates,
        "contestants": described,
        "quality": {"smollm2": {"ours_fp32": {"kl_nats_per_token": 0.0123, "bits_per_byte": 1.23456}}},
    }
    result = json.loads(json.dumps(result))
    text = peer_tables.tables(result)
    assert "| pe-onnx fp32 | 14 (2.00) | 4.5 (0.22) |" in text
    assert "| pe-onnx fp32 | 0.012 | 1.2346 |" in text
    assert "- llama.cpp Q4_0: not measured, no compiler" in text
    peer_tables.draw(result, tmp_path / "plot.svg")
    assert "tokens in the cache" in (tmp_path / "plot.svg").read_text() or (tmp_path / "plot.svg").stat().st_size
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmarks/peers.py -->\nold\n<!-- end -->\nb\n")
    readme_tables.write(readme, "peers", text)
    assert readme.read_text() == f"a\n<!-- benchmarks/peers.py -->\n{text}\n<!-- end -->\nb\n"
    with pytest.raises(ValueError, match="has no lines"):
        readme_tables.write(tmp_path / "plot.svg", "peers", text)


def test_a_worker_answers_for_a_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    pe_onnx.export(encoding="rope", preset="tiny", output=bundle, logits="all", config={"vocab_size": 40_000})
    with WorkerProcess(TINY, Path(sys.executable), bundle, 1, tmp_path / "log") as worker:
        assert set(worker.load(64)) == {"import_s", "load_s"}
        assert worker.ask("prefill", tokens=17)["seconds"] > 0
        assert len(worker.ask("decode", context=33, steps=3)["seconds"]) == 3
        assert len(worker.ask("decode", context=21, steps=2)["seconds"]) == 2
        worker.ask("prefill", tokens=64)
        file = tmp_path / "logits.npy"
        ids = [3, 1, 4, 1, 5, 9, 2]
        worker.ask("logits", tokens=ids, file=str(file))
        cache = pe_onnx.load(bundle, threads=1).cache(1, 16)
        expected = np.stack([cache.prefill([ids[:1]])[0], *(cache.decode([token])[0].copy() for token in ids[1:])])
        np.testing.assert_allclose(np.load(file), expected, atol=1e-4)
        with pytest.raises(WorkerError, match="prefill: InputError: 65 tokens are more than"):
            worker.ask("prefill", tokens=65)
    starts = {"ours_tiny": lambda: WorkerProcess(TINY, Path(sys.executable), bundle, 1, tmp_path / "log")}
    assert peer_speed.fresh_starts(starts["ours_tiny"], 1)["peak_bytes"] > 1e7
    times = peer_speed.measure(starts, contexts=[9], prompts=[5], rounds=1, turns=2, steps=2)["ours_tiny"]
    assert times.error is None
    assert [len(block) for block in times.decode[9]] == [2, 2]
    assert len(times.prefill[5]) == 2
