"""A secret as it is now: read again at every use, from a file or the environment."""

from __future__ import annotations

import os
from pathlib import Path

from cachd.errors import Invalid


class Secret:
    """A token in a file, or else in an environment variable. Its text is never shown."""

    def __init__(self, file: Path | None, variable: str | None = None) -> None:
        self._file, self._variable = file, variable

    def read(self) -> str | None:
        """The token without surrounding space; None when there is none.

        Raises Invalid when it holds anything but printable ASCII: it would end up in a header.
        """
        text = self._text()
        if text and not all("!" <= c <= "~" for c in text):
            raise Invalid(
                f"the secret in {self._file or self._variable} holds characters no token has",
                code="bad_secret",
                mend="write it again, on one line",
            )
        return text or None

    def user_and_password(self) -> str | None:
        """`user:password`, each of any printable characters; None when there is none. Raises Invalid."""
        text = self._text()
        if text and not (":" in text and text.isprintable()):
            raise Invalid(
                f"the secret in {self._file or self._variable} is not user:password",
                code="bad_secret",
                mend="write user:password, on one line",
            )
        return text or None

    def _text(self) -> str | None:
        if self._file is not None:
            try:
                return self._file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise Invalid(
                    f"secret file {self._file} cannot be read: {type(error).__name__}",
                    code="bad_secret",
                    mend="check the path and its mode",
                ) from error
        return os.environ.get(self._variable, "").strip() if self._variable is not None else None
