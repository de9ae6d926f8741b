"""The exception that wrong user input raises, and the exit code of a command that was only partly successful.

The command line catches `UserError`, prints `holdfast: error: <line>` and exits with code 2.
"""

# Exit code of a command that finished although some parts failed. Each failed part is reported in one line.
PARTIAL = 3


class UserError(ValueError):
    """Wrong user input, in one line: what was passed, why it cannot work, what to write instead.

    A command that raises it leaves no file half written.
    """

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))
