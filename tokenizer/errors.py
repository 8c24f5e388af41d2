"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """One sentence: what was wrong, where, and what to do. The command line prints it and exits with status 2."""
