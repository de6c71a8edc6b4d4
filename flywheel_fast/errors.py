"""The ways in which a run ends early; the command line turns them into one sentence and an exit status."""


class BadInput(Exception):
    """Usage, config or data that cannot be used (exit 2): names the file, key or row, and the cure."""


class Failure(Exception):
    """Something broke while running (exit 1): names what broke, and how to go on."""


class Stopped(Exception):
    """A signal asked for it, and everything is saved (exit 75, a scheduler's "try again")."""
