"""ByT5's tokenizer as a tokenizer.json: the bytes of UTF-8 and sentinels, which transformers 5.23 has in Python only.

    <pad> 0, </s> 1, <unk> 2, byte b at b + 3, <extra_id_i> at 259 + i        text, then </s>

Two things differ from transformers' `ByT5Tokenizer`: bytes that are no UTF-8 are decoded to U+FFFD, where that leaves
them out, and a text that ends in ``</s>`` gets another one, where that gives a warning.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer


def convert(tokenizer: ByT5Tokenizer) -> Tokenizer:
    """The same ids for the same text."""
    added = tokenizer.added_tokens_decoder
    vocabulary = {token.content: index for index, token in added.items()}
    for byte, character in enumerate(_characters()):
        vocabulary[character] = tokenizer.offset + byte
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    end = str(tokenizer.eos_token)
    fast.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, vocabulary[end])]
    )
    fast.add_special_tokens(
        [
            AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=True)
            for token in (added[index] for index in sorted(added))
        ]
    )
    return fast


def _characters() -> list[str]:
    """The character that stands for each byte, as in GPT-2: itself where it can be seen, else one from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 0x100 + hidden.index(byte)) for byte in range(256)]
