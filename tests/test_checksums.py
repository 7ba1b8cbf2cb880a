"""SHA256SUMS files are parsed as sha256sum writes them; any other form is refused."""

from __future__ import annotations

import pytest

from cachd.model import MAX_FILES, Digest
from cachd.sources import checksums
from cachd.sources.cancel import CancelToken
from tests.fetching import HEX, refused


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (f"{HEX}  a\n", ["a"]),
        (f"{HEX} *a.bin\r\n{HEX}  dir/b c\r\n", ["a.bin", "dir/b c"]),
        (f"{HEX.upper()}  ./a", ["a"]),
        (f"# made by hand\n\n{HEX}  é\n   \n", ["é"]),
        (f"SHA256 (a) = {HEX}\nSHA256(./dir/b (1)) = {HEX}\n", ["a", "dir/b (1)"]),
        (f"SHA2-256(a)= {HEX}\n", ["a"]),
        ("", []),
    ],
)
def test_sums_are_read_as_sha256sum_writes_them(content: str, paths: list[str]) -> None:
    assert checksums.parse(content.encode(), "SHA256SUMS") == dict.fromkeys(paths, Digest("sha256", HEX))


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_sums_may_begin_with_the_mark_of_their_encoding(coding: str) -> None:
    mark = "\ufeff" if coding.endswith("e") else ""
    content = f"{mark}{HEX}  a\r\n{HEX} *é\r\n".encode(coding)
    assert [*checksums.parse(content, "SHA256SUMS")] == ["a", "é"]


PGP = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{}-----BEGIN PGP SIGNATURE-----\n\niQ\n-----END"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sums_that_pgp_signed_are_the_lines_between_header_and_signature(end: str) -> None:
    signed = PGP.format(f"{HEX}  a\n{HEX}  b\n").replace("\n", end)
    assert [*checksums.parse(signed.encode(), "SHA256SUMS")] == ["a", "b"]
    wrong = PGP.format(f"{HEX}  a\nb\n").replace("\n", end)
    assert "line 5" in refused(lambda: checksums.parse(wrong.encode(), "SHA256SUMS"), "bad_checksums").detail


def test_sums_of_scripts_and_of_windows_are_read() -> None:
    lines = [f"{HEX} a", f"{HEX.upper()}\tb", f"\\{HEX} *c\\\\d", f"{HEX}  .git/config", f"{HEX} *e/._f"]
    assert [*checksums.parse("\r\n".join(lines).encode(), "SHA256SUMS")] == ["a", "b", "c/d"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{HEX}  a\n{HEX}  a\n".encode(), "line 2"),
        (f"{HEX}\n".encode(), "line 1"),
        (f"{HEX}  \n".encode(), "line 1"),
        (f"{HEX}\t a\n".encode(), "line 1"),
        (f"{HEX}a\n".encode(), "line 1"),
        (f"{HEX[:-1]}  a\n".encode(), "line 1"),
        (f"{'g' * 64}  a\n".encode(), "line 1"),
        (f"d41d8cd98f00b204e9800998ecf8427e  a\n{HEX}  b\n".encode(), "line 1"),
        (f"\\{HEX}  a\\nb\n".encode(), "line 1"),
        (b"<!doctype html>\n", "line 1"),
        (b"\xff\xfe\x00\xd8a", "not text"),
        (f"SHA256 (a) = {HEX}\n{HEX}  a\n".encode(), "line 2"),
        (f"MD5 (a) = {HEX[:32]}\n".encode(), "line 1"),
        (f"{HEX}  \xff\n".encode("latin-1"), "not text"),
    ],
    ids=ascii,
)
def test_sums_of_any_other_form_are_refused_with_the_line(content: bytes, told: str) -> None:
    assert told in refused(lambda: checksums.parse(content, "SHA256SUMS"), "bad_checksums").detail


def test_what_is_no_file_of_a_model_is_left_out_of_the_sums() -> None:
    empty = checksums.OF_NO_BYTES.hex
    lines = [
        f"{HEX}  SHA256SUMS",
        f"{HEX}  .git/config",
        f"{empty}  folder",
        f"{HEX}  folder/x",
        f"{empty}  e",
    ]
    assert [*checksums.parse("\n".join(lines).encode(), "SHA256SUMS")] == ["folder/x", "e"]


def test_sums_have_so_many_lines_and_files_and_no_more() -> None:
    lines, files = 2 * MAX_FILES, [f"{HEX}  .git/{number}" for number in range(MAX_FILES)]
    assert checksums.parse(b"\n" * lines, "SHA256SUMS") == {}
    refused(lambda: checksums.parse(b"\n" * (lines + 1), "SHA256SUMS"), "document_too_large")
    assert checksums.parse("\n".join(files).encode(), "SHA256SUMS") == {}
    one_more = "\n".join([*files, f"{HEX}  a"]).encode()
    refused(lambda: checksums.parse(one_more, "SHA256SUMS"), "too_many_files")


def test_a_name_with_backslashes_is_a_path_of_windows() -> None:
    assert [*checksums.parse(f"\\{HEX}  sub\\\\a\n".encode(), "SHA256SUMS")] == ["sub/a"]


class Asked:
    """Directories whose sums are asked for, at times that the test sets."""

    def __init__(self) -> None:
        self.now, self.bases = 100.0, list[str]()
        self.latest = checksums.LatestChecksums(self.listing, clock=lambda: self.now)

    def listing(self, base: str, _token: CancelToken) -> bytes:
        self.bases.append(base)
        return f"{HEX}  {len(self.bases)}\n".encode()

    def of(self, base: str) -> list[str]:
        return [*self.latest.of(base, CancelToken())]


def test_the_sums_of_a_directory_are_asked_for_once_in_ten_seconds() -> None:
    asked = Asked()
    assert (asked.of("a/"), asked.of("a/")) == (["1"], ["1"])
    asked.now += 9.9
    assert asked.of("a/") == ["1"]
    asked.now += 0.1
    assert asked.of("a/") == ["2"]
    assert asked.of("b/") == ["3"]
    assert asked.of("a/") == ["4"], "only the last directory is remembered"
    assert asked.bases == ["a/", "a/", "b/", "a/"]
