"""The two kinds of failure that the command line tells apart by its exit code."""


class UsageError(ValueError):
    """The request itself is wrong: an unknown model, a path that is not there, an option out of range. Exit code 2."""


class RunError(RuntimeError):
    """The request was fine and could not be met: a corrupt file, a checkpoint of another model. Exit code 1."""
