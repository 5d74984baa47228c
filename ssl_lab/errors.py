"""The one exception for a user's mistake: the command line prints its message alone, without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend. The message names the thing, says why it fails and what to do, in one line."""
