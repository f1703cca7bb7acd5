"""The one exception that means: the input is at fault, and here is what to do about it."""


class InputError(ValueError):
    """Bad input of the user's: a record, a grid, a config, a model folder.

    The message names the place (file and line, field, value), what was expected and what to do. The
    command line prints it without a traceback and exits with status 2.
    """
