"""What the benchmark of the handle makes of moments, and that its rings of processes pass tokens."""

from __future__ import annotations

from bench.ring_processes import Behaviour, rings
from bench.streams import Streams
from bench.targets import targets


def test_rates_count_tokens_while_all_streams_decode() -> None:
    streams = Streams(started=0.0, times=[[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert streams.first_token_s == 1.5
    assert streams.step_ms == 1000.0
    assert streams.tokens_per_s == 2.0  # four of them after 2.0 and until 4.0
    assert streams.all_tokens_per_s == 8 / 5


def test_streams_that_never_decode_together_have_a_rate() -> None:
    streams = Streams(started=0.0, times=[[1.0, 2.0], [3.0, 4.0]])
    assert streams.tokens_per_s == streams.all_tokens_per_s == 1.0


def test_targets_are_of_the_parts_that_ran() -> None:
    assert targets({}) == {}
    assert targets({"hops": {"hop_ms": {2: 0.6, 4: 1.2}}}) == {
        "hop_ms": {"at_most": 1.0, "measured": 1.2, "met": False}
    }


def test_rings_of_processes_pass_tokens_and_wait_as_told() -> None:
    with rings([1, 2]) as opened:
        opened.behave(Behaviour(wait_s=0.01))
        for stages in (1, 2):
            streams = opened.streams(stages, count=2, tokens=4)
            assert [len(times) for times in streams.times] == [4, 4]
            assert streams.step_ms >= 10 * stages
