"""The one exception that means "the request is wrong"."""


class RequestError(ValueError):
    """What was asked for cannot be done as asked.

    The message is one line that names the flag or file, its value, and what would do. Programs print it
    and exit with code 2; it is raised before anything is written.
    """
