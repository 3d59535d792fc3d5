"""Packages in Node through @huggingface/transformers, which npm installs: our tokens, texts and chat prompts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import numpy as np
import pytest
from conftest import Bundles, Shared

import pe_onnx
from pe_onnx.packager import package
from pe_onnx.quantization import quantize

pytestmark = pytest.mark.slow

PACKAGES = ("@huggingface/transformers@4.3.1",)
LENGTHS, NEW = (20, 7, 13), 24
GROUPED = {"tie_word_embeddings": False, "num_key_value_heads": 2, "head_dim": 24}
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["hello", " a  b\n\t", "Grüße 🙂 東京", "it's 1234 \r\n x"]

SCRIPT = """
import { readFileSync } from 'node:fs';
import { env, AutoModelForCausalLM, AutoTokenizer, Tensor } from '@huggingface/transformers';

const { root, runs } = JSON.parse(readFileSync(0, 'utf8')), results = {};
Object.assign(env, { allowRemoteModels: false, localModelPath: root });
for (const [name, run] of Object.entries(runs)) {
  const options = { session_options: { intraOpNumThreads: 1 }, ...(run.dtype ? { dtype: run.dtype } : {}) };
  const model = await AutoModelForCausalLM.from_pretrained(run.folder, options);
  const longest = Math.max(...run.rows.map((row) => row.length));
  const batch = (value) => new Tensor('int64', BigInt64Array.from(run.rows.flatMap((row) =>
    [...Array(longest - row.length).fill(0n), ...row.map(value)])), [run.rows.length, longest]);
  const inputs = { input_ids: batch(BigInt), attention_mask: batch(() => 1n) };
  const made = await model.generate({ ...inputs, max_new_tokens: run.new, do_sample: false });
  results[name] = made.tolist().map((row) => row.slice(longest).map(Number));
  const tokenizer = await AutoTokenizer.from_pretrained(run.folder);
  results[name + ' ids'] = run.texts.map((text) => tokenizer(text).input_ids.tolist()[0].map(Number));
  results[name + ' texts'] = results[name + ' ids'].map((ids) => tokenizer.decode(ids));
  if (run.chat) results[name + ' chat'] =
    tokenizer.apply_chat_template(run.chat, { tokenize: false, add_generation_prompt: true });
}
console.log(JSON.stringify(results));
"""

WEB = """
import { existsSync, readFileSync } from 'node:fs';
import * as ort from 'onnxruntime-web';

const { root, runs } = JSON.parse(readFileSync(0, 'utf8')), results = {};
ort.env.wasm.numThreads = 1;
const int64 = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
for (const [name, run] of Object.entries(runs)) {
  const file = `${root}${run.folder}/onnx/model.onnx`, data = `${file}_data`;
  const externalData = existsSync(data) ? [{ path: 'model.onnx_data', data: readFileSync(data) }] : [];
  const session = await ort.InferenceSession.create(readFileSync(file), { executionProviders: ['wasm'], externalData });
  let ids = run.rows[0], sent = 0, cache = {};
  for (const { name, shape } of session.inputMetadata.filter(({ name }) => name.startsWith('past_key_values')))
    cache[name] = new ort.Tensor('float32', new Float32Array(0), [1, shape[1], 0, shape[3]]);
  for (results[name] = []; results[name].length < run.new; results[name].push(ids[0])) {
    const positions = ids.map((_, i) => sent + i);
    const inputs = { input_ids: int64(ids), attention_mask: int64(Array(sent + ids.length).fill(1)) };
    const outputs = await session.run({ ...inputs, position_ids: int64(positions), ...cache });
    const last = outputs.logits.data.slice(-outputs.logits.dims[2]);
    [sent, ids] = [sent + ids.length, [last.indexOf(Math.max(...last))]];
    for (const name of Object.keys(cache)) cache[name] = outputs[name.replace('past_key_values', 'present')];
  }
}
console.log(JSON.stringify(results));
"""


@pytest.fixture(scope="session")
def node(shared: Shared) -> Path:
    """A folder with the package installed."""
    return shared(PACKAGES, lambda folder: environments.make_node(folder, PACKAGES))


def run(node: Path, root: Path, runs: dict[str, Any], code: str = SCRIPT) -> dict[str, Any]:
    (script := root / "run.mjs").write_text(code)
    if not (root / "node_modules").exists():
        (root / "node_modules").symlink_to(node / "node_modules")
    given = json.dumps({"root": f"{root}/", "runs": runs})
    ran = subprocess.run(["node", script], input=given, capture_output=True, text=True, cwd=root, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 256, length).tolist() for length in LENGTHS]


def compare(found: dict[str, Any], name: str, bundle: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Our tokens, equal to those in ``found``. A row that has ended goes on there until all have."""
    model = pe_onnx.load(bundle, verify=False)
    ours = [result.tokens for result in model.generate(prompts, NEW)]
    assert [row[: len(want)] for row, want in zip(found[name], ours, strict=True)] == ours, name
    assert found[f"{name} ids"] == [model.tokenizer.encode(text) for text in TEXTS]
    assert found[f"{name} texts"] == TEXTS
    return ours


def test_our_decoders(node: Path, bundles: Bundles, tmp_path: Path) -> None:
    """A batch padded on the left, heads in groups and of a size that is not C / H."""
    kinds = {
        **{name: bundles(name, "portable", preset="tiny", config=GROUPED) for name in ("alibi", "learned", "rope")},
        "half": bundles("alibi", "portable", preset="tiny", config=GROUPED, dtype="fp16"),
    }
    for name, bundle in kinds.items():
        package(bundle, "transformersjs", tmp_path / name)
    asked = {name: {"folder": name, "rows": rows(), "new": NEW, "texts": TEXTS} for name in kinds}
    found = run(node, tmp_path, asked)
    made = {name: compare(found, name, bundle, rows()) for name, bundle in kinds.items()}
    assert len({json.dumps(made[name]) for name in ("alibi", "learned", "rope")}) == 3, (
        "the encoding makes a difference"
    )


def test_webassembly(node: Path, bundles: Bundles, tmp_path: Path) -> None:
    """What a browser has: onnxruntime-web, handed the weights as Transformers.js does there."""
    kinds = {name: bundles(name, "portable", preset="tiny", config=GROUPED) for name in ("alibi", "learned")}
    for name, bundle in kinds.items():
        package(bundle, "transformersjs", tmp_path / name)
    assert (tmp_path / "learned" / "onnx" / "model.onnx_data").exists()
    found = run(node, tmp_path, {name: {"folder": name, "rows": rows(), "new": NEW} for name in kinds}, WEB)
    assert found == {name: pe_onnx.load(bundle).generate(rows()[0], NEW).tokens for name, bundle in kinds.items()}
    assert found["alibi"] != found["learned"]


def test_smollm2(node: Path, smollm2_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """Two variants in one package, weights in files of their own; whichever is asked for, by default the first."""
    plain = smollm2_bundles("portable")
    quantize(plain, tmp_path / "q", verify=False)
    package([plain, tmp_path / "q"], "transformersjs", tmp_path / "p")
    assert (tmp_path / "p" / "onnx" / "model.onnx_data").samefile(plain / "model.onnx.data")
    tokenizer = pe_onnx.load(plain, verify=False).tokenizer
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(CHAT), False),
        tokenizer.encode("The capital of France is"),
    ]
    run_of = {"folder": "p", "rows": prompts, "new": NEW, "texts": TEXTS, "chat": CHAT}
    found = run(node, tmp_path, {"fp32": run_of, "q4": {**run_of, "dtype": "q4", "rows": prompts[:1]}})
    made = compare(found, "fp32", plain, prompts)
    assert tokenizer.decode(made[0]).startswith("The capital of France is Paris")
    assert compare(found, "q4", tmp_path / "q", prompts[:1])[0] != made[0], "the variants differ"
    assert found["fp32 chat"] == tokenizer.apply_chat_template(CHAT)
