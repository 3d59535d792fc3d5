"""What a page in a browser needs of npm: packages of one exact version, kept once for a user.

``npm pack`` fetches a package from the registry that npm is set up for. The archive must have the SHA-512 that is
written here; it is kept below the user's cache folder, where a later call finds it without a network. A machine
without npm is given a folder with the packages installed in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pe_onnx.errors import ConfigError, ExportError, MissingDependencyError, first_line, system_reason

WAIT_S = 900


@dataclass(frozen=True)
class Package:
    """A version of a package, and what is taken of it."""

    name: str
    version: str
    sha512: str
    """Of the archive, in base64, as npm writes it."""
    files: Mapping[str, str]
    """Path inside the package to the name it is given."""

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


ONNXRUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    {
        f"dist/{name}": name
        for name in (
            "ort.wasm.min.mjs",
            "ort-wasm-simd-threaded.mjs",
            "ort-wasm-simd-threaded.wasm",
            "ort.min.mjs",
            "ort-wasm-simd-threaded.jsep.mjs",
            "ort-wasm-simd-threaded.jsep.wasm",
        )
    },
)
"""Two builds: the small one for WASM, and one with WebGPU. The build ``asyncify`` is not used: it has no float64, in
which the angles of a rotation are made, and its attention was wrong in our runs (site.py)."""
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    {"dist/tokenizers.min.mjs": "tokenizers.mjs", "LICENSE": "LICENSE"},
)
JINJA = Package(
    "@huggingface/jinja",
    "0.5.11",
    "YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
    {"dist/index.js": "jinja.mjs", "LICENSE": "LICENSE"},
)


def copy_package(package: Package, folder: Path, npm_folder: Path | None = None) -> None:
    """Put a package's files into ``folder``, which is made.

    npm_folder: where ``npm install`` was run, or its node_modules; nothing is fetched then. Raises ConfigError for a
    folder without this version, MissingDependencyError where there is no npm, ExportError where it fails.
    """
    folder.mkdir(parents=True)
    if npm_folder is not None:
        source = _installed(package, npm_folder)
        for inside, name in package.files.items():
            shutil.copyfile(source / inside, folder / name)
        return
    with tarfile.open(_archive(package)) as archive:
        for inside, name in package.files.items():
            member = archive.extractfile(f"package/{inside}")
            assert member is not None, "the checksum is right"
            with member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def _installed(package: Package, npm_folder: Path) -> Path:
    places = [npm_folder / "node_modules" / package.name, npm_folder / package.name]
    place = next((place for place in places if (place / "package.json").is_file()), None)
    if place is None:
        raise ConfigError(f"--npm-folder {npm_folder} has no {package.name}: run npm install {package.spec} there")
    try:
        version = json.loads((place / "package.json").read_text("utf-8")).get("version")
    except (ValueError, AttributeError):
        version = None
    if version != package.version:
        raise ConfigError(
            f"--npm-folder {npm_folder} has {package.name} {version}, not {package.version}: run npm install "
            f"{package.spec} there"
        )
    missing = next((inside for inside in package.files if not (place / inside).is_file()), None)
    if missing is not None:
        raise ConfigError(f"--npm-folder {npm_folder} has no {missing} of {package.spec}: install it again")
    return place


def cache_folder() -> Path:
    """Where archives are kept: ``$XDG_CACHE_HOME/pe-onnx``, or ``~/.cache/pe-onnx``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pe-onnx"


def _archive(package: Package) -> Path:
    """The archive in the cache, fetched where it is not there or not whole."""
    place = cache_folder() / f"{package.name.replace('@', '').replace('/', '-')}-{package.version}.tgz"
    if place.is_file() and _sha512(place) == package.sha512:
        return place
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            f"npm is not installed, and {package.spec} is not in {cache_folder()}: install Node.js, or give "
            f"--npm-folder with the package installed elsewhere"
        )
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_folder()) as partial:
            _pack(npm, package, Path(partial))
            made = next(Path(partial).glob("*.tgz"), None)
            if made is None or _sha512(made) != package.sha512:
                raise ExportError(f"npm gave a {package.spec} whose SHA-512 is not the known one; see its registry")
            os.replace(made, place)
    except OSError as error:
        raise ExportError(f"cannot write {cache_folder()}: {system_reason(error)}") from error
    return place


def _pack(npm: str, package: Package, folder: Path) -> None:
    command = [npm, "pack", package.spec, "--pack-destination", str(folder), "--silent", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"npm pack {package.spec} took more than {WAIT_S} s; give --npm-folder") from None
    if done.returncode:
        reason = first_line(RuntimeError(done.stderr or done.stdout or f"exit code {done.returncode}"))
        raise ExportError(f"npm pack {package.spec} failed: {reason}; give --npm-folder for a machine without network")


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
