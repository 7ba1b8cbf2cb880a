"""Reads secrets from files or the environment, again at every use, so that they can rotate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Invalid

log = structlog.get_logger(__name__)

_LONGEST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Secrets:
    """What a request carries for one origin alone.

    `headers` go with every request to that origin. `query` is added to the URL that is requested first, and
    to none that it redirects to: a Location is a complete URL.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: str = field(default="", repr=False)


class Secret:
    """A secret in a file or, without one, in an environment variable. Its text is never shown."""

    def __init__(self, file: Path | None, variable: str | None = None) -> None:
        self._file, self._variable = file, variable

    def read(self) -> str | None:
        """The token, without surrounding space; None when there is none.

        Raises Invalid when it holds anything but visible ASCII, as it goes into a header.
        """
        return _checked(self._text(), self._shown)

    def user_and_password(self) -> str | None:
        """The secret as `user:password`, of printable characters; None when there is none. Raises Invalid."""
        text = self._text()
        if text and not (":" in text and text.isprintable()):
            raise Invalid(
                "a secret of the daemon is not user:password",
                code="bad_secret",
                hint="write user:password on one line; the daemon's log says in which file or variable",
            ).withhold(secret=self._shown)
        return text or None

    @property
    def where(self) -> str:
        """The file or the variable that it is read from; empty for neither."""
        return self._shown

    @property
    def _shown(self) -> str:
        return str(self._file or self._variable or "")

    def _text(self) -> str:
        if self._file is not None:
            return _of_file(self._file, self._shown)
        return os.environ.get(self._variable, "").strip() if self._variable is not None else ""


class GivenSecret(Secret):
    """A secret that a caller sent. It is in no file, and lasts as long as this object."""

    def __init__(self, text: str) -> None:
        super().__init__(None)
        self._given = text

    def _text(self) -> str:
        return self._given


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is: in a variable, in a file (that `variable` names, if set), or nowhere."""

    variable: str | None = None
    file: Path | None = None


class HubToken(Secret):
    """The token in `file`, else the one that huggingface_hub would use (its page "Environment variables").

    That is HF_TOKEN, HUGGING_FACE_HUB_TOKEN, the file that HF_TOKEN_PATH names, or the file of `hf auth
    login`, in this order; none of them if HF_HUB_DISABLE_IMPLICIT_TOKEN is set. The token is sent to the
    endpoint in force, whatever that is.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__(file)
        self._warned = False

    def read(self) -> str | None:
        """See `Secret.read`. Raises Invalid for an unreadable file, unless it is that of `hf auth login`."""
        place = self.place()
        if place.file is None:
            return _checked(os.environ.get(place.variable or "", ""), place.variable or "")
        if place.variable or place.file == self._file:
            shown = f"{place.file} ({place.variable})" if place.variable else str(place.file)
            return _checked(_of_file(place.file, shown), shown)
        return self._of_login(place.file)

    @property
    def where(self) -> str:
        """See `Secret.where`."""
        place = self.place()
        named = f"{place.file} ({place.variable})" if place.file and place.variable else ""
        return named or str(place.file or place.variable or "")

    def place(self) -> Place:
        """Where the token is looked for now; an empty Place when nowhere."""
        if self._file is not None:
            return Place(file=self._file)
        if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
            return Place()
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            if os.environ.get(variable, "").strip():
                return Place(variable)
        if named := os.environ.get("HF_TOKEN_PATH", "").strip():
            return Place("HF_TOKEN_PATH", Path(_expanded(named)))
        home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118 it may begin with ~
            os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
        )
        home = _expanded(home)
        # A ~ is left when no home directory is known.
        return Place() if home.startswith("~") else Place(file=Path(home, "token"))

    def _of_login(self, file: Path) -> str | None:
        try:
            return _checked(_text(file), str(file))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, UnicodeDecodeError, Invalid) as error:
            # A warning is enough: nobody configured this file for cachd.
            if not self._warned:
                self._warned = True
                log.warning("the token of `hf auth login` is not used", file=str(file), reason=_why(error))
            return None


def _of_file(file: Path, shown: str) -> str:
    try:
        return _text(file).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(
            f"a secret file of the daemon cannot be read: {_why(error)}",
            code="bad_secret",
            hint="check its path and mode; the daemon's log says which file it is",
        ).withhold(secret=shown) from error


def _text(file: Path) -> str:
    return files.content(file, at_most=_LONGEST_BYTES).decode()


def _why(error: OSError | UnicodeDecodeError | Invalid) -> str:
    if isinstance(error, Invalid):
        return error.detail
    return files.reason(error) if isinstance(error, OSError) else "not text"


def _checked(text: str, shown: str) -> str | None:
    text = text.strip()
    if not all("!" <= c <= "~" for c in text):
        raise Invalid(
            "a secret of the daemon holds characters that a token cannot have",
            code="bad_secret",
            hint="write it again, on one line; the daemon's log says in which file or variable",
        ).withhold(secret=shown)
    return text or None


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111 it does not fail without a home


def is_true(variable: str) -> bool:
    """Whether an environment variable of another tool is set to true, as huggingface_hub reads it."""
    return os.environ.get(variable, "").strip().upper() in ("1", "ON", "YES", "TRUE")
