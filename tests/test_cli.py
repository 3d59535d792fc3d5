"""The command line as a user meets it: a mistake is one line, and a result is all that is on stdout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pe_onnx
from pe_onnx import discovery

Bundles = Callable[..., Path]
Result = subprocess.CompletedProcess[str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]

SPEED = re.compile(r"\[\d+ prompt tokens at \d+/s, (\d+) new at [\d.]+ tokens/s\]\n")

WARM_SERVER = """
import json, os, sys, tempfile, traceback
import pe_onnx.exporter, pe_onnx.models.bridge, pe_onnx.parity, pe_onnx.reference, transformers
from pe_onnx.cli import main
for line in sys.stdin:
    folder, args = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(files[0].fileno(), 1)
        os.dup2(files[1].fileno(), 2)
        sys.stdin, sys.argv, code = open(0), ["pe-onnx", *args], 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    print(json.dumps([code, *texts]), flush=True)
"""


@pytest.fixture(scope="module")
def warm_cli() -> Iterator[Cli]:
    """``cli`` for commands that load PyTorch: each in a process of its own, forked from one that has loaded it."""
    with subprocess.Popen(
        [sys.executable, "-c", WARM_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(*args: object, cwd: Path) -> Result:
            assert server.stdin is not None
            assert server.stdout is not None
            print(json.dumps([str(cwd), list(map(str, args))]), file=server.stdin, flush=True)
            code, out, err = json.loads(server.stdout.readline())
            return Result(list(map(str, args)), code, out, err)

        yield run
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def run(cli: Cli, warm_cli: Cli, tmp_path: Path) -> Callable[..., Result]:
    """A command line in an empty folder, whichever way is quick."""

    def either(*args: object, stdin: str | None = None) -> Result:
        if args[0] in ("export", "parity"):
            return warm_cli(*args, cwd=tmp_path)
        return cli(*args, stdin=stdin, cwd=tmp_path)

    return either


def refused(result: Result, code: int, *words: str) -> None:
    """One line that names what is wrong, no traceback, nothing on stdout."""
    assert result.stderr.startswith("pe-onnx: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    assert result.stdout == ""
    assert result.returncode == code, result.stderr
    for word in words:
        assert word in result.stderr


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def places(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command lines below name in braces: bundles, and checkpoints with one thing wrong each."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    root = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).to(
        torch.float32
    ).save_pretrained(root / "t5")
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(
        root / "mamba"
    )
    weights = load_file(root / "llama" / "model.safetensors")

    def variant(name: str) -> Path:
        shutil.copytree(root / "llama", root / name)
        return root / name

    def with_weights(name: str, changed: dict[str, torch.Tensor | None]) -> None:
        kept = {key: value for key, value in {**weights, **changed}.items() if value is not None}
        save_file(kept, variant(name) / "model.safetensors", metadata={"format": "pt"})

    with_weights("missing_weight", {"model.layers.1.self_attn.q_proj.weight": None})
    with_weights("extra_weight", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with_weights("other_shape", {"model.norm.weight": torch.zeros(65)})
    content = (root / "llama" / "model.safetensors").read_bytes()
    for name, length in (("truncated", len(content) // 2), ("header_only", 100), ("empty_weights", 0)):
        (variant(name) / "model.safetensors").write_bytes(content[:length])
    (variant("no_weights") / "model.safetensors").unlink()
    (variant("bad_json") / "config.json").write_text("{nope")
    (variant("bad_vocabulary") / "vocab.json").write_text("{nope")
    values = json.loads((root / "llama" / "config.json").read_text())
    (variant("unknown_family") / "config.json").write_text(json.dumps({**values, "model_type": "nonesuch"}))
    (root / "no_config").mkdir()
    shutil.copytree(bundles("rope"), root / "corrupted")
    model = bytearray((root / "corrupted" / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (root / "corrupted" / "model.onnx").write_bytes(model)
    return {
        **{path.name: str(path) for path in root.iterdir()},
        "rope": str(bundles("rope")),
        "learned": str(bundles("learned", config={"max_position_embeddings": 32})),
        "no_tokenizer": str(bundles("rope", config={"vocab_size": 300})),
        "long_name": "x" * 300,
        "nine": "9" * 30,
        "a33": "a" * 33,
    }


USAGE = [
    # the command and its arguments
    ("exprot", ["exprot", "'export'"]),
    ("export --encoding rope", ["--output"]),
    ("export --encoding rope -o b extra", ["extra"]),
    ("export --encoding rope -o b --trget ort", ["--trget", "--target"]),
    ("export -o b", ["one of --encoding and --model"]),
    ("export --encoding rope --model {llama} -o b", ["one of --encoding and --model"]),
    ("export --model {llama} --preset tiny -o b", ["--preset"]),
    ("export --model {llama} --set hidden_size=64 -o b", ["--set"]),
    # the encoding
    ("export --encoding rop -o b", ["'rop'", "did you mean 'rope'?", "alibi"]),
    ("export --encoding ../encoding -o b", ["encoding"]),
    ("export --encoding rope:thet=5 -o b", ["thet", "did you mean 'theta'?"]),
    ("export --encoding none:theta=5 -o b", ["theta", "no parameters"]),
    ("export --encoding rope:theta=abc -o b", ["theta = 'abc'", "number"]),
    ("export --encoding rope:theta -o b", ["'theta'", "name=value"]),
    ("export --encoding rope:theta=0 -o b", ["theta = 0"]),
    ("export --encoding rope:theta=nan -o b", ["theta = 'nan'"]),
    ("export --encoding rope:theta=inf -o b", ["theta = 'inf'"]),
    ("export --encoding rope:interleaved=maybe -o b", ["interleaved = 'maybe'"]),
    ("export --encoding rope:rotary_dim=15 -o b", ["15", "even"]),
    ("export --encoding rope:rotary_dim=18 -o b", ["18", "head size = 16"]),
    ("export --encoding rope:rotary_dim=8.5 -o b", ["rotary_dim = '8.5'"]),
    ("export --encoding rope:rotary_dim=1e400 -o b", ["rotary_dim = '1e400'"]),
    # our own decoder
    ("export --encoding rope --set head_dim=24 -o b", ["head size = 24", "16", "portable"]),
    ("export --encoding rope --preset tny -o b", ["'tny'", "did you mean 'tiny'?"]),
    ("export --encoding rope --target prtable -o b", ["'prtable'", "did you mean 'portable'?"]),
    ("export --encoding rope --dtype fp61 -o b", ["'fp61'", "did you mean 'fp16'?"]),
    ("export --encoding rope --logits lst -o b", ["'lst'", "did you mean 'last'?"]),
    ("export --encoding rope --set hiden_size=64 -o b", ["'hiden_size'", "did you mean 'hidden_size'?"]),
    ("export --encoding rope --set hidden_size -o b", ["'hidden_size'", "name=value"]),
    ("export --encoding rope --set hidden_size=abc -o b", ["hidden_size = 'abc'"]),
    ("export --encoding rope --set num_hidden_layers=0 -o b", ["num_hidden_layers = 0"]),
    ("export --encoding rope --set num_attention_heads=5 -o b", ["num_attention_heads = 5"]),
    ("export --encoding rope --set num_key_value_heads=3 -o b", ["num_key_value_heads = 3"]),
    ("export --encoding rope --set norm=rmz -o b", ["norm = 'rmz'", "rms"]),
    ("export --encoding rope --set head_dim=abc -o b", ["head_dim = 'abc'"]),
    ("export --encoding rope --set head_dim=16.5 -o b", ["head_dim = 16.5"]),
    ("export --encoding rope --set seed=abc -o b", ["seed = 'abc'"]),
    ("export --encoding rope --set seed=1.5 -o b", ["seed = 1.5"]),
    ("export --encoding rope --set norm_eps=abc -o b", ["norm_eps = 'abc'"]),
    ("export --encoding rope --set score_scale=abc -o b", ["score_scale = 'abc'"]),
    ("export --encoding rope --set logit_softcap=abc -o b", ["logit_softcap = 'abc'"]),
    ("export --encoding rope --set tie_word_embeddings=maybe -o b", ["tie_word_embeddings = 'maybe'"]),
    ("export --encoding rope --set encoding=alibi -o b", ["encoding"]),
    ("export --encoding rope --set encoding_parameters=5 -o b", ["encoding_parameters"]),
    # the checkpoint
    ("export --model {no_config}/nothing -o b", ["nothing", "does not exist"]),
    ("export --model {no_config} -o b", ["no_config", "config.json"]),
    ("export --model {llama}/config.json -o b", ["config.json", ".gguf"]),
    ("export --model {bad_json} -o b", ["bad_json", "config.json"]),
    ("export --model {missing_weight} -o b", ["missing", "model.layers.1.self_attn.q_proj.weight"]),
    ("export --model {extra_weight} -o b", ["model.layers.0.self_attn.q_proj.bias"]),
    ("export --model {other_shape} -o b", ["shape", "model.norm.weight"]),
    ("export --model {truncated} -o b", ["truncated"]),
    ("export --model {header_only} -o b", ["truncated"]),
    ("export --model {empty_weights} -o b", ["truncated"]),
    ("export --model {no_weights} -o b", ["model.safetensors"]),
    ("export --model {bad_vocabulary} -o b", ["vocab.json"]),
    ("export --model {t5} -o b", ["'t5'", "encoder-decoder"]),
    ("export --model {mamba} -o b", ["mamba"]),
    ("export --model {unknown_family} -o b", ["nonesuch"]),
    # the output
    ("export --encoding rope -o taken", ["taken", "exists"]),
    ("export --encoding rope -o taken --force", ["taken", "not a bundle"]),
    ("export --encoding rope -o file --force", ["file", "exists"]),
    ("export --encoding rope -o file/b", ["file"]),
    # generate
    ("generate", ["DIR"]),
    ("generate {rope} ''", ["no tokens"]),
    ("generate {rope} hi ''", ["no tokens"]),
    ("generate {learned} {a33} -n 1", ["33", "32 positions of the encoding"]),
    ("generate {learned} hi --max-length 33", ["33", "32 positions of the encoding"]),
    ("generate {rope} --tokens 1,999999", ["999999", "0..255"]),
    ("generate {rope} --tokens 1,-5", ["-5", "0..255"]),
    ("generate {rope} --tokens 1,{nine}", ["{nine}"]),
    ("generate {rope} --tokens a,b", ["'a,b'", "integers"]),
    ("generate {rope} --tokens 1,,2", ["'1,,2'", "integers"]),
    ("generate {rope} --tokens ''", ["--tokens"]),
    ("generate {rope} hi --tokens 1,2", ["--tokens"]),
    ("generate {no_tokenizer} hi", ["no tokenizer", "--tokens"]),
    ("generate {rope} hi --chat", ["no chat template"]),
    ("generate {rope} hi --system be_brief", ["--system", "--chat"]),
    ("generate {rope} hi --provider foo", ["'foo'", "cpu, cuda, auto"]),
    ("generate {rope} hi --temperature -1", ["temperature = -1"]),
    ("generate {rope} hi --temperature nan", ["temperature = nan"]),
    ("generate {rope} hi --temperature abc", ["--temperature", "'abc'"]),
    ("generate {rope} hi --top-p 1.5", ["top_p = 1.5"]),
    ("generate {rope} hi --top-p -0.1", ["top_p = -0.1"]),
    ("generate {rope} hi --top-k -1", ["top_k = -1"]),
    ("generate {rope} hi --min-p 2", ["min_p = 2"]),
    ("generate {rope} hi --repetition-penalty 0", ["repetition_penalty = 0"]),
    ("generate {rope} hi --seed -1", ["seed = -1"]),
    ("generate {rope} hi --stop ''", ["stop = ''"]),
    ("generate {rope} hi --max-new-tokens 0", ["--max-new-tokens = 0"]),
    ("generate {rope} hi -n -1", ["--max-new-tokens = -1"]),
    ("generate {rope} hi -n abc", ["--max-new-tokens", "'abc'"]),
    ("generate {rope} hi --max-length 0", ["max_length = 0"]),
    ("generate {rope} hi --max-length 1", ["max_length = 1"]),
    ("generate {rope} hi --threads -1", ["threads = -1"]),
    # parity
    ("parity {rope} --mode stps", ["'stps'", "did you mean 'steps'?"]),
    ("parity {rope} --mode left_padding", ["left_padding", "portable"]),
    ("parity {rope} --length 1", ["2 tokens"]),
    ("parity {rope} --length 0", ["length = 0"]),
    ("parity {rope} --length -5", ["length = -5"]),
    ("parity {rope} --seed -5", ["seed = -5"]),
    ("parity {rope} --tolerance nan", ["tolerance = nan"]),
    ("parity {rope} --reference {no_config}/nothing", ["nothing", "does not exist"]),
    ("parity {rope} --reference {llama}", ["64", "256"]),
    ("parity {no_tokenizer} --prompt hello", ["no tokenizer"]),
    ("parity {rope} --provider foo", ["'foo'"]),
    # the others
    ("list extra", ["extra"]),
    ("inspect", ["DIR"]),
    ("inspect {rope} --jsn", ["--jsn", "--json"]),
]
"""Wrong usage or input, exit code 2: the command line, and what its one line names."""

BROKEN = [
    ("generate {corrupted} hi", ["corrupted", "model.onnx", "checksum"]),
    ("inspect {corrupted}", ["corrupted", "model.onnx", "checksum"]),
    ("parity {corrupted}", ["corrupted", "model.onnx", "checksum"]),
    ("generate nothing hi", ["nothing", "does not exist"]),
    ("inspect nothing", ["nothing", "does not exist"]),
    ("parity nothing", ["nothing", "does not exist"]),
    ("generate taken hi", ["taken", "manifest.json"]),
    ("generate {long_name} hi", ["not a bundle"]),
]
"""A broken bundle or a check that fails, exit code 1."""


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [(*case, 2) for case in USAGE] + [(*case, 1) for case in BROKEN],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(
    line: str, words: list[str], code: int, run: Callable[..., Result], places: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    before = snapshot(tmp_path)
    result = run(*(word.format_map(places) for word in shlex.split(line)), stdin="from standard input")
    refused(result, code, *(word.format_map(places) for word in words))
    assert snapshot(tmp_path) == before


def test_an_existing_bundle_is_kept_without_force(run: Callable[..., Result], bundles: Bundles, tmp_path: Path) -> None:
    shutil.copytree(bundles("rope"), tmp_path / "b")
    before = snapshot(tmp_path)
    refused(run("export", "--encoding", "alibi", "-o", "b"), 2, "output b exists", "--force")
    assert snapshot(tmp_path) == before


def test_no_prompt_at_all(cli: Cli, bundles: Bundles) -> None:
    refused(cli("generate", bundles("rope"), stdin=""), 2, "no prompt")


def test_the_first_mistakes_in_a_process_of_their_own(cli: Cli, tmp_path: Path) -> None:
    """As installed, without the warm process: what PyTorch says as it loads would show here."""
    refused(cli("export", "--encoding", "rop", "-o", tmp_path / "b"), 2, "did you mean 'rope'?")
    refused(cli("export", "--model", tmp_path, "-o", tmp_path / "b"), 2, "config.json")
    assert snapshot(tmp_path) == {}


def test_code_in_a_checkpoint_is_never_run(cli: Cli, places: dict[str, str], tmp_path: Path) -> None:
    """transformers would ask on the terminal, and run it at a `y`."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(places["llama"], checkpoint)
    values = json.loads((checkpoint / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (checkpoint / "config.json").write_text(json.dumps({**values, "model_type": "custom", "auto_map": own}))
    (checkpoint / "own.py").write_text(
        f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass Config: pass\nclass Model: pass"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    result = cli("export", "--model", checkpoint, "-o", tmp_path / "b", stdin="y\n", env=environment)
    assert not (tmp_path / "it ran").exists()
    refused(result, 2, "checkpoint", "code")


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        (["CPUExecutionProvider"], ["CPU build", "pe-onnx[gpu]"]),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["NVIDIA driver"]),
    ],
)
def test_cuda_that_cannot_be_had_says_what_is_missing(providers: list[str], words: list[str], bundles: Bundles) -> None:
    """On any machine: what onnxruntime and the system report is put in its place. auto takes the CPU."""
    code = f"""
import os, sys, onnxruntime
exists = os.path.exists
os.path.exists = lambda path: "nvidia" not in str(path) and exists(path)
onnxruntime.get_available_providers = lambda: {providers!r}
from pe_onnx.cli import main
main()
"""
    command = [sys.executable, "-c", code, "generate", str(bundles("rope")), "hi", "-n", "1", "--provider"]
    result = subprocess.run([*command, "cuda"], capture_output=True, text=True)
    refused(result, 2, "provider 'cuda' cannot be had", *words)
    assert subprocess.run([*command, "auto"], capture_output=True).returncode == 0


# parity


def test_parity_whose_checkpoint_has_gone(run: Callable[..., Result], places: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(places["llama"], tmp_path / "checkpoint")
    assert run("export", "--model", "checkpoint", "-o", "b").returncode == 0
    passed = run("parity", "b", "--mode", "steps", "--length", 9)
    assert passed.returncode == 0, passed.stderr
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    refused(run("parity", "b", "--mode", "steps"), 2, str(tmp_path / "checkpoint"), "--reference")
    named = run("parity", "b", "--reference", "moved", "--mode", "steps", "--length", 9)
    assert named.returncode == 0, named.stderr


def test_parity_that_fails(run: Callable[..., Result], bundles: Bundles) -> None:
    """Figures first, verdict second; the exit code and one line on stderr for who reads no table."""
    args = ("parity", bundles("rope"), "--mode", "steps", "--length", 9)
    assert run(*args).returncode == 0
    result = run(*args, "--tolerance", "1e-12")
    assert result.returncode == 1
    assert "steps" in result.stdout
    assert "FAIL" in result.stdout
    assert result.stderr.startswith("pe-onnx: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("tolerance", "passed"), [([], True), (["--tolerance", "1e-12"], False)])
def test_parity_in_json(run: Callable[..., Result], bundles: Bundles, tolerance: list[str], passed: bool) -> None:
    result = run("parity", bundles("rope"), "--mode", "steps", "--mode", "whole", "--length", 9, "--json", *tolerance)
    report = json.loads(result.stdout)
    assert report["passed"] is passed
    assert [mode["mode"] for mode in report["modes"]] == ["steps", "whole"]
    assert result.returncode == (0 if passed else 1)


def test_parity_prints_whole_words(run: Callable[..., Result], bundles: Bundles) -> None:
    """In the 80 columns of what is no terminal: the names of modes are what a user copies."""
    result = run("parity", bundles("rope", "portable"), "--length", 9)
    assert result.returncode == 0, result.stderr
    assert "…" not in result.stdout
    for word in ("interior_padding", "positions", "near-ties"):
        assert word in result.stdout


# Good use


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_help(cli: Cli, option: str) -> None:
    result = cli(option)
    assert (result.returncode, result.stderr) == (0, "")
    if option == "--version":
        assert result.stdout == f"pe-onnx, version {pe_onnx.__version__}\n"
    else:
        assert all(f"  {name} " in result.stdout for name in discovery.names("cli"))


@pytest.mark.parametrize("name", discovery.names("cli"))
def test_help_of_each_command(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{name} [OPTIONS]" in result.stdout
    assert "--help" in result.stdout


def test_export_says_what_it_made_on_stderr_only(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("export", "--encoding", "rope:theta=5000,rotary_dim=8", "--set", "num_hidden_layers=1", "-o", "new/b")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"new/b: rope, ort, fp32, \d+ kB in [\d.]+ s\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b"]
    shown = json.loads(run("inspect", "new/b", "--json").stdout)
    assert shown["encoding"]["parameters"]["theta"] == {"value": 5000.0, "origin": "given"}
    assert shown["encoding"]["parameters"]["interleaved"] == {"value": False, "origin": "default"}
    assert run("export", "--encoding", "alibi", "-o", "new/b", "--force").returncode == 0
    assert json.loads(run("inspect", "new/b", "--json").stdout)["encoding"]["name"] == "alibi"


def test_list(cli: Cli) -> None:
    result = cli("list")
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(cli("list", "--json").stdout)
    assert list(shown["encodings"]) == discovery.names("encodings")
    assert set(shown) == {"encodings", "families", "presets", "targets"}
    for kind in ("encodings", "presets", "targets"):
        for name in shown[kind]:
            assert re.search(rf"^ {name} ", result.stdout, re.MULTILINE), name
    assert f"{len(shown['families'])} families" in result.stdout


def test_list_of_families(cli: Cli) -> None:
    document = json.loads(cli("list", "--models", "--json").stdout)
    result = cli("list", "--models", "--encodings", env={**os.environ, "COLUMNS": "400"})
    assert (result.returncode, result.stderr) == (0, "")
    for name, row in document["families"].items():
        cells = [row.get("encoding"), row.get("route"), ", ".join(row.get("targets", []))]
        if row["status"] != "right":
            cells = [row["reason"]] if row["status"] == "refused" else []
        lines = [line for line in result.stdout.splitlines() if line.startswith(f" {name} ")]
        assert len(lines) == bool(cells), name
        assert all(str(cell) in line for cell in cells for line in lines), name
    assert cli("list", "--markdown").returncode == 2


def test_inspect(cli: Cli, bundles: Bundles) -> None:
    bundle = bundles("rope", "portable", config={"num_key_value_heads": 2, "head_dim": 24})
    result = cli("inspect", bundle)
    assert (result.returncode, result.stderr) == (0, "")
    shapes = {
        "input_ids": "[batch_size, sequence_length]",
        "attention_mask": "[batch_size, total_sequence_length]",
        "position_ids": "[batch_size, sequence_length]",
        "past_key_values.{0..1}.key": "[batch_size, 2, past_sequence_length, 24]",
        "past_key_values.{0..1}.value": "[batch_size, 2, past_sequence_length, 24]",
        "logits": "[batch_size, sequence_length, 256]",
        "present.{0..1}.key": "[batch_size, 2, total_sequence_length, 24]",
        "present.{0..1}.value": "[batch_size, 2, total_sequence_length, 24]",
    }
    for name, shape in shapes.items():
        assert re.search(rf"^ {re.escape(name)} +{re.escape(shape)} *$", result.stdout, re.MULTILINE), name
    for text in ("portable", "rope", "theta", "10000.0", "default", "768 bytes per token", "pe_onnx::RotaryEmbedding"):
        assert text in result.stdout


def test_inspect_in_json(cli: Cli, bundles: Bundles) -> None:
    result = cli("inspect", bundles("rope"), "--json")
    assert result.stderr == ""
    shown = json.loads(result.stdout)
    assert shown["inputs"]["past_key_values.1.value"] == ["batch_size", 4, "past_sequence_length", 16]
    assert list(shown["inputs"])[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shown["outputs"]["logits"] == ["batch_size", 1, 256]
    assert shown["cache_bytes_per_token"] == 2 * 2 * 4 * 16 * 4
    assert shown["encoding"] == json.loads((bundles("rope") / "manifest.json").read_text())["encoding"]


DRAW = ("--temperature", "5", "--seed", "5")
"""A tiny model is sure of itself: only heat makes it vary."""


def test_generate_prints_the_text_on_stdout_and_the_speed_on_stderr(cli: Cli, bundles: Bundles) -> None:
    expected = pe_onnx.load(bundles("rope")).generate("hello", 7)
    result = cli("generate", bundles("rope"), "hello", "-n", 7)
    assert result.returncode == 0
    assert result.stdout == expected.text + "\n"
    speed = SPEED.fullmatch(result.stderr)
    assert speed is not None, result.stderr
    assert speed[1] == "7"


def test_generate_streams(bundles: Bundles) -> None:
    """stdout is a socket that keeps each write apart."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", "generate", str(bundles("rope")), "hello"]
    with ours, subprocess.Popen([*command, "-n", "20"], stdout=theirs, stderr=subprocess.PIPE) as process:
        theirs.close()
        ours.settimeout(60)
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            pieces.append(ours.recv(65536))
        process.communicate()
    text = pe_onnx.load(bundles("rope")).generate("hello", 20).text
    assert b"".join(pieces).decode() == text + "\n"
    assert len(pieces) > 10


def test_generate_in_json(cli: Cli, bundles: Bundles) -> None:
    result = cli("generate", bundles("rope"), "hello", "-n", 7, "--json")
    document = json.loads(result.stdout)
    expected = pe_onnx.load(bundles("rope")).generate("hello", 7)
    assert document["generations"] == [
        {"text": expected.text, "tokens": expected.tokens, "prompt_tokens": 5, "finish_reason": "length"}
    ]
    assert document["timing"]["new_tokens"] == 7
    assert SPEED.fullmatch(result.stderr)


def test_several_prompts_are_a_batch(cli: Cli, bundles: Bundles) -> None:
    prompts = ["a", "a longer one", "ü!"]
    alone = [cli("generate", bundles("rope"), prompt, "-n", 6).stdout for prompt in prompts]
    result = cli("generate", bundles("rope"), *prompts, "-n", 6)
    expected = (f"--- {i}: {p!r}\n{text}" for i, (p, text) in enumerate(zip(prompts, alone, strict=True), 1))
    assert result.stdout == "".join(expected)
    speed = SPEED.fullmatch(result.stderr)
    assert speed is not None
    assert speed[1] == "18"
    document = json.loads(cli("generate", bundles("rope"), *prompts, "-n", 6, "--json").stdout)
    assert [row["text"] + "\n" for row in document["generations"]] == alone
    assert [row["prompt_tokens"] for row in document["generations"]] == [1, 12, 3]


def test_stop_ends_the_text_before_it(cli: Cli, bundles: Bundles) -> None:
    args = ("generate", bundles("rope"), "hello", "-n", 60, *DRAW, "--json")
    text = json.loads(cli(*args).stdout)["generations"][0]["text"]
    at = next(i for i in range(3, len(text) - 2) if re.fullmatch(r"\w\W", text[i : i + 2], re.ASCII))
    stop = text[at : at + 2]
    stopped = json.loads(cli(*args, "--stop", "not there", "--stop", stop).stdout)["generations"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(stop)]
    assert len(stopped["tokens"]) < 60
    plain = cli(*args[:-1], "--stop", stop, stdin="")
    assert plain.stdout == stopped["text"] + "\n"


def test_a_seed_gives_the_same_text_again(cli: Cli, bundles: Bundles) -> None:
    texts = [
        cli("generate", bundles("rope"), "hello", "-n", 32, "--temperature", 20, *seed).stdout
        for seed in (("--seed", 1), ("--seed", 1), ("--seed", 2), (), ())
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_the_prompt_may_come_from_standard_input(cli: Cli, bundles: Bundles) -> None:
    expected = cli("generate", bundles("rope"), "two\nlines", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "-n", 6, stdin="two\nlines\n").stdout == expected


def test_echo_prints_the_prompt_first(cli: Cli, bundles: Bundles) -> None:
    plain = cli("generate", bundles("rope"), "hello", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "hello", "-n", 6, "--echo").stdout == "hello" + plain
    assert cli("generate", bundles("rope"), "-n", 6, "--echo", stdin="hello").stdout == "hello" + plain


def test_tokens_are_a_prompt(cli: Cli, bundles: Bundles) -> None:
    ids = ",".join(str(byte) for byte in b"hello")
    expected = cli("generate", bundles("rope"), "hello", "-n", 6).stdout
    assert cli("generate", bundles("rope"), "--tokens", ids, "-n", 6).stdout == expected


def test_tokens_are_the_prompt_of_a_bundle_without_a_tokenizer(
    cli: Cli, bundles: Bundles, places: dict[str, str]
) -> None:
    result = cli("generate", places["no_tokenizer"], "--tokens", "1,2,299", "-n", 6, "--json")
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)["generations"][0]["tokens"]
    assert len(made) == 6
    assert all(0 <= token < 300 for token in made)
    result = cli("generate", places["no_tokenizer"], "--tokens", "1,2,299", "-n", 6)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"\d+", result.stdout) == [str(token) for token in made], "ids, where there is no text"


def test_a_learned_table_is_used_to_its_end(cli: Cli, places: dict[str, str]) -> None:
    """32 tokens fit, and the token after them is still drawn."""
    result = cli("generate", places["learned"], "a" * 32, "-n", 5, "--json")
    assert len(json.loads(result.stdout)["generations"][0]["tokens"]) == 1
    result = cli("generate", places["learned"], "a" * 30, "-n", 5, "--json")
    assert len(json.loads(result.stdout)["generations"][0]["tokens"]) == 3


def test_a_reader_that_goes_away_is_no_traceback(bundles: Bundles) -> None:
    command = [sys.executable, "-c", "from pe_onnx.cli import main; main()", "generate", str(bundles("rope")), "hello"]
    with subprocess.Popen(
        [*command, "-n", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait(timeout=60)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1
