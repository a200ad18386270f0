"""The one exception that is meant for people: a sentence that says what was wrong, where, and what to do."""


class UserError(Exception):
    """A mistake outside the program (recipe, data, disk). The command line prints it without a stack trace."""
