"""Pages in a real browser: headless Chromium, driven; everything it complains of is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SIZES = {"wide": (1280, 900), "tablet": (820, 1100), "phone": (390, 844)}


@dataclass
class Watched:
    """A page, and what happened on it.

    Attributes:
        page: Playwright's.
        complaints: console errors and warnings, and uncaught exceptions.
        requests: all addresses that were asked for, but for ``data:`` ones.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def outside(self, own: str) -> list[str]:
        """Requests to anything but the page's own origin (or, for a file, the file itself)."""
        if own.startswith("file:"):
            return [address for address in self.requests if address != own]
        origin = urlsplit(own)[:2]
        return [address for address in self.requests if urlsplit(address)[:2] != origin]

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        return bool(self.page.evaluate(wide))


def chromium() -> str:
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine; `make test` installs it as root on Debian")
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A browser, for as long as it is needed."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=as_root)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(
    browser: Any, address: str, *, size: str = "wide", dark: bool = False, wait: str = "body"
) -> Iterator[Watched]:
    """Open a page in a context of its own, and watch it."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    try:
        seen = Watched(context.new_page())
        page = seen.page
        page.set_default_timeout(20_000)
        page.on(
            "console",
            lambda m: seen.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith("data:") else seen.requests.append(r.url),
        )
        page.goto(address)
        page.wait_for_selector(wait)
        yield seen
    finally:
        context.close()


def as_address(path: Path) -> str:
    return path.resolve().as_uri()
