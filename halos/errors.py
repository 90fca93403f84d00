"""The one error that is the user's to mend, as opposed to a defect of ours."""


class UserError(Exception):
    """Wrong input: the message says what was wrong, where, what was given and what would work. Ends in exit status 2."""
