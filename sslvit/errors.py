"""Exceptions that stop a run with one sentence, and their exit codes."""

LONGEST = 2000  # characters of a message

DIVERGED, BAD_DATA, NO_INPUT, INTERNAL, CANNOT_WRITE, PREEMPTED, BAD_CONFIGURATION = 3, 65, 66, 70, 73, 75, 78


class Error(Exception):
    """The run cannot continue; the message says why, and the way out. Plain ValueErrors are bad configurations.

    >>> import sslvit
    >>> try:
    ...     sslvit.load_model("no/such/model")
    ... except sslvit.Error as error:
    ...     print(error)
    no/such/model is neither a folder here nor OWNER/NAME on the Hub
    """

    code = INTERNAL

    def __str__(self) -> str:
        return shortened(super().__str__())


class Diverged(Error):
    """Training diverged, or its features collapsed."""

    code = DIVERGED


class DataError(Error, ValueError):
    """Data that cannot be used."""

    code = BAD_DATA


class NoInput(DataError):
    """There is no data at this place."""

    code = NO_INPUT


class CannotWrite(Error, OSError):
    """Output cannot be written, or belongs to another run."""

    code = CANNOT_WRITE


class NeedsLinux(Error, ImportError):
    """Something that this operating system does not have."""

    code = BAD_CONFIGURATION


class Preempted(Error):
    """A signal asked the run to stop, and everything was saved."""

    code = PREEMPTED


def shortened(text: str) -> str:
    """The beginning and the end, with the way out, of a long text, such as one that quotes a file."""
    excess = len(text) - LONGEST
    return text if excess <= 0 else f"{text[: LONGEST // 2]} ({excess:,} characters) {text[-LONGEST // 2 :]}"
