"""The exceptions that end a stage without being bugs."""


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
