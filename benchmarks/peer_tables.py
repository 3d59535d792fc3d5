"""The result of ``peers.py`` as Markdown and as a figure. Knows the JSON, not how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_checkpoints import LABELS

from pe_onnx.plots import BLUE, GREEN, INK, PURPLE, VERMILLION

Result = dict[str, Any]

MISSING = "-"
COLORS = {"ours": BLUE, "genai": VERMILLION, "llama_cpp": GREEN, "transformers": PURPLE, "optimum": INK}
LINES = {32: ("-", "o"), 16: ("--", "s"), 8: ("-.", "^"), 4: (":", "D")}
"""By bits of a weight."""


def tables(result: Result) -> str:
    """Markdown: speed, costs, quality, and who is missing for what reason."""
    parts = [speed_table(result), cost_table(result)]
    if result.get("quality"):
        parts.append(quality_table(result))
    machine = result["machine_rates"]
    parts.append(
        f"In brackets the share of the bound: bytes of weights and cache over {machine['read_bytes_per_s'] / 1e9:.1f} "
        f"GB/s for a step, float32 operations over {machine['gemm_operations_per_s'] / 1e9:.0f} GFLOP/s for a prompt, "
        f"both measured in the same run with {result['threads']} threads."
    )
    if absent := reasons(result):
        parts.append(absent)
    return "\n\n".join(parts)


def speed_table(result: Result) -> str:
    prompts, contexts = result["prompts"], result["contexts"]
    heads = [f"prefill {n:,}, tokens/s" for n in prompts] + [f"decode at {n:,}, ms" for n in contexts]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for figures in measured(result):
        cells = [_prefill(figures["prefill"].get(str(n))) for n in prompts]
        cells += [_decode(figures["decode"].get(str(n))) for n in contexts]
        lines.append(f"| {figures['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(result: Result) -> str:
    lines = [
        "| | file, MB | load, s | peak, MB | export, s | export peak, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for figures in measured(result):
        cells = [
            _number(figures.get("file_bytes"), 1e6, 0),
            _number(figures.get("load_s"), 1, 2),
            _number(figures.get("peak_bytes"), 1e6, 0),
            _number(figures.get("export_s") or None, 1, 1),
            _number(figures.get("export_peak_bytes") or None, 1e6, 0),
        ]
        lines.append(f"| {figures['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quality_table(result: Result) -> str:
    models = list(result["quality"])
    heads = [f"{what}, {LABELS.get(model, model)}" for model in models for what in ("KL, nats/token", "bits/byte")]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    names = list(dict.fromkeys(name for figures in result["quality"].values() for name in figures))
    for name in names:
        found = [result["quality"][model].get(name, {}) for model in models]
        cells = []
        for figures in found:
            kl, bits = figures.get("kl_nats_per_token"), figures.get("bits_per_byte")
            cells += [MISSING if kl is None else f"{kl:.2g}", MISSING if bits is None else f"{bits:.4f}"]
        if any(cell != MISSING for cell in cells):
            label = result["contestants"].get(name, {}).get("label", name)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(result: Result) -> list[Result]:
    return [figures for figures in result["contestants"].values() if figures.get("decode") or figures.get("prefill")]


def reasons(result: Result) -> str:
    """A line for each contestant that could not be measured."""
    failed = [figures for figures in result["contestants"].values() if figures.get("error")]
    return "\n".join(f"- {figures['label']}: not measured, {figures['error']}" for figures in failed)


def _prefill(figures: Result | None) -> str:
    return MISSING if not figures else f"{figures['tokens_per_s']:,.0f} ({figures['bound_share']:.2f})"


def _decode(figures: Result | None) -> str:
    return MISSING if not figures else f"{figures['ms']:.1f} ({figures['bound_share']:.2f})"


def _number(value: float | None, unit: float, digits: int) -> str:
    return MISSING if value is None else f"{value / unit:,.{digits}f}"


def draw(result: Result, path: Path) -> None:
    """Decode time against context, both logarithmic; colour for the engine, line for the bits."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    colors: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.hashsalt": "pe-onnx", "font.size": 10, **colors}):
        figure, axes = pyplot.subplots(figsize=(8.5, 4.6), layout="constrained")
        for name, figures in result["contestants"].items():
            points = {int(n): value["ms"] for n, value in figures.get("decode", {}).items()}
            if not points:
                continue
            color = next(color for engine, color in COLORS.items() if name.startswith(engine))
            line, marker = LINES[figures["bits"]]
            style: dict[str, Any] = {
                "color": color,
                "linestyle": line,
                "marker": marker,
                "markersize": 4.5,
                "linewidth": 1.6,
            }
            axes.plot(list(points), list(points.values()), label=figures["label"], **style)
        contexts = result["contexts"]
        axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="decode, ms per token")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(True, which="major", color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, transparent=True, dpi=130)
        pyplot.close(figure)
