"""The site that ``pe-onnx web`` writes, without a browser and without a network."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import npm_doubles
import pytest
from command_line import refused
from conftest import Bundles, Cli
from folder_contents import names, snapshot

from pe_onnx import npm_packages
from pe_onnx.bundle import Bundle, read_bundle
from pe_onnx.errors import ConfigError, ExportError, MissingDependencyError
from pe_onnx.site import PAGE, RECORD, check_bundle, webgpu_refusal, write_site

LINKS = re.compile(r"(?:https?:)?//[\w.-]+\.\w+|['\"(]data:")
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return npm_doubles.write(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def rope(bundles: Bundles) -> Path:
    return bundles("rope", "ort", preset="tiny")


def test_a_site(rope: Path, npm: Path, tmp_path: Path, run: Cli) -> None:
    before = snapshot(rope)
    done = run("web", rope, "-o", "made/site", "--npm-folder", npm, "--title", "Little <model>")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "python -m http.server -d made/site\n"
    assert "WASM and WebGPU" in done.stderr
    site = tmp_path / "made" / "site"
    record = json.loads((site / RECORD).read_text("utf-8"))
    there = {str(path.relative_to(site)): path.stat().st_size for path in site.rglob("*") if path.is_file()}
    there.pop(RECORD)
    assert record["files"] == there
    assert {path.name for path in PAGE.iterdir()} - {"onnxruntime-web.LICENSE"} <= there.keys()
    assert "vendor/onnxruntime-web/LICENSE" in there
    assert (site / "bundle/model.onnx").read_bytes() == (rope / "model.onnx").read_bytes()
    assert record["title"] == "Little <model>"
    assert record["decoder"]["caches"] == read_bundle(rope).manifest["model"]["caches"]
    assert record["encoding"]["parameters"]["theta"] == 10000.0
    assert names(tmp_path / "made") == ["site"]
    assert snapshot(rope) == before


def test_every_file_is_its_own() -> None:
    """A second name of a bundle's weights would make onnx-ir refuse the bundle."""
    assert "os.link" not in Path(write_site.__code__.co_filename).read_text("utf-8")


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_no_file_of_the_page_names_another_server(path: Path) -> None:
    assert not LINKS.search(path.read_text("utf-8").replace(NAMESPACE, ""))


def test_that_search_finds_servers() -> None:
    assert LINKS.search('import "https://cdn.example/x.js"')
    assert LINKS.search('<img src="//cdn.example/x.png">')


def test_every_file_that_the_page_names_is_there(rope: Path, npm: Path, tmp_path: Path) -> None:
    write_site(rope, tmp_path / "site", npm_folder=npm)
    named = set()
    for path in PAGE.iterdir():
        text = path.read_text("utf-8")
        named |= set(re.findall(r'(?:from |src=|href=|Worker\()"(?:\./)?([\w.]+)"', text))
    assert {"page.js", "worker.js", "style.css", "icon.svg", "curves.js"} <= named
    assert all((tmp_path / "site" / name).is_file() for name in named)


@pytest.mark.parametrize("place", ["a folder of notes", "a bundle"])
def test_force_replaces_sites_only(place: str, rope: Path, npm: Path, tmp_path: Path, run: Cli) -> None:
    site = tmp_path / "site"
    if place == "a bundle":
        import shutil

        shutil.copytree(rope, site)
    else:
        site.mkdir()
        (site / "notes.txt").write_text("mine")
    before = snapshot(site)
    refused(run("web", rope, "-o", site, "--npm-folder", npm), 2, "exists")
    refused(run("web", rope, "-o", site, "--npm-folder", npm, "--force"), 2, "not a site")
    assert snapshot(site) == before


def test_force_replaces_a_site(rope: Path, npm: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_site(rope, site, npm_folder=npm, title="old")
    (site / "left over").touch()
    with pytest.raises(ConfigError, match="exists"):
        write_site(rope, site, npm_folder=npm)
    write_site(rope, site, npm_folder=npm, title="new", force=True)
    assert json.loads((site / RECORD).read_text())["title"] == "new"
    assert not (site / "left over").exists()


def test_what_fails_leaves_the_old_site(rope: Path, npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    write_site(rope, site, npm_folder=npm)
    before = snapshot(site)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pe_onnx.site._tokenizer", fail)
    with pytest.raises(ExportError, match="No space left"):
        write_site(rope, site, npm_folder=npm, force=True)
    assert snapshot(site) == before
    assert names(tmp_path) == ["site"]


def changed(folder: Path, **entries: Any) -> Bundle:
    """A bundle whose manifest says other things, as ``model__encoder``."""
    manifest = copy.deepcopy(dict(read_bundle(folder).manifest))
    for path, value in entries.items():
        *parents, last = path.split("__")
        entry = manifest
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
    return Bundle(folder, manifest)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"model__encoder": {"width": 64, "caches": [[4, 16], [4, 16]], "start_token": 0}}, "encoder-decoder"),
        ({"dtype": "bf16"}, "bf16"),
        ({"model__windows": [0, 32]}, "--target portable"),
        ({"files": {"model.onnx.data": {"bytes": 3 << 30, "sha256": ""}}}, "3.0 GiB"),
    ],
)
def test_what_no_browser_runs(entries: dict[str, Any], reason: str, rope: Path) -> None:
    check_bundle(changed(rope))
    with pytest.raises(ConfigError, match=reason):
        check_bundle(changed(rope, **entries))


def test_it_is_refused_before_anything_is_fetched(rope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_onnx.site.read_bundle", lambda folder: changed(rope, dtype="bf16"))
    monkeypatch.setattr("pe_onnx.npm_packages.copy_package", lambda *args: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match="bf16"):
        write_site(rope, tmp_path / "site")
    assert names(tmp_path) == []


def test_what_webgpu_gets_wrong(rope: Path) -> None:
    assert webgpu_refusal(changed(rope)) is None
    assert webgpu_refusal(changed(rope, model__score_heads=4, target="portable")) is None
    assert "bias" in str(webgpu_refusal(changed(rope, model__score_heads=4)))
    assert "int8" in str(webgpu_refusal(changed(rope, quantization={"bits": None, "cache": "int8"})))


def test_a_bias_is_what_the_manifest_says(bundles: Bundles) -> None:
    assert webgpu_refusal(read_bundle(bundles("alibi", "ort", preset="tiny")))
    assert webgpu_refusal(read_bundle(bundles("alibi", "portable", preset="tiny"))) is None


def test_npm_folders_without_the_packages(rope: Path, npm: Path, tmp_path: Path, run: Cli) -> None:
    refused(run("web", rope, "-o", "s", "--npm-folder", tmp_path), 2, "no onnxruntime-web", "npm install")
    npm_doubles.write(tmp_path / "old")
    package = tmp_path / "old/node_modules/onnxruntime-web"
    (package / "package.json").write_text('{"version": "1.20.0"}')
    refused(run("web", rope, "-o", "s", "--npm-folder", tmp_path / "old"), 2, "1.20.0, not 1.30.0")
    (package / "package.json").write_text('{"version": "1.30.0"}')
    (package / "dist/ort.min.mjs").unlink()
    refused(run("web", rope, "-o", "s", "--npm-folder", tmp_path / "old"), 2, "dist/ort.min.mjs")
    write_site(rope, tmp_path / "inside", npm_folder=npm / "node_modules")
    assert not (tmp_path / "s").exists()


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def fake_npm(folder: Path, script: str) -> None:
    path = folder / "bin" / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_without_npm(rope: Path, no_cache: Path) -> None:
    with pytest.raises(MissingDependencyError, match="--npm-folder"):
        write_site(rope, no_cache / "site")
    assert not (no_cache / "site").exists()


def test_npm_that_fails(rope: Path, no_cache: Path) -> None:
    fake_npm(no_cache, "echo 'npm error network' >&2; exit 1")
    with pytest.raises(ExportError, match="npm error network"):
        write_site(rope, no_cache / "site")


def test_an_archive_that_is_not_the_known_one(rope: Path, no_cache: Path) -> None:
    fake_npm(no_cache, 'echo other > "$4/onnxruntime-web-1.30.0.tgz"')
    with pytest.raises(ExportError, match="SHA-512"):
        write_site(rope, no_cache / "site")
    assert names(npm_packages.cache_folder()) == []


def test_an_archive_is_fetched_once(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import hashlib
    import tarfile

    source = no_cache / "package"
    source.mkdir()
    (source / "x.mjs").write_text("x")
    with tarfile.open(no_cache / "a.tgz", "w:gz") as archive:
        archive.add(source, "package")
    digest = base64.b64encode(hashlib.sha512((no_cache / "a.tgz").read_bytes()).digest()).decode()
    package = npm_packages.Package("@some/thing", "1.2.3", digest, {"x.mjs": "y.mjs"})
    fake_npm(no_cache, f'/bin/cp {no_cache}/a.tgz "$4/some-thing-1.2.3.tgz"')
    npm_packages.copy_package(package, no_cache / "one")
    fake_npm(no_cache, "exit 1")
    npm_packages.copy_package(package, no_cache / "two")
    assert (no_cache / "two/y.mjs").read_text() == "x"
    next(npm_packages.cache_folder().glob("*.tgz")).write_text("broken")
    with pytest.raises(ExportError, match="failed"):
        npm_packages.copy_package(package, no_cache / "three")


def test_mistakes(rope: Path, tmp_path: Path, run: Cli) -> None:
    refused(run("web", rope), 2, "--output")
    refused(run("web", "nothing", "-o", "s"), 1, "does not exist")
    refused(run("web", rope, "-o", "s", "--npm", "x"), 2, "--npm")
