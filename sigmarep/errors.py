"""The ways in which a run can end early, each with its own exit status."""


class SigmarepError(Exception):
    """An expected ending: the commands print its message on one line and exit with `exit_status`."""

    exit_status = 1


class BadInput(SigmarepError, ValueError):
    """A configuration, file or folder that the user must change; the message names it and the remedy."""

    exit_status = 2


class Diverged(SigmarepError):
    """The loss became non-finite or rose above the configured multiple of its start."""

    exit_status = 3


class Stopped(SigmarepError):
    """SIGTERM arrived; the state was saved before this was raised."""

    exit_status = 143
