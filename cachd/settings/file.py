"""Reads a configuration file: YAML in which every value is a string, with the line of each value.

Numbers and flags stay strings, so `name: 123` and `name: no` are names. Each option later converts its
string to its own type, as for an environment variable.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import yaml

from cachd import files
from cachd.errors import Invalid
from cachd.findings import Finding, Place, key_of

LONGEST_BYTES = 1 << 20
_DEEPEST = 20
_MAX_VALUES = 100_000  # an anchored value counts at every use
# They say where the daemon is, and are found even in a file that is not YAML.
PLACE_KEYS = ("root", "own_directory", "listen", "token_file", "tls_cert_file")
_BLOCK = re.compile(r"[A-Za-z_]+:")  # begins the lines of one key of the file
_NOTHING = ("", "~", "null", "Null", "NULL")
_PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
# Beginnings of PyYAML's messages -> cachd's. PyYAML's own may quote a part of a secret.
_SAYS = {
    r"found character '\\t'": "a tab: indent with spaces",
    r"mapping values are not allowed": "wrong indentation, or a value with ': ' that needs quotes",
    r"found undefined alias": "a value that starts with * is an alias of an anchor: quote the value",
    r"found undefined tag handle": "a value that starts with ! is a tag: quote the value",
    r"found character '[@`]'": "a value cannot start with @ or `: quote it",
    r"but found another document": "a second document: only one is read",
    r"found unexpected end of stream": "the end of the file inside quotes",
}
Key = tuple[str | int, ...]
Value = object


@dataclass(slots=True)
class ConfigFile:
    """The keys of a file, the line of each key and entry, and the findings about them."""

    name: str
    content: bytes = b""
    keys: dict[str, Value] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def place(self, key: Key) -> Place:
        """The file and line of the key, or of the closest key around it; line 0 if neither is known."""
        around = (self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines)
        return Place(self.name, next(around, 0))


def read(path: Path) -> ConfigFile:
    """Read a file. Keys without a value are left out; an empty file has no keys.

    Raises Invalid when the file cannot be read, is too long or too deep, is not UTF-8, or is not a YAML
    mapping. All other errors, such as a key that is set twice, go into `findings`.
    """
    found = ConfigFile(str(path))
    try:
        _read_into(found)
    except _Unusable as error:
        raise Invalid(str(error.finding), code="bad_config", hint=error.hint) from error
    return found


def examine(path: Path) -> ConfigFile:
    """As `read`, but what `read` raises is a finding, too, and of the keys only PLACE_KEYS are then read."""
    found = ConfigFile(str(path))
    try:
        _read_into(found)
        return found
    except _Unusable as error:
        hint = f" ({error.hint})" if error.hint else ""
        finding = replace(error.finding, reason=f"{error.finding.reason}{hint}")
    unusable = ConfigFile(found.name, found.content, findings=[finding])
    unusable.keys = _places(unusable)
    return unusable


def _places(file: ConfigFile) -> dict[str, Value]:
    """The PLACE_KEYS of a file that is not YAML: those whose own lines are."""
    lines = file.content.decode("utf-8-sig", errors="replace").splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if _BLOCK.match(line)]
    found: dict[str, Value] = {}
    for start, end in pairwise([*starts, len(lines)]):
        if lines[start].partition(":")[0] not in PLACE_KEYS:
            continue
        with suppress(_Unusable):
            node = _composed("", "\n" * start + "".join(lines[start:end]))  # so that line numbers are right
            if isinstance(node, yaml.MappingNode):
                keys = _Reading(file).value(node, ())
                found = keys | found if isinstance(keys, dict) else found
    return {key: value for key, value in found.items() if value is not None}


def parse(text: str) -> Value:
    """The value of a YAML text, such as `[a, b]` or `{a: b}` in a variable. Raises Invalid."""
    found = ConfigFile("")
    try:
        node = _composed(found.name, text)
        value = _Reading(found).value(node, ()) if node else None
    except _Unusable as error:
        raise Invalid(str(error.finding), code="bad_config") from error
    if found.findings:
        raise Invalid(str(found.findings[0]), code="bad_config")
    return value


class _Unusable(Exception):
    """No key of a file can be used: `finding` says why, `hint` what to do about it."""

    def __init__(self, file: str, line: int, reason: str, *, hint: str = "") -> None:
        super().__init__(reason)
        self.finding, self.hint = Finding(Place(file, line), "", reason), hint


def _read_into(file: ConfigFile) -> None:
    """Read the content, the keys and their lines. Raises _Unusable."""
    file.content = _content(file.name)
    node = _composed(file.name, _decoded(file))
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise _Unusable(file.name, line, "has no keys", hint="write 'key: value' lines")
    keys = _Reading(file).value(node, ())
    assert isinstance(keys, dict)
    file.keys = {key: value for key, value in keys.items() if value is not None}


def _content(name: str) -> bytes:
    try:
        return files.content(Path(name), at_most=LONGEST_BYTES)
    except OSError as error:
        reason = f"the configuration file cannot be read: {files.reason(error)}"
        raise _Unusable(name, 0, reason, hint="check the path and its mode") from error


def _decoded(file: ConfigFile) -> str:
    try:
        return file.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.content.count(b"\n", 0, error.start) + 1
        raise _Unusable(file.name, line, "not UTF-8", hint="save the file as UTF-8") from None


def _composed(file: str, text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Unusable(file, line, "a control character") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or ""
        reason = next((says for form, says in _SAYS.items() if re.match(form, problem)), None)
        reason = reason or "not YAML: " + re.sub(r"'[^'<>]{2,}'", "this", problem)
        raise _Unusable(file, mark.line + 1 if mark else 0, reason) from None
    except RecursionError:
        raise _Unusable(file, 0, f"nested deeper than {_DEEPEST} levels") from None


class _Reading:
    """Turns YAML nodes into values of a ConfigFile.

    Raises _Unusable above 100,000 values or 20 levels. Other errors go into the file's findings.
    """

    def __init__(self, into: ConfigFile) -> None:
        self._into = into
        self._values = 0

    def value(self, node: yaml.Node, key: Key) -> Value:
        line = node.start_mark.line + 1
        self._into.lines.setdefault(key, line)
        self._values += 1
        if len(key) > _DEEPEST or self._values > _MAX_VALUES:
            bound = f"nested deeper than {_DEEPEST} levels" if len(key) > _DEEPEST else "too many values"
            raise _Unusable(self._into.name, line, bound)
        if node.tag not in _PLAIN_TAGS:
            self._wrong(line, key, "a value that starts with ! is a tag: quote the value")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each, (*key, number)) for number, each in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        is_quoted = node.style is not None  # a quoted "" or "null" is a string
        return None if not is_quoted and node.value in _NOTHING else str(node.value)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Value]:
        found: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        first: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                self._wrong(line, key, "a key is one word, not a list or a mapping")
            elif name.value == "<<" and name.style is None:
                merged = self._merged(value, key) | merged
            elif name.value in first:
                where = f"in lines {first[name.value]} and {line}"
                self._wrong(line, (*key, name.value), f"is set twice, {where}")
            else:
                first[name.value] = self._into.lines[*key, name.value] = line
                found[name.value] = self.value(value, (*key, name.value))
        return merged | found

    def _merged(self, node: yaml.Node, key: Key) -> dict[str, Value]:
        """The keys that `<<: *anchor` or `<<: [*one, *other]` adds; the first of several wins."""
        several = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, Value] = {}
        for each in several:
            value = self.value(each, (*key, "<<"))
            if isinstance(value, dict):
                found = value | found
            else:
                self._wrong(each.start_mark.line + 1, key, "<< takes a mapping")
        return found

    def _wrong(self, line: int, key: Key, reason: str) -> None:
        self._into.findings.append(Finding(Place(self._into.name, line), key_of(key), reason))
