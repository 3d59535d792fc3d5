"""A ``pe-onnx serve`` in a process of its own, and bundles to serve."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_chat(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle that has a chat template."""
    shutil.copytree(bundle, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return folder


@dataclass
class Served:
    """A server that takes requests."""

    process: subprocess.Popen[str]
    address: str
    errors: list[str] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"{self.address}/v1"

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        text = httpx.get(f"{self.address}/metrics", timeout=30).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def wait_until(self, name: str, value: float, seconds: float = 20) -> float:
        """Seconds until a metric has a value."""
        begin = time.monotonic()
        while self.metric(name) != value:
            assert time.monotonic() - begin < seconds, f"{name} is {self.metric(name)} and not {value}"
            time.sleep(0.005)
        return time.monotonic() - begin


@contextmanager
def serve(bundle: Path, *options: object, port: int = 0) -> Iterator[Served]:
    """Serve a bundle until the block ends."""
    code = "from pe_onnx.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(bundle), "--port", str(port), *map(str, options)]
    environment = {key: value for key, value in os.environ.items() if key != "PE_ONNX_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    errors: list[str] = []
    address = None
    for line in process.stderr:
        errors.append(line)
        if found := re.search(r" at (http://\S+)/v1,", line):
            address = found[1]
            break
    assert address is not None, "".join(errors)
    threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True).start()
    try:
        yield Served(process, address, errors)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
