"""Text to token ids and back, on the device: without torch and transformers, other imports at first use.

A bundle's manifest names one of these kinds:

    {"kind": "tokenizer.json"}   the file of the `tokenizers` library
    {"kind": "vocab"}            a plain vocab.json, token to id; greedy longest match
    {"kind": "bytes"}            ids 0 to 255 are the bytes of UTF-8
    None                         no tokenizer: the user gives token ids

End-of-sequence ids, special tokens and the chat template come from the files that `save_pretrained` of
transformers 5.23 writes beside the weights. Not supported: sentencepiece's tokenizer.model,
`clean_up_tokenization_spaces`, and tools or documents in chat templates.
"""

from __future__ import annotations

import importlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from pe_onnx.errors import BundleError, ConfigError, InputError, MissingDependencyError, did_you_mean

_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no UTF-8, or not yet


class Tokenizer(ABC):
    """What generation needs of a tokenizer; `load_tokenizer` makes one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._template: Any = None
        """The chat template, once it was read."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; ``add_special_tokens`` adds those that the tokenizer puts around it (BOS).

        Text from `apply_chat_template` holds its special tokens already: encode it with False. Raises
        InputError for text that is not valid Unicode or has no tokens in the vocabulary.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            raise InputError(f"the text has {found}: accepted is valid Unicode, read it as UTF-8") from None
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids. Ids without a token are left out; bytes that are no UTF-8 become U+FFFD."""
        numbers = [operator.index(token_id) for token_id in ids]
        if numbers and min(numbers) < 0:
            raise InputError(f"token id = {min(numbers)}: accepted are ids from 0")
        return self._decode(numbers, skip_special_tokens) if numbers else ""

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves this id out: a special token, or an id without a token."""

    def is_unfinished(self, token_id: int) -> bool:
        """Whether the decoder may still change the text of a sequence that ends in this token."""
        return False

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is none."""
        return None

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a text: of generation_config.json, else config.json, else tokenizer_config.json."""
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            value = self._json(name).get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
                raise BundleError(f"{name}: eos_token_id = {value!r}: accepted is an id or a list of ids")
            return frozenset(ids)
        eos = self.token_to_id(self.special_tokens.get("eos_token", ""))
        return frozenset() if eos is None else frozenset([eos])

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, for example ``{"bos_token": "<s>"}``."""
        named = self._json("tokenizer_config.json")
        if "added_tokens_decoder" not in named:  # before transformers 4.34 they had their own file
            named = named | self._json("special_tokens_map.json")
        texts = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
        return {key: v for key, v in texts.items() if key.endswith("_token") and isinstance(v, str)}

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source: chat_template.jinja, or that in tokenizer_config.json (of several, `default`)."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
        return template if isinstance(template, str) else None

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, as transformers' `apply_chat_template` writes it.

        ``messages`` are dicts such as ``{"role": "user", "content": "hello"}``; a key whose value is None is
        left out. ``add_generation_prompt`` ends the prompt with the header of the answer. Raises InputError
        when there is no template or no message, or when the template refuses the conversation.
        """
        if self.chat_template is None:
            raise InputError(f"{self._folder} has no chat template: give the prompt as plain text")
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"messages = {messages!r}: accepted is a list of dicts with role and content")
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {"messages": given, "add_generation_prompt": add_generation_prompt}
        variables |= {"tools": None, "documents": None, **self.special_tokens}
        environment = _chat_environment()
        try:
            if self._template is None:
                self._template = environment.from_string(self.chat_template)
            return str(self._template.render(variables))
        except Exception as error:  # the template is the checkpoint's program: it can raise anything
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template fails: {type(error).__name__}: {reason}") from error

    def _json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder, empty if the file is missing."""
        path = self._folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from error
        if not isinstance(content, dict):
            raise BundleError(f"{path} holds a {type(content).__name__}: accepted is a JSON object")
        return content


class JsonTokenizer(Tokenizer):
    """The tokenizer.json of the `tokenizers` library."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tokenizers = _import("tokenizers")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path} is missing: export again, or give token ids, as in --tokens 1,2,3")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from error
        self._tokenizer.no_truncation()  # left over from training; transformers switches both off too
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._byte_tokens = {self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_silent(self, token_id: int) -> bool:
        return token_id in self._special or self._tokenizer.id_to_token(token_id) is None

    def is_unfinished(self, token_id: int) -> bool:
        """Byte fallback decodes a run of byte tokens to U+FFFD if any byte of the run is invalid."""
        return token_id in self._byte_tokens


class VocabTokenizer(Tokenizer):
    """A plain vocab.json ``{token: id}``: at each character the longest token that matches.

    Special tokens are matched in the text like any other; none are added around it. A character that begins
    no token becomes ``<unk>``, or raises InputError if the vocabulary has no ``<unk>``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / "vocab.json"
        self._ids: dict[str, int] = self._json("vocab.json")
        if not self._ids:
            raise BundleError(f"{path} is missing or empty: export the bundle again")
        for token, token_id in self._ids.items():
            if not token or type(token_id) is not int or token_id < 0:
                raise BundleError(f"{path}: {token!r} = {token_id!r}: accepted is a text and an id from 0")
        self._tokens = {token_id: token for token, token_id in self._ids.items()}
        if len(self._tokens) < len(self._ids):
            raise BundleError(f"{path} gives two tokens the same id: accepted is one id for each token")
        self._longest = max(map(len, self._ids))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = []
        start = 0
        while start < len(text):
            ends = range(min(start + self._longest, len(text)), start, -1)
            token = next((text[start:end] for end in ends if text[start:end] in self._ids), None)
            if token is None and "<unk>" not in self._ids:
                known = f"{' '.join(list(self._ids)[:40])}{' ...' if len(self._ids) > 40 else ''}"
                raise InputError(f"no token for {text[start]!r} at character {start}: accepted are {known}")
            ids.append(self._ids[token or "<unk>"])
            start += len(token or text[start])
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        skipped = self._special if skip_special_tokens else frozenset()
        return "".join(self._tokens.get(token_id, "") for token_id in ids if token_id not in skipped)

    @cached_property
    def _special(self) -> frozenset[int]:
        named = self.special_tokens.values()
        return self.eos_token_ids | {self._ids[token] for token in named if token in self._ids}

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def is_silent(self, token_id: int) -> bool:
        return token_id in self._special or token_id not in self._tokens


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8; ids above (padding, end of text) have no text."""

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode("utf-8"))

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token_id for token_id in ids if token_id < 256).decode("utf-8", errors="replace")

    def is_silent(self, token_id: int) -> bool:
        return token_id > 255


class NoTokenizer(Tokenizer):
    """Stands for the tokenizer of a bundle that has none: a `TextStream` of it is empty, `eos_token_ids` works."""

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise InputError("this bundle has no tokenizer: give token ids, as in --tokens 1,2,3")

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        raise InputError("this bundle has no tokenizer: read token ids, give them as in --tokens 1,2,3")

    def is_silent(self, token_id: int) -> bool:
        return True


_KINDS: dict[str, type[Tokenizer]] = {
    "bytes": BytesTokenizer,
    "tokenizer.json": JsonTokenizer,
    "vocab": VocabTokenizer,
}


def load_tokenizer(folder: Path, spec: Mapping[str, Any] | None) -> Tokenizer:
    """The tokenizer of a bundle's folder; ``spec`` is the manifest's `tokenizer`, ``{"kind": ...}`` or None.

    Raises BundleError for an unknown kind and for a file that is missing or unreadable, and
    MissingDependencyError when the kind needs a package that is not installed.
    """
    if spec is None:
        return NoTokenizer(Path(folder))
    kind = spec.get("kind")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise BundleError(f"tokenizer kind = {kind!r}: accepted are {known}{did_you_mean(str(kind), _KINDS)}")
    return _KINDS[kind](Path(folder))


class TextStream:
    """Text of token ids that arrive one by one: nothing that a later token can change, nothing after a stop.

    Joined, the pieces are the whole decoding of the ids, up to the stop string. Only a window is decoded, as
    in text-generation-inference, so a token costs the same after 10 others or 10,000: the tokens of the last
    piece, whose text is out (a decoder that strips a leading space strips it there), and those whose text is
    held back, 16 at most. One case is not exact: byte fallback replaces every byte of a run of byte tokens if
    one of them is invalid; in a run of more than 16, what was out already stays as it was.

    ``stop`` are strings that end the text before them: the one that is complete first, and the longest of
    those complete together. ``prompt`` are the ids before the first one pushed, for a text that continues
    them: the first piece then keeps its leading space. Raises ConfigError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stops:
            raise ConfigError("stop = '': accepted is a string of one character or more")
        self._window = [t for t in prompt[-_MAX_HELD_TOKENS:] if not tokenizer.is_silent(t)]
        self._read = len(self._window)  # tokens at the window's start whose text is out
        self._tail = ""  # decoded, but it may begin a stop string
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is certain by now, often none; none after a stop."""
        if self.stopped or self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        end = len(self._window)
        if text.endswith(_REPLACEMENT) or self._tokenizer.is_unfinished(token_id):
            if end - self._read < _MAX_HELD_TOKENS:
                return ""
            end = self._last_border(text)
        return self._emit(self._advance(end), final=False)

    def finish(self) -> str:
        """Return the text that was held back: no token follows."""
        return "" if self.stopped else self._emit(self._advance(len(self._window)), final=True)

    def _last_border(self, text: str) -> int:
        """The last token border with a whole character before it, else one that no character crosses.

        A character has at most 4 bytes, an unfinished one at most 3, and a token at least one.
        """
        decode, window, end = self._tokenizer.decode, self._window, len(self._window)
        whole = [n for n in range(end - 3, end + 1) if not decode(window[:n]).endswith(_REPLACEMENT)]
        apart = [n for n in range(end - 6, end - 2) if decode(window[:n]) + decode(window[n:]) == text]
        return max(whole or apart or [end])

    def _advance(self, end: int) -> str:
        """The text of the window's tokens from `_read` to ``end``; they become the context of the next."""
        before = self._tokenizer.decode(self._window[: self._read])
        after = self._tokenizer.decode(self._window[:end])
        if after.startswith(before):
            piece = after[len(before) :]
        else:  # a run of byte tokens turned out to be invalid when its beginning was out already
            piece = self._tokenizer.decode(self._window[self._read : end])
        self._window, self._read = self._window[self._read :], end - self._read
        return piece

    def _emit(self, piece: str, final: bool) -> str:
        """``piece`` behind what was held back, cut before a stop string and before what may begin one."""
        text, self._tail = self._tail + piece, ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)[1]]
        elif not final:
            starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            cut = len(text) - max(starts, default=0)
            text, self._tail = text[:cut], text[cut:]
        self._pieces.append(text)
        return text


@cache
def _chat_environment() -> Any:
    """The sandboxed Jinja environment of transformers 5.23, `utils/chat_template_utils.py`."""
    jinja2, ext, sandbox = _import("jinja2"), _import("jinja2.ext"), _import("jinja2.sandbox")

    class Generation(ext.Extension):  # type: ignore[name-defined]
        """``{% generation %}`` marks the assistant's text for training: here it renders what it encloses."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _import(module: str) -> Any:
    """A module of an extra; MissingDependencyError if it is missing or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} cannot be imported ({error}): pip install 'pe-onnx[cpu]' or 'pe-onnx[gpu]'"
        ) from error
