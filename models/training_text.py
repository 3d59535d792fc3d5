"""What the small decoders are trained on: the King James Version of the Bible, 4 MB of English in the public domain.

Debian's packages ``bible-kjv`` and ``bible-kjv-text`` carry it: the text is compressed in a form of its own, which the
program of the first reads. One verse stands on a line. The end of a text is never trained on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pe_onnx.errors import ConfigError, system_reason

PACKAGES = ("bible-kjv", "bible-kjv-text")
WHOLE = "gen1:1-rev22:21"
HELD_OUT_BYTES = 112 << 10
"""56 windows of 2,048."""


def read(path: Path | None) -> bytes:
    """A file of the user's own, or the Bible. Raises ConfigError where it is not to be had, or is too short."""
    try:
        text = bible() if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--data {path} cannot be read: {system_reason(error)}") from None
    if len(text) < 4 * HELD_OUT_BYTES:
        named = "the Bible of this system" if path is None else f"--data {path}"
        raise ConfigError(f"{named} holds {len(text):,} bytes; {4 * HELD_OUT_BYTES:,} are the least")
    return text


def split(text: bytes) -> tuple[bytes, bytes]:
    """What is trained on, and what is held out, which begins with a whole character."""
    at = len(text) - HELD_OUT_BYTES
    while at < len(text) and 0x80 <= text[at] < 0xC0:  # the inside of a character in UTF-8
        at += 1
    return text[:at], text[at:]


def bible() -> bytes:
    """From the installed packages, or from Debian's without installing them."""
    if program := shutil.which("bible"):
        return _verses([program])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True, text=True)
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise ConfigError(
                f"{' and '.join(PACKAGES)} cannot be had from Debian: {said[-1] if said else error}; give --data FILE"
            ) from None
        return _verses([str(folder / "root/usr/bin/bible"), "-d", "bible.data"], folder / "root/usr/lib")


def _verses(command: list[str], folder: Path | None = None) -> bytes:
    """Without the ``Ge1:1`` before each. folder: to be in; the program looks for no absolute path."""
    try:
        whole = [*command, "-f", "-l", "1000000", WHOLE]
        said = subprocess.run(whole, cwd=folder, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{command[0]} does not print the Bible: {error}; give --data FILE") from None
    return re.sub(rb"^\S+ ", b"", said, flags=re.MULTILINE)
