"""The documentation as a site, where the extra `docs` is installed: every link goes somewhere, and searching finds."""

import functools
import http.server
import importlib.util
import json
import subprocess
import sys
import threading

import browser
import pytest

from helpers import ROOT

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra `docs` is not installed"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={out}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


def test_every_page_is_in_its_index(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) + "/" for page in (ROOT / "docs").rglob("*.md")}
    assert found == pages | {"", "changes/"}


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium here")
def test_searching_in_a_browser_finds_a_page(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.Page(f"http://127.0.0.1:{server.server_port}/") as page:
            page.click(".md-search__input")
            page.run("document.querySelector('.md-search__input').value = 'complementary masks'")
            page.run("document.querySelector('.md-search__input').dispatchEvent(new Event('keyup', {bubbles: true}))")
            page.until("!!document.querySelector('.md-search-result__link')")
            hrefs = page.run("[...document.querySelectorAll('.md-search-result__link')].map(a => a.href).join(' ')")
            assert "guide/changing/" in hrefs
            assert page.errors == []
        server.shutdown()
