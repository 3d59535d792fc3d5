"""Angle errors of rotations in ulps: small where the tables are right, and what a table in float16 looks like.

The graphs are small and by hand; that every encoding of ours is right stands in ``test_parity_encodings.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_bundle
import tiny_models
from conftest import Bundles
from onnx import TensorProto, helper, numpy_helper
from variants import VARIANTS

import pe_onnx
from pe_onnx.angles import LONG, AngleError, default_positions, rotary_angles, summary
from pe_onnx.bundle import read_bundle, write_bundle
from pe_onnx.errors import InputError

R = 16
FREQUENCIES = 10000.0 ** -(np.arange(0, R, 2) / R)
POSITIONS = [1, 127, 2047, 131071]
RIGHT = 1.2
"""Ulps: half for the angle and half for its cosine and sine."""
HALF = 400
"""Ulps of what has been in float16, at the least, where the angle is small."""

Nodes = list[onnx.NodeProto]


def cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)


def through(source: str, target: str, narrow: int, to: int) -> Nodes:
    """A value in a narrow type and back."""
    return [cast(source, f"{target}_narrow", narrow), cast(f"{target}_narrow", target, to)]


def tables(
    dtype: int = TensorProto.DOUBLE,
    narrow_angle: bool = False,
    narrow_cos: bool = False,
    frequency: Nodes | None = None,
) -> Nodes:
    """Nodes that make ``cos`` and ``sin`` of ``position_ids``, in a type and at two places through float16."""
    nodes = [cast("position_ids", "p", dtype), helper.make_node("Unsqueeze", ["p", "last"], ["column"])]
    nodes += frequency or [cast("frequencies", "f", dtype)]
    nodes += [helper.make_node("Mul", ["column", "f"], ["exact"])]
    nodes += through("exact", "angle", TensorProto.FLOAT16 if narrow_angle else dtype, dtype)
    for kind in ("Cos", "Sin"):
        name = kind.lower()
        nodes += [helper.make_node(kind, ["angle"], [f"{name}_wide"])]
        narrow = TensorProto.FLOAT16 if narrow_cos and kind == "Cos" else TensorProto.FLOAT
        nodes += through(f"{name}_wide", name, narrow, TensorProto.FLOAT)
    return nodes


def rotated(x: str = "past_key_values.0.key", y: str = "present.0.key", cos: str = "cos", sin: str = "sin") -> Nodes:
    return [helper.make_node("RotaryEmbedding", [x, cos, sin], [y])]


def spelled_out() -> Nodes:
    """x cos + turned(x) sin in single operators, each frequency twice."""
    return [
        *(helper.make_node("Concat", [name, name], [f"{name}_twice"], axis=-1) for name in ("cos", "sin")),
        helper.make_node("Mul", ["past_key_values.0.key", "cos_twice"], ["straight"]),
        helper.make_node("Neg", ["past_key_values.0.key"], ["turned"]),
        helper.make_node("Mul", ["turned", "sin_twice"], ["across"]),
        helper.make_node("Add", ["straight", "across"], ["present.0.key"]),
    ]


def bundle(folder: Path, nodes: Nodes, max_length: int | None = None, **initializers: np.ndarray) -> Path:
    """A bundle of two layers whose graph these nodes are."""
    manifest = small_bundle.manifest()
    manifest["model"]["max_length"] = max_length
    given = {"last": np.array([-1]), "frequencies": FREQUENCIES, **initializers}
    shapes = {"position_ids": ["batch_size", "sequence_length"]}
    shapes |= {f"past_key_values.{i}.key": ["batch_size", 4, "past_sequence_length", 16] for i in range(2)}
    types = {name: TensorProto.INT64 if name == "position_ids" else TensorProto.FLOAT for name in shapes}
    made = {name for node in nodes for name in node.output if name.startswith("present")}
    graph = helper.make_graph(
        nodes,
        "rotation",
        [helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted(made)],
        [numpy_helper.from_array(value, name) for name, value in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with write_bundle(folder, manifest) as partial:
        onnx.save(model, partial / "model.onnx")
    return folder


def worst(folder: Path, positions: Sequence[int] = POSITIONS) -> float:
    return max(error.max_ulps for error in rotary_angles(folder, positions))


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.FLOAT])
@pytest.mark.parametrize("rotation", [rotated, spelled_out])
def test_right_tables_are_right_to_an_ulp(rotation: Callable[[], Nodes], dtype: int, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", tables(dtype) + rotation())
    errors = rotary_angles(folder, POSITIONS)
    assert [error.position for error in errors] == POSITIONS
    assert 0 < max(error.max_ulps for error in errors) < RIGHT
    assert all(error.layers == [0] for error in errors)
    float32 = dtype == TensorProto.FLOAT
    assert (errors[-1].max_abs_radians > 1e-4) == float32  # where the angle has few digits after the point
    assert (errors[-1].max_abs_radians < 1e-7) != float32


@pytest.mark.parametrize("fault", ["narrow_cos", "narrow_angle"])
@pytest.mark.parametrize("rotation", [rotated, spelled_out])
def test_what_has_been_in_float16_is_seen(rotation: Callable[[], Nodes], fault: str, tmp_path: Path) -> None:
    nodes = tables(narrow_cos=fault == "narrow_cos", narrow_angle=fault == "narrow_angle") + rotation()
    assert worst(bundle(tmp_path / "b", nodes)) > HALF


def test_an_angle_in_float16_is_lost_altogether_at_long_positions(tmp_path: Path) -> None:
    (error,) = rotary_angles(bundle(tmp_path / "b", tables(narrow_angle=True) + rotated()), [32767])
    assert error.max_abs_radians > 0.5


def test_a_last_digit_of_the_frequencies_at_one_position_is_seen(tmp_path: Path) -> None:
    """The next float32 of each frequency from position 131,071 on: 0.5 of an ulp or more where there is 0.05."""
    single = FREQUENCIES.astype(np.float32)
    other = np.nextafter(single, np.float32(2)).astype(np.float64)
    nodes = [
        helper.make_node("Equal", ["column", "far"], ["is_far"]),
        helper.make_node("Where", ["is_far", "others", "frequencies"], ["f"]),
    ]
    given = {"frequencies": single.astype(np.float64), "others": other, "far": np.array(131071.0)}
    changed = bundle(tmp_path / "changed", tables(frequency=nodes) + rotated(), **given)
    clean = bundle(tmp_path / "clean", tables() + rotated(), frequencies=single.astype(np.float64))
    assert worst(clean, [131071]) < 0.05
    assert worst(changed, [131071]) > 0.5
    assert worst(changed, [131070]) < 0.05


def test_a_factor_on_both_cancels_and_so_does_the_sense_of_the_turn(tmp_path: Path) -> None:
    scaled = [helper.make_node("Mul", [name, "factor"], [f"{name}_scaled"]) for name in ("cos", "sin")]
    backwards = [helper.make_node("Neg", ["sin_scaled"], ["sin_back"])]
    nodes = tables() + scaled + backwards + rotated(cos="cos_scaled", sin="sin_back")
    assert worst(bundle(tmp_path / "b", nodes, factor=np.array(1.37, np.float32))) < RIGHT + 0.5


@pytest.mark.parametrize("wrong", [None, 700])
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "by the operator"])
def test_a_table_without_cosines_in_the_graph(gathered: bool, wrong: int | None, tmp_path: Path) -> None:
    """Its frequencies are read off its first positions; one wrong row is seen."""
    angle = np.arange(1024)[:, None] * FREQUENCIES
    if wrong is not None:
        angle[wrong] *= 1 + 1e-5
    given = {"cos_table": np.cos(angle).astype(np.float32), "sin_table": np.sin(angle).astype(np.float32)}
    nodes = [helper.make_node("Gather", [f"{name}_table", "position_ids"], [name]) for name in ("cos", "sin")]
    if not gathered:
        inputs = ["past_key_values.0.key", "cos_table", "sin_table", "position_ids"]
        nodes = [helper.make_node("RotaryEmbedding", inputs, ["present.0.key"])]
    folder = bundle(tmp_path / "b", nodes if not gathered else nodes + rotated(), max_length=1024, **given)
    right = [p for p in (1, 127, 700, 1023) if p != wrong]
    assert worst(folder, right) < RIGHT + 1.5  # the frequencies are known to a digit or so
    assert wrong is None or worst(folder, [wrong]) > 50
    with pytest.raises(InputError, match=r"position 1024 must be in 0\.\.1023"):
        rotary_angles(folder, [1024])


def test_tables_of_different_layers_are_told_apart(tmp_path: Path) -> None:
    """The second through float16."""
    nodes = tables() + rotated()
    nodes += [*through("cos_wide", "rough", TensorProto.FLOAT16, TensorProto.FLOAT)]
    nodes += rotated("past_key_values.1.key", "present.1.key", cos="rough")
    first, second = rotary_angles(bundle(tmp_path / "b", nodes), [127])
    assert (first.table, first.layers, second.table, second.layers) == ("cos", [0], "rough", [1])
    assert first.max_ulps < RIGHT < HALF < second.max_ulps


@pytest.mark.parametrize("encoding", ["alibi", "sinusoidal"])
def test_what_does_not_rotate_has_no_angles(bundles: Bundles, encoding: str) -> None:
    """A sinusoidal embedding has cosines too: they are added."""
    assert rotary_angles(bundles(encoding)) == []
    assert summary([]) == ""


@pytest.mark.parametrize("encoding", ["rope_longrope", "rope_dynamic"])
def test_frequencies_that_switch_are_those_of_the_run(bundles: Bundles, encoding: str) -> None:
    """Of a run that reaches as far as the position. The same channel turns at another rate there."""
    folder = bundles(encoding, config={"max_position_embeddings": 64})
    short, long = rotary_angles(folder, [10, 100])
    assert (short.reach, long.reach) == (11, 101)
    assert max(short.max_ulps, long.max_ulps) < RIGHT


@pytest.mark.parametrize("name", [pytest.param("llama_yarn_factor", marks=pytest.mark.slow), "gptj"])
def test_bridged_models(name: str, tmp_path: Path) -> None:
    """Angles in float32 as transformers makes them, and the table that GPT-J is given."""
    model_type, options = VARIANTS[name]
    tiny_models.build(model_type, **options).save_pretrained(tmp_path / "checkpoint")
    pe_onnx.export(model=tmp_path / "checkpoint", output=tmp_path / "b", verify=False)
    errors = rotary_angles(tmp_path / "b")
    assert {i for error in errors for i in error.layers} == {0, 1}
    assert max(error.max_ulps for error in errors) < RIGHT + 1.5


def test_the_default_positions(tmp_path: Path) -> None:
    short = read_bundle(bundle(tmp_path / "short", tables() + rotated(), max_length=2048), verify=False)
    endless = read_bundle(bundle(tmp_path / "endless", tables() + rotated()), verify=False)
    assert default_positions(short) == [1, 127, 2047]
    assert default_positions(endless) == [1, 127, 2047, 3072, *LONG]


def test_the_summary_has_the_worst_table_at_each_position() -> None:
    errors = [AngleError(p, ulps, 1e-8, 0, "cos", [0], None) for p, ulps in ((127, 0.5), (127, 900.0), (1, 0.25))]
    line = summary(errors)
    assert line.startswith("angles: 0.25 ulp at 1, 900 ulp at 127; at most 1.0e-08 radians;")
    assert "1 ulp is the spacing of float32 at the angle" in line
