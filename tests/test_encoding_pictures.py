"""The numbers behind an encoding's picture, against formulas written anew here, and the pictures themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from drawn_encodings import ENCODINGS, encoding
from matplotlib.figure import Figure
from test_plots import contrast

from pe_onnx import encoding_pictures as pictures
from pe_onnx.encoding import PerLayer, PositionalEncoding
from pe_onnx.encodings.rope import Rope
from pe_onnx.plots import rendered

REACH = 131


def filled(made: PositionalEncoding, note: str = "") -> Figure:
    figure = Figure()
    pictures.draw(made, figure, note)
    return figure


def test_alibi_falls_by_its_slopes() -> None:
    def right(made: PositionalEncoding) -> bool:
        slopes = np.array([1 / 2 ** (h + 1) for h in range(8)])  # the paper's, for 8 heads
        return np.allclose(pictures.biases(made, REACH, REACH - 1), -slopes[:, None] * np.arange(REACH), rtol=1e-6)

    made: Any = encoding("alibi", {"num_attention_heads": 8})
    assert right(made)
    made.slopes = made.slopes * 1.01
    assert not right(made)


def spread(found: pictures.ByDistance) -> float:
    return float(np.max(found.high - found.low))


@pytest.mark.parametrize("name", ["rope", "rope_interleaved", "rope_yarn", "rope_partial", "xpos"])
def test_rotated_scores_depend_on_the_distance_alone(name: str) -> None:
    made: Any = encoding(name)
    assert spread(pictures.rotated_scores(made, REACH)) < 1e-5
    made.rotate = lambda query, key, tables: (
        query,
        Rope.turn(made, key, tables[:2]),
    )  # queries that are left as they are
    assert spread(pictures.rotated_scores(made, REACH)) > 0.1


def test_the_score_of_ones_is_the_mean_cosine() -> None:
    frequencies = [10000.0 ** (-2 * i / 16) for i in range(8)]
    exact = [sum(math.cos(d * f) for f in frequencies) / 8 for d in range(REACH)]
    np.testing.assert_allclose(pictures.rotated_scores(encoding("rope"), REACH).mean, exact, atol=1e-5)


def test_wavelengths() -> None:
    exact = np.array([2 * math.pi * 10000.0 ** (2 * i / 16) for i in range(8)])
    np.testing.assert_allclose(pictures.wavelengths(encoding("rope"), 2), exact, rtol=1e-5)
    np.testing.assert_allclose(pictures.wavelengths(encoding("rope_linear", factor=3), 2), 3 * exact, rtol=1e-5)
    np.testing.assert_allclose(pictures.wavelengths(encoding("xpos"), 2), exact, rtol=1e-5)
    proportional = pictures.wavelengths(encoding("rope_proportional", partial_rotary_factor=0.5), 2)
    np.testing.assert_allclose(proportional, np.where(np.arange(8) < 4, exact, np.inf), rtol=1e-5)
    dynamic = encoding("rope_dynamic")
    np.testing.assert_allclose(pictures.wavelengths(dynamic, 2048), exact, rtol=1e-5)
    assert pictures.wavelengths(dynamic, 4096)[-1] > 2 * exact[-1]


def test_angles_are_position_times_frequency() -> None:
    turned = pictures.angles(encoding("rope"), REACH)
    exact = np.arange(REACH)[:, None] * 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(np.exp(1j * turned), np.exp(1j * exact), atol=1e-5)


def test_the_product_of_sinusoids_depends_on_the_distance_alone() -> None:
    table = pictures.vectors(encoding("sinusoidal"), REACH)
    found = pictures.products(table, table)
    exact = [sum(math.cos(d * 10000.0 ** (-2 * i / 64)) for i in range(32)) for d in range(REACH)]
    np.testing.assert_allclose(found.mean, exact, atol=1e-4)
    assert spread(found) < 1e-4
    learned = pictures.vectors(encoding("learned"), REACH)
    assert spread(pictures.products(learned, learned)) > 1


def test_products_are_those_of_pairs() -> None:
    left, right = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [10.0], [100.0]])
    found = pictures.products(left, right)  # 1, 20, 400; 2, 40; 4
    assert [list(x) for x in found] == [[421 / 3, 21.0, 4.0], [1.0, 2.0, 4.0], [400.0, 40.0, 4.0]]


def test_t5_bias_looks_its_table_up() -> None:
    made: Any = encoding("t5_bias")
    found = pictures.biases(made, 256, 255)
    weight = made.weight.detach().numpy().T
    np.testing.assert_allclose(found[:, :16], weight[:, :16], rtol=1e-6)  # a bucket each
    np.testing.assert_allclose(found[:, 128:], np.repeat(weight[:, 31:], 128, 1), rtol=1e-6)


def test_shares_sum_to_one() -> None:
    found = pictures.shares(pictures.biases(encoding("kerple_log"), REACH, REACH - 1))
    np.testing.assert_allclose(found.sum(-1), 1)
    assert (np.diff(found) < 0).all()


def test_the_mask_alone_shares_evenly() -> None:
    expected = [[1 / (i + 1) if j <= i else 0.0 for j in range(7)] for i in range(7)]
    np.testing.assert_allclose(pictures.masked_shares(7), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_drawn(name: str) -> None:
    figure = filled(encoding(name))
    shown = [axes for axes in figure.findobj(matplotlib.axes.Axes) if axes.axison and axes.get_title("left")]
    assert len(shown) >= 2
    for axes in shown:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert any(np.isfinite(line.get_ydata().astype(float)).any() for line in axes.lines) or axes.images


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_picture_is_the_same_bytes(ending: str) -> None:
    def content(made: PositionalEncoding) -> bytes:
        return rendered(f"figure.{ending}", lambda figure: pictures.draw(made, figure))

    made: Any = encoding("t5_bias")
    before = content(made)
    assert content(encoding("t5_bias")) == before
    made.weight.data += torch.arange(4.0)  # trained on
    assert content(made) != before


def test_what_the_caller_set_of_matplotlib_stays() -> None:
    before = dict(matplotlib.rcParams)
    filled(encoding("rope"))
    assert dict(matplotlib.rcParams) == before


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_a_mix_has_a_row_for_each_encoding() -> None:
    figure = filled(encoding("rope_two_bases", {"num_hidden_layers": 5}), "a note")
    assert "layers 0, 2, 4: rope" in texts(figure)
    assert "layers 1, 3: rope_linear" in texts(figure)
    assert "a note" in texts(figure)
    many = encoding("t5_bias_per_layer", {"num_hidden_layers": 7})
    assert "3 more encodings of layers are not shown" in texts(filled(many))
    assert "layer 4" not in texts(filled(many))


def test_a_bias_that_sees_the_position_is_drawn_for_two_queries() -> None:
    assert "query at 1,023, not 255" in texts(filled(encoding("fire_shared")))
    assert "query at" not in texts(filled(encoding("alibi")))


def test_shades_can_be_read_on_light_and_dark_pages() -> None:
    assert len(set(pictures.shades(32))) == 32
    assert all(contrast(color, page) >= 3.0 for color in pictures.shades(32) for page in ("#ffffff", "#0d1117"))


def test_a_short_table_is_drawn_to_its_end() -> None:
    figure = filled(encoding("learned", {"max_position_embeddings": 9}))
    assert len(figure.axes[1].lines[0].get_ydata()) == 9


def test_a_rotation_by_other_tables_shows_scores_alone() -> None:
    class Other(Rope):
        def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cos, sin = super().tables(positions)
            return (torch.stack((cos, sin)),)

        def rotate(self, query: torch.Tensor, key: torch.Tensor, tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return super().rotate(query, key, tuple(tables[0]))

    made = Other(encoding("rope").config)
    assert [axes.get_title("left") for axes in filled(made).axes] == ["score of two vectors of ones"]


def test_a_mix_of_hooks() -> None:
    config = encoding("rope").config
    mix = PerLayer(config, [encoding("rope"), encoding("alibi")])
    assert "layer 1: alibi" in texts(filled(mix))


def test_a_picture_without_matplotlib_is_refused(tmp_path: Path) -> None:
    from test_missing_packages import MAIN, without

    result = without({"matplotlib"}, MAIN, "explain", "rope", "--plot", tmp_path / "rope.svg")
    assert result.returncode == 2
    assert "pip install 'pe-onnx[plot]'" in result.stderr
