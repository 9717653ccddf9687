"""The one exception type that the command line tools print without a traceback."""


class UserError(ValueError):
    """A config, folder or file that its owner can put right; the message says how."""
