"""A function in a process of its own: nothing of ours is loaded there but what the function itself imports.

For what a process can tell only once: how long a load takes, and how much memory was taken at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from pe_onnx import errors
from pe_onnx.errors import BundleError, PeOnnxError

CHILD = """
import importlib, json, sys
path, function, arguments = json.load(sys.stdin)
sys.path[:] = path
from pe_onnx.errors import PeOnnxError
module, name = function.split(":")
try:
    result = {"value": getattr(importlib.import_module(module), name)(**arguments)}
except PeOnnxError as error:
    result = {"error": type(error).__name__, "text": str(error)}
print("\\n" + json.dumps(result))
"""


def call_fresh(function: str, **arguments: Any) -> Any:
    """``call_fresh("pe_onnx.latency:load_and_peak", folder="bundle")``; arguments and result are JSON values.

    Raises what the function raised of our own errors, and BundleError where the process died.
    """
    given = json.dumps([sys.path, function, arguments])  # a prompt may be longer than an argument can be
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, text=True)
    try:
        if done.returncode:
            raise ValueError
        result = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise BundleError(f"a process to measure in died: {last}") from None
    if "error" in result:
        kind = getattr(errors, result["error"], PeOnnxError)
        raise kind(result["text"])
    return result["value"]


def status_bytes(field: str) -> int | None:
    """``VmRSS``, resident now, or ``VmHWM``, the most there has been, of this process; None where nobody says.

    Linux says it in /proc, where no parent's size is counted; elsewhere the most is getrusage's.
    """
    try:
        with open("/proc/self/status") as lines:
            return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (most if sys.platform == "darwin" else 1024 * most) if field == "VmHWM" else None
