"""What an encoding does, as a picture that is computed by the encoding's own code.

- ``embed``: the vectors by position and channel, and the dot product of two positions by their distance
- ``rotate``: the angle of each pair by position, its wavelength beside plain RoPE's, and the score of a query and a key
  of ones by their distance
- ``bias``: the term on the scores by distance for each head, and what it makes of scores that are all alike
- none: what the causal mask alone makes of scores that are all alike
- a mix: one row for each encoding that its layers have

``draw`` takes a built encoding, so that trained weights can be drawn as well as random ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pe_onnx.errors import needs
from pe_onnx.plots import BLUE, INK, PURPLE, STYLE, STYLES, VERMILLION

with needs("the picture of an encoding", "'pe-onnx[export]'"):
    import torch

    from pe_onnx.encoding import PositionalEncoding, build_encoding
    from pe_onnx.models.attention import PlainStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

Array = np.ndarray[Any, Any]

SHOWN = 128
"""Positions of a matrix, from 0 on."""
BIAS_REACH, FAR_QUERY = 256, 1023
"""Distances of a bias; the position of a second query, for biases that see more than the distance."""
SCORE_REACH = 2048
"""Distances of rotated scores."""
LEAST_SHARE = 1e-6
"""Of attention, below which nothing is drawn."""
MASKED = 16
"""Tokens under the causal mask alone."""
MOST_ROWS = 4
"""Encodings of a mix; what more there are is counted."""
MOST_STYLES = 4
"""Heads that have a style each; more are shades."""
WIDTH, HEIGHT, TITLE = 4.1, 3.2, 0.3
"""Inches of a panel, and of a line above or below."""


class ByDistance(NamedTuple):
    """A number for each distance 0 .. N - 1, over several places of the pair: equal where distance alone counts."""

    mean: Array
    low: Array
    high: Array


def draw(encoding: PositionalEncoding, figure: Figure, note: str = "") -> None:
    """Fill an empty figure, whose size and layout are set. note: a line below, such as where the weights are from.

    Raises MissingDependencyError where matplotlib is missing.
    """
    with needs("the picture of an encoding", "'pe-onnx[plot]'"):
        import matplotlib

    rows = _rows(encoding)
    shown = rows[:MOST_ROWS]
    columns = max(len(_panels(one)) for one, _ in shown)
    if len(rows) > MOST_ROWS:
        note = f"{len(rows) - MOST_ROWS} more encodings of layers are not shown{'; ' if note else ''}{note}"
    with matplotlib.rc_context(STYLE), torch.no_grad():
        extra = TITLE * sum(bool(layers) for _, layers in shown) + TITLE * bool(note)
        figure.set_size_inches(WIDTH * columns, HEIGHT * len(shown) + extra)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
        if note:
            figure.supxlabel(note, fontsize=8.5, color=INK, x=0.02, ha="left")
        places: list[FigureBase] = [figure]
        if encoding.hook == "layer":
            places = list(figure.subfigures(len(shown), 1, squeeze=False)[:, 0])
        for place, (one, layers) in zip(places, shown, strict=True):
            if layers:
                place.suptitle(f"{layers}: {name(one)}", fontsize=10.5, color=INK, x=0.02, ha="left")
            grid = place.subplots(1, columns, squeeze=False)[0]
            panels = _panels(one)
            for axes, panel in zip(grid, panels, strict=False):
                panel(axes, one)
            for axes in grid[len(panels) :]:
                axes.set_axis_off()


def name(encoding: PositionalEncoding) -> str:
    """The registered name, which is that of its file."""
    return type(encoding).__module__.rpartition(".")[2]


def _rows(encoding: PositionalEncoding) -> list[tuple[PositionalEncoding, str]]:
    """Each encoding that a layer has, and which layers have it."""
    if encoding.hook != "layer":
        return [(encoding, "")]
    layers: dict[PositionalEncoding, list[int]] = {}
    for i in range(encoding.config.num_hidden_layers):
        layers.setdefault(encoding.layer(i), []).append(i)
    return [(one, f"layer{'s' * (len(at) > 1)} {', '.join(map(str, at))}") for one, at in layers.items()]


def _limited(encoding: PositionalEncoding, length: int) -> int:
    return min(length, encoding.max_length or length)


@torch.no_grad()
def vectors(encoding: PositionalEncoding, length: int) -> Array:
    """``[length, C]``, what is added to the embedding at positions 0 .. length - 1."""
    return encoding.embed(torch.arange(length)[None])[0].double().numpy()


def products(left: Array, right: Array) -> ByDistance:
    """Dot products of rows i of ``left`` and j <= i of ``right`` by i - j, both ``[N, C]``; of as many pairs as
    there are."""
    scores = left @ right.T
    by_distance = [np.diagonal(scores, -d) for d in range(len(left))]
    return ByDistance(*(np.array([f(x) for x in by_distance]) for f in (np.mean, np.min, np.max)))


def angles(encoding: PositionalEncoding, length: int) -> Array:
    """Radians ``[length, R/2]`` within a turn, of a step of the first ``length`` positions."""
    cos, sin = (table[0].double() for table in encoding.tables(torch.arange(length)[None])[:2])
    return torch.atan2(sin, cos).numpy()


def wavelengths(encoding: PositionalEncoding, reach: int) -> Array:
    """Tokens of a whole turn ``[R/2]``, in a step of so many; infinite for pairs that do not turn."""
    cos, sin = (table[0, 1].double() for table in encoding.tables(torch.tensor([[0, 1, reach - 1]]))[:2])
    return (2 * math.pi / torch.atan2(sin, cos).abs()).numpy()


def rotated_scores(encoding: PositionalEncoding, reach: int) -> ByDistance:
    """The score over D of a query and a key of ones, as ``rotate`` turns them, for the distances 0 .. reach - 1.

    Of three queries, the last within ``reach``, at half of it and at a quarter.
    """
    config = encoding.config
    D = config.head_size
    positions = torch.arange(reach)[None]
    query = torch.ones(1, reach, config.num_attention_heads * D)
    key = torch.ones(1, reach, config.kv_heads * D)
    q, k = (x[0, :, :D].double().numpy() for x in encoding.rotate(query, key, encoding.tables(positions)))
    found = np.full((3, reach), np.nan)
    for row, at in zip(found, (reach - 1, reach // 2, reach // 4), strict=True):
        row[: at + 1] = (k[: at + 1] @ q[at] / D)[::-1]
    return ByDistance(np.nanmean(found, 0), np.nanmin(found, 0), np.nanmax(found, 0))


@torch.no_grad()
def biases(encoding: PositionalEncoding, reach: int, query: int) -> Array:
    """``[H, reach]``, the term on the scores of the query at a position by the distance of the key."""
    bias = encoding.bias(torch.tensor([[query]]), None, query + 1)[0, :, 0]  # [H, S]
    return bias.flip(-1)[:, :reach].double().numpy()


def shares(bias: Array) -> Array:
    """What attention gives to each of ``[H, N]`` keys whose scores are the bias alone."""
    weights: Array = np.exp(bias - bias.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def masked_shares(tokens: int) -> Array:
    """``[T, T]``, what our decoder's attention gives to each key where all scores are 0."""
    step = PlainStep(torch.ones(1, tokens, dtype=torch.int64))
    nothing, each = torch.zeros(1, tokens, 1), torch.eye(tokens)[None]
    return step.attend(0, nothing, nothing, each, num_heads=1, kv_heads=1, scale=1.0)[0].numpy()


def plain_rope(encoding: PositionalEncoding) -> PositionalEncoding | None:
    """``rope`` of the same base and rotary size; None for what is already that, or has no base."""
    theta = encoding.parameters_used.get("theta", getattr(encoding, "theta", None))
    if theta is None or name(encoding) in ("rope", "rope_interleaved"):
        return None
    size = 2 * encoding.tables(torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1]
    parameters = {"theta": theta, "rotary_dim": size}
    return build_encoding(dataclasses.replace(encoding.config, encoding="rope", encoding_parameters=parameters))


def _title(axes: Any, text: str, x: str, y: str) -> None:
    from matplotlib import ticker

    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True))
    axes.set_title(text, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _embedding(axes: Any, encoding: PositionalEncoding) -> None:
    table = vectors(encoding, _limited(encoding, SHOWN))
    _matrix(axes, table.T, "RdBu_r", float(np.abs(table).max()))
    _title(axes, "added to the embedding", "position", "channel")


def _products(axes: Any, encoding: PositionalEncoding) -> None:
    table = vectors(encoding, _limited(encoding, SHOWN))
    _band(axes, products(table, table), BLUE, "mean")
    _title(axes, "dot product of two positions", "distance", "product, mean and range")


def _matrix(axes: Any, values: Array, colors: str, limit: float) -> None:
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap=colors, vmin=-limit, vmax=limit, interpolation="none"
    )
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)


def _band(axes: Any, found: ByDistance, color: str, label: str, line: str = "-") -> None:
    distances = np.arange(len(found.mean))
    axes.fill_between(distances, found.low, found.high, color=color, alpha=0.25, linewidth=0)
    axes.plot(distances, found.mean, color=color, linestyle=line, linewidth=1.6, label=label)
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)


def _angles(axes: Any, encoding: PositionalEncoding) -> None:
    turns = angles(encoding, _limited(encoding, SHOWN)) / (2 * math.pi)
    _matrix(axes, turns.T, "twilight_shifted", 0.5)
    _title(axes, "angle, turns", "position", "pair of channels")


def _wavelengths(axes: Any, encoding: PositionalEncoding) -> None:
    trained = encoding.config.max_position_embeddings
    reaches = (2, trained, 2 * trained, 4 * trained) if encoding.path_dependent else (2,)
    plain = plain_rope(encoding)
    found: dict[str, Array] = {}
    for reach in (r for r in reaches if r == _limited(encoding, r)):
        tokens = wavelengths(encoding, reach)
        if not any(np.allclose(tokens, other, rtol=1e-4) for other in found.values()):
            found[f"a step to {reach:,}" if encoding.path_dependent else name(encoding)] = tokens
    if plain is not None:
        axes.plot(wavelengths(plain, 2), color=INK, linestyle=":", linewidth=3, label="rope")
    for (label, tokens), (color, marker, line) in zip(found.items(), STYLES, strict=False):
        axes.plot(
            np.where(np.isfinite(tokens), tokens, np.nan),
            color=color,
            marker=marker,
            markersize=3,
            linestyle=line,
            label=label,
        )
    still = int(np.isinf(next(iter(found.values()))).sum())
    _level(axes, trained, f"{trained:,} tokens")
    axes.set_yscale("log")
    if len(found) > 1:
        _legend_below(axes, 2)
    else:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    _title(axes, f"a whole turn{f'; {still} pairs stand still' if still else ''}", "pair of channels", "tokens")


def _rotated(axes: Any, encoding: PositionalEncoding) -> None:
    reach = _limited(encoding, SCORE_REACH)
    plain = plain_rope(encoding)
    if plain is not None:
        axes.plot(rotated_scores(plain, reach).mean, color=INK, linestyle=":", linewidth=1, label="rope")
    _band(axes, rotated_scores(encoding, reach), BLUE, name(encoding))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, reach)
    ticks = [0, *(10**k for k in range(1 + int(math.log10(reach))))]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    if plain is not None:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    _title(axes, "score of two vectors of ones", "distance", "score over head size")


def _legend_below(axes: Any, columns: int) -> None:
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": columns, "columnspacing": 1.0}
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, **place)


def _level(axes: Any, value: float, label: str) -> None:
    """A line across, named at its right end."""
    axes.axhline(value, color=INK, linewidth=0.8)
    place = {"xy": (1.01, value), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
    axes.annotate(label, ha="left", va="center", fontsize=8.5, **place)


def shades(count: int) -> list[str]:
    """Colours in a row, all of middle lightness."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    row = LinearSegmentedColormap.from_list("heads", [BLUE, PURPLE, VERMILLION])
    return [to_hex(row(x)) for x in np.linspace(0, 1, count)]


def _heads(axes: Any, values: Array, label: str, line: str = "-") -> None:
    H = len(values)
    colors = [style[0] for style in STYLES] if H <= MOST_STYLES else shades(H)
    for h, (row, color) in enumerate(zip(values, colors, strict=False)):
        named = label or (f"head {h}" if H <= MOST_STYLES or h in (0, H - 1) else "_")
        axes.plot(row, color=color, linestyle=line, linewidth=1.4, label=named if not label or h == 0 else "_")


def _bias(axes: Any, encoding: PositionalEncoding) -> None:
    reach = _limited(encoding, BIAS_REACH)
    near, far = reach - 1, _limited(encoding, FAR_QUERY + 1) - 1
    values, others = biases(encoding, reach, near), biases(encoding, reach, far)
    _heads(axes, values, "")
    if not np.allclose(values, others, rtol=1e-5, atol=1e-5):
        _heads(axes, others, f"query at {far:,}, not {near:,}", "--")
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)
    _legend_below(axes, 3)
    _title(axes, "added to the scores", "distance", "term, for each head")


def _shares(axes: Any, encoding: PositionalEncoding) -> None:
    reach = _limited(encoding, BIAS_REACH)
    given = shares(biases(encoding, reach, reach - 1))
    _heads(axes, given, "")
    _level(axes, 1 / reach, "no bias")
    axes.set_yscale("log")
    axes.set_ylim(max(LEAST_SHARE, given.min() / 2), 1)
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)
    _title(axes, "attention, all scores alike", "distance", "share of a key")


def _mask(axes: Any, encoding: PositionalEncoding) -> None:
    seen = masked_shares(MASKED)
    image = axes.imshow(
        np.where(seen > 0, seen, np.nan), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none"
    )
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    _title(axes, "attention, all scores alike", "key", "query")


def _first_key(axes: Any, encoding: PositionalEncoding) -> None:
    seen = masked_shares(MASKED)
    axes.plot(seen[:, 0], color=VERMILLION, marker="o", markersize=3)
    axes.set_ylim(0, 1.05)
    axes.grid(True, axis="y", color=INK, alpha=0.25, linewidth=0.7)
    _title(axes, "what the mask alone tells", "position of the query", "share of the first key")


_PANELS = {
    "embed": (_embedding, _products),
    "rotate": (_angles, _wavelengths, _rotated),
    "bias": (_bias, _shares),
    "none": (_mask, _first_key),
}


def _panels(encoding: PositionalEncoding) -> tuple[Callable[[Any, PositionalEncoding], None], ...]:
    """Those of the hook; of a rotation by other tables than cosines and sines the scores alone."""
    if encoding.hook == "rotate":
        shapes = {table.shape for table in encoding.tables(torch.arange(2)[None])[:2]}
        pairs = [shape[-1] for shape in shapes if len(shape) == 3]
        if len(shapes) > 1 or not pairs or 2 * pairs[0] > encoding.config.head_size:
            return (_rotated,)
    return _PANELS[encoding.hook]
