"""A replica that samples, simulated: continuous batching of responses of given lengths."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from zppo_mm.planning.operations import DecodeStep


def decode_seconds(
    responses: Sequence[int], prompts: Sequence[int], max_batch_size: int, step: DecodeStep
) -> float:
    """Return the seconds until the last response ends. A place that becomes free is taken at once,
    in the order of the sequences.

    Args:
        responses: Tokens of every response; the prefill gives the first one.
        prompts: Tokens of every sequence's prompt, in the cache from the start.
        max_batch_size: Most sequences at once.
        step: Seconds of a decoding step.
    """
    waiting = list(zip(responses, prompts, strict=True))[::-1]
    running: list[tuple[int, int, int]] = []
    seconds, now, cached = 0.0, 0, 0
    while waiting or running:
        while waiting and len(running) < max_batch_size:
            response, prompt = waiting.pop()
            # `ends` is the step after the last token; the cache holds prompt and tokens so far.
            heapq.heappush(running, (now + response, response, prompt))
            cached += prompt
        ends, response, prompt = heapq.heappop(running)
        batch, steps = len(running) + 1, ends - now
        # Every running sequence grows by one token a step: the mean over the interval.
        seconds += steps * step.seconds(batch, cached + batch * steps / 2)
        cached += batch * steps - response - prompt
        now = ends
    return seconds


def serve_seconds(
    arrivals: Sequence[float], services: Sequence[float], num_places: int
) -> list[float]:
    """Return when every request is answered: each takes the place that is free first, in the order
    of the requests.

    Args:
        arrivals: Seconds at which the requests are made, ascending.
        services: Seconds that each takes.
        num_places: Requests that all servers answer at once.
    """
    free = [0.0] * num_places
    ends = []
    for arrival, service in zip(arrivals, services, strict=True):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        ends.append(end)
    return ends
