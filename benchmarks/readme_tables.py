"""Tables of a benchmark in the README, between the marks that name it."""

from __future__ import annotations

from pathlib import Path


def write(readme: Path, benchmark: str, text: str) -> None:
    """Replace what stands between the marks of ``benchmarks/{benchmark}.py``. Raises ValueError where they are
    missing."""
    begin, end = f"<!-- benchmarks/{benchmark}.py -->\n", "<!-- end -->"
    before, mark, rest = readme.read_text("utf-8").partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"{readme} has no lines {begin.strip()!r} and {end!r}")
    readme.write_text(f"{before}{begin}{text}\n{end}{rest.split(end, 1)[1]}", "utf-8")
