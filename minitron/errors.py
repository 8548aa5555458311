"""The exceptions that a user is meant to read."""


class MinitronError(Exception):
    """A mistake that the user can mend.

    Its message is one line: what is wrong, the values met, and what to change. A launcher prints
    it without a traceback and exits with status 2; any other exception is a bug and shows one.
    """


class Diverged(MinitronError):
    """A training run whose loss is no number any more; one of another shape may fare better."""
