"""The one exception a user's input can cause; the command line prints `holdfast: error: <line>` and exits with 2."""


class UserError(ValueError):
    """One line for the user: what was passed, why it cannot work, what to write instead. Nothing has been written."""

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))
