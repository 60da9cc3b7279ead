"""How long kernels take: calls in one captured graph, so that the host's launches are not in the figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 20) -> float:
    """Median time of one call on the current GPU; the calls stand one after the other in a graph.

    Every call runs once before: what it compiles, chooses and allocates stays outside. Calls that go round more memory
    than the second-level cache has measure cold reads.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
    torch.cuda.current_stream().wait_stream(stream)
    times: list[float] = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e3 / len(calls))
    del kept
    return statistics.median(times)
