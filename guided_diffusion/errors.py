"""The one exception type that means "the input is wrong", not "the program is wrong"."""


class InputError(ValueError):
    """Bad input: the message names the file or flag, what was found, and what to do, on one line.

    The scripts print the message without a traceback and exit with code 2.
    """
