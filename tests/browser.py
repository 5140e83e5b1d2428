"""Pages in a headless browser: what they say, ask for and look like. It is not a test.

The fixtures `chromium` and `window` reach every test through conftest.py.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Dialog

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A browser in a container, that asks for nothing by itself.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
# Anything else leaves this machine.
LOCAL = re.compile(r"(file|data|blob|about|chrome-error):|https?://(127\.0\.0\.1|localhost|\[::1\])([:/?#]|$)", re.I)
SIZE = (1300, 1800)  # width and height in CSS pixels
SECONDS = 60.0  # that a page or an element may take to appear; a busy machine draws slowly


class Window:
    """One page of a browser, and what it did.

    Attributes:
        page: Playwright's page, for clicks and waiting.
        requests: Addresses that the page asked for, in turn; what would leave the machine is not let through.
        dialogs: Texts of alert, confirm and prompt boxes, each dismissed at once.
        errors: Exceptions of the page's scripts that nothing caught.
    """

    def __init__(self, context: "BrowserContext") -> None:
        context.set_default_timeout(1000 * SECONDS)
        context.route(lambda url: not LOCAL.match(url), lambda route: route.abort())
        self.page = context.new_page()
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._dismiss)

    def _dismiss(self, dialog: "Dialog") -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, address: str | Path) -> None:
        """Goes to a page and waits until it is loaded.

        Args:
            address: A URL, or the path of a file.
        """
        self.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)

    @property
    def text(self) -> str:
        """What the page says, as a reader sees it: without what is hidden."""
        return self.page.inner_text("body")

    def wait_for(self, text: str) -> None:
        """Returns once the page shows a text.

        Raises:
            playwright.sync_api.TimeoutError: It does not within `SECONDS`.
        """
        self.page.get_by_text(text).locator("visible=true").first.wait_for()

    def foreign(self) -> list[str]:
        """The requests that went beyond this machine."""
        return [url for url in self.requests if not LOCAL.match(url)]

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Takes a picture (PNG) of what is in view, or of the whole page; returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, full_page=whole)
        return path

    def blank(self) -> bool:
        """Whether there is nothing to see: an empty page, or one of text alone without styles, has few colours."""
        import io

        from PIL import Image

        image = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        return len(image.getcolors(maxcolors=image.width * image.height) or ()) < 50


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    """The system's browser. Of one module only: while it runs, playwright's loop forbids asyncio.run here."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is here ({', '.join(NAMES)})")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: "Browser") -> Iterator[Window]:
    """A fresh window without cookies or cache."""
    with chromium.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}) as context:
        yield Window(context)
