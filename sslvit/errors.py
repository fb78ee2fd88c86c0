"""What stops a run, in one sentence, and the exit code that says it to a script."""

LONGEST = 2000  # characters of a message

DIVERGED, BAD_DATA, NO_INPUT, INTERNAL, CANNOT_WRITE, PREEMPTED, BAD_CONFIGURATION = 3, 65, 66, 70, 73, 75, 78


class Stop(Exception):
    """A run cannot go on, and the message says why and what to do. Plain ValueErrors are bad configurations."""

    code = INTERNAL

    def __str__(self) -> str:
        return shortened(super().__str__())


class Diverged(Stop):
    """Training diverged, or its features collapsed."""

    code = DIVERGED


class DataError(Stop, ValueError):
    """Data that cannot be used."""

    code = BAD_DATA


class NoInput(DataError):
    """There is no data where we were told to look."""

    code = NO_INPUT


class CannotWrite(Stop, OSError):
    """Output cannot be written, or belongs to another run."""

    code = CANNOT_WRITE


class Preempted(Stop):
    """A signal asked us to stop, and everything was saved."""

    code = PREEMPTED


def shortened(text: str) -> str:
    """The beginning and the end, where the way out stands, of a text that quotes a file at length."""
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[: LONGEST // 2]} ({left_out:,} characters) {text[-LONGEST // 2 :]}"
