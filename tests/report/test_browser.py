"""The page in a real browser: from disk, without a network, on a wide and on a narrow window."""

import html
import re
import shutil
import subprocess

import pytest
from PIL import Image
from report_pages import UGLY, full_report

from peft_modal.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = (*UGLY, *(f"class_number_{i}" for i in range(40 - len(UGLY))))

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
    pytest.mark.slow,
]


def browse(page, profile, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
        "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def cloud(axes, sample, prediction):
    axes.plot(*sample["points"][:, :2].T, ".")


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_opens_from_disk_and_is_never_wider_than_its_window(tmp_path, width):
    write_report(full_report(NAMES), tmp_path, renderer=lambda: cloud)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # A window cannot be as narrow as a telephone; a frame can, and one with its text inside may be measured.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin:0"><iframe style="width:{width}px;height:3000px;border:0" srcdoc="{html.escape(text)}" '
        "onload=\"const d = this.contentDocument; const inside = [...d.querySelectorAll('section > *, header > *')];"
        "document.body.dataset.result = [d.documentElement.scrollWidth, this.contentWindow.innerWidth,"
        "Math.ceil(Math.max(...inside.map(e => e.getBoundingClientRect().right))),"
        "[...d.images].filter(i => i.naturalWidth > 0).length, d.images.length, d.title].join('|')\"></iframe>",
        encoding="utf-8",
    )
    picture = tmp_path / "picture.png"
    window = f"--window-size={max(width, 500)},3000"

    dom = browse(frame, tmp_path / "profile", window, "--dump-dom")
    browse(tmp_path / "report.html", tmp_path / "profile", window, f"--screenshot={picture}")

    result = html.unescape(re.search(r'data-result="([^"]*)"', dom)[1])
    scroll, inner, right, loaded, images, title = result.split("|")
    assert int(inner) == width
    assert int(scroll) <= width
    assert int(right) <= width
    assert loaded == images != "0"
    assert title == "a_backbone tuned with <i>method</i> on data"
    with Image.open(picture) as image:
        assert image.size == (max(width, 500), 3000)
        assert len(image.convert("L").getcolors()) > 50
