"""Work that waits for collectives, as generators, so that other work can go on meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""Yields while a collective is under way; returns its result in the end."""


def completed(steps: Steps[Result]) -> Result:
    """Take steps to their end, waiting for every collective."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


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
