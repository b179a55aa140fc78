"""Errors the user can fix."""


class UserError(Exception):
    """Wrong usage or bad input: printed as one line without a traceback, with exit code 2.

    The message must contain what is wrong, where (file, line), and what to do.
    """

    exit_code = 2


class RunError(UserError):
    """A failure of a run whose command is correct, for example because the disk is full: exit code 1."""

    exit_code = 1
