"""Which certificate authorities connections trust, and what happens when their file cannot be used."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from cachd.errors import Unavailable
from cachd.sources.trust import Authorities, reason_of
from tests.ground.origin.certificates import certify


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    certify(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


def test_the_context_demands_tls_and_is_made_once_for_each_version_of_the_file(pem: Path) -> None:
    authorities = Authorities(str(pem))
    authorities.check()
    first = authorities.context()
    assert first.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert first.verify_mode is ssl.CERT_REQUIRED
    assert first.check_hostname
    assert not first.options & ssl.OP_IGNORE_UNEXPECTED_EOF
    assert len(first.get_ca_certs()) == 1
    assert authorities.context() is first
    certify(pem.with_name("new.pem"))
    pem.with_name("new.pem").replace(pem)
    assert authorities.context() is not first


def test_without_a_file_the_systems_own_authorities_are_trusted() -> None:
    authorities = Authorities()
    authorities.check()
    assert authorities.file is None
    assert authorities.context() is authorities.context()


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\n", b"-----BEGIN KEY-----\n"])
def test_a_file_without_a_certificate_is_refused_and_named_only_in_the_log(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    authorities = Authorities(str(file))
    for use in (authorities.check, authorities.context):
        with pytest.raises(Unavailable) as refusal:
            use()
        assert refusal.value.code == "bad_ca_file"
        assert str(file) not in str(refusal.value)
        assert refusal.value.withheld["file"] == str(file)
        assert reason_of(refusal.value)
        assert content is not None or "No such file" in reason_of(refusal.value)


def test_a_file_that_became_unusable_is_used_again_when_it_is_mended(pem: Path) -> None:
    authorities, content = Authorities(str(pem)), pem.read_bytes()
    first = authorities.context()
    pem.write_bytes(b"x")
    with pytest.raises(Unavailable):
        authorities.context()
    pem.write_bytes(content + b"\n")
    assert authorities.context() is not first
    assert reason_of(Unavailable("no cause", code="bad_ca_file")) == "no cause"
