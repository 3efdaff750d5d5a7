"""What goes wrong in a way that a message can explain; `run.run_script` makes one line of it."""


class InputError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


class WriteError(InputError):
    """A file that cannot be written: what comes after it cannot be either."""
