"""Replicas in Ray Serve, in a virtual environment of its own: one is killed under load, and a bundle is updated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import pytest
from checkout import ROOT

import pe_onnx

pytestmark = pytest.mark.slow

Bundles = Callable[..., Path]
Shared = Callable[[object, Callable[[Path], object]], Path]
PACKAGES = (
    "ray[serve]==2.60.0",
    *("onnxruntime==1.32.0", "numpy==2.4.6", "tokenizers==0.23.3", "Jinja2==3.1.6", "click==8.5.1", "rich==15.0.0"),
    *("fastapi==0.165.0", "uvicorn==0.54.0", "httptools==0.9.0", "uvloop==0.23.0", "prometheus-client==0.26.0"),
    "openai==3.57.0",
)
PROMPTS = [f"prompt {i}" for i in range(20)]
NEW = 24

SCRIPT = """
import json, os, random, signal, subprocess, sys, threading, time
import openai, ray
from ray import serve
from pe_onnx.server import replicas

asked = json.load(sys.stdin)
ray.init(configure_logging=False, include_dashboard=False, num_cpus=4, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": asked["port"]})
address = f"http://127.0.0.1:{asked['port']}/v1"


def deploy(bundle):
    arguments = {"bundle": bundle, "name": "m", "replicas": 2, "slots": 8, "max_queue": 200, "max_length": 256}
    serve.run(replicas.build(arguments), name="pe_onnx", route_prefix="/")


def running():
    states = serve.status().applications["pe_onnx"].deployments["Replica"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items()}


def processes():
    return set(subprocess.run(["pgrep", "-f", "^ray::ServeReplica"], capture_output=True, text=True).stdout.split())


def client(number):
    rng = random.Random(number)
    with openai.OpenAI(base_url=address, api_key="none", max_retries=8, timeout=60) as http:
        while not stop.is_set():
            prompt = rng.choice(asked["prompts"])
            try:
                answer = http.completions.create(model="m", prompt=prompt, max_tokens=asked["new"], temperature=0)
                answers.append((prompt, answer.choices[0].text))
            except Exception as error:
                failures.append(repr(error))


def until(condition, seconds=60):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.1)


deploy(asked["bundles"][0])
answers, failures, stop, marks = [], [], threading.Event(), {}
threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
until(lambda: len(answers) > 40)
listed = processes()
before = len(answers)
os.kill(int(min(listed)), signal.SIGKILL)
until(lambda: len(answers) > before + 40)
marks["replicas"] = len(listed)
until(lambda: processes() - listed and running() == {"RUNNING": 2})
marks["killed_at"] = before
deploy(asked["bundles"][1])
marks["updated_at"] = len(answers)
until(lambda: len(answers) > marks["updated_at"] + 40)
stop.set()
for thread in threads:
    thread.join()
serve.shutdown()
ray.shutdown()
print(json.dumps({"answers": answers, "failures": failures, "marks": marks}))
"""


@pytest.fixture(scope="module")
def python(shared: Shared) -> Path:
    return environments.interpreter(shared("ray", lambda folder: environments.make_python(folder, PACKAGES)))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def two(bundles: Bundles) -> list[Path]:
    return [bundles(name, "ort", preset="tiny", config={"tie_word_embeddings": False}) for name in ("rope", "alibi")]


def test_no_request_is_lost_when_a_replica_dies_or_the_bundle_changes(python: Path, two: list[Path]) -> None:
    asked = {"bundles": [str(bundle) for bundle in two], "prompts": PROMPTS, "new": NEW, "port": 8417}
    ran = subprocess.run(
        [str(python), "-c", SCRIPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    expected = []
    for bundle in two:
        model = pe_onnx.load(bundle)
        expected.append({prompt: model.generate(prompt, NEW).text for prompt in PROMPTS})
    assert all(expected[0][prompt] != expected[1][prompt] for prompt in PROMPTS)
    assert found["failures"] == []
    marks, kinds = found["marks"], []
    for prompt, text in found["answers"]:
        assert text in (expected[0][prompt], expected[1][prompt]), prompt
        kinds.append(text == expected[1][prompt])
    assert marks["replicas"] == 2
    assert not any(kinds[: marks["killed_at"]])
    assert all(kinds[marks["updated_at"] + 8 :])  # eight clients had asked before


def test_the_command(python: Path, two: list[Path], tmp_path: Path) -> None:
    """``pe-onnx serve --ray`` answers, and ends when it is interrupted; --ray-config writes what build reads."""
    command = [str(python), "-c", "from pe_onnx.cli import main; main()", "serve", str(two[0])]
    options = ["--ray", "--port", "8418", "--replicas", "1-2", "--name", "m", "--max-length", "128"]
    process = subprocess.Popen(
        [*command, *options],
        env=environment(),
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    code = (
        "import openai, time\n"
        "with openai.OpenAI(base_url='http://127.0.0.1:8418/v1', api_key='none', max_retries=0) as client:\n"
        "    for _ in range(120):\n"
        "        try:\n"
        "            print(client.completions.create(model='m', prompt='hello', max_tokens=9, temperature=0).usage)\n"
        "            break\n"
        "        except (openai.APIConnectionError, openai.NotFoundError, openai.InternalServerError):\n"
        "            time.sleep(0.5)\n"
    )
    try:
        asked = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=200)
        process.send_signal(signal.SIGINT)
        assert "completion_tokens=9" in asked.stdout, asked.stderr
        assert process.wait(90) in (0, 130)
    finally:
        process.kill()
    config = tmp_path / "serve.yaml"
    wrote = subprocess.run(
        [*command, "--ray-config", str(config), "--replicas", "2-5", "--slots", "4", "--api-key", "s3cret"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=100,
    )
    assert "PE_ONNX_API_KEY" in wrote.stderr, wrote.stderr
    assert "s3cret" not in config.read_text()
    assert "needs_key: true" in config.read_text()
    read = (
        "import sys, yaml\n"
        "from pe_onnx.server.replicas import build\n"
        "application = yaml.safe_load(open(sys.argv[1]))['applications'][0]\n"
        "assert application['import_path'] == 'pe_onnx.server.replicas:build'\n"
        "print(build(application['args']))"
    )
    built = subprocess.run(
        [str(python), "-c", read, str(config)], capture_output=True, text=True, env=environment(), timeout=100
    )
    assert "Application" in built.stdout, built.stderr
