"""A mistake on the command line is one line that names it, and an exit code."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_line import refused
from conftest import Cli
from folder_contents import snapshot

USAGE = [
    # the command and its arguments
    ("exprot", ["exprot", "'export'"]),
    ("export --encoding rope --weights rop -o b", ["'rop'", "did you mean 'rope'?"]),
    ("export --encoding rope --weights rope --preset tiny -o b", ["'tiny'", "random weights"]),
    ("export --encoding rope --weights rope --set seed=1 -o b", ["'seed'", "random weights"]),
    ("export --encoding alibi --weights rope -o b", ["'rope'", "rotation", "'alibi'"]),
    ("export --model {llama} --weights rope -o b", ["--weights"]),
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
    ("export --model {bart} -o b", ["'bart'", "encoder-decoder", "t5, mt5, umt5 only"]),
    ("export --model {mamba} -o b", ["Mamba", "linear_attention"]),
    ("export --model {unknown_family} -o b", ["nonesuch"]),
    # the output
    ("export --encoding rope -o taken", ["taken", "exists"]),
    ("export --encoding rope -o taken --force", ["taken", "not a bundle"]),
    ("export --encoding rope -o file --force", ["file", "exists"]),
    ("export --encoding rope -o file/b", ["file"]),
    # generate
    ("generate 'The capital of France is'", ["'The capital of France is'", "before the prompt"]),
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
    ("generate {rope} hi --beams 0", ["num_beams = 0"]),
    ("generate {rope} hi --beams 2 --return-sequences 3", ["num_return_sequences = 3", "num_beams = 2"]),
    ("generate {rope} hi --beams 2 --length-penalty nan", ["length_penalty = nan"]),
    ("generate {rope} hi --length-penalty 2", ["--length-penalty", "--beams"]),
    ("generate {rope} hi --beams 2 --early-stopping yes", ["--early-stopping", "'yes'"]),
    ("generate {rope} hi --beams 2 --temperature 1", ["temperature = 1.0", "num_beams = 2"]),
    ("generate {rope} hi --beams 2 --stop x", ["stop = ['x']", "num_beams = 2"]),
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
    ("generate", ["bundle is not a bundle", "pe-onnx export"]),
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
    line: str, words: list[str], code: int, run: Cli, places: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    before = snapshot(tmp_path)
    result = run(*(word.format_map(places) for word in shlex.split(line)), stdin="from standard input")
    refused(result, code, *(word.format_map(places) for word in words))
    assert snapshot(tmp_path) == before


def test_the_first_mistakes_in_a_process_of_their_own(cli: Cli, tmp_path: Path) -> None:
    """As installed, without the warm process: what PyTorch says as it loads would show here."""
    refused(cli("export", "--encoding", "rop", "-o", tmp_path / "b"), 2, "did you mean 'rope'?")
    refused(cli("export", "--model", tmp_path, "-o", tmp_path / "b"), 2, "config.json")
    assert snapshot(tmp_path) == {}
