"""The page's tokenizer, sampling and text, in node, against ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import page_scripts
import pytest

from pe_onnx.tokenizer import TextStream, load_tokenizer

pytestmark = pytest.mark.skipif(page_scripts.NODE is None, reason="node is not installed")

TEXTS = [
    "Hello, world!",
    " \t\n\r\n  ",
    "naïve café — “quotes” … ½ €",
    "日本語と한국어",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u00a0\u200b\ufeff",
    "\ufeffbom",
    "\x00\x7f",
]
LOAD = """
import { loadTokenizer } from "./tokenizer.js";
import { TextStream } from "./text_stream.js";
const read = async (name) => JSON.parse(fs.readFileSync(`${given.folder}/${name}`, "utf8"));
const tokenizer = await loadTokenizer(given.entry, read, (name) => import(`./vendor/${name}.mjs`));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_scripts.modules(tmp_path_factory.mktemp("node") / "page")


def entry(kind: str | None, silent: list[int], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "eos": [], "silent": silent, "unfinished": [], "special_tokens": {}, **more}


def test_bytes(page: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(tmp_path, {"kind": "bytes"})
    rng = random.Random(0)
    streams = [[rng.choice([*range(256), 300]) for _ in range(60)] for _ in range(20)]
    streams += [ours.encode(text) for text in TEXTS]
    code = """
    const pieces = (ids) => {
      const stream = new TextStream(tokenizer, given.prompt);
      return [...ids.map((id) => stream.push(id)), stream.finish()];
    };
    answer({ ids: given.texts.map((text) => tokenizer.encode(text)),
             decoded: given.streams.map((ids) => tokenizer.decode(ids)), pieces: given.streams.map(pieces) });
    """
    prompt = ours.encode("é and on")
    given = {
        "folder": str(tmp_path),
        "entry": entry("bytes", list(range(256, 400))),
        "texts": TEXTS,
        "streams": streams,
        "prompt": prompt,
    }
    got = page_scripts.run(page, LOAD + code, given)
    assert got["ids"] == [ours.encode(text) for text in TEXTS]
    assert got["decoded"] == [ours.decode(ids) for ids in streams]
    for ids, pieces in zip(streams, got["pieces"], strict=True):
        stream = TextStream(ours, prompt=prompt)
        assert pieces == [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_is_shown_when_it_is_whole(page: Path, tmp_path: Path) -> None:
    code = """
    const stream = new TextStream(tokenizer, []);
    answer([...tokenizer.encode("a👍b")].map((id) => stream.push(id)));
    """
    given = {"folder": str(tmp_path), "entry": entry("bytes", [])}
    assert page_scripts.run(page, LOAD + code, given) == ["a", "", "", "", "👍", "b"]


def test_a_vocabulary(page: Path, tmp_path: Path) -> None:
    vocab = {"a": 0, "ab": 1, "b": 2, "👍": 3, "👍a": 4, "<s>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    ours = load_tokenizer(tmp_path, {"kind": "vocab"})
    texts = ["abba👍a👍", "<s>b", ""]
    code = """
    let refusal = null;
    try { tokenizer.encode("x"); } catch (error) { refusal = error.message; }
    answer({ ids: given.texts.map((text) => tokenizer.encode(text)), text: tokenizer.decode([5, 1, 3, 9]), refusal });
    """
    given = {"folder": str(tmp_path), "entry": entry("vocab", [5]), "texts": texts}
    got = page_scripts.run(page, LOAD + code, given)
    assert got["ids"] == [ours.encode(text) for text in texts]
    assert got["text"] == ours.decode([5, 1, 3, 9]) == "ab👍"
    assert "“x”" in got["refusal"]


def test_without_a_tokenizer(page: Path, tmp_path: Path) -> None:
    code = """
    let refusal = null;
    try { tokenizer.encode("Once"); } catch (error) { refusal = error.message; }
    answer([tokenizer.encode("1, 2,3"), refusal]);
    """
    ids, refusal = page_scripts.run(page, LOAD + code, {"folder": str(tmp_path), "entry": entry(None, [])})
    assert ids == [1, 2, 3]
    assert "token ids" in refusal


@pytest.mark.parametrize("wrong", ["ids", "decoded"])
def test_a_tokenizer_that_is_not_exact_is_refused(wrong: str, page: Path, tmp_path: Path) -> None:
    sample = {"text": "ab", "ids": [97, 98], "decoded": "ab", wrong: [97, 97] if wrong == "ids" else "ba"}
    code = """
    const load = (samples) => loadTokenizer({ ...given.entry, samples }, null, null).then(() => "", (e) => e.message);
    answer([await load([given.sample]), await load([{ text: "ab", ids: [97, 98], decoded: "ab" }])]);
    """
    given = {"folder": str(tmp_path), "entry": entry("bytes", []), "sample": sample}
    refusal, fine = page_scripts.run(page, LOAD + code, given)
    assert "not read exactly" in refusal
    assert fine == ""


def test_sampling(page: Path) -> None:
    code = """
    import { Sampler } from "./sampling.js";
    const logits = Float32Array.from([0, 2, 2, 1]);
    const make = (temperature, topP, seed) => new Sampler({ temperature, topP, seed });
    const draws = (sampler, n) => Array.from({ length: n }, () => sampler.next(logits));
    let refusal = null;
    try { make(0, 1, 0).next(Float32Array.from([NaN, NaN])); } catch (error) { refusal = error.message; }
    answer({ greedy: make(0, 1, 0).next(logits), plain: draws(make(1, 1, 7), 8000), refusal,
             nucleus: draws(make(1, 0.7, 7), 500), same: draws(make(1, 1, 7), 20), other: draws(make(1, 1, 8), 20) });
    """
    got = page_scripts.run(page, code)
    assert got["greedy"] == 1
    weights = [1, 7.389, 7.389, 2.718]
    for token, weight in enumerate(weights):
        assert abs(got["plain"].count(token) / 8000 - weight / sum(weights)) < 0.02
    assert set(got["nucleus"]) == {1, 2}
    assert got["same"] == got["plain"][:20] != got["other"]
    assert "no finite number" in got["refusal"]


def test_labels_of_layers(page: Path) -> None:
    code = """
    import { layersLabel } from "./curves.js";
    answer([[0], [0, 1], [0, 1, 2, 5], [1, 3, 4]].map(layersLabel));
    """
    wanted = ["layer 0", "layers 0, 1", "layers 0 to 2, 5", "layers 1, 3, 4"]
    assert page_scripts.run(page, code) == wanted
