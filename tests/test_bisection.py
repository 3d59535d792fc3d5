"""The drill-down: planted faults are found with their layer and operator, and right bundles show no difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import planted
import pytest
import tiny_models
import torch

import pe_onnx
from pe_onnx import twin
from pe_onnx.bisection import CAST, INNER_FACTOR, bisect
from pe_onnx.errors import BundleError, CheckpointError, ConfigError
from pe_onnx.parity import check_parity, compared_pairs, prepare
from pe_onnx.passes.fused_projections import JOIN
from pe_onnx.tolerance import tolerance_for

pytestmark = pytest.mark.usefixtures("one_thread", "one_trace")
Bundles = Callable[..., Path]
LAYER = "decoder.blocks.1.attention"


@pytest.fixture(scope="module")
def one_trace() -> Any:
    """A source is traced once for all its faulty bundles."""
    before, held = twin.of_graph, {}

    def of_graph(bundle: Any, file: str, reference: Any = None) -> Any:
        key = repr((bundle.manifest["source"], bundle.target, bundle.logits, file, reference))
        if key not in held:
            held[key] = before(bundle, file, reference)
        return held[key]

    twin.of_graph = of_graph
    yield
    twin.of_graph = before


# what is planted: a fault, into which bundle, and the layer, operator and words that must be found
FAULTS: dict[str, tuple[planted.Fault, str, dict[str, Any], str, str, str]] = {
    "theta": (planted.theta(LAYER), "rope", {}, LAYER, "RotaryEmbedding", "Cos"),
    "rotated": (planted.rotated(LAYER), "rope_nope", {}, LAYER, "RotaryEmbedding", "stands before input 0"),
    "table": (
        planted.transposed_table("decoder.encoding.weight"),
        "t5_bias",
        {},
        "decoder",
        "T5RelativeBias",
        "the same numbers in another order",
    ),
    "mask": (planted.shifted_mask, "alibi", {}, "decoder.blocks.0.attention", "Add", "LessOrEqual"),
    "slot": (planted.slot(LAYER, -1), "rope", {}, LAYER, "Add", "input 5 of CachedAttention"),
    "half": (planted.half_table, "rope", {}, "decoder.blocks.0.attention", "Cast", "Cast to float16"),
}
TARGET = {"mask": "portable", "slot": "ort"}
"""Where a target has no such thing: compact rows have no mask, masked ones no slots."""


def cases() -> list[Any]:
    found = []
    for name in FAULTS:
        for target in ("ort", "portable"):
            if TARGET.get(name, target) == target:
                first = "ort" if name in ("theta", "table", "half") else "portable"
                slow = () if target == TARGET.get(name, first) else (pytest.mark.slow,)
                found.append(pytest.param(name, target, id=f"{name}-{target}", marks=slow))
    return found


@pytest.mark.parametrize(("name", "target"), cases())
def test_a_planted_fault_is_found(name: str, target: str, bundles: Bundles, tmp_path: Path) -> None:
    fault, encoding, options, layer, operator, words = FAULTS[name]
    right = bundles(encoding, target, **options)
    wrong = planted.plant(right, tmp_path / "wrong", fault)
    assert not check_parity(wrong, modes=["whole"]).passed
    found = bisect(wrong)
    assert found is not None
    assert (found.layer, found.operator) == (layer, operator)
    assert words in found.text
    assert found.text.startswith(f"{layer}, run ")
    assert found.before.relative < 1e-5
    assert found.difference.relative > 1e-4
    assert found.to_dict()["text"] == found.text


def test_a_right_bundle_has_no_fault(bundles: Bundles) -> None:
    assert bisect(bundles("rope"), tokens=20, modes=["steps"]) is None


def test_a_fault_that_comes_with_the_17th_step(bundles: Bundles, tmp_path: Path) -> None:
    wrong = planted.plant(bundles("rope"), tmp_path / "wrong", planted.later_slot(LAYER))
    found = bisect(wrong, modes=["steps"])
    assert found is not None
    assert (found.layer, found.mode, found.step, found.step_tokens, found.step_position) == (LAYER, "steps", 17, 1, 17)
    assert "step 17 of mode steps (1 token from position 17)" in found.text


def test_what_onnxruntime_refuses_to_run(bundles: Bundles, tmp_path: Path, capfd: Any) -> None:
    wrong = planted.plant(bundles("rope"), tmp_path / "wrong", planted.slot(LAYER, 1))
    found = bisect(wrong)
    assert found is not None
    assert (found.layer, found.reader, found.operator) == (LAYER, "CachedAttention", "Add")
    assert "refused by onnxruntime" in found.text
    assert "seqlens_k" in found.text
    assert capfd.readouterr().err == ""


def test_an_inserted_node_that_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    """It has no counterpart in PyTorch, nor has its output."""

    def fault(model: Any) -> None:
        (node,) = [n for n in planted.attention(model) if n.name.startswith(LAYER)]
        shape = planted.constant(model, "shape", planted.np.array([7, 11, 13]))
        node.replace_input_with(2, planted.before(node, "Reshape", node.inputs[2], shape))

    found = bisect(planted.plant(bundles("rope"), tmp_path / "wrong", fault), modes=["whole"])
    assert found is not None
    assert (found.operator, found.reader) == ("Reshape", "Reshape")
    assert "refused by onnxruntime" in found.text


def test_what_is_ruled_out(bundles: Bundles) -> None:
    """The reference is another model's: bundle and module agree, and both are told to be off."""

    def other(ids: Any) -> Any:
        return planted.np.random.default_rng(0).standard_normal((*ids.shape, 256)).astype("f")

    for modes in (["whole"], ["ragged"], ["steps"]):
        with pytest.raises(BundleError, match="the module it was traced from is off itself, by"):
            bisect(bundles("rope"), other, tokens=24, modes=modes)


def test_errors_that_add_up(bundles: Bundles) -> None:
    """Below what any single value may be off by, and above what the logits may."""
    found = bisect(bundles("rope"), tolerance=1e-9, tokens=20, modes=["whole"])
    assert found is not None
    assert found.difference.max_abs > 0


def test_a_weight(bundles: Bundles, tmp_path: Path) -> None:
    name = "decoder.blocks.0.mlp.down_proj.weight"
    found = bisect(planted.plant(bundles("rope"), tmp_path / "wrong", planted.scaled_weight(name)), modes=["ragged"])
    assert found is not None
    assert (found.layer, found.operator) == ("decoder.blocks.0.mlp.down_proj", "MatMul")
    assert f"its weight {name} is not PyTorch's" in found.text


def test_a_weight_among_those_of_a_joined_product(bundles: Bundles, tmp_path: Path) -> None:
    name = JOIN.join(f"decoder.blocks.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    found = bisect(planted.plant(bundles("rope"), tmp_path / "wrong", planted.scaled_weight(name)), modes=["ragged"])
    assert found is not None
    assert (found.layer, found.operator) == ("decoder.blocks.0.mlp.gate_proj", "MatMul")
    assert f"its weight {name} is not PyTorch's" in found.text


def test_a_fault_in_a_half_precision_bundle(bundles: Bundles, tmp_path: Path) -> None:
    """Its values are compared with those of float32 weights, within float16's tolerance."""
    right = bundles("rope", dtype="fp16")
    assert bisect(right, tokens=40, modes=["whole", "steps"]) is None
    found = bisect(planted.plant(right, tmp_path / "wrong", planted.theta(LAYER)), modes=["whole"])
    assert found is not None
    assert (found.layer, found.operator) == (LAYER, "RotaryEmbedding")


def test_greedy_tokens_and_padding(bundles: Bundles, tmp_path: Path) -> None:
    wrong = planted.plant(bundles("alibi", "portable"), tmp_path / "wrong", planted.shifted_mask)
    for mode in ("greedy", "left_padding", "interior_padding"):
        found = bisect(wrong, modes=[mode])
        assert found is not None
        assert (found.mode, found.operator) == (mode, "Add")


class Scaled(torch.nn.Module):
    """A module of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(256, 64), torch.nn.Linear(64, 256)

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
        from pe_onnx.models.attention import cached_step

        step = cached_step("ort", attention_mask, input_ids.shape[1], past_key_values)
        x = self.embedding(input_ids)
        x = x + step.attend(0, x, x, x, num_heads=4, kv_heads=4, scale=0.25, window=9)
        return self.head(x), step.presents


def test_a_module_is_handed_in_and_an_attribute_named(tmp_path: Path) -> None:
    module = Scaled()
    pe_onnx.export(module, tmp_path / "right", layers=1, kv_heads=4, head_size=16)
    wrong = planted.plant(tmp_path / "right", tmp_path / "wrong", planted.shifted_window)
    assert bisect(tmp_path / "right", module, tokens=20, modes=["steps"]) is None
    found = bisect(wrong, module, tokens=40, modes=["steps"])
    assert found is not None
    assert (found.operator, found.step) == ("CachedAttention", 8)
    assert "its attribute window = 8 is 9 in PyTorch" in found.text
    assert check_parity(tmp_path / "right", module, tokens=20).passed
    with pytest.raises(CheckpointError, match="hand it in as the reference"):
        bisect(wrong)
    with pytest.raises(CheckpointError, match="hand it in as the reference"):
        bisect(wrong, lambda ids: planted.np.zeros((*ids.shape, 256), "f"), tokens=20, modes=["steps"])


def test_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoints.write(folder, "llama")
    pe_onnx.export(model=folder, output=tmp_path / "right")
    layer = "model.model.layers.1.self_attn"
    found = bisect(planted.plant(tmp_path / "right", tmp_path / "wrong", planted.theta(layer)), tokens=40)
    assert found is not None
    assert (found.layer, found.operator) == (layer, "RotaryEmbedding")


@pytest.mark.slow
def test_another_checkpoint_as_the_reference(bundles: Bundles, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        checkpoints.write(tmp_path / name, "llama", seed=seed)
    pe_onnx.export(model=tmp_path / "one", output=tmp_path / "bundle")
    found = bisect(tmp_path / "bundle", tmp_path / "other", tokens=20)
    assert found is not None
    assert (found.layer, found.operator) == ("model.model.embed_tokens", "Gather")
    assert "is not PyTorch's" in found.text


@pytest.mark.slow
def test_an_encoder_decoder(t5_bundles: Bundles, tmp_path: Path) -> None:
    right = t5_bundles("t5")
    assert bisect(right, tokens=24, modes=["encoder", "whole", "ragged"]) is None
    name = "model.decoder.block.1.layer.1.EncDecAttention.o.weight"
    found = bisect(
        planted.plant(right, tmp_path / "decoder", planted.scaled_weight(name), "decoder_model.onnx"),
        tokens=24,
    )
    assert found is not None
    assert (found.mode, found.layer) == ("whole", "model.decoder.block.1.layer.1.EncDecAttention.o")
    name = "encoder.block.2.layer.0.SelfAttention.o.weight"
    found = bisect(
        planted.plant(right, tmp_path / "encoder", planted.scaled_weight(name), "encoder_model.onnx"),
        tokens=24,
    )
    assert found is not None
    assert (found.mode, found.layer) == ("encoder", "encoder.block.2.layer.0.SelfAttention.o")


@pytest.mark.slow
def test_a_fault_of_an_encoder_that_only_padding_shows(t5_bundles: Bundles, tmp_path: Path) -> None:
    def fault(model: Any) -> None:
        mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
        readers = [(node, index) for node, index in mask.uses()]
        ones = planted.before(next(iter(model.graph)), "Sub", mask, mask)
        ones = planted.before(readers[0][0], "Add", ones, planted.constant(model, "one", planted.np.array(1)))
        for node, index in readers:
            node.replace_input_with(index, ones)

    wrong = planted.plant(t5_bundles("t5"), tmp_path / "wrong", fault, "encoder_model.onnx")
    found = bisect(wrong, tokens=24, modes=["encoder"])
    assert found is not None
    assert found.mode == "encoder"
    assert "Add" in found.text
    with pytest.raises(ConfigError, match="decoder's steps"):
        bisect(wrong, tokens=24, modes=["beams"])


def test_a_bundle_without_scoped_names(bundles: Bundles, tmp_path: Path) -> None:
    def plain(model: Any) -> None:
        planted.theta(LAYER)(model)
        for i, node in enumerate(model.graph):
            for j, value in enumerate(node.outputs):
                if "/" in value.name:
                    value.name = f"value_{i}_{j}"

    with pytest.raises(BundleError, match="export it again"):
        bisect(planted.plant(bundles("rope"), tmp_path / "wrong", plain), modes=["whole"])


def replayed(folder: Path, mode: str, tokens: int = 40, casts: bool = True) -> tuple[float, float]:
    """Of a right bundle: the greatest relative difference of a value inside the graph, and the share of the nodes
    whose values have a counterpart."""
    from pe_onnx.exposed import ExposedGraph
    from pe_onnx.replay import Replay

    compared = prepare(folder, tokens=tokens, modes=[mode])
    noted = compared.open_cache.noted = []
    for _ in compared_pairs(compared, mode):
        pass
    graph = ExposedGraph(compared.bundle)
    made = twin.of_graph(compared.bundle, compared.bundle.model.name)
    names = [name for name in graph.values if name in made.nodes and (casts or not CAST.search(name))]
    worst = 0.0
    for cache, rows in noted:
        replay = Replay(graph, made, cache.feeds or [], len(rows))
        for run in replay.runs(names):
            found = {name: run.difference(name) for name in names}
            assert all(found.values()), [name for name, d in found.items() if d is None]
            worst = max(worst, *(d.relative for d in found.values() if d is not None))
    return worst, len(names) / len(graph.values)


@pytest.mark.parametrize(
    ("encoding", "target", "mode"),
    [
        ("rope", "portable", "left_padding"),
        ("t5_bias", "ort", "ragged"),
        ("alibi", "portable", "right_padding"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("none", "ort", "ragged"),
                ("learned", "portable", "interior_padding"),
                ("sinusoidal", "ort", "steps"),
                ("t5_bias", "portable", "ragged"),
                ("alibi", "ort", "chunks"),
                ("rope_two_bases", "ort", "ragged"),
                ("fire", "portable", "ragged"),
            )
        ),
    ],
)
def test_right_values_agree_inside_the_graph(encoding: str, target: str, mode: str, bundles: Bundles) -> None:
    worst, share = replayed(bundles(encoding, target), mode)
    assert worst <= INNER_FACTOR * tolerance_for("fp32", 2).error / 2
    assert share > 0.8


@pytest.mark.slow
def test_right_values_of_a_half_precision_checkpoint_agree(tmp_path: Path) -> None:
    """Its trace has casts that the float32 one has not."""
    checkpoints.write(tmp_path / "checkpoint", "llama")
    pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "bundle", dtype="fp16")
    worst, share = replayed(tmp_path / "bundle", "ragged", casts=False)
    assert worst <= INNER_FACTOR * tolerance_for("fp16", 2).error
    assert share > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "ort"),
        ("gemma2", "portable"),
        ("gpt2", "ort"),
        ("cohere", "portable"),
        ("falcon", "ort"),
        ("opt", "ort"),
    ],
)
def test_right_values_of_families_agree_inside_the_graph(family: str, target: str, tmp_path: Path) -> None:
    tiny_models.build(family).save_pretrained(tmp_path / "checkpoint")
    pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "bundle", target=target)
    worst, share = replayed(tmp_path / "bundle", "ragged")
    assert worst <= INNER_FACTOR * tolerance_for("fp32", 2).error
    assert share > 0.6


def test_check_names_the_operator_too(bundles: Bundles, tmp_path: Path) -> None:
    """Of a fault that parity shows, and of one that onnxruntime refuses to run."""
    asked: dict[str, Any] = {"tokens": 20, "modes": ["whole"], "matrix": False, "latency": False}
    faults = (planted.theta(LAYER), planted.slot(LAYER, 1))
    wrong = [planted.plant(bundles("rope"), tmp_path / str(i), fault) for i, fault in enumerate(faults)]
    report = pe_onnx.check(wrong, **asked)
    assert not report.passed
    for one, operator in zip(report.checks, ("RotaryEmbedding", "Add"), strict=True):
        (finding,) = one.of("parity")
        assert finding.details.startswith(f"{LAYER}, ")
        assert f": {operator}, " in finding.details
        assert "pe-onnx bisect" in str(finding.next_step)
        assert one.divergence is not None
        assert one.divergence["operator"] == operator
