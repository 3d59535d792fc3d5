"""ALiBi in channels of the heads: the pieces are exact, and ``cuda.onnx`` computes with them what the bundle computes
with a bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from cache_script import script
from conftest import Bundles
from graphs import counts

import pe_onnx
from pe_onnx import saved_cache
from pe_onnx.bundle import CUDA, MODEL, Bundle, read_bundle
from pe_onnx.contract import stored
from pe_onnx.encodings import alibi, alibi_bloom, alibi_mpt
from pe_onnx.errors import ConfigError, ExportError, InputError
from pe_onnx.kv_cache import make_cache
from pe_onnx.passes import alibi_channels
from pe_onnx.passes.alibi_channels import AlibiChannels
from pe_onnx.passes.nodes import take_place
from pe_onnx.position_channels import BITS, CHANNELS, MOST_POSITIONS, USED, of_keys, of_queries
from pe_onnx.quantization import quantize
from pe_onnx.session import Session
from pe_onnx.tolerance import tolerance_for

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPED = {"num_key_value_heads": 2}
POSITIONS = np.array([0, 1, 255, 256, 257, 2047, 2048, 2049, 65535, 65536, 131071, (1 << 22) + 3, MOST_POSITIONS - 1])
SLOPES = {
    "alibi, 4": alibi.slopes(4),
    "alibi, 12": alibi.slopes(12),
    "alibi, 71": alibi.slopes(71),
    "bloom, 112": alibi_bloom.slopes(112),
    "mpt, 24": alibi_mpt.slopes(24),
    "mpt, 8, to 2^-40": alibi_mpt.slopes(8, 40.0),
}
Array = np.ndarray[Any, Any]


def held(values: Array, dtype: str) -> Array:
    """What a tensor of the dtype holds of them."""
    bits = stored(values.astype(np.float32), dtype)
    wide = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits
    return wide.astype(np.float64)


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("size", [64, 128, 240])
def test_products_of_the_pieces_are_the_penalty(name: str, dtype: str, size: int) -> None:
    slopes, scale = SLOPES[name].numpy().astype(np.float64), size**-0.5
    keys, queries = of_keys(POSITIONS, BITS[dtype]), of_queries(slopes, scale, dtype)
    assert queries is not None
    assert (keys.shape, queries.shape) == ((len(POSITIONS), CHANNELS), (len(slopes), CHANNELS))
    exact = [i for i, channel in enumerate(USED[BITS[dtype]]) if channel.piece < 2]
    np.testing.assert_array_equal(held(keys, dtype)[:, exact], keys[:, exact])
    np.testing.assert_array_equal(held(queries, dtype), queries)
    have, want = scale * queries @ held(keys, dtype).T.astype(np.float64), slopes[:, None] * POSITIONS
    smallest = 2.0**-22 * scale * POSITIONS / 256  # slopes that float16 holds as multiples of its least number
    assert (np.abs(have - want) <= 2.0**-22 * want + smallest).all()


def test_digits_count_every_position() -> None:
    positions = np.arange(1 << 13)
    for bits in (8, 11):
        values = of_keys(positions, bits).astype(np.float64)
        first = [i for i, channel in enumerate(USED[bits]) if channel.piece == 0]
        np.testing.assert_array_equal(256 * values[:, first].sum(1), positions)


def test_slopes_that_float16_cannot_hold() -> None:
    for slopes in ([1.0, 1e6], [np.inf], [np.nan]):
        assert of_queries(np.array(slopes), 0.125, "float16") is None
    assert of_queries(np.array([1.0, 1e6]), 0.125, "bfloat16") is not None
    assert of_queries(np.array([1.0]), 1e-4, "float16") is None  # the scores' scale is in them


# --------------------------------------------------------------------------------------------------------------- graph


def half(bundles: Bundles, encoding: str = "alibi", dtype: str = "fp16", **config: Any) -> Bundle:
    return read_bundle(bundles(encoding, "ort", dtype=dtype, config=GROUPED | config))


def runs(bundle: Bundle, graph: str) -> list[Array]:
    session = Session(bundle, graph=graph, threads=1)
    made = [row for logits in script(make_cache(session, 3, 700), 30) for row in logits]
    ids = np.random.default_rng(1).integers(0, 256, 4200).tolist()  # past 2,048, where the second digit begins
    return [*made, *make_cache(session, 1, 4200, chunk_tokens=700).prefill([ids])]


@pytest.mark.parametrize("encoding", ["alibi", "alibi_bloom", "alibi_mpt"])
def test_no_bias_and_the_same_logits(bundles: Bundles, encoding: str) -> None:
    bundle = half(bundles, encoding)
    model = ir.load(bundle.folder / CUDA)
    made, before = counts(model), counts(ir.load(bundle.folder / MODEL))
    layers = len(bundle.caches)
    assert (made["AlibiBias"], made["CachedAttention"], made["GroupQueryAttention"]) == (0, 0, layers)
    assert before["Split"] - made["Split"] == layers  # queries, keys and values stay joined
    assert all(len(node.inputs) == 7 for node in model.graph if node.op_type == "GroupQueryAttention")
    assert "AlibiBias" not in {function.name for function in model.functions.values()}
    have, want = (np.stack(runs(bundle, name)) for name in (CUDA, MODEL))
    assert np.ptp(want) > 1
    np.testing.assert_allclose(have, want, atol=tolerance_for("fp16", bundle.depth).error * want.std() / 4)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_checkpoints(family: str, tmp_path: Path) -> None:
    """BLOOM's queries, keys and values come apart in other ways than by one Split."""
    tiny_models.build(family).save_pretrained(tmp_path / "checkpoint")
    bundle = pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b", dtype="fp16")
    assert bundle.manifest["proof"]["verified"]
    assert bundle.positions_of(CUDA) == 11
    assert counts(ir.load(bundle.folder / CUDA))["AlibiBias"] == 0
    ids, made = np.random.default_rng(0).integers(3, 90, 60), []
    for graph in (CUDA, MODEL):
        cache = make_cache(Session(bundle, graph=graph, threads=1), 2, 70)
        made.append(np.stack([*cache.prefill([ids.tolist(), ids[:9].tolist()]), *cache.decode([5, 6])]))
    np.testing.assert_allclose(made[0], made[1], atol=tolerance_for("fp16", bundle.depth).error * made[1].std() / 2)


def changed(bundles: Bundles, change: Any) -> AlibiChannels:
    """The pass on a graph that was changed before, which must stay as it is then."""
    model, made = ir.load(half(bundles).folder / MODEL), AlibiChannels()
    change(model.graph)
    before = counts(model)
    assert not made(model).modified
    assert counts(model) == before
    return made


def attentions(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "CachedAttention"]


def with_softcap(graph: ir.Graph) -> None:
    attentions(graph)[1].attributes["softcap"] = ir.AttrFloat32("softcap", 20.0)


def with_sinks(graph: ir.Graph) -> None:
    node = attentions(graph)[0]
    graph.append(ir.node("Identity", [graph.inputs[0]]))
    node.resize_inputs(9)
    node.replace_input_with(8, graph.initializers["decoder.norm.weight"])


def without_a_bias(graph: ir.Graph) -> None:
    attentions(graph)[1].replace_input_with(7, None)


def with_a_layer_that_rotates(graph: ir.Graph) -> None:
    node = attentions(graph)[1]
    other = ir.node("GroupQueryAttention", node.inputs[:7], domain="com.microsoft", num_outputs=3)
    graph.insert_before(node, other)
    for made, old in zip(other.outputs, node.outputs, strict=True):
        take_place(made, old)
    graph.remove(node, safe=True)


def with_other_keys(graph: ir.Graph) -> None:
    bias = next(node for node in graph if node.op_type == "AlibiBias")
    bias.replace_input_with(2, bias.inputs[1])


def with_great_slopes(graph: ir.Graph) -> None:
    slopes = next(node for node in graph if node.op_type == "AlibiBias").inputs[0]
    assert slopes is not None
    slopes.const_value = ir.tensor(np.full(4, 1e6, np.float32), name=slopes.name)


@pytest.mark.parametrize(
    "change",
    [with_softcap, with_sinks, without_a_bias, with_a_layer_that_rotates, with_other_keys, with_great_slopes],
    ids=lambda change: change.__name__,
)
def test_what_is_not_alibi_alone_keeps_its_bias(bundles: Bundles, change: Any) -> None:
    assert changed(bundles, change).bits is None


def test_other_graphs_stay(bundles: Bundles) -> None:
    for encoding in ("none", "t5_bias", "alibi_falcon", "kerple_log"):
        assert not AlibiChannels()(ir.load(half(bundles, encoding).folder / MODEL)).modified
    assert not AlibiChannels()(ir.load(bundles("alibi", "ort") / MODEL)).modified  # float32
    wide = half(bundles, head_dim=256)  # no more fit
    assert not (wide.folder / CUDA).exists()
    assert wide.caches_of(CUDA) == wide.caches


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_wrong_channel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The proof runs ``cuda.onnx`` too: here the slopes of its heads are in the wrong order."""
    right = alibi_channels.of_queries

    def wrong(slopes: Array, scale: float, dtype: str) -> Array | None:
        return right(slopes[::-1], scale, dtype)

    monkeypatch.setattr(alibi_channels, "of_queries", wrong)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        pe_onnx.export(encoding="alibi", preset="tiny", output=tmp_path / "b", dtype=dtype)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- cache and bundle


def test_the_cache_has_the_channels_and_no_score_is_held(bundles: Bundles) -> None:
    bundle = half(bundles)
    session = Session(bundle, graph=CUDA, threads=1)
    assert session.caches == [(2, 16 + CHANNELS)] * 2
    assert session.cache_bytes_per_token == bundle.cache_bytes_on("cuda") == 2 * 2 * 2 * 2 * 24
    assert bundle.cache_bytes_on("cpu") == bundle.cache_bytes_per_token == 2 * 2 * 2 * 2 * 16
    assert (session.score_heads, Session(bundle, threads=1).score_heads) == (0, 4)
    cache = make_cache(session, 2, 50)
    cache.prefill([[1, 2, 3], [4]])
    assert cache.nbytes == 2 * 50 * session.cache_bytes_per_token
    bits = bundle.positions_of(CUDA)
    assert bits == 11
    np.testing.assert_array_equal(cache.buffers[0].block(0, 0, 3)[1, :, 16:], of_keys(np.arange(3), bits))
    assert not cache.buffers[1].block(0, 0, 3)[:, :, 16:].any()


def test_more_positions_than_channels_hold_are_refused(bundles: Bundles) -> None:
    bundle = half(bundles)
    with pytest.raises(ConfigError, match=f"more than the {MOST_POSITIONS} positions"):
        make_cache(Session(bundle, graph=CUDA, threads=1), 1, MOST_POSITIONS + 1)
    assert make_cache(Session(bundle, threads=1), 1, MOST_POSITIONS + 1).max_length == MOST_POSITIONS + 1
    full = make_cache(Session(bundle, graph=CUDA, threads=1), 1, MOST_POSITIONS)
    full.lengths[:] = MOST_POSITIONS  # as if so many had been run
    with pytest.raises(InputError, match=f"more than the {MOST_POSITIONS} positions"):
        full.decode([1])


def test_a_saved_cache_is_read_by_the_other_graph(bundles: Bundles, tmp_path: Path) -> None:
    """A file holds no channels of positions: it is the bundle's, whichever graph made it."""
    bundle, rng = half(bundles), np.random.default_rng(0)
    rows = [rng.integers(0, 256, n).tolist() for n in (31, 2100)]
    sessions = {graph: Session(bundle, graph=graph, threads=1) for graph in (MODEL, CUDA)}
    for graph, session in sessions.items():
        cache = make_cache(session, 2, 2200)
        cache.prefill(rows)
        cache.save(tmp_path / graph)
        want = cache.decode([3, 4]).copy()
        for other in sessions.values():
            loaded = make_cache(other, 2, 2200)
            with saved_cache.opened(tmp_path / graph, bundle) as saved:
                loaded.restore(saved)
            have = loaded.decode([3, 4])
            if other is session:
                np.testing.assert_array_equal(have, want)
            np.testing.assert_allclose(have, want, atol=tolerance_for("fp16", bundle.depth).error * want.std() / 4)
    assert (tmp_path / MODEL).stat().st_size == (tmp_path / CUDA).stat().st_size


def test_quantized_bundles(bundles: Bundles, tmp_path: Path) -> None:
    source = half(bundles)
    weights = quantize(source, tmp_path / "w")
    assert weights.positions_of(CUDA) == 11
    made = counts(ir.load(weights.folder / CUDA))
    assert made["MatMulNBits"] > 0
    assert made["AlibiBias"] == 0
    ids, logits = list(range(90)), []
    for graph in (CUDA, MODEL):
        logits.append(make_cache(Session(weights, graph=graph, threads=1), 1, 90).prefill([ids])[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=0.02 * logits[1].std())
    cache = quantize(source, tmp_path / "c", bits=None, cache="int8")
    assert not (cache.folder / CUDA).exists()
    assert cache.positions_of(CUDA) is None
