"""A GGUF file read our way: the same fields, tensors and values as by gguf's reader and transformers' parser."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils

from pe_onnx.models import gguf_once

WORDS = ["<s>", "a", "\u0120the", "\u4e2d\u6587", "", "x" * 300]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every type that a file can hold, and tensors in float32 and in blocks of 4 bits."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.string", "caf\u00e9")
    writer.add_uint8("a.uint8", 250)
    writer.add_int8("a.int8", -7)
    writer.add_uint16("a.uint16", 65_000)
    writer.add_int32("a.int32", -70_000)
    writer.add_uint64("a.uint64", 1 << 40)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.words", WORDS)
    writer.add_array("a.numbers", [3, 1, 2])
    writer.add_array("a.scores", [0.5, -1.25])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 5)).astype(np.float32))
    weights = rng.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor(
        "blocks", gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_and_tensors(file: Path) -> None:
    ours, theirs = gguf_once.Reader(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    assert len(ours.fields) > 12
    for name, field in theirs.fields.items():
        mine = ours.fields[name]
        assert (mine.offset, mine.data, mine.types) == (field.offset, field.data, field.types), name
        assert [part.dtype for part in mine.parts] == [part.dtype for part in field.parts]
        for have, want in zip(mine.parts, field.parts, strict=True):
            np.testing.assert_array_equal(have, want)
    for mine, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type, mine.n_bytes) == (tensor.name, tensor.tensor_type, tensor.n_bytes)
        np.testing.assert_array_equal(mine.data, tensor.data)


def test_values(file: Path) -> None:
    found = {}
    for name, field in gguf_once.Reader(file).fields.items():
        values = [gguf_once.parse_value(field.parts[i], field.types) for i in field.data]
        assert values == [
            modeling_gguf_pytorch_utils._gguf_parse_value(field.parts[i], field.types) for i in field.data
        ]
        found[name] = values
    assert found["a.words"] == WORDS
    assert found["a.string"] == ["caf\u00e9"]
    assert found["a.bool"] == [True]


def test_transformers_is_left_as_it_was(file: Path) -> None:
    before = (gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils._gguf_parse_value)
    with suppress(RuntimeError), gguf_once.parsed_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
        assert modeling_gguf_pytorch_utils._gguf_parse_value is gguf_once.parse_value
        raise RuntimeError
    assert before == (gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils._gguf_parse_value)
