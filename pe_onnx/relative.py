"""A bundle's times as multiples of a yardstick's: what is measured for the latency gate, and kept as its baseline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pe_onnx.intervals import Estimate, median_interval
from pe_onnx.yardstick import Sizes

MEASURES = ("decode", "prefill")


@dataclass
class Relative:
    """A bundle's times as multiples of the yardstick's: 1.1 takes a tenth longer than the plain work."""

    provider: str
    threads: int
    clock: str
    """``processor`` or ``wall``."""
    yardstick: Sizes
    ratios: dict[str, list[float]]
    """By measure, ``decode`` and ``prefill``: of each process the median ratio of neighbours."""
    tools: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def estimate(self, measure: str) -> Estimate:
        return median_interval(self.ratios[measure])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` gives the same back."""
        medians = {f"{measure}_ratio": self.estimate(measure).median for measure in MEASURES}
        return {**medians, **dataclasses.asdict(self), "yardstick": self.yardstick._asdict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Relative:
        """Raises KeyError, TypeError or ValueError for what ``to_dict`` does not give."""
        ratios = {measure: [float(x) for x in values["ratios"][measure]] for measure in MEASURES}
        if not all(series and all(x > 0 for x in series) for series in ratios.values()):
            raise ValueError("ratios must be positive")
        return cls(
            str(values["provider"]),
            int(values["threads"]),
            str(values["clock"]),
            Sizes(**{name: int(values["yardstick"][name]) for name in Sizes._fields}),
            ratios,
            dict(values["tools"]),
            dict(values["machine"]),
        )

    def joined(self, other: Relative) -> Relative:
        """Both measurements as one."""
        return dataclasses.replace(
            self, ratios={measure: self.ratios[measure] + other.ratios[measure] for measure in MEASURES}
        )
