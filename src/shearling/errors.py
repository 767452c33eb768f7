"""The one exception that users meet."""


class ShearlingError(ValueError):
    """Something the user gave cannot work.

    The message is one sentence that names what was given, what was expected and what would
    work; the command line prints it without a traceback and exits with 2.
    """
