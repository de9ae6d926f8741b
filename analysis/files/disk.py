"""Recognises a full disk, which every library reports in its own way."""

import errno


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error means that the disk (or the quota) is full.

    The text of an error has to be searched, because torch raises a RuntimeError of its zip writer, and tokenizers
    raises a bare Exception.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in ("No space left on device", "PytorchStreamWriter", "file write failed"))
