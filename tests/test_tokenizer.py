"""Tokenizers and chat templates against transformers; the text stream against decoding everything at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pe_onnx.errors import BundleError, ConfigError, InputError
from pe_onnx.tokenizer import TextStream, Tokenizer, load_tokenizer

NOWHERE = Path("nowhere")
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
    """A byte-level BPE with a BOS before each text, as Llama 3 has."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<bos>", "<eos>", "<|user|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A sentencepiece-style BPE: "▁" for spaces, bytes for unknown characters, the first space stripped."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorw.", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A unigram model whose decoder drops the spaces of the first token."""
    pieces = ["<unk>", "▁", "▁a", "▁the", "s", "ing", "▁▁", "é", "."]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"un": 0, "##happy": 1, "day": 2, "##s": 3, ".": 4}))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write_json(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def load_saved(folder: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, {"kind": "tokenizer.json"})


def load_both(folder: Path, chat_template: str | None = None) -> tuple[Tokenizer, Any]:
    """Ours and transformers', from the folder of a checkpoint as transformers writes it."""
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), chat_template=chat_template, **names)
    fast.save_pretrained(folder)
    return load_tokenizer(folder, {"kind": "tokenizer.json"}), AutoTokenizer.from_pretrained(folder)


def test_tokenizer_json_is_that_of_transformers(tmp_path: Path) -> None:
    ours, theirs = load_both(tmp_path)
    for text in [*SENTENCES, "<|user|>hi<eos> <tool call>", "\x00\u200d\U0010ffff"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert (ids[:1] == [0]) == special
            for skip in (True, False):
                want = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == want
    assert ours.eos_token_ids == {theirs.eos_token_id}
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)  # settings of a training run, which do not count
    assert load_saved(tmp_path, backend).encode(SENTENCES[0]) == theirs.encode(SENTENCES[0])


def test_bytes() -> None:
    ours = load_tokenizer(NOWHERE, {"kind": "bytes"})
    for text in SENTENCES:
        assert ours.encode(text) == list(text.encode("utf-8"))
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode([104, 256, 999, 105]) == "hi"
    assert ours.decode([0xE2, 0x82]) == "\ufffd"


def test_vocab_takes_the_longest_match(tmp_path: Path) -> None:
    write_json(tmp_path, "vocab.json", {"<eos>": 0, "a": 4, "ab": 2, "abc": 3, "c": 5, "<unk>": 9, "<s>": 7})
    write_json(tmp_path, "tokenizer_config.json", {"eos_token": "<eos>", "bos_token": {"content": "<s>"}})
    ours = load_tokenizer(tmp_path, {"kind": "vocab"})
    assert ours.encode("abcabacaé<eos>") == [3, 2, 4, 5, 4, 9, 0]
    assert ours.encode("") == []
    assert ours.decode([7, 3, 2, 4, 0, 9, 77]) == "abcaba<unk>"
    assert ours.decode([7, 3, 0], skip_special_tokens=False) == "<s>abc<eos>"
    assert ours.eos_token_ids == {0}
    write_json(tmp_path, "vocab.json", {"1": 0, "+": 1})
    with pytest.raises(InputError, match=r"'x' at character 2: accepted are 1 \+$"):
        load_tokenizer(tmp_path, {"kind": "vocab"}).encode("1+x")


@pytest.mark.parametrize("content", [{}, {"a": "1"}, {"a": -1}, {"": 1}, {"a": 1, "b": 1}, {"a": True}, ["a"]])
def test_a_broken_vocab_is_refused(tmp_path: Path, content: object) -> None:
    write_json(tmp_path, "vocab.json", content)
    with pytest.raises(BundleError, match=r"vocab\.json"):
        load_tokenizer(tmp_path, {"kind": "vocab"})


def test_without_a_tokenizer_ids_must_be_given(tmp_path: Path) -> None:
    none = load_tokenizer(tmp_path, None)
    with pytest.raises(InputError, match=r"no tokenizer.*--tokens 1,2,3"):
        none.encode("hi")
    with pytest.raises(InputError, match=r"no tokenizer.*--tokens 1,2,3"):
        none.decode([1])
    assert stream(none, [5, 0, 7]).text == none.decode([]) == ""


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
    with pytest.raises(InputError, match=r"'\\udcff' at character 2"):
        load_tokenizer(tmp_path, {"kind": "bytes"}).encode("ab\udcff")
    with pytest.raises(InputError, match="token id = -1"):
        load_tokenizer(tmp_path, {"kind": "bytes"}).decode([3, -1])


EOS_FILES = ("generation_config.json", "config.json", "tokenizer_config.json")
EOS = [([[7, 8], 5, 4], {7, 8}), ([None, 5, 4], {5}), ([None, 0, 4], {0}), ([None, None, 4], {4})]


@pytest.mark.parametrize(("values", "want"), EOS)
def test_eos_comes_from_the_first_file_that_has_it(tmp_path: Path, values: list[Any], want: set[int]) -> None:
    assert load_tokenizer(tmp_path, {"kind": "bytes"}).eos_token_ids == set()
    for name, value in zip(EOS_FILES, values, strict=True):
        write_json(tmp_path, name, {"eos_token_id": value})
    assert load_tokenizer(tmp_path, {"kind": "bytes"}).eos_token_ids == want
    for wrong in ("2", True, -1, [2, None], 2.0):
        write_json(tmp_path, EOS_FILES[0], {"eos_token_id": wrong})
        with pytest.raises(BundleError, match=r"config\.json: eos_token_id = "):
            _ = load_tokenizer(tmp_path, {"kind": "bytes"}).eos_token_ids


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
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} "
    "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% set x = 1 %}{% generation %}{% set x = 2 %} {{ m.content }}"
    "{{ x }}\n{%- endgeneration %}|{{ x }}\n{% endfor %}",
    "None is left out": "{% for m in messages %}{{ 'tool_calls' in m }} {% endfor %}",
    "names not given": "{{ tools is none }}{{ documents is none }}{{ unk_token is defined }}{{ pad_token }}",
    "namespace, macro, today": "{% set ns = namespace(n=0) %}{% macro f(x) %}<{{ x }}>{% endmacro %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ f(ns.n) }}"
    "{{ strftime_now('%Y') | length }}",
    "trailing newline": "a\n{{ messages | length }}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_templates_render_as_in_transformers(tmp_path: Path, name: str, prompt: bool) -> None:
    ours, theirs = load_both(tmp_path, TEMPLATES[name])
    got = ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt)
    assert got == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode(got, add_special_tokens=False) == ids


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES)
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ bos_token }} default"}]
    for template, want in (("plain{{ bos_token }}", "plain<s>"), (named, "<s> default")):
        config = {"chat_template": template, "bos_token": {"content": "<s>"}}
        write_json(tmp_path, "tokenizer_config.json", config)
        assert load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES) == want
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("template", "messages", "complaint"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", MESSAGES, "roles must alternate"),
        ("{% for m in messages %}\n", MESSAGES, "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", MESSAGES, "TypeError"),
        ("{{ messages.append({}) }}", MESSAGES, "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "SecurityError"),
        ("x", [], "messages = "),
        ("x", ["hello"], "messages = "),
    ],
)
def test_a_failing_chat_is_named(tmp_path: Path, template: str, messages: Any, complaint: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(InputError, match=complaint) as caught:
        load_tokenizer(tmp_path, {"kind": "bytes"}).apply_chat_template(messages)
    assert "\n" not in str(caught.value)


def stream(tokenizer: Tokenizer, ids: list[int], **options: Any) -> TextStream:
    text_stream = TextStream(tokenizer, **options)
    pieces = [text_stream.push(token_id) for token_id in ids]
    pieces.append(text_stream.finish())
    assert text_stream.text == "".join(pieces)
    assert text_stream.finish() == ""
    return text_stream


@pytest.mark.parametrize("backend", [byte_level, byte_fallback, metaspace, word_pieces])
@pytest.mark.parametrize("seed", range(8))
def test_streaming_is_decoding_everything(tmp_path: Path, backend: Any, seed: int) -> None:
    ours = load_saved(tmp_path, backend())
    V = backend().get_vocab_size()
    rng = random.Random(seed)
    for length in (0, 1, 2, 3, 5, 15, 63, 400):
        ids = [rng.randrange(V + 3) for _ in range(length)]
        if backend is byte_fallback:  # no run of more than 15 byte tokens: 259 to 271 are none
            ids = [rng.randrange(259, V) if rng.random() < 0.3 or i % 16 == 15 else n for i, n in enumerate(ids)]
        assert stream(ours, ids).text == ours.decode(ids)


@pytest.mark.parametrize("seed", range(8))
def test_streaming_bytes_that_are_no_utf8(seed: int) -> None:
    ours = load_tokenizer(NOWHERE, {"kind": "bytes"})
    rng = random.Random(seed)
    mixed = [*b"A\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\x98\xff\xed\xa0\xef\xbf\xbd", 300]
    for choices in (range(256), mixed, [0x80], [0xF0, 0x9F, 0x98], [0xE2, 0x82, 0xAC, 0xFF], mixed[-4:-1]):
        for length in (1, 2, 3, 17, 200):
            ids = [rng.choice(choices) for _ in range(length)]
            assert stream(ours, ids).text == bytes(n for n in ids if n < 256).decode("utf-8", "replace")
    endless = [0xEF, 0xBF, 0xBD] * 40  # U+FFFD itself, so that no text ends in anything else
    assert stream(ours, [0xFF, *endless, 0xFF]).text == "\ufffd" * 42


def test_a_long_run_of_byte_fallback_is_exact_if_valid_and_late_by_16_tokens(tmp_path: Path) -> None:
    ours = load_saved(tmp_path, byte_fallback())
    text = "hello 日本語の文章と中文的句子한국어문장도🙂🚀🙂🚀🙂é world."
    ids = ours.encode(text)
    assert stream(ours, ids).text == ours.decode(ids) == text
    text_stream = TextStream(ours)
    for count, token_id in enumerate(ids, 1):
        text_stream.push(token_id)
        assert text.startswith(text_stream.text)
        assert len(text_stream.text.encode()) >= count - 1 - 16
    late = stream(ours, [3 + byte for byte in "日本語日本語日本語".encode() + b"\xff"])
    assert late.text == "日本語日本" + 13 * "\ufffd"  # what is out stays


def test_no_half_character_is_shown(tmp_path: Path) -> None:
    for ours in (load_saved(tmp_path, byte_level()), load_tokenizer(tmp_path, {"kind": "bytes"})):
        text_stream = TextStream(ours)
        shown = [text_stream.push(token_id) for token_id in ours.encode("a🙂é日")]
        assert "" in shown
        assert [piece for piece in shown if piece] == list("a🙂é日")
    half = TextStream(load_tokenizer(NOWHERE, {"kind": "bytes"}))
    assert [*map(half.push, b"b\xe2\x82"), half.finish()] == ["b", "", "", "\ufffd"]


def test_a_continued_prompt_keeps_its_space(tmp_path: Path) -> None:
    ours = load_saved(tmp_path, byte_fallback())
    prompt, answer = ours.encode("hello"), ours.encode("world")
    assert stream(ours, answer).text == ours.decode(answer) == "world"
    assert stream(ours, answer, prompt=prompt).text == " world"
    assert stream(ours, answer, prompt=[*prompt, 2]).text == " world"
    with_special = [2, *answer, 2, *answer, 2]
    assert stream(ours, with_special).text == ours.decode(with_special) == "world world"


@pytest.mark.parametrize("backend", [byte_level, byte_fallback, metaspace])
def test_the_window_stays_short_whatever_comes(tmp_path: Path, backend: Any, monkeypatch: Any) -> None:
    ours = load_saved(tmp_path, backend())
    decode, lengths = ours.decode, [0]
    monkeypatch.setattr(ours, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    byte = ours.token_to_id("<0xE2>") or ours.token_to_id("â") or 1
    for ids in ([0], [byte], [10**6], [5, 6, 7, 4]):
        stream(ours, ids * 300)
    assert 1 < max(lengths) <= 2 * 16


STOPS = [
    ("hello STOP world", ["STOP"], "hello "),
    ("hello STOSTOP!", ["STOP"], "hello STO"),
    ("aaab", ["aab"], "a"),
    ("xabcy", ["abc", "b"], "xa"),
    ("xabcy", ["abc", "bc", "c"], "x"),
    ("xabcy", ["c", "abcz"], "xab"),
    ("xaby", ["abc", "bcd"], None),
    ("STOP", ["STOP"], ""),
    ("été 🙂🚀!", ["🙂🚀"], "été "),
    ("été 🙂🙂", ["🙂🚀"], None),
    ("a long lone string", "lone", "a long "),
]


@pytest.mark.parametrize(("text", "stop", "want"), STOPS)
def test_stop_strings(tmp_path: Path, text: str, stop: list[str], want: str | None) -> None:
    for ours in (load_saved(tmp_path, byte_level()), load_tokenizer(tmp_path, {"kind": "bytes"})):
        ids = ours.encode(text)
        got = stream(ours, ids, stop=stop)
        assert got.text == (text if want is None else want)
        assert got.stopped == (want is not None)
        assert not got.stopped or got.push(ids[-1]) == ""


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
        first = next((text[:end] for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))), None)
        got = stream(ours, ids, stop=stop)
        assert got.stopped == (first is not None)
        cut = max((len(s) for s in stop if first and first.endswith(s)), default=0)
        assert got.text == (text if first is None else first[: len(first) - cut])


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    ours = load_tokenizer(NOWHERE, {"kind": "bytes"})
    text_stream = TextStream(ours, stop=["END", "<|im_end|>"])
    shown = [text_stream.push(byte) for byte in b"a<b E<|im_x END"]
    assert "/".join(shown) == "a//<b/ //E/////<|im_x/ ///"
    assert text_stream.stopped
    with pytest.raises(ConfigError, match="stop = ''"):
        TextStream(ours, stop=["a", ""])


@pytest.mark.parametrize(("package", "kind"), [("tokenizers", "tokenizer.json"), ("jinja2", "bytes")])
def test_imports_are_lazy_and_a_missing_one_names_the_extra(tmp_path: Path, package: str, kind: str) -> None:
    (tmp_path / "chat_template.jinja").write_text("x", encoding="utf-8")
    code = f"""if True:
        import sys, pathlib, pe_onnx.sampling, pe_onnx.tokenizer as t, pe_onnx.errors as errors
        t.TextStream(t.load_tokenizer(pathlib.Path("nowhere"), {{"kind": "bytes"}})).push(65)
        print([name for name in ("torch", "transformers", "tokenizers", "jinja2") if name in sys.modules])
        sys.modules[{package!r}] = None
        folder, spec = pathlib.Path({str(tmp_path)!r}), {{"kind": {kind!r}}}
        try: t.load_tokenizer(folder, spec).apply_chat_template([{{}}])
        except errors.MissingDependencyError as error: print(error)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, message = run.stdout.splitlines()
    assert imported == "[]"
    assert message.startswith(f"{package} cannot be imported")
    assert message.endswith("pip install 'pe-onnx[cpu]' or 'pe-onnx[gpu]'")
