"""SGLang's real load generator, in its process, against a stand-in for the server: order, places, arrivals, what comes back."""

from __future__ import annotations

import pytest
from streaming_server import StreamingServer

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.bench_model import BenchModel
from sgl_hq.launch.demo_model import ensure_demo_model
from sgl_hq.launch.load_ab.load_client import RequestsClient, check_lengths, generator_arguments, is_open_loop
from sgl_hq.launch.load_ab.requests_file import LoadRequest, RequestSet, write


@pytest.fixture(scope="module")
def model():
    folder = str(ensure_demo_model())
    return BenchModel(folder, "demo", folder, 23040, False)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with RequestsClient(tmp_path_factory.mktemp("client")) as made:
        yield made


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    """Each begins with its own number, so that it can be told apart."""
    return [(100 + index, *range(1000, 1000 + length - 1)) for index, length in enumerate(lengths)]


def request_set(*requests: LoadRequest) -> RequestSet:
    return RequestSet("w", "unshared", "cold", 3, None, requests, "some", 0)


@pytest.fixture
def sent(client, model, tmp_path):
    def send(requests: RequestSet, concurrency: int = 64, rate=None, **server):
        with StreamingServer(**server) as stand_in:
            path = tmp_path / "requests.jsonl"
            write(requests, path)
            return client.send(stand_in, requests, path, model, concurrency, rate), stand_in

    return send


def test_results_are_the_servers_words_in_the_files_order(sent):
    asked = prompts(5, 9, 7)
    results, server = sent(request_set(*(LoadRequest(prompt, output) for prompt, output in zip(asked, (6, 2, 4)))))
    assert [(r["prompt_tokens"], r["output_tokens"], r["cached_tokens"], r["error"]) for r in results] == [
        (5, 6, 7, None), (9, 2, 7, None), (7, 4, 7, None),
    ]  # fmt: skip
    assert sorted(tuple(body["input_ids"]) for body in server.asked) == asked
    for result, prompt in zip(results, asked):
        assert result["text"] == "x" * result["output_tokens"]
        began, ended = server.span(prompt)
        assert result["start_s"] <= began and result["start_s"] + result["latency_s"] == pytest.approx(ended, abs=0.2)
        # The first token counts although it has no text: the second one is a step of 20 ms later.
        assert result["ttft_s"] <= result["latency_s"] - 0.02 * (result["output_tokens"] - 1.5)
    for body in server.asked:
        assert body["sampling_params"]["ignore_eos"] is True and body["sampling_params"]["temperature"] == 0
        assert body["routing"] is None, "the index is not sent"


def test_no_more_than_concurrency_requests_are_in_flight(sent):
    requests = request_set(*(LoadRequest(prompt, 4) for prompt in prompts(*[8] * 9)))
    assert sent(requests, concurrency=3)[1].most_at_once() == 3
    assert sent(requests, concurrency=64)[1].most_at_once() > 5


def test_a_turn_waits_for_the_one_before_and_keeps_no_place_meanwhile(sent):
    long, short, second, other = prompts(8, 9, 10, 11)
    requests = request_set(LoadRequest(long, 30), LoadRequest(short, 2), LoadRequest(second, 2, after=0), LoadRequest(other, 2, after=1))
    results, server = sent(requests, concurrency=2)
    assert server.span(second)[0] >= server.span(long)[1] and server.span(other)[0] >= server.span(short)[1]
    assert server.span(other)[1] < server.span(long)[1], "the place of the second turn, which waited, was free"
    assert results[2]["latency_s"] < 0.3, "its clock starts when it is sent"


def test_requests_arrive_at_their_times_however_many_are_in_flight(sent):
    times = (0.0, 0.4, 0.5)
    asked = prompts(8, 8, 8)
    requests = request_set(*(LoadRequest(prompt, 40, at_s=at) for prompt, at in zip(asked, times)))
    results, server = sent(requests)
    starts = [result["start_s"] for result in results]
    assert [start - starts[0] for start in starts] == pytest.approx(times, abs=0.1) and server.most_at_once() == 3


def test_a_rate_draws_the_same_arrivals_for_every_arm(sent):
    requests = request_set(*(LoadRequest(prompt, 2) for prompt in prompts(*[8] * 6)))
    one, two = ([r["start_s"] - results[0]["start_s"] for r in results] for results in (sent(requests, rate=8.0)[0] for _ in range(2)))
    assert one == pytest.approx(two, abs=0.1) and one[-1] > 0.2


def test_a_stopped_answer_may_be_shorter(sent):
    requests = request_set(LoadRequest(prompts(8)[0], 9, stop=("\n\n",), answer="1"))
    results, server = sent(requests, answer=lambda body: {"completion_tokens": 5})
    params = server.asked[0]["sampling_params"]
    assert results[0]["output_tokens"] == 5
    assert (params["stop"], params["ignore_eos"], params["max_new_tokens"]) == (["\n\n"], False, 9)


def test_another_length_than_the_files_fails_the_run(sent):
    requests = request_set(*(LoadRequest(prompt, 3) for prompt in prompts(8, 8)))
    with pytest.raises(BenchError, match="Request 0 of w has 8 tokens, the server read 9"):
        sent(requests, answer=lambda body: {"prompt_tokens": 9} if body["input_ids"][0] == 100 else {})
    with pytest.raises(BenchError, match="Request 1 of w asks for 3 tokens, the server says that it made 2"):
        sent(requests, answer=lambda body: {"completion_tokens": 2} if body["input_ids"][0] == 101 else {})


def test_an_aborted_request_is_an_error_of_its_own(sent):
    requests = request_set(*(LoadRequest(prompt, 3) for prompt in prompts(8, 8)))
    abort = {"finish_reason": {"type": "abort", "message": "no room"}, "completion_tokens": 0}
    results, _ = sent(requests, answer=lambda body: abort if body["input_ids"][0] == 101 else {})
    assert [result["error"] for result in results] == [None, "no room"]
    check_lengths(requests, results)


def test_arrivals_are_the_requests_or_the_rates(model):
    timed, free = request_set(LoadRequest((1, 2), 1, at_s=0.0)), request_set(LoadRequest((1, 2), 1))
    assert is_open_loop(timed, None) and is_open_loop(free, 2.0) and not is_open_loop(free, None)
    assert "--use-trace-timestamps" in generator_arguments("u", timed, model, 2.0)
    assert generator_arguments("u", free, model, 2.0)[-2:] == ["--request-rate", "2.0"]
