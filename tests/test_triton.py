"""Triton's model repository: its configuration, and the sequence that the server would run, on onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import environments
import numpy as np
import onnxruntime
import pbtxt
import pytest
import yaml
from conftest import Bundles, Shared

import pe_onnx
from pe_onnx.packager import package
from pe_onnx.packages import Options

CLIENT = ("tritonclient[grpc]==2.73.0",)
UNTIED = {"tie_word_embeddings": False}
FAST = ("rope", "t5_bias", "learned")
ENCODINGS = (*FAST, "alibi", "none", "sinusoidal")
PROMPT, NEW = 20, 24
DTYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64}
Config = dict[str, list[Any]]


def prompt() -> list[int]:
    return np.random.default_rng(0).integers(1, 256, PROMPT).tolist()


def ours(bundle: Path, tokens: list[int], new: int = NEW) -> list[int]:
    return pe_onnx.load(bundle).generate(tokens, new, ignore_eos=True).tokens


def model(repository: Path, name: str) -> tuple[Config, onnxruntime.InferenceSession]:
    session = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    return pbtxt.parse((repository / name / "config.pbtxt").read_text()), session


def first_states(config: Config, fill: float = 0.0) -> dict[str, np.ndarray]:
    """As ``SequenceStates::Initialize`` of Triton's core makes them: one row where ``max_batch_size`` is not 0, each
    variable axis 1; the content is ``initial_state``'s, whose size must be the same."""
    states = {}
    for state in config["sequence_batching"][0]["state"]:
        shape = [1] * bool(config["max_batch_size"][0]) + [1 if size == -1 else size for size in state["dims"]]
        (initial,) = state["initial_state"]
        assert initial["zero_data"] == [True]
        assert initial["name"] != [""]
        assert initial["data_type"] == state["data_type"]
        assert [1, *initial["dims"]] == shape
        states[state["input_name"][0]] = np.full(shape, fill, DTYPES[state["data_type"][0]])
    return states


def serve(repository: Path, name: str, new: int, masked: bool = True, fill: float = 0.0) -> list[int]:
    """The requests of README.txt, one sequence, the outputs of each run the states of the next."""
    config, session = model(repository, name)
    states, pairs = first_states(config, fill), config["sequence_batching"][0]["state"]
    tokens, sent, made = prompt(), 0, []
    while len(made) < new:
        request = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.array([[0 if masked else 1] + [1] * (sent + len(tokens))]),
            "position_ids": np.arange(sent, sent + len(tokens))[None],
        }
        check_request(config, request)
        outputs = [pair["output_name"][0] for pair in pairs]
        logits, *presents = session.run(["logits", *outputs], {**request, **states})
        states = {pair["input_name"][0]: present for pair, present in zip(pairs, presents, strict=True)}
        sent += len(tokens)
        tokens = [int(logits[0, -1].argmax())]
        made += tokens
    return made


def check_request(config: Config, request: dict[str, np.ndarray]) -> None:
    """What the server checks of a request: inputs by name, dtype and shape, and no more rows than a batch has."""
    assert {entry["name"][0] for entry in config["input"]} == request.keys()
    for entry in config["input"]:
        values = request[entry["name"][0]]
        assert values.dtype == DTYPES[entry["data_type"][0]]
        assert 1 <= len(values) <= config["max_batch_size"][0]
        assert len(values.shape) == 1 + len(entry["dims"])
        assert all(size in (-1, have) for size, have in zip(entry["dims"], values.shape[1:], strict=True))


def packaged(bundles: Bundles, encoding: str, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    bundle = bundles(encoding, "portable", preset="tiny", config=UNTIED, **options)
    package(bundle, "triton", tmp_path / "r", Options(name="m"))
    return bundle, tmp_path / "r"


@pytest.mark.parametrize("encoding", [pytest.param(e, marks=() if e in FAST else pytest.mark.slow) for e in ENCODINGS])
def test_a_sequence_as_triton_feeds_it(encoding: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle, repository = packaged(bundles, encoding, tmp_path)
    expected = ours(bundle, prompt())
    assert len(set(expected)) > NEW // 4
    assert serve(repository, "m", NEW) == expected
    assert serve(repository, "m", NEW, fill=3.0) == expected, "what the first slot holds makes no difference"
    assert serve(repository, "m", NEW, masked=False, fill=3.0) != expected, "the mask is what leaves it out"


@pytest.mark.slow
def test_half_precision(bundles: Bundles, tmp_path: Path) -> None:
    bundle, repository = packaged(bundles, "alibi", tmp_path, dtype="fp16")
    assert serve(repository, "m", NEW) == ours(bundle, prompt())


@pytest.mark.parametrize("name", ["m", "m_stateless"])
@pytest.mark.parametrize("logits", ["all", "last"])
def test_the_configuration_is_that_of_the_graph(name: str, logits: str, bundles: Bundles, tmp_path: Path) -> None:
    """What the backend's ValidateInputs and ValidateOutputs compare, the batch in front."""
    _, repository = packaged(bundles, "alibi", tmp_path, logits=logits)
    config, session = model(repository, name)
    states = config["sequence_batching"][0]["state"] if name == "m" else []
    for kind, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        known = {entry["name"][0]: (entry["data_type"][0], entry["dims"]) for entry in config[kind]}
        known |= {state[f"{kind}_name"][0]: (state["data_type"][0], state["dims"]) for state in states}
        graph = {value.name: value for value in values}
        assert known.keys() == graph.keys()
        for entry, (dtype, dims) in known.items():
            shape = [size if isinstance(size, int) else -1 for size in graph[entry].shape]
            assert [-1, *dims] == shape, entry
            assert {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}[dtype] == graph[entry].type
    assert config["max_batch_size"] == [1 if name == "m" else 8]
    assert config["name"] == [name]
    assert config["backend"] == ["onnxruntime"]


@pytest.mark.parametrize("first", [0, 1])
def test_the_stateless_model(first: int, bundles: Bundles, tmp_path: Path) -> None:
    """A batch padded on the left, from a cache of no tokens or of Triton's one slot."""
    bundle, repository = packaged(bundles, "alibi", tmp_path)
    config, session = model(repository, "m_stateless")
    rows = [prompt(), prompt()[:7]]
    mask = np.array([[0] * (PROMPT - len(row)) + [1] * len(row) for row in rows])
    ids = np.array([[0] * (PROMPT - len(row)) + row for row in rows])
    caches = {
        entry["name"][0]: np.zeros([2, entry["dims"][0], first, entry["dims"][2]], np.float32)
        for entry in config["input"][3:]
    }
    mask, made = np.concatenate([np.zeros((2, first), int), mask], 1), []
    for _ in range(5):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        request = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}
        check_request(config, request)
        logits, *presents = session.run([entry["name"][0] for entry in config["output"]], request)
        caches = dict(zip(caches, presents, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((2, 1), int)], 1)
        made.append(ids[:, 0])
    assert np.array(made).T.tolist() == [ours(bundle, row, 5) for row in rows]


def test_the_readme_says_what_was_sent(bundles: Bundles, tmp_path: Path) -> None:
    _, repository = packaged(bundles, "alibi", tmp_path)
    text = (repository / "README.txt").read_text()
    for line in ("input_ids       int64 [1, n]", "attention_mask  int64 [1, 1 + n]    0, then n ones", "m_stateless"):
        assert line in text


def test_kserve(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("alibi", "portable", preset="tiny", config=UNTIED)
    package(bundle, "kserve", tmp_path / "k", Options(name="My_model.1", storage_uri="pvc://claim/repository"))
    service = yaml.safe_load((tmp_path / "k" / "inference_service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"] == {"name": "my-model-1"}, "what Kubernetes allows"
    assert service["spec"]["predictor"]["model"] == {
        "modelFormat": {"name": "onnx"},
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "storageUri": "pvc://claim/repository",
    }
    assert serve(tmp_path / "k" / "repository", "My_model.1", NEW) == ours(bundle, prompt())


SCRIPT = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

configs = [text_format.Parse(text, model_config_pb2.ModelConfig()) for text in json.load(sys.stdin)]
print(json.dumps([json_format.MessageToDict(config, preserving_proto_field_name=True) for config in configs]))
"""


@pytest.fixture(scope="session")
def client(shared: Shared) -> Path:
    """An environment with tritonclient."""
    return shared(CLIENT, lambda folder: environments.make_python(folder, CLIENT))


@pytest.mark.slow
def test_triton_reads_the_configuration(client: Path, bundles: Bundles, tmp_path: Path) -> None:
    """By the schema that tritonclient carries; a field that it has not, or of another type, is an error."""
    _, repository = packaged(bundles, "alibi", tmp_path)
    texts = [(repository / name / "config.pbtxt").read_text() for name in ("m", "m_stateless")]
    read = json.loads(environments.run_python(client, SCRIPT, json.dumps(texts)))
    for text, message in zip(texts, read, strict=True):
        assert _same(pbtxt.parse(text), message)
    assert not _same(pbtxt.parse(texts[0]), read[1])


def _same(plain: Any, message: Any) -> bool:
    """Whether both readings hold the same; MessageToDict writes int64 as text, and a single value bare."""
    if isinstance(message, dict):
        return (
            isinstance(plain, dict)
            and plain.keys() == message.keys()
            and all(_same(plain[key], value if isinstance(value, list) else [value]) for key, value in message.items())
        )
    if isinstance(message, list):
        return len(plain) == len(message) and all(_same(a, b) for a, b in zip(plain, message, strict=True))
    return str(plain) == str(message)
