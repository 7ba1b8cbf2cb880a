"""Words that the code no longer uses do not come back."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cachd"
# Each old word, and the word to use instead.
GONE = {
    "wish": "spec, ModelSpec",
    "wishes": "pending",
    "means": "context, PullContext",
    "cut": "cancel token",
    "cuts": "cancel token",
    "reach": "address policy",
    "landed": "received",
    "sums": "checksums",
    "suspension": "quarantine",
    "suspensions": "quarantines",
    "suspended": "quarantined",
    "mend": "hint",
    "mends": "hints",
    "owes": "should yield",
    "asker": "caller",
    "askers": "callers",
    "glance": "quick check",
    "past": "history",
    "uses": "usage log",
    "told": "reported, requested",
    "tells": "reports",
    "whole": "intact, complete",
    "aside": "damaged",
    "reread": "verify",
    "look": "check",
    "looks": "checks",
    "room": "space",
    "worth": "score",
    "MOST_": "MAX_",
}
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
KEY = re.compile(r"""["']([a-z_]+)["']""")  # a key of a document, or an error code


def old_words(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, name and old word, for each identifier and each key of a document that contains an old word."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        name = token.string if token.type == tokenize.NAME else ""
        if token.type == tokenize.STRING and (key := KEY.fullmatch(token.string)):
            name = key[1]
        for word in WORDS.findall(name):
            if word.lower() in GONE:
                yield token.start[0], name, word.lower()
        if name.lstrip("_").startswith("MOST_"):
            yield token.start[0], name, "MOST_"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_identifier_and_no_key_has_a_word_that_was_given_up(path: Path) -> None:
    assert [f"line {line}: {name}: say {GONE[word]}" for line, name, word in old_words(path)] == []


def test_old_words_are_found_in_names_and_in_keys(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text('Wishes = {"mend": is_cut}  # wish\nx = "a wish"\n_MOST_FILES = 1\n')
    assert [word for _, _, word in old_words(tmp_path / "m.py")] == ["wishes", "mend", "cut", "MOST_"]
