"""Exceptions that end a command, each with its exit status."""


class SigmarepError(Exception):
    """Base class of expected failures: commands print the message on one line and exit with `exit_status`."""

    exit_status = 1


class BadInput(SigmarepError, ValueError):
    """Invalid configuration, file or folder; the message names it and the remedy."""

    exit_status = 2


class Diverged(SigmarepError):
    """The loss became infinite or NaN, or exceeded the configured multiple of the first loss."""

    exit_status = 3


class Stopped(SigmarepError):
    """The run was stopped by SIGTERM, after saving its state."""

    exit_status = 143


def one_line(error: BaseException, most: int = 200) -> str:
    """The text of an error on one line, of at most `most` characters; its type's name if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__
