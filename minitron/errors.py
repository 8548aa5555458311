"""The exceptions that end a stage without being bugs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MinitronError(Exception):
    """A mistake that the user can mend.

    Its message is one line: what is wrong, the values met, and what to change. A launcher prints
    it without a traceback and exits with status 2; any other exception is a bug and shows one.
    """


class Diverged(MinitronError):
    """A training run whose loss is no number any more; one of another shape may fare better."""


class Stopped(Exception):
    """A signal asked the run to end, and it has saved what it needs to go on.

    A launcher exits with a status that says so (`minitron.stage.STOPPED`).
    """


@contextlib.contextmanager
def saying(where: str) -> Iterator[None]:
    """Put before what is wrong where it is: `where: what`."""
    try:
        yield
    except MinitronError as error:
        raise MinitronError(f"{where}: {error}") from None
