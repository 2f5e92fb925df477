"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
    """A user's mistake, told in one line: the value got, the values allowed, the option to change.

    The command line prints it as `error: <message>` and exits with status 2, before anything is written.
    """
