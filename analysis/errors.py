"""The exception that a user's input can cause, and the exit codes of commands.

The command line prints `holdfast: error: <line>` and exits with 2.
"""

# Exit code of a command that did its work in part: each part that failed is one line.
PARTIAL = 3


class UserError(ValueError):
    """One line for the user: what was passed, why it cannot work, what to write instead. Nothing has been written."""

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))
