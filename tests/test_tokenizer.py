"""Tokenizers and chat templates against transformers; the text stream against decoding everything at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pe_onnx.errors import BundleError, ConfigError, InputError, MissingDependencyError
from pe_onnx.tokenizer import TextStream, Tokenizer, load_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Où est l'été? Der Bär läuft über die Straße; ¿qué tal, señor?",
    "日本語の文章と、中文的句子。한국어 문장도 있습니다.",
    "Emoji 🙂🚀 and a family 👩‍👩‍👧 in one line\n\n\tindented, 12345 + 67 = 12412",
    "",
    "   leading and trailing   ",
]
MESSAGES = [
    {"role": "system", "content": "Antworte kurz: <b>ü</b>"},
    {"role": "user", "content": "Hi 🙂"},
    {"role": "assistant", "content": "Hello!", "tool_calls": None},
    {"role": "user", "content": "Bye"},
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE with a BOS that is put before each text, as Llama 3 and SmolLM have."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<bos>", "<eos>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A sentencepiece-style BPE: "▁" for spaces, bytes for unknown characters, the first space stripped."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorw.", "▁▁"]
    merges = [("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A unigram model whose decoder drops the spaces of the first token."""
    pieces = ["<unk>", "▁", "▁a", "▁the", "s", "ing", "▁▁", "é", "."]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"un": 0, "##happy": 1, "day": 2, "##s": 3, ".": 4}))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


BACKENDS: list[Callable[[], tokenizers.Tokenizer]] = [byte_level, byte_fallback, metaspace, word_pieces]


def write_json(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def load_json_tokenizer(folder: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, {"kind": "tokenizer.json"})


def save_pretrained(folder: Path, **options: Any) -> None:
    """The folder of a checkpoint, as transformers writes it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", **options
    )
    fast.save_pretrained(folder)


# --- text to ids and back ---------------------------------------------------------------------------------------


def test_tokenizer_json_is_that_of_transformers(tmp_path: Path) -> None:
    save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, {"kind": "tokenizer.json"})
    for text in [*SENTENCES, "<|user|>hi<eos> <tool call>", "\x00\u200d\U0010ffff"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
        assert ours.encode(text)[0] == 0
        assert ours.encode(text, add_special_tokens=False)[:1] != [0]
    assert ours.eos_token_ids == {theirs.eos_token_id}


def test_truncation_and_padding_of_the_training_run_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    ours = load_json_tokenizer(tmp_path, backend)
    ids = ours.encode(SENTENCES[0])
    assert 4 < len(ids) != 50
    assert ours.decode(ids) == SENTENCES[0]


def test_bytes() -> None:
    ours = load_tokenizer(Path("nowhere"), {"kind": "bytes"})
    for text in SENTENCES:
        assert ours.encode(text) == list(text.encode("utf-8"))
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode([104, 256, 999, 105]) == "hi"
    assert ours.decode([0xE2, 0x82]) == "\ufffd"
    assert ours.eos_token_ids == frozenset()


def test_vocab_takes_the_longest_match(tmp_path: Path) -> None:
    write_json(tmp_path, "vocab.json", {"<eos>": 0, "a": 4, "ab": 2, "abc": 3, "c": 5, "<unk>": 9, "<s>": 7})
    write_json(tmp_path, "tokenizer_config.json", {"eos_token": "<eos>", "bos_token": {"content": "<s>"}})
    ours = load_tokenizer(tmp_path, {"kind": "vocab"})
    assert ours.encode("abcabacaé<eos>") == [3, 2, 4, 5, 4, 9, 0]
    assert ours.encode("") == []
    assert ours.decode([7, 3, 2, 4, 0, 9, 77]) == "abcaba<unk>"
    assert ours.decode([7, 3, 0], skip_special_tokens=False) == "<s>abc<eos>"
    assert ours.eos_token_ids == {0}


def test_vocab_without_unk_names_what_it_cannot_take(tmp_path: Path) -> None:
    write_json(tmp_path, "vocab.json", {"1": 0, "+": 1})
    ours = load_tokenizer(tmp_path, {"kind": "vocab"})
    assert ours.encode("1+1") == [0, 1, 0]
    with pytest.raises(InputError, match=r"'x' at character 2: accepted are 1 \+$"):
        ours.encode("1+x")


@pytest.mark.parametrize(
    "content", [{}, {"a": "1"}, {"a": -1}, {"": 1}, {"a": 1, "b": 1}, {"a": True}, ["a"]], ids=str
)
def test_a_broken_vocab_is_refused(tmp_path: Path, content: object) -> None:
    write_json(tmp_path, "vocab.json", content)
    with pytest.raises(BundleError, match=r"vocab\.json"):
        load_tokenizer(tmp_path, {"kind": "vocab"})


def test_without_a_tokenizer_ids_must_be_given(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": 5})
    none = load_tokenizer(tmp_path, None)
    for call in (lambda: none.encode("hi"), lambda: none.decode([1])):
        with pytest.raises(InputError, match="no tokenizer.*--tokens 1,2,3"):
            call()
    with pytest.raises(InputError, match="no chat template"):
        none.apply_chat_template(MESSAGES)
    assert none.eos_token_ids == {5}


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'tokenizer\.jsn'.*did you mean 'tokenizer\.json'"):
        load_tokenizer(tmp_path, {"kind": "tokenizer.jsn"})
    with pytest.raises(BundleError, match="kind = None"):
        load_tokenizer(tmp_path, {})
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path, {"kind": "tokenizer.json"})
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path, {"kind": "tokenizer.json"})
    ours = load_tokenizer(tmp_path, {"kind": "bytes"})
    with pytest.raises(InputError, match=r"'\\udcff' at character 2"):
        ours.encode("ab\udcff")
    with pytest.raises(InputError, match="token id = -1"):
        ours.decode([3, -1])


# --- end of sequence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"generation_config.json": [7, 8], "config.json": 5, "tokenizer_config.json": 4}, {7, 8}),
        ({"generation_config.json": None, "config.json": 5, "tokenizer_config.json": 4}, {5}),
        ({"config.json": 0, "tokenizer_config.json": 4}, {0}),
        ({"config.json": None, "tokenizer_config.json": 4}, {4}),
        ({"config.json": []}, set()),
        ({}, set()),
    ],
)
def test_eos_comes_from_the_first_file_that_has_it(
    tmp_path: Path, files: dict[str, Any], want: set[int]
) -> None:
    for name, value in files.items():
        write_json(tmp_path, name, {"eos_token_id": value})
    assert load_tokenizer(tmp_path, {"kind": "bytes"}).eos_token_ids == want


@pytest.mark.parametrize("value", ["2", True, -1, [2, None], 2.0])
def test_an_eos_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    write_json(tmp_path, "config.json", {"eos_token_id": value})
    with pytest.raises(BundleError, match=r"config\.json: eos_token_id = "):
        _ = load_tokenizer(tmp_path, {"kind": "bytes"}).eos_token_ids


# --- chat templates ---------------------------------------------------------------------------------------------

TEMPLATES = {
    "special tokens, whitespace control": """{{ bos_token }}
    {%- for message in messages %}
        {% if message['role'] == 'system' %}
    [{{ message.content | trim }}]
        {%- else %}
<|user|>{{ message['role'] + ': ' + message['content'] + eos_token }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
""",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %} {{ m.content }}{{ x }}\n"
    "{%- endgeneration %}|{{ x }}\n{% endfor %}",
    "None left out": "{% for m in messages %}{{ 'tool_calls' in m }} {{ m.tool_calls is defined }} {% endfor %}",
    "names that are not given": "{{ tools is none }}{{ documents is none }}{{ unk_token is defined }}{{ pad_token }}",
    "namespace, macro, today": "{% set ns = namespace(n=0) %}{% macro f(x) %}<{{ x }}>{% endmacro %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ f(ns.n) }}"
    "{{ strftime_now('%Y') | length }}",
    "no trailing newline\n\n": "a\n{{ messages | length }}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_render_as_in_transformers(
    tmp_path: Path, name: str, add_generation_prompt: bool
) -> None:
    save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    want = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    ours = load_tokenizer(tmp_path, {"kind": "tokenizer.json"})
    got = ours.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert got == want
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt)["input_ids"]
    assert ours.encode(got, add_special_tokens=False) == ids


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    ours = load_tokenizer(tmp_path, {"kind": "bytes"})
    with pytest.raises(InputError, match="no chat template"):
        ours.apply_chat_template(MESSAGES)
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ bos_token }} default"}]
    for template, want in (("plain{{ bos_token }}", "plain<s>"), (named, "<s> default")):
        write_json(
            tmp_path, "tokenizer_config.json", {"chat_template": template, "bos_token": {"content": "<s>"}}
        )
        assert load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES) == want
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}\n", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.append({}) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_an_input_error(tmp_path: Path, template: str, complaint: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(InputError, match=complaint) as caught:
        load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], ["hello"], [MESSAGES]])
def test_messages_must_be_a_list_of_dicts(tmp_path: Path, messages: list[Any]) -> None:
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="messages = "):
        load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(messages)


# --- the text stream --------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int], **options: Any) -> TextStream:
    """Push all ids, and hold at each step that what is out is a beginning of the whole text."""
    text_stream = TextStream(tokenizer, **options)
    pieces = [text_stream.push(token_id) for token_id in ids]
    pieces.append(text_stream.finish())
    assert text_stream.text == "".join(pieces)
    assert text_stream.finish() == ""
    return text_stream


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(8))
def test_streaming_is_decoding_everything(tmp_path: Path, backend: Callable[[], Any], seed: int) -> None:
    ours = load_json_tokenizer(tmp_path, backend())
    V = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].__len__()
    rng = random.Random(seed)
    for length in (0, 1, 2, 3, 5, 15, 63, 400):
        ids = [rng.randrange(V + 3) for _ in range(length)]
        if backend is byte_fallback:  # runs of at most 16 byte tokens, which is what is exact
            ids = [token_id if rng.random() < 0.7 else rng.choice([259, 260, 270]) for token_id in ids]
            ids = [259 if i % 16 == 15 else token_id for i, token_id in enumerate(ids)]
        assert stream(ours, ids).text == ours.decode(ids)


@pytest.mark.parametrize("seed", range(8))
def test_streaming_bytes_that_are_no_utf8(seed: int) -> None:
    ours = load_tokenizer(Path("nowhere"), {"kind": "bytes"})
    rng = random.Random(seed)
    lead = [
        0x41,
        0x80,
        0xBF,
        0xC3,
        0xE2,
        0x82,
        0xAC,
        0xF0,
        0x9F,
        0x98,
        0xFF,
        0xED,
        0xA0,
        0xEF,
        0xBF,
        0xBD,
        300,
    ]
    for choices in (
        range(256),
        lead,
        [0x80],
        [0xF0, 0x9F, 0x98],
        [0xE2, 0x82, 0xAC, 0xFF],
        [0xEF, 0xBF, 0xBD],
    ):
        for length in (1, 2, 3, 17, 200):
            ids = [rng.choice(choices) for _ in range(length)]
            assert stream(ours, ids).text == bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    endless = [0xEF, 0xBF, 0xBD] * 40  # U+FFFD itself, never anything else at the end
    assert stream(ours, endless).text == "\ufffd" * 40
    assert stream(ours, [0xFF] + endless + [0xFF]).text == "\ufffd" * 42


def test_a_long_run_of_byte_fallback_keeps_valid_text_exact(tmp_path: Path) -> None:
    ours = load_json_tokenizer(tmp_path, byte_fallback())
    text = "hello 日本語の文章と中文的句子한국어문장도🙂🚀🙂🚀🙂 world."
    ids = ours.encode(text)
    assert len(ids) > 60
    assert stream(ours, ids).text == ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
def test_no_half_character_is_shown(tmp_path: Path, kind: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, {"kind": kind})
    text = "a🙂é日"
    text_stream = TextStream(ours)
    shown = [text_stream.push(token_id) for token_id in ours.encode(text)]
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    assert "" in shown
    half = TextStream(ours)
    assert [half.push(token_id) for token_id in (0x62, 0xE2, 0x82)] == ["b", "", ""] or kind != "bytes"
    assert half.finish() == "\ufffd" or kind != "bytes"


def test_a_continued_prompt_keeps_its_space(tmp_path: Path) -> None:
    ours = load_json_tokenizer(tmp_path, byte_fallback())
    prompt, answer = ours.encode("hello"), ours.encode("world")
    assert ours.decode(answer) == "world"
    assert stream(ours, answer).text == "world"
    assert stream(ours, answer, prompt=prompt).text == " world"
    assert stream(ours, answer, prompt=[*prompt, 2]).text == " world"
    spaces = [token_id for word in (answer, answer) for token_id in (*word, 2)]
    assert stream(ours, spaces).text == ours.decode(spaces) == "world world"


def test_the_window_stays_short_whatever_comes(tmp_path: Path) -> None:
    lengths: list[int] = []
    for folder_name, backend in (("a", byte_level), ("b", byte_fallback), ("c", metaspace)):
        (tmp_path / folder_name).mkdir()
        ours = load_json_tokenizer(tmp_path / folder_name, backend())
        decode = ours.decode
        ours.decode = lambda ids, *args, decode=decode: lengths.append(len(ids)) or decode(ids, *args)  # type: ignore[method-assign]
        byte = ours.token_to_id("<0xE2>") or ours.token_to_id("â") or 1
        for ids in ([0] * 300, [byte] * 300, [10**6] * 300, [5, 6, 7, 4] * 75):
            stream(ours, ids)
    assert 16 < max(lengths) <= 40


# --- stop strings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("hello STOP world", ["STOP"], "hello "),
        ("hello STO", ["STOP"], None),
        ("hello STOSTOP!", ["STOP"], "hello STO"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xabcy", ["abc", "b"], "xa"),
        ("xabcy", ["abc", "bc", "c"], "x"),
        ("xabcy", ["c", "abcz"], "xab"),
        ("xabdy", ["abc", "d"], "xab"),
        ("xaby", ["abc", "bcd"], None),
        ("STOP", ["STOP"], ""),
        ("été 🙂🚀!", ["🙂🚀"], "été "),
        ("été 🙂🙂", ["🙂🚀"], None),
        ("nothing", [], None),
        ("a lone string", "lone", "a "),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "tokenizer.json"])
def test_stop_strings(tmp_path: Path, kind: str, text: str, stop: list[str], want: str | None) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, {"kind": kind})
    ids = ours.encode(text, add_special_tokens=False)
    got = stream(ours, ids, stop=stop)
    assert got.stopped == (want is not None)
    assert got.text == (text if want is None else want)
    assert got.push(ids[0]) == ""


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_do_not_depend_on_where_tokens_end(tmp_path: Path, seed: int) -> None:
    pieces = ["a", "b", "c", "ab", "ba", "abc", "cab", "bcab"]
    write_json(tmp_path, "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    ours = load_tokenizer(tmp_path, {"kind": "vocab"})
    rng = random.Random(seed)
    for _ in range(300):
        ids = [rng.randrange(len(pieces)) for _ in range(rng.randrange(12))]
        stop = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        text = ours.decode(ids)
        ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))]
        longest = max((len(s) for s in stop if ends and text[: ends[0]].endswith(s)), default=0)
        got = stream(ours, ids, stop=stop)
        assert got.stopped == bool(ends)
        assert got.text == (text[: ends[0] - longest] if ends else text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    text_stream = TextStream(load_tokenizer(Path("nowhere"), {"kind": "bytes"}), stop=["END", "<|im_end|>"])
    shown = [text_stream.push(byte) for byte in b"a<b E<|im_x EN"]
    assert shown == ["a", "", "<b", " ", "", "E", "", "", "", "", "<|im_x", " ", "", ""]
    assert text_stream.push(ord("D")) == ""
    assert text_stream.stopped
    assert text_stream.text == "a<b E<|im_x "
    with pytest.raises(ConfigError, match="stop = ''"):
        TextStream(load_tokenizer(Path("nowhere"), {"kind": "bytes"}), stop=["a", ""])


# --- what is imported -------------------------------------------------------------------------------------------


def test_the_runtime_half_imports_nothing_that_is_not_asked_for() -> None:
    code = (
        "import sys, pathlib; import pe_onnx.sampling; from pe_onnx.tokenizer import *;"
        "t = load_tokenizer(pathlib.Path('nowhere'), {'kind': 'bytes'}); s = TextStream(t); s.push(65);"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'jinja2', 'onnxruntime') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("package", "kind"), [("tokenizers", "tokenizer.json"), ("jinja2", "bytes")])
def test_a_missing_package_names_the_extra(tmp_path: Path, package: str, kind: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")
    code = (
        f"import sys, pathlib; sys.modules[{package!r}] = None\n"
        "from pe_onnx.tokenizer import load_tokenizer; from pe_onnx.errors import MissingDependencyError\n"
        f"try: load_tokenizer(pathlib.Path({str(tmp_path)!r}), {{'kind': {kind!r}}}).apply_chat_template([{{}}])\n"
        "except MissingDependencyError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{package} cannot be imported")
    assert "pip install 'pe-onnx[cpu]' or 'pe-onnx[gpu]'" in run.stdout
    assert run.stdout.count("\n") == 1
    assert issubclass(MissingDependencyError, ImportError)
