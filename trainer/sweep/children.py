"""The processes that a sweep's worker has started, so that they end with it."""

import subprocess

# What a worker has started and must not outlive it.
commands: "list[subprocess.Popen[bytes]]" = []
