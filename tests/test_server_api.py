"""``pe-onnx serve`` through OpenAI's own Python client, as it comes: answers are those of ``generate``."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import servers
from command_line import refused
from conftest import Cli

import pe_onnx
from pe_onnx.generate import Model
from pe_onnx.sampling import SamplingOptions

Bundles = Callable[..., Path]
NAME = "tiny-rope"
MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]


@pytest.fixture(scope="module")
def bundle(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = bundles("rope", "ort", preset="tiny", config={"tie_word_embeddings": False})
    return servers.with_chat(made, tmp_path_factory.mktemp("served") / NAME)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return pe_onnx.load(bundle)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[servers.Served]:
    options = ("--slots", 4, "--max-length", 600, "--max-new-tokens", 500, "--max-queue", 8, "--max-body", "64kB")
    with servers.serve(bundle, *options) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: servers.Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_completion_is_what_generate_gives(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model=NAME, prompt="Once upon", max_tokens=20, temperature=0)
    expected = model.generate("Once upon", 20)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.model == NAME
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 20, 29)


def test_the_length_of_a_completion_defaults_to_16_tokens(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model=NAME, prompt=[1, 2, 3], temperature=0)
    assert answer.choices[0].text == model.generate([1, 2, 3], 16).text


def test_several_prompts_and_several_choices(client: openai.OpenAI, model: Model) -> None:
    prompts = ["one", "another one"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=9, temperature=1.5, seed=5)
    rows = [prompt for prompt in prompts for _ in range(2)]
    expected = model.generate(rows, 9, SamplingOptions(temperature=1.5, seed=5))
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3 + 11


def test_a_seed_gives_the_same_text_again(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return client.completions.create(model=NAME, prompt="x", max_tokens=20, seed=seed).choices[0].text

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert text(None) != text(None)


def test_a_stream_joins_to_the_whole(client: openai.OpenAI, model: Model) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=NAME, prompt="Stream", max_tokens=40, temperature=0, stream=True, stream_options=options
        )  # type: ignore[call-overload]
    )
    *text, last = chunks
    assert "".join(chunk.choices[0].text for chunk in text) == model.generate("Stream", 40).text
    assert len(text) > 10
    assert [chunk.choices[0].finish_reason for chunk in text if chunk.choices[0].finish_reason] == ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 40)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, model: Model, server: servers.Served) -> None:
    whole = model.generate("Stop here", 60).text
    stop = next(whole[i : i + 2] for i in range(8, 50) if whole[i : i + 2].isascii() and whole[i : i + 2].isprintable())
    answer = client.completions.create(
        model=NAME, prompt="Stop here", max_tokens=400, temperature=0, stop=[stop, "\u2603 never"]
    )
    expected = model.generate("Stop here", 400, stop=[stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.tokens)
    server.wait_until("pe_onnx_running", 0)


def test_echo(client: openai.OpenAI, model: Model) -> None:
    expected = "Echo " + model.generate("Echo ", 5).text
    asked: dict[str, Any] = {"model": NAME, "prompt": "Echo ", "max_tokens": 5, "temperature": 0, "echo": True}
    assert client.completions.create(**asked).choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == expected


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "Log", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    told = client.completions.create(**asked).choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert len(told.tokens or ()) == len(told.token_logprobs) == len(told.text_offset or ()) == 6
    for chosen, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert chosen == max(top.values())
        assert list(top.values()) == sorted(top.values(), reverse=True)
    streamed = [c.choices[0].logprobs for c in client.completions.create(**asked, stream=True)]
    again = [value for one in streamed if one for value in one.token_logprobs]
    assert again == pytest.approx(
        told.token_logprobs, abs=1e-5
    )  # the prompt was held by then: another run, another sum
    assert [value for one in streamed if one for value in one.text_offset] == told.text_offset


def test_a_chat(client: openai.OpenAI, model: Model) -> None:
    prompt = model.tokenizer.apply_chat_template(MESSAGES)
    assert prompt == "<system>be brief\n<user>héllo\n<assistant>"
    expected = model.generate(prompt, 25).text
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 25, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    follow_up = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "so?"}]}]
    second = client.chat.completions.create(model=NAME, messages=follow_up, max_tokens=5, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 10
    text = f"{prompt}{expected}\n<user>so?\n<assistant>"
    assert second.choices[0].message.content == model.generate(text, 5).text


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 4
    for entry in content:
        assert [entry.logprob, entry.token] == [entry.top_logprobs[0].logprob, entry.top_logprobs[0].token]
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_models_and_health(client: openai.OpenAI, server: servers.Served) -> None:
    assert [entry.id for entry in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")
    assert httpx.get(f"{server.address}/health").json()["status"] == "ok"
    assert httpx.get(f"{server.address}/nothing").status_code == 404
    assert httpx.put(f"{server.address}/health").status_code == 405


REFUSED = (
    ({"model": "gpt-4"}, 404, "'gpt-4' is not served here"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [1, -1]}, 400, "prompt.1: Input should be greater than or equal to 0"),
    ({"prompt": 5}, 400, "prompt: accepted is text, a list of token ids, or a list of these"),
    ({"repetition_penalty": 1e-39}, 400, "repetition_penalty"),
    ({"prompt": [999_999]}, 400, "token id 999999 must be in 0"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": "x" * 601}, 400, "601 tokens are more than the 600"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 501}, 400, "501 is more than the 500"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"n": 13}, 400, "13 answers at once; at most 12"),
    ({"n": 0}, 400, "n"),
    ({"seed": 2**80}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": 3}, 400, "stop: accepted is text, or a list of texts"),
    ({"logit_bias": {"7": 1, "07": 2}}, 400, "logit_bias"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": 1, "echo": True}, 400, "echo"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "token id 99999"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"best_of": 3}, 400, "best_of: is not supported"),
    ({"suffix": "x"}, 400, "suffix: is not supported"),
    ({"\ud800": 1}, 400, "unicode"),
)


@pytest.mark.parametrize(("changed", "status", "message"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_is_refused(server: servers.Served, changed: dict[str, Any], status: int, message: str) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 2, **changed}
    answer = httpx.post(
        f"{server.base_url}/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "constrained" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 30_000, b'{"model": NaN}', b'"x"'])
def test_bodies_that_are_no_requests(server: servers.Served, body: bytes) -> None:
    for route in ("completions", "chat/completions"):
        for kind in ("application/json", "text/plain"):
            answer = httpx.post(f"{server.base_url}/{route}", content=body, headers={"content-type": kind})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]


def test_a_body_that_is_too_long(server: servers.Served) -> None:
    url, kind = f"{server.base_url}/completions", {"content-type": "application/json"}
    assert httpx.post(url, content=b" " * 64_001, headers=kind).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(70):
            yield b" " * 1000

    answer = httpx.post(url, content=pieces(), headers=kind)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        413,
        "the body is longer than the 64000 bytes that this server takes",
    )


def test_tools_are_refused_by_name(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="tools: is not supported here; leave it out"):
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=tools)


def test_a_client_that_leaves_frees_its_slot_within_a_step(bundle: Path) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 15_000, "temperature": 0, "ignore_eos": True}
    with servers.serve(bundle, "--slots", 1) as server:
        for stream in (False, True):
            with socket.create_connection(server.address.removeprefix("http://").split(":")) as connection:  # type: ignore[arg-type]
                text = httpx.Request("POST", server.address, json={**body, "stream": stream}).content
                head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
                connection.sendall("\r\n".join((*head, f"Content-Length: {len(text)}", "", "")).encode() + text)
                server.wait_until("pe_onnx_running", 1)
                before = server.metric("pe_onnx_steps_taken")
            server.wait_until("pe_onnx_running", 0)
            taken = server.metric("pe_onnx_steps_taken") - before
            assert taken < 500, taken  # of 15,000; the metrics themselves take some steps to read
        server.wait_until("pe_onnx_cancelled_total", 2)


def test_the_queue_is_bounded(bundle: Path) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 5000, "temperature": 0, "ignore_eos": True}
    with servers.serve(bundle, "--slots", 1, "--max-queue", 1) as server:
        url = f"{server.base_url}/completions"
        threads = [threading.Thread(target=lambda: httpx.post(url, json=body, timeout=120)) for _ in range(2)]
        threads[0].start()
        server.wait_until("pe_onnx_running", 1)
        threads[1].start()
        server.wait_until("pe_onnx_waiting", 1)
        refusal = httpx.post(url, json=body, timeout=120)
        assert refusal.status_code == 429
        assert 1 <= int(refusal.headers["retry-after"]) <= 60
        assert refusal.json()["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()
        assert httpx.post(url, json={**body, "max_tokens": 2}, timeout=60).status_code == 200


def test_a_request_out_of_time(bundle: Path) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 15_000, "temperature": 0, "ignore_eos": True}
    with servers.serve(bundle, "--timeout", 0.5) as server:
        url = f"{server.base_url}/completions"
        answer = httpx.post(url, json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        streamed = httpx.post(url, json={**body, "stream": True}, timeout=60).text
        assert "out of time after" in streamed
        assert "[DONE]" not in streamed
        server.wait_until("pe_onnx_running", 0)


def test_the_key(bundle: Path) -> None:
    with servers.serve(bundle, "--api-key", "s3cret") as server:
        for wrong in (
            {},
            {"authorization": "Bearer other"},
            {"authorization": "s3cret"},
            {"authorization": b"Bearer \xff"},
        ):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/completions"):
                assert httpx.get(f"{server.address}{path}", headers=wrong).status_code == 401
        assert httpx.get(f"{server.address}/health").status_code == 200
        right = {"authorization": "bearer s3cret"}
        assert httpx.get(f"{server.address}/v1/models", headers=right).status_code == 200
        with openai.OpenAI(base_url=server.base_url, api_key="s3cret", max_retries=0) as client:
            assert [entry.id for entry in client.models.list()] == [NAME]


def test_a_stopping_server_ends_what_is_under_way(bundle: Path, model: Model) -> None:
    with servers.serve(bundle) as server:
        answers: list[httpx.Response] = []
        body = {"model": NAME, "prompt": "x", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
        url = f"{server.base_url}/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=60)))
        thread.start()
        server.wait_until("pe_onnx_running", 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        assert answers[0].status_code == 200
        assert answers[0].json()["choices"][0]["text"] == model.generate("x", 600, ignore_eos=True).text
        assert "Traceback" not in "".join(server.errors)


def test_what_outlasts_the_grace_is_told(bundle: Path) -> None:
    with servers.serve(bundle, "--grace", 1, "--slots", 2, "--max-length", 100_000) as server:
        answers: dict[bool, httpx.Response] = {}
        body = {"model": NAME, "prompt": "x", "max_tokens": 90_000, "temperature": 0, "ignore_eos": True}

        def ask(stream: bool) -> None:
            url = f"{server.base_url}/completions"
            answers[stream] = httpx.post(url, json={**body, "stream": stream}, timeout=60)

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        server.wait_until("pe_onnx_running", 2)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        assert (answers[False].status_code, answers[False].headers["retry-after"]) == (503, "1")
        assert answers[False].json()["error"]["message"] == "the server is shutting down"
        assert "the server is shutting down" in answers[True].text
        assert "[DONE]" not in answers[True].text
        assert "Traceback" not in "".join(server.errors)


def test_headers_without_end_and_bodies_that_do_not_come(bundle: Path) -> None:
    with servers.serve(bundle, "--timeout", 0.5) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            with suppress(OSError):
                for _ in range(400):
                    connection.sendall(b"X-Long: " + b"y" * 1000 + b"\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 400")
                assert connection.recv(1000) is not None
        with socket.create_connection((host, int(port)), 30) as connection:
            head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 99")
            connection.sendall("\r\n".join((*head, "", "{")).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert httpx.get(f"{server.address}/health").status_code == 200


def test_an_answer_without_a_length_of_its_own_is_within_the_limit(bundle: Path, model: Model) -> None:
    with servers.serve(bundle, "--max-new-tokens", 6) as server:
        body = {"model": NAME, "prompt": "x", "temperature": 0, "suffix": None, "seed": -5}
        answer = httpx.post(f"{server.base_url}/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == model.generate("x", 6).text


def test_answers_to_one_prompt_compute_it_once(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="a prompt of its own, new to all", n=3, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens or 0) <= (31, 3)


def test_killed_and_started_again(bundle: Path) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 5, "temperature": 0}
    texts = []
    port = 0
    for _ in range(2):
        with servers.serve(bundle, port=port) as server:
            port = int(server.address.rpartition(":")[2])
            texts.append(httpx.post(f"{server.base_url}/completions", json=body).json()["choices"][0]["text"])
            server.process.kill()
            server.process.wait()
    assert texts[0] == texts[1]


def test_a_port_that_is_taken(server: servers.Served, bundles: Bundles, cli: Cli) -> None:
    port = server.address.rpartition(":")[2]
    refused(cli("serve", bundles("rope"), "--port", port), 2, port, "cannot be listened on")


def test_it_listens_on_this_machine_alone(server: servers.Served) -> None:
    assert server.address.startswith("http://127.0.0.1:")
