"""The page in a real browser: it renders, sorts, fits a phone, complains of nothing and asks nobody for anything."""

import http.server
import re
import shutil
import subprocess
import threading

import pytest

from pumice.report import format_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
    pytest.mark.slow,
]
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"),
)


@pytest.fixture
def browse(tmp_path):
    """The document after it was shown, and what its console said."""

    def browse(text):
        path = tmp_path / "page.html"
        path.write_text(text, "utf-8")
        options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,2000", path.as_uri()]
        shown = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120, check=True)
        return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]

    return browse


def with_script(page, script):
    return page.replace("</body>", f"<script>{script}</script></body>")


@pytest.fixture(scope="module")
def page(timed):
    return format_page(timed, "pumice report model.so")


def test_it_renders_without_a_complaint(browse, page, timed):
    document, console = browse(page)
    assert console == []
    assert document.count("<details>") == len(timed.layers)
    assert document.count("<button>") >= 8  # the script ran


def test_what_is_wrong_would_be_seen(browse, page):
    assert browse(with_script(page, "nothing.at.all"))[1]


def test_tables_sort_by_number_both_ways(browse, page, timed):
    script = """
        const table = document.querySelector("#layers table");
        const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === "bytes");
        const read = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join(" ");
        const orders = [read()];
        for (let i = 0; i < 2; i++) { table.tHead.rows[0].cells[column].firstChild.click(); orders.push(read()); }
        document.title = orders.join(", ");
    """
    document, console = browse(with_script(page, script))
    sizes = [layer.compiled_bytes for layer in timed.layers]
    ascending = [str(1 + index) for index in sorted(range(len(sizes)), key=sizes.__getitem__)]
    expected = [[str(1 + index) for index in range(len(sizes))], ascending, ascending[::-1]]
    assert re.search("<title>(.*)</title>", document)[1] == ", ".join(map(" ".join, expected))
    assert console == []


@pytest.mark.parametrize("width", [400, 1200])
def test_it_is_no_wider_than_its_window(browse, page, tmp_path, width):
    """In a frame, for a window has a least width."""
    script = "parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(' '), '*')"
    (tmp_path / "framed.html").write_text(with_script(page, script), "utf-8")
    receive = "<script>addEventListener('message', (event) => { document.title = event.data; });</script>"
    document, _ = browse(f'<title></title>{receive}<iframe src="framed.html" width="{width}" height="900"></iframe>')
    inner, needed = map(int, re.search("<title>(.*)</title>", document)[1].split())
    assert inner == width
    assert needed <= inner


def test_it_asks_nobody_for_anything(browse, page):
    """Even a page into which somebody else's element got: the policy stands before it."""
    asked = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        stranger = f'<img src="{address}/a"><script src="{address}/b"></script><script>fetch("{address}/c")</script>'
        _, console = browse(page.replace("</body>", f"{stranger}</body>"))
        assert asked == []
        assert sum("Content Security Policy" in line for line in console) >= 3
        browse(f'<img src="{address}/image">')
        assert asked == ["/image"]  # without the policy it would have been seen
        server.shutdown()
