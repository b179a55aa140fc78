"""The one exception that stands for something the user can mend."""


class UserError(Exception):
    """Wrong usage or bad input: shown as one line, exit code 2, never with a traceback.

    The message says what is wrong, where (file, line), and what to do.
    """

    exit_code = 2


class RunError(UserError):
    """A run that fails through no fault of the command's (a full disk, a rank that is lost): exit code 1."""

    exit_code = 1
