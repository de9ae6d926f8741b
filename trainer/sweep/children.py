"""The list of processes that a worker of a sweep has started, so that they end with the worker."""

import subprocess

# Running child processes of this worker.
commands: "list[subprocess.Popen[bytes]]" = []
