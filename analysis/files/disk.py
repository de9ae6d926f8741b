"""Recognising a full disk, which every library reports in its own way."""

import errno


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that nothing more fits on the disk (or into the quota).

    torch raises a RuntimeError of its zip writer and tokenizers a bare Exception, so their text has to be read.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in ("No space left on device", "PytorchStreamWriter", "file write failed"))
