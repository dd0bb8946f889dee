"""What a real SGLang 0.5.23 says of its work, and when: its figures lag, and a hang must not hide in that."""

from stepguardd.sources.sglang import open_requests, read_metrics

IDLE = b"""sglang:num_running_reqs{tp_rank="0"} 0.0
sglang:num_queue_reqs{tp_rank="0"} 0.0
sglang:generation_tokens_total{is_streaming="false"} 268.0
sglang:http_requests_active{endpoint="/generate",method="POST"} 0.0
sglang:http_requests_active{endpoint="/metrics",method="GET"} 1.0
"""


def test_a_probe_is_no_request_in_the_server() -> None:
    assert read_metrics(IDLE) == (0, 268)


def test_a_request_that_hangs_in_its_first_pass_is_in_the_server_before_the_scheduler_says_so() -> None:
    hung = IDLE.replace(b'"/generate",method="POST"} 0.0', b'"/generate",method="POST"} 3.0')
    assert read_metrics(hung) == (3, 268)


def test_a_long_generation_makes_tokens_before_it_ends() -> None:
    before = IDLE + b'sglang:realtime_tokens_total{mode="decode"} 100.0\n'
    after = IDLE + b'sglang:realtime_tokens_total{mode="decode"} 101.0\n'
    first, second = read_metrics(before)[1], read_metrics(after)[1]
    assert first is not None
    assert second == first + 1


def test_open_requests_are_those_that_generate_whatever_the_scheduler_counts() -> None:
    busy = IDLE.replace(b'num_running_reqs{tp_rank="0"} 0.0', b'num_running_reqs{tp_rank="0"} 8.0')
    assert open_requests(busy) == 0
    assert (
        open_requests(busy.replace(b'"/generate",method="POST"} 0.0', b'"/generate",method="POST"} 3.0')) == 3
    )
    assert open_requests(b"sglang:num_running_reqs 8.0\n") is None
