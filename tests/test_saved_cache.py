"""A cache in a file: what it gives back, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import pe_onnx
from pe_onnx import saved_cache
from pe_onnx.errors import CacheFileError, InputError

Bundles = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, 400).tolist()
ROWS = [TOKENS[:30], TOKENS[50:51], TOKENS[100:163]]


@pytest.mark.parametrize(
    ("encoding", "target", "options"),
    [
        ("rope", "ort", {}),
        ("rope", "ort", {"dtype": "fp16"}),
        ("t5_bias", "portable", {}),
    ],
)
def test_a_loaded_cache_goes_on_where_it_was_saved(
    bundles: Bundles, encoding: str, target: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Ragged rows, tokens in use only; read by safetensors too."""
    model = pe_onnx.load(bundles(encoding, target, **options))
    cache = model.cache(3)
    cache.prefill(ROWS)
    cache.decode([1, 2, 3], np.array([True, False, True]))
    cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
    held = 31 + 1 + 64
    room = 8 + int.from_bytes((tmp_path / "cache").read_bytes()[:8], "little")
    assert (tmp_path / "cache").stat().st_size == room + held * (8 + model.bundle.cache_bytes_per_token)
    loaded = pe_onnx.load(bundles(encoding, target, **options)).load_cache(tmp_path / "cache")
    assert (loaded.tokens, loaded.lengths.tolist()) == (cache.tokens, [31, 1, 64])
    for token in (7, 8):
        np.testing.assert_array_equal(loaded.decode([token] * 3), cache.decode([token] * 3))
    with safe_open(tmp_path / "cache", "numpy") as file:
        assert file.get_tensor("2.tokens").tolist() == [*ROWS[2], 3]
        assert file.get_tensor("1.past_key_values.0.key").shape == (4, 1, 16)


def test_an_empty_row_and_a_cache_that_is_replaced(bundles: Bundles, tmp_path: Path) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    cache.save(tmp_path / "c")
    assert model.load_cache(tmp_path / "c").tokens == [[]]
    cache.prefill([TOKENS[:9]])
    cache.save(tmp_path / "c")
    assert model.load_cache(tmp_path / "c").tokens == [TOKENS[:9]]


def test_a_save_that_fails_leaves_the_old_file(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    cache.prefill([TOKENS[:9]])
    cache.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    cache.decode([3])

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_cache.os, "fsync", full)
    with pytest.raises(CacheFileError, match=r"cannot write the cache to .*: No space left"):
        cache.save(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert (tmp_path / "c").read_bytes() == before


def _header(content: bytes, change: Callable[[dict], None]) -> bytes:
    room = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + room])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + room :]


KEY = "0.past_key_values.1.key"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda c: b"", "not a saved cache"),
        (lambda c: c[:100], "not a saved cache"),
        (lambda c: b"\xff" * 8 + c[8:], "not a saved cache"),
        (lambda c: c[:8] + b"[" * (len(c) - 8), "not a saved cache"),
        (lambda c: c[:-1], "corrupted: it has"),
        (lambda c: c + b"x", "corrupted: it has"),
        (lambda c: c[:-5] + bytes([c[-5] ^ 1]) + c[-4:], "checksum of its data"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(bundle="0" * 64)), "of another bundle"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(version="9")), "version 9; this pe-onnx reads 1"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(format="pt")), "not a saved cache"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(lengths="[9,9]")), "tensors are not those"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(lengths="[]")), "not a saved cache"),
        (lambda c: _header(c, lambda h: h["__metadata__"].update(lengths="[99999999999999]")), "not a saved cache"),
        (lambda c: _header(c, lambda h: h[KEY].update(shape=[4, 9, 32])), "tensors are not those"),
        (lambda c: _header(c, lambda h: h[KEY].update(shape=[4, "9", 16])), "tensors are not those"),
        (lambda c: _header(c, lambda h: h[KEY].update(dtype="F16")), "tensors are not those"),
        (lambda c: _header(c, lambda h: h[KEY].update(data_offsets=[0, 2304])), "tensors are not those"),
        (lambda c: _header(c, lambda h: h.pop(KEY)), "tensors are not those"),
        (lambda c: _header(c, lambda h: h.pop("__metadata__")), "not a saved cache"),
    ],
)
def test_what_is_no_cache_of_the_bundle_is_refused(
    bundles: Bundles, tmp_path: Path, broken: Callable[[bytes], bytes], message: str
) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    cache.prefill([TOKENS[:9]])
    cache.save(tmp_path / "c")
    (tmp_path / "c").write_bytes(broken((tmp_path / "c").read_bytes()))
    with pytest.raises(CacheFileError, match=message) as caught:
        model.load_cache(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_limits_and_other_bundles(bundles: Bundles, tmp_path: Path) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    cache.prefill([TOKENS[:40]])
    cache.save(tmp_path / "c")
    with pytest.raises(CacheFileError, match="of another bundle"):
        pe_onnx.load(bundles("alibi")).load_cache(tmp_path / "c")
    with pytest.raises(CacheFileError, match="of another bundle"):
        pe_onnx.load(bundles("rope", "portable")).load_cache(tmp_path / "c")
    with pytest.raises(InputError, match="40 tokens are more than max_length = 39"):
        model.load_cache(tmp_path / "c", max_length=39)
    with pytest.raises(CacheFileError, match="No such file"):
        model.load_cache(tmp_path / "nothing")
    with pytest.raises(CacheFileError, match=r"cannot write the cache to .*nothing"):
        cache.save(tmp_path / "nothing" / "c")
    with (
        saved_cache.opened(tmp_path / "c", model.bundle) as saved,
        pytest.raises(InputError, match="1 saved rows for a cache of 2"),
    ):
        model.cache(2).restore(saved)


def test_the_command_line_saves_and_loads(cli: Callable, bundles: Bundles, tmp_path: Path) -> None:
    args = ("generate", bundles("rope"), "-n", 5, "--json")
    file = tmp_path / "c"
    assert cli(*args, "once upon", "--save-cache", file).returncode == 0
    result = cli(*args, "once upon a time", "--load-cache", file, "--save-cache", file)
    document = json.loads(result.stdout)
    assert document["timing"]["reused_tokens"] == 9
    assert document["generations"] == json.loads(cli(*args, "once upon a time").stdout)["generations"]
    for options, code, message in (
        (("a", "b", "--load-cache", file), 2, "2 prompts for a cache of 1 rows"),
        (("a", "--load-cache", tmp_path), 1, "Is a directory"),
        (("a", "--save-cache", tmp_path), 1, "name a file in a folder"),
        (("a", "--beams", 2, "--load-cache", file), 2, "--load-cache is not for --beams"),
    ):
        failed = cli(*args, *options)
        assert (failed.returncode, failed.stdout) == (code, "")
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
