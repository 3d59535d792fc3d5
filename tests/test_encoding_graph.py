"""The encoding cut out of a decoder, drawn by the page's own code in node, against the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import page_scripts
import pytest
from conftest import Bundles

from pe_onnx.bundle import read_bundle
from pe_onnx.encoding_graph import write_encoding_graph

pytestmark = pytest.mark.skipif(page_scripts.NODE is None, reason="node is not installed")

Array = np.ndarray[Any, Any]
POSITION = 41
FEEDS = """
import { Encoding } from "./encoding.js";
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const encoding = new Encoding({ Tensor }, given.picture, given.caches);
"""
ASKS = """
const feeds = encoding.feeds(encoding.positions(given.position), given.position);
answer(Object.entries(feeds).map(([name, t]) => [name, t.type, Array.from(t.data, Number), t.dims]));
"""
DRAWS = """
const outputs = Object.fromEntries(given.outputs.map(([name, data, dims]) => [name, { data, dims }]));
encoding.session = { run: async () => outputs };
const { distances, groups } = await encoding.at(given.position);
const plain = ({ label, lines }) => ({ label, lines: lines.map((line) => Array.from(line.values)) });
answer({ distances, groups: groups.map(plain) });
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_scripts.modules(tmp_path_factory.mktemp("node") / "page")


def drawn(folder: Path, page: Path, place: Path, position: int = POSITION) -> dict[str, Any]:
    """What the page would draw of a bundle, with onnxruntime in place of onnxruntime-web."""
    bundle = read_bundle(folder)
    picture = write_encoding_graph(bundle, place / "encoding.onnx")
    given = {"picture": picture, "caches": bundle.caches, "position": position}
    feeds = {
        name: np.array(data, {"int64": np.int64, "float32": np.float32}[dtype]).reshape(dims)
        for name, dtype, data, dims in page_scripts.run(page, FEEDS + ASKS, given)
    }
    session = onnxruntime.InferenceSession(place / "encoding.onnx")
    named = [output.name for output in session.get_outputs()]
    values = zip(named, session.run(None, feeds), strict=True)
    outputs = [(name, value.ravel().astype(float).tolist(), value.shape) for name, value in values]
    return page_scripts.run(page, FEEDS + DRAWS, {**given, "outputs": outputs}) | {"picture": picture}


def weights(folder: Path) -> Callable[[str], Array]:
    """The initializer whose name ends so, in float64."""
    model = onnx.load(folder / "model.onnx")

    def get(end: str) -> Array:
        (tensor,) = (t for t in model.graph.initializer if t.name.endswith(end))
        return onnx.numpy_helper.to_array(tensor, str(folder)).astype(np.float64)

    return get


def cosines(distance: Array, frequency: Array) -> Array:
    return np.cos(distance[:, None] * frequency).mean(1)


def frequencies(theta: float = 10000.0, rotary: int = 16) -> Array:
    return theta ** -(np.arange(0, rotary, 2) / rotary)


def rotated(distance: Array) -> list[Array]:
    return [cosines(distance, frequencies())]


def partly_rotated(distance: Array) -> list[Array]:
    return [(cosines(distance, frequencies(rotary=4)) + 3) / 4]


def faded(distance: Array) -> list[Array]:
    zeta = (np.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
    return [(np.cos(distance[:, None] * frequencies()) * zeta ** (distance[:, None] / 512)).mean(1)]


def sharpened(distance: Array) -> list[Array]:
    return [1.5**2 * cosines(distance, frequencies())]


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize(
    ("encoding", "parameters", "formula"),
    [
        ("rope", {}, rotated),
        ("rope_interleaved", {}, rotated),
        ("rope_partial", {"partial_rotary_factor": 0.25}, partly_rotated),
        ("xpos", {}, faded),
        ("rope_longrope", {"long_factor": (1.0,) * 8, "attention_factor": 1.5}, sharpened),
    ],
)
def test_rotations(
    encoding: str,
    parameters: dict[str, Any],
    formula: Callable[[Array], list[Array]],
    target: str,
    bundles: Bundles,
    page: Path,
    tmp_path: Path,
) -> None:
    folder = bundles(encoding, target, preset="tiny", encoding_parameters=parameters)
    got = drawn(folder, page, tmp_path)
    distance = np.arange(POSITION + 1)
    assert got["distances"] == distance.tolist()
    assert [group["label"] for group in got["groups"]] == ["layers 0, 1"]
    np.testing.assert_allclose(got["groups"][0]["lines"], formula(distance), atol=2e-6)


def test_layers_with_other_rotations(bundles: Bundles, page: Path, tmp_path: Path) -> None:
    got = drawn(bundles("rope_two_bases", "ort", preset="tiny"), page, tmp_path)
    distance = np.arange(POSITION + 1)
    for group, label, theta in zip(got["groups"], ["layer 0", "layer 1"], [1e4, 1e6], strict=True):
        assert group["label"] == label
        np.testing.assert_allclose(group["lines"][0], cosines(distance, frequencies(theta)), atol=2e-6)


def test_long_texts_are_sampled(bundles: Bundles, page: Path, tmp_path: Path) -> None:
    got = drawn(bundles("rope", "ort", preset="tiny"), page, tmp_path, position=5000)
    distance = np.array(got["distances"])
    assert (distance[0], distance[-1], len(distance)) == (0, 5000, 384)
    np.testing.assert_allclose(got["groups"][0]["lines"], rotated(distance), atol=2e-6)


def penalty(distance: Array, weight: Callable[[str], Array]) -> Array:
    return -(2.0 ** -(8 * np.arange(1, 5) / 4))[:, None] * distance


def buckets(distance: Array, weight: Callable[[str], Array]) -> Array:
    far = 16 + np.floor(np.log(np.maximum(distance, 1) / 16) / np.log(128 / 16) * 16).astype(int)
    return weight("encoding.weight")[np.where(distance < 16, distance, np.minimum(far, 31))].T


def logarithmic(distance: Array, weight: Callable[[str], Array]) -> Array:
    return weight("decoder/neg") * np.log1p(weight("decoder/unsqueeze_1") * distance)  # -r1 and r2


@pytest.mark.parametrize("target", ["ort", "portable"])
@pytest.mark.parametrize(
    ("encoding", "formula"), [("alibi", penalty), ("t5_bias", buckets), ("kerple_log", logarithmic)]
)
def test_biases(
    encoding: str,
    formula: Callable[[Array, Callable[[str], Array]], Array],
    target: str,
    bundles: Bundles,
    page: Path,
    tmp_path: Path,
) -> None:
    folder = bundles(encoding, target, preset="tiny")
    got = drawn(folder, page, tmp_path)
    if target == "ort":
        assert [group["label"] for group in got["groups"]] == ["layers 0, 1"]
    for group in got["groups"]:
        wanted = formula(np.arange(POSITION + 1), weights(folder))
        np.testing.assert_allclose(group["lines"], wanted, rtol=1e-5, atol=1e-5)


def test_positions_that_are_added(bundles: Bundles, page: Path, tmp_path: Path) -> None:
    folder = bundles("learned", "ort", preset="tiny")
    table = weights(folder)("table.weight")[: POSITION + 1][::-1]
    lengths = np.linalg.norm(table, axis=1)
    (line,) = drawn(folder, page, tmp_path)["groups"][0]["lines"]
    np.testing.assert_allclose(line, table @ table[0] / lengths / lengths[0], atol=2e-6)


def test_sines_that_are_added(bundles: Bundles, page: Path, tmp_path: Path) -> None:
    (line,) = drawn(bundles("sinusoidal", "portable", preset="tiny"), page, tmp_path)["groups"][0]["lines"]
    wanted = cosines(np.arange(POSITION + 1), frequencies(rotary=64))
    np.testing.assert_allclose(line, wanted, atol=2e-6)


def test_no_encoding(bundles: Bundles, tmp_path: Path) -> None:
    picture = write_encoding_graph(read_bundle(bundles("none", "ort", preset="tiny")), tmp_path / "encoding.onnx")
    assert picture == {"kind": "none"}
    assert not (tmp_path / "encoding.onnx").exists()


def test_a_table_that_is_too_large(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_onnx.encoding_graph.MOST_BYTES", 1000)
    picture = write_encoding_graph(read_bundle(bundles("learned", "ort", preset="tiny")), tmp_path / "encoding.onnx")
    assert picture["kind"] == "unknown"
    assert "MiB" in picture["reason"]
    assert not (tmp_path / "encoding.onnx").exists()
