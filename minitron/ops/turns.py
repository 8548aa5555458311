"""Jobs that take turns, so that one computes while the collective of another is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from minitron.ops.objectives import Steps


def take_turns(jobs: Iterator[Steps[None]], *, at_once: int) -> None:
    """Complete all jobs in order, `at_once` of them begun; one that waits lets the other go on."""
    begun: deque[Steps[None]] = deque()

    def advance(job: Steps[None]) -> None:
        try:
            next(job)
        except StopIteration:
            return
        begun.append(job)

    for job in jobs:
        advance(job)
        while len(begun) >= at_once:
            advance(begun.popleft())
    while begun:
        advance(begun.popleft())
