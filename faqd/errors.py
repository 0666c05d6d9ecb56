"""The one exception for what a user can put right, and what others say of a failure."""

INTERRUPTED, TERMINATED = 130, 143


class UserError(ValueError):
    """An expected failure: the message says what, where and what to do.

    Only the command line turns it into a sentence, so that real bugs keep their traceback.
    exit_code: 2 for bad input or usage, 1 where a gate, a verification or a build failed, 130 after Ctrl-C
    (docs/commands.md).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Paused(Exception):
    """A run that stops where it was told to, before its end: no error, its sentence says how it goes on."""


def first_line(error: BaseException) -> str:
    """What a library says of a failure, short enough for a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
