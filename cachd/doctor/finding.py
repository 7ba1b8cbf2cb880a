"""The result of a check: a finding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cachd.doctor.codes import Code
from cachd.errors import CachdError, printable


class State(StrEnum):
    """How bad a finding is. Only `wrong` needs somebody to act now."""

    ok = "ok"
    warning = "warning"
    wrong = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    `subject`: what it is about, such as an endpoint or a model; empty if the code says it. `what`: what was
    found. `hint`: what to do about it. `error`: the code of the error that the daemon would report.
    """

    code: Code
    state: State
    what: str
    hint: str = ""
    subject: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if self.state is State.ok and self.error:
            raise ValueError(f"{self.code} is ok, and has the error {self.error}")

    def as_document(self) -> dict[str, str]:
        """The finding as JSON, without what is empty. Strangers' text is printable."""
        document = {
            "code": self.code.value,
            "state": self.state.value,
            "subject": self.subject,
            "what": self.what,
            "hint": self.hint,
            "error": self.error,
        }
        return {key: printable(value) for key, value in document.items() if value}


def ok(code: Code, what: str, *, subject: str = "") -> Finding:
    """A finding of something that is right."""
    return Finding(code, State.ok, what, subject=subject)


def of_error(
    code: Code, error: CachdError, *, subject: str = "", state: State = State.wrong, hint: str = ""
) -> Finding:
    """The finding of an error that a check met. The facts that only an operator may know are shown."""
    facts = "".join(f" ({name}: {fact})" for name, fact in error.withheld.items())
    return Finding(
        code, state, f"{error.detail}{facts}", hint or error.hint, subject=subject, error=error.code
    )
