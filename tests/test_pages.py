"""The files of the web pages: how the daemon serves them, and what they may not hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cachd.api import pages
from tests.ground.site import Ground, assert_problem, said

STATIC = Path(pages.__file__).parent / "static"
PATHS = [
    "/",
    "/docs",
    *(f"/assets/{file.name}" for file in sorted(STATIC.iterdir()) if file.suffix != ".html"),
]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_of_the_pages_is_sent_once_and_no_site_may_frame_it(ground: Ground, path: str) -> None:
    answer = ground.node.ask("GET", path)
    assert answer.status == 200
    policy = said(answer, "Content-Security-Policy")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= {*policy.split("; ")}
    assert "unsafe" not in policy
    assert (said(answer, "X-Frame-Options"), said(answer, "X-Content-Type-Options")) == ("DENY", "nosniff")
    for known in (said(answer, "ETag"), f'"other", W/{said(answer, "ETag")}'):
        again = ground.node.ask("GET", path, headers={"If-None-Match": known})
        assert (again.status, again.document, said(again, "ETag")) == (304, b"", said(answer, "ETag"))
    assert ground.node.ask("GET", path, headers={"If-None-Match": '"other"'}).document == answer.document


def test_the_pages_are_counted_and_hold_nothing_else(ground: Ground) -> None:
    before = ground.node.metric("cachd_requests_total", op="asset", result="2xx")
    assert ground.node.ask("GET", "/assets/status.js").status == 200
    assert ground.node.metric("cachd_requests_total", op="asset", result="2xx") == before + 1
    for path in ("/assets/", "/assets/status.html", "/assets/../pages.py", "/assets/%2e%2e/pages.py"):
        assert_problem(ground.node.ask("GET", path), 404, "no_such_path")
    assert_problem(ground.node.ask("POST", "/"), 405, "method_not_allowed")


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_a_file_of_the_pages_loads_nothing_from_elsewhere_and_writes_no_html(file: Path) -> None:
    text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"""["'(]\s*(https?:)?//""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text)
    assert not re.search(r"<style|<script(?![^>]* src=)|\s(on\w+|style)=\"", text)
    assert text.count("\n") <= 400
