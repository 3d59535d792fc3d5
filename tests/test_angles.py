"""Angle errors of rotations in ulps: small where the tables are right, and what a table in float16 looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny_models
import torch
from conftest import Bundles

import pe_onnx
from pe_onnx import angles, discovery
from pe_onnx.angles import default_positions, rotary_angles, summary
from pe_onnx.bundle import read_bundle
from pe_onnx.encodings.rope import Rope
from pe_onnx.errors import InputError
from pe_onnx.exporter import silenced

ROTATING = [name for name in discovery.names("encodings") if name.startswith("rope") or name == "xpos"]
RIGHT = 1.6
"""Ulps: half for the angle, half for its cosine and sine, half for a factor on both."""
HALF = 200
"""Ulps of what has been in float16, at the least."""


def exported(folder: Path, **options: object) -> Path:
    pe_onnx.export(output=folder / "b", verify=False, **options)  # type: ignore[arg-type]
    return folder / "b"


@pytest.mark.parametrize("encoding", ROTATING)
def test_every_rope_is_right_to_an_ulp(encoding: str, tmp_path: Path) -> None:
    errors = rotary_angles(folder := exported(tmp_path, encoding=encoding))
    assert sorted({error.position for error in errors}) == default_positions(read_bundle(folder))
    assert max(error.max_ulps for error in errors) < RIGHT, errors
    turned = {layer for error in errors for layer in error.layers}
    assert turned == ({0} if encoding == "rope_nope" else {0, 1})


def broken(folder: Path, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The worst error up to position 127 of a RoPE whose positions and frequencies make other tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rope, "tables", lambda self, p: change(p.double()[..., None], self.frequencies(p)))
        rope = exported(folder, encoding="rope")
    return max(error.max_ulps for error in rotary_angles(rope, [1, 127, 131071]))


def tables(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angle.cos().float(), angle.sin().float()


def test_the_same_procedure_with_nothing_broken(tmp_path: Path) -> None:
    assert broken(tmp_path, lambda p, f: tables(p * f)) < RIGHT


def test_cosines_that_went_through_float16_are_seen(tmp_path: Path) -> None:
    assert broken(tmp_path, lambda p, f: ((p * f).cos().half().float(), (p * f).sin().float())) > HALF


def test_angles_in_float16_are_seen(tmp_path: Path) -> None:
    assert broken(tmp_path, lambda p, f: tables((p * f).half().float())) > HALF


def test_frequencies_that_change_their_last_digit_at_a_position_are_seen(tmp_path: Path) -> None:
    """The next float32 of each from position 127 on: an ulp where there is 0.01 of one."""
    clean = broken(tmp_path / "clean", lambda p, f: tables(p * f.float().double()))

    def change(p: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        single = f.float()
        longer = torch.nextafter(single, torch.full_like(single, 2.0)).double()
        return tables(p * torch.where(p == 131071, longer, single.double()))

    assert broken(tmp_path / "changed", change) > clean + 0.3


def test_a_wrong_table_at_one_position_alone_is_seen(tmp_path: Path) -> None:
    folder = exported(tmp_path, encoding="rope")
    right = angles.Tables(read_bundle(folder))
    run = right._run

    def shifted(position: int) -> dict[str, np.ndarray]:
        values = run(position)
        if position == 127:
            cos, sin = (str(v.name) for v in (right.rotations[0].cos, right.rotations[0].sin))
            values[cos][1], values[sin][1] = (run(128)[name][1] for name in (cos, sin))
        return values

    right._run = shifted  # type: ignore[method-assign]
    ulps = {position: next(right.errors(position)).max_ulps for position in (126, 127, 128)}
    assert ulps[127] > 1e4
    assert max(ulps[126], ulps[128]) < RIGHT


@pytest.mark.parametrize("encoding", ["alibi", "sinusoidal", "none"])
def test_what_does_not_rotate_has_no_angles(bundles: Bundles, encoding: str) -> None:
    """A sinusoidal embedding has cosines too: they are added."""
    assert rotary_angles(bundles(encoding)) == []
    assert summary([]) == ""


def test_two_bases_are_two_tables(tmp_path: Path) -> None:
    errors = rotary_angles(exported(tmp_path, encoding="rope_two_bases"), [127])
    assert [error.layers for error in errors] == [[0], [1]]
    assert errors[0].table != errors[1].table


@pytest.mark.parametrize("encoding", ["rope_longrope", "rope_dynamic"])
def test_frequencies_that_switch_are_those_of_the_run(encoding: str, tmp_path: Path) -> None:
    """Of a run that reaches as far as the position: the same channel turns by another frequency there."""
    folder = exported(tmp_path, encoding=encoding, config={"max_position_embeddings": 64})
    short, long = rotary_angles(folder, [10, 100])
    assert (short.reach, long.reach) == (11, 101)
    found = angles.Tables(read_bundle(folder))
    name = str(found.rotations[0].angle.name)  # type: ignore[union-attr]
    before, after = found._run(10)[name][0], found._run(100)[name][0]
    assert np.abs(after / before - 1).max() > 0.1
    assert max(short.max_ulps, long.max_ulps) < RIGHT


def test_positions_beyond_what_the_encoding_takes_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, encoding="xpos")
    limit = read_bundle(folder).max_length
    assert limit is not None
    assert max(default_positions(read_bundle(folder))) < limit
    with pytest.raises(InputError, match=rf"position {limit} must be in 0\.\.{limit - 1}"):
        rotary_angles(folder, [limit])
