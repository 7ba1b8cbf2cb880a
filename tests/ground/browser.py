"""Somebody at the web pages of a daemon: the machine's Chromium without a window, driven by playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.ground.needs import chromium_binary

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 120_000.0
PHONE, DESKTOP = (360, 740), (1280, 800)
LIGHT, DARK = "light", "dark"
_NOT_OURS = "Failed to load resource"  # the browser's own line for each answer of 4xx; the page shows these


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, for a machine that has what `chromium` of tests/ground/needs.py names."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_binary())
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(
    browser: Browser,
    url: str,
    path: str = "/",
    *,
    size: tuple[int, int] = DESKTOP,
    scheme: str = LIGHT,
    provoked: str = "",
) -> Iterator[Page]:
    """A page of the daemon at `url`, opened in a fresh profile.

    Fails at the end if the page wrote an error or a warning to the console, or asked another host. `provoked`
    is in the errors that the test means to cause.
    """
    wrong: list[str] = []
    expected = [each for each in (_NOT_OURS, provoked) if each]
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == DARK else "light",
        locale="en-GB",
    )
    context.set_default_timeout(PATIENCE_MS)
    try:
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if _is_of(request.url, url) else wrong.append(request.url))
        page.on(
            "console",
            lambda said: (
                wrong.append(said.text)
                if said.type in ("error", "warning") and not any(each in said.text for each in expected)
                else None
            ),
        )
        page.goto(url + path)
        yield page
    finally:
        context.close()
    assert wrong == [], wrong


def _is_of(address: str, url: str) -> bool:
    return address.startswith(f"{url}/")
