"""Errors: those that you can fix, and bugs; every message without passwords."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a full or forbidden disk, whichever library wrote to it: for you to fix, and no bug."""

_PASSWORD = re.compile(
    r"""(postgres\w*(?:\+\w+)?://[^\s:/@"']*:)(?:[^\s"']*@|(?!\d{1,5}(?:[/?\s"']|$))[^\s"']*)""", re.IGNORECASE
)
_PASSWORD_OPTION = re.compile(r"""(password=)[^&\s"']*""", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """The text with the password of every database URL in it replaced by ***, also where the URL is cut off."""
    hidden = _PASSWORD.sub(lambda match: f"{match[1]}***{'@' if match[0].endswith('@') else ''}", text)
    return _PASSWORD_OPTION.sub(r"\1***", hidden)


class FintxError(Exception):
    """An error that you can fix.

    The message is one line (or one line per problem): what was wanted, what was found, where, and how to fix it. The
    command line prints it and exits with code 2; anything that is not a FintxError is a bug of fintx. Modules derive
    named errors from it where a caller must tell one from another. No message holds a database's password.
    """

    def __init__(self, text: str):
        super().__init__(without_passwords(text))


class Bug(FintxError):
    """An error that you can't fix. Its traceback is in a file that the message names; exit code 1."""


class StopAtOnce(BaseException):
    """The second request to stop. Not a KeyboardInterrupt: typer turns that into a silent exit code 130."""


def as_fintx_error(error: Exception, *, of: str = "") -> FintxError:
    """Any exception as a FintxError: a full disk is for you to fix, anything unforeseen is a bug.

    Args:
        of: what failed, such as a study's name.
    """
    if isinstance(error, FintxError):
        return error
    prefix = f"{of}: " if of else ""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return FintxError(f"{prefix}{where}{os.strerror(error.errno)}; fix that, and the same command continues")
    with tempfile.NamedTemporaryFile("w", prefix="fintx-", suffix=".traceback.txt", delete=False) as file:
        file.write(without_passwords("".join(traceback.format_exception(error))))
    reason = next(iter(str(error).splitlines()), "")
    return Bug(f"{prefix}{type(error).__name__}: {reason}; this is a bug of fintx, please report {file.name}")
