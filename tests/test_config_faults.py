"""What is wrong with options: how many faults a refusal names, and what is wrong only beside others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachd.config import Config, examine
from cachd.config.faults import MAX_FINDINGS, conflicts, refusal
from cachd.findings import Finding, Place
from cachd.settings.given import Given
from tests.ground.origin.certificates import Tls, certify

NOT_PEM = "-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n"


def found(count: int) -> list[Finding]:
    """So many findings, in the wrong order."""
    return [Finding(Place("f", number), f"key{number}", "is wrong") for number in range(count, 0, -1)]


@pytest.mark.parametrize(
    ("count", "more", "last"),
    [
        (1, 0, "f:1: key1: is wrong"),
        (MAX_FINDINGS, 0, f"f:{MAX_FINDINGS}: key{MAX_FINDINGS}: is wrong"),
        (MAX_FINDINGS + 1, 0, "and 1 more"),
        (MAX_FINDINGS, 2, "and 2 more"),
        (MAX_FINDINGS + 3, 4, "and 7 more"),
    ],
)
def test_a_refusal_names_so_many_faults_in_their_order_and_counts_the_others(
    count: int, more: int, last: str
) -> None:
    refused = refusal(found(count), more)
    lines = refused.detail.splitlines()
    assert (lines[0], lines[-1]) == ("f:1: key1: is wrong", last)
    assert len(lines) == min(count, MAX_FINDINGS) + last.startswith("and")
    assert (refused.code, refused.hint) == ("bad_option", "cachd options lists every option")


def told(file: Path, text: str) -> list[str]:
    """What is found wrong with a file, without its path."""
    file.write_text(text)
    return [str(each).removeprefix(str(file)) for each in examine(config=file).findings]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachd.yaml"


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("streams: 4", []),
        ("streams: many", [":1: streams: 'many' is not a whole number from 1 to 256"]),
        (
            "models: [{ref: hf://a/b, priority: x}]",
            [":1: models[0].priority: 'x' is not a whole number from -100 to 100"],
        ),
        ("models: [3]", [":1: models[0]: is not a mapping of keys to values"]),
        ("models: [{ref: hf://a/b, copy: {}}]", [":1: models[0].copy: is not a list"]),
    ],
)
def test_a_fault_says_what_the_option_wants(file: Path, text: str, findings: list[str]) -> None:
    assert told(file, text) == findings


def test_only_a_whole_number_with_two_bounds_names_both(file: Path) -> None:
    (wrong,) = told(file, "keep_opened_seconds: many")
    assert wrong.startswith(":1: keep_opened_seconds: ")
    assert "whole number" not in wrong


def test_a_name_or_a_prefix_that_is_there_twice_is_a_fault_of_the_second(file: Path) -> None:
    models = "models:\n- {ref: hf://a/b, name: m}\n- {ref: hf://c/d}\n- {ref: hf://e/f, name: m}\n"
    assert told(file, models) == [
        ":4: models[2]: models[0] has the name m, too: give each model a name of its own"
    ]
    assert told(file, models.replace("f, name: m", "f")) == []
    sources = "sources:\n- prefix: hf://a/\n- prefix: hf://b/\n- prefix: hf://a/\n"
    assert told(file, sources) == [":4: sources[2].prefix: sources[0] has this prefix, too"]


@pytest.mark.parametrize("key", ["ca_file", "s3_ca_file"])
def test_a_file_of_authorities_is_parsed_if_an_option_names_it(file: Path, tmp_path: Path, key: str) -> None:
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.write_text(NOT_PEM)
    certify(right, Tls())
    (line,) = told(file, f"{key}: {wrong}")
    assert line.startswith(f":1: {key}: {wrong} cannot be used: ")
    assert line.endswith(": give a PEM file")
    assert told(file, f"{key}: {right}") == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE"])
def test_a_bundle_of_the_system_is_only_searched_for_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    bundle = tmp_path / "bundle"
    monkeypatch.setenv(variable, str(bundle))
    bundle.write_text(NOT_PEM)
    assert examine().findings == []
    bundle.write_text("nothing")
    (finding,) = examine().findings
    assert (finding.place.name, finding.reason.startswith(f"{bundle} cannot be used")) == (variable, True)


def test_options_without_a_fault_have_none() -> None:
    assert conflicts(Config(), Given({}, None)) == []
