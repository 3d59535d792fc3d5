"""Generation: greedy, batches, limits, continuation of a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch

import pe_onnx
from pe_onnx.beam_search import BeamOptions
from pe_onnx.config import DecoderConfig
from pe_onnx.errors import ConfigError, InputError, ProviderError
from pe_onnx.models.decoder import Decoder
from pe_onnx.models.exportable import PlainDecoder
from pe_onnx.sampling import SamplingOptions

Bundles = Callable[..., Path]


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_greedy_is_pytorchs_greedy(bundles: Bundles, target: str) -> None:
    prompt = [5, 99, 3, 250, 17]
    made = pe_onnx.load(bundles("rope", target)).generate(prompt, 40).tokens
    decoder = PlainDecoder(Decoder(DecoderConfig.preset("tiny", encoding="rope")))
    ids = list(prompt)
    for _ in range(40):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(decoder(tokens, torch.ones_like(tokens), torch.arange(len(ids))[None])[0, -1].argmax()))
    assert made == ids[5:]


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_a_batch_gives_what_its_rows_give_alone(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("t5_bias", target))
    prompts = ["a", "the dog chased the pig", "1 2 3"]
    together = model.generate(prompts, 24)
    assert [r.tokens for r in together] == [model.generate(p, 24).tokens for p in prompts]
    assert [r.prompt_tokens for r in together] == [1, 22, 5]
    sampling = SamplingOptions(temperature=1.0, seed=3)
    assert model.generate(prompts, 24, sampling)[0].tokens == model.generate(prompts[0], 24, sampling).tokens


def test_streamed_pieces_make_the_text(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("alibi"))
    pieces: dict[int, str] = {0: "", 1: ""}

    def take(row: int, piece: str) -> None:
        pieces[row] += piece

    results = model.generate(["ab", "héllo"], 60, stream=take)
    assert [pieces[0], pieces[1]] == [r.text for r in results]
    assert model.timing.prompt_tokens == 8
    assert (model.timing.new_tokens, model.timing.decoded_tokens) == (120, 118)
    assert model.timing.decode_tokens_per_s > 0


def test_a_stop_string_ends_the_text_before_it(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope"))
    whole = model.generate("abc", 60)
    assert whole.finish_reason == "length"
    stop = next(c for c in whole.text if c.isascii())
    cut = model.generate("abc", 60, stop=[stop])
    assert (cut.text, cut.finish_reason) == (whole.text.split(stop)[0], "stop")


def test_an_end_token_ends_a_row_and_not_the_batch(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pe_onnx.load(bundles("rope"))
    plain = model.generate(["abc", "xyz"], 30)
    end = plain[0].tokens[10]
    monkeypatch.setattr(model.tokenizer, "eos_token_ids", frozenset({end}))
    ended = model.generate(["abc", "xyz"], 30)
    first = plain[0].tokens.index(end)
    assert ended[0].tokens == plain[0].tokens[: first + 1]
    assert ended[0].finish_reason == "stop"
    expected = plain[1].tokens
    if end in expected:
        expected = expected[: expected.index(end) + 1]
    assert ended[1].tokens == expected
    assert model.generate(["abc", "xyz"], 30, ignore_eos=True)[0].tokens == plain[0].tokens


def test_continuing_a_cache_computes_only_what_is_new(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope"))
    cache = model.cache()
    first = model.generate([1, 2, 3], 10, cache=cache)
    assert cache.lengths.tolist() == [12]
    second = model.generate([first.tokens[-1], 7, 8], 10, cache=cache)
    assert model.timing.prompt_tokens == 3
    assert second.tokens == model.generate([1, 2, 3, *first.tokens, 7, 8], 10).tokens


def test_generation_ends_at_the_length_limit(bundles: Bundles) -> None:
    result = pe_onnx.load(bundles("rope")).generate([1] * 20, 500, max_length=32)
    assert (len(result.tokens), result.finish_reason) == (13, "length")


def test_a_full_row_does_not_end_the_batch(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("learned", config={"max_position_embeddings": 64}))
    long, short = model.generate([[7] * 60, [9]], 20)
    assert (len(long.tokens), long.finish_reason) == (5, "length")
    assert short.tokens == model.generate([9], 20).tokens
    assert len(short.tokens) == 20


PROMPTS = [[5, 9, 13], [44], [8, 70, 33, 21, 60, 7], [90, 12]]


@torch.no_grad()
def test_beams_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported checkpoints, with end tokens at which beams end early; prompts of different lengths are one batch."""
    ends, made = (2, *range(30, 40)), set()
    for model_type, target in (("gpt2", "ort"), ("llama", "portable")):
        checkpoint = checkpoints.write(tmp_path / model_type, model_type, gain=1.0, tie_word_embeddings=False)
        pe_onnx.export(checkpoint, tmp_path / "b", target=target, force=True)
        model, oracle = pe_onnx.load(tmp_path / "b"), checkpoints.oracle(checkpoint)
        monkeypatch.setattr(model.tokenizer, "eos_token_ids", frozenset(ends))
        longest = max(map(len, PROMPTS))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
        for k, penalty, early, n, repetition in (
            (4, 1.0, False, 4, 1.0),
            (3, 2.0, True, 1, 1.3),
            (5, 0.0, "never", 2, 1.0),
        ):
            want = oracle.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=20,
                do_sample=False,
                num_beams=k,
                length_penalty=penalty,
                early_stopping=early,
                num_return_sequences=n,
                repetition_penalty=repetition,
                pad_token_id=0,
                eos_token_id=list(ends),
                output_scores=True,
                return_dict_in_generate=True,
            )
            sampling = SamplingOptions(repetition_penalty=repetition)
            got = model.generate(PROMPTS, 20, sampling, beams=BeamOptions(k, penalty, early, n))
            assert len(got) == 4 * n
            for result, tokens, score in zip(got, want.sequences.tolist(), want.sequences_scores.tolist(), strict=True):
                assert result.tokens == tokens[longest:][: len(result.tokens)]
                assert (result.finish_reason == "stop") == (result.tokens[-1] in ends)
                assert result.finish_reason == "stop" or len(result.tokens) == 20
                assert result.score == pytest.approx(score, rel=2e-5)
                made.add(len(result.tokens))
        assert model.timing.prompt_tokens == 12
        assert model.timing.new_tokens == sum(len(result.tokens) for result in got)
    assert len(made) > 4, "beams end at different times"


@pytest.mark.parametrize("target", ["ort", "portable"])
def test_one_prompt_and_several_beams(bundles: Bundles, target: str) -> None:
    model = pe_onnx.load(bundles("alibi", target))
    one = model.generate("abc", 12, beams=BeamOptions(4))
    two = model.generate("abc", 12, beams=BeamOptions(4, num_return_sequences=2))
    assert not isinstance(one, list)
    assert isinstance(two, list)
    assert one == two[0]
    assert two[0].score >= two[1].score
    assert two[0].tokens != two[1].tokens
    assert one.text == model.tokenizer.decode(one.tokens)
    assert model.generate("abc", 12, beams=BeamOptions(1)) == model.generate("abc", 12)


def test_beams_end_at_the_length_limit_and_not_each_others(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("learned", config={"max_position_embeddings": 64}))
    beams = BeamOptions(3)
    long, short = model.generate([[7] * 60, [9]], 20, beams=beams)
    assert (len(long.tokens), long.finish_reason) == (5, "length")
    assert long.tokens == model.generate([7] * 60, 5, beams=beams).tokens
    assert short.tokens == model.generate([9], 20, beams=beams).tokens
    assert len(short.tokens) == 20


def test_what_beams_do_not_go_with(bundles: Bundles) -> None:
    model, beams = pe_onnx.load(bundles("rope")), BeamOptions(2)
    for options, named in (
        ({"stream": lambda row, piece: None}, "stream with num_beams = 2"),
        ({"stop": ["x"]}, r"stop = \['x'\] with num_beams = 2"),
        ({"cache": model.cache()}, "cache with num_beams = 2"),
        ({"sampling": SamplingOptions(temperature=0.5)}, "temperature = 0.5 with num_beams = 2"),
    ):
        with pytest.raises(ConfigError, match=named):
            model.generate("a", 3, beams=beams, **options)
    with pytest.raises(InputError, match="3000 tokens are more than max_length"):
        model.generate([1] * 3000, 3, beams=beams)


def test_what_generate_refuses(bundles: Bundles) -> None:
    model = pe_onnx.load(bundles("rope"))
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        model.generate("a", 0)
    with pytest.raises(InputError, match="empty"):
        model.generate([])
    with pytest.raises(InputError, match="no tokens"):
        model.generate("")
    with pytest.raises(ConfigError, match="one of cpu, cuda, auto"):
        pe_onnx.load(bundles("rope"), provider="gpu")


def test_asking_for_cuda_where_there_is_none_says_what_is_missing(bundles: Bundles) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/proc/driver/nvidia").exists():
        assert pe_onnx.load(bundles("rope"), provider="cuda").session.device.kind == "cuda"
        return
    with pytest.raises(ProviderError, match=r"pip install 'pe-onnx\[gpu\]'|no NVIDIA driver"):
        pe_onnx.load(bundles("rope"), provider="cuda")
    assert pe_onnx.load(bundles("rope"), provider="auto").session.device.kind == "cpu"
