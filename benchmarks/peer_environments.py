"""The environments that the peers of ``peers.py`` live in: a venv each, made once, with versions pinned.

One that cannot be made is recorded with its reason, and its contestants are left out, until its folder is removed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peer_contestants import GENAI, LLAMA_CPP, OPTIMUM, OURS, interpreter

REQUIREMENTS: dict[str, list[str]] = {
    GENAI: ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "numpy==2.4.6"],
    LLAMA_CPP: ["llama-cpp-python==0.3.36"],
    OPTIMUM: ["torch==2.13.0", "optimum[onnxruntime]"],
}
BUILD_VARIABLES = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
"""llama-cpp-python has no wheels and is compiled, for this machine's instructions, without its part for images."""
SHOWN = ("onnxruntime-genai", "onnxruntime", "llama-cpp-python", "optimum", "optimum-onnx", "transformers", "torch")
RECORD = "environment.json"


def environment(name: str, cache: Path) -> dict[str, Any]:
    """``python``, ``versions`` and ``setup_s``, or ``error``, why there is none. Made where it is missing."""
    if name == OURS:
        return {"python": str(interpreter()), "versions": _versions(interpreter()), "setup_s": 0.0}
    folder = cache / name
    record = folder / RECORD
    if record.exists():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    result = _make(name, folder)
    result["setup_s"] = round(time.perf_counter() - begin, 1)
    record.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _make(name: str, folder: Path) -> dict[str, Any]:
    python = folder / "env" / "bin" / "python"
    log = folder / "setup.log"
    commands = [
        [sys.executable, "-m", "venv", str(folder / "env")],
        [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]],
    ]
    for command in commands:
        with log.open("a") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **BUILD_VARIABLES})
        if done.returncode:
            return {"error": last_error(log.read_text("utf-8", "replace"))}
    return {"python": str(python), "versions": _versions(python)}


def last_error(log: str) -> str:
    """The line of a log that says why: the last that begins like an error, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error", "Error")) or "Error:" in line]
    return without_places((errors or lines or ["no output"])[-1])[:300]


def without_places(text: str) -> str:
    """Addresses left out and paths cut to their last part: what a committed result may say of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "", re.sub(r"https?://[^\s'\"<>)]+", "(address)", text))


def _versions(python: Path) -> dict[str, str]:
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True)
    installed = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listed.stdout)}
    return {name: installed[name] for name in SHOWN if name in installed}
