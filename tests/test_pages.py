"""A page is one file that loads nothing, shows markup, does not obey it, and draws its pictures."""

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import RESPONSE, example, pixels, run, write_data
from PIL import Image

from data import load_examples
from files import read_lines
from pages import coloured


class Page(HTMLParser):
    """What a page loads, runs and shows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        self.open += [dict(attrs).get("class", "")] * (tag == "span")

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        self.text += data


EVIL = (
    "<script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\"> Which & why?"
)


def test_sheet(stage, tmp_path):
    """One self-contained file; markup in the data is shown, not obeyed; each tag has its colour."""
    red = Image.new("RGB", (200, 120), (250, 10, 20))
    response = RESPONSE.replace("So red.", f"So {EVIL}")
    rows = [example(n, images=[red], question=EVIL, response=response) for n in range(5)]
    sheet = tmp_path / "sheet.html"
    stage("sheet", data=write_data(tmp_path, rows), sheet=str(sheet), n_sheet=3)
    page = Page(sheet.read_text())
    assert page.tags.count("article") == 3 and page.tags.count("img") == 6
    assert "script" not in page.tags
    assert all(s.startswith("data:image/jpeg;base64,") for s in page.sources)
    assert page.text.count(EVIL) == 6 and not page.open
    for name in ("think", "latent", "parser", "answer"):
        assert page.text.count(f"<{name}>") == page.text.count(f"</{name}>") == 3
        assert sheet.read_text().count(f'<span class="{name}">') == 3
        assert f".{name}{{" in sheet.read_text()


def test_tags_that_do_not_match():
    """Whatever a model wrote, colours end with it, and every sign of it is shown."""
    tags = ["<think>", "</think>", "<answer>", "</answer>", "a < b"]
    for response in map(" ".join, itertools.product(tags, repeat=4)):
        page = Page(coloured(response))
        assert not page.open and page.text == response
        assert coloured(response).count("<span") == coloured(response).count("</span>")


def test_a_page_of_answers(stages, tmp_path):
    """Wrong answers first, what was imagined beside the real picture; made anew without asking."""
    args = [f"--model={stages['gap']}", f"--data={stages['world']}/test.jsonl"]
    args += [f"--out={tmp_path}/eval", "--max_new_tokens=40", f"--sheet={tmp_path}/page.html"]
    assert "give --save_latents=1" in run("eval.py", *args, ok=False)
    run("eval.py", *args, "--save_latents=1")
    answers = {row["id"]: row for row in read_lines(tmp_path / "eval" / "scored.jsonl")}
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("article") == len(answers)
    # a question picture each, the real picture of each span, and one imagined for each whole span
    rows = load_examples(stages["world"] / "test.jsonl", training=False)
    pictures = sum(1 + len(row["aux_images"]) + answers[row["id"]]["latents"] // 4 for row in rows)
    assert page.tags.count("img") == pictures
    assert page.text.count("with the real features") > 0 and not page.open
    verdicts = re.findall(r"test-\d+: (right|wrong)", page.text)
    assert verdicts == sorted(verdicts, reverse=True) and len(verdicts) == len(answers)
    # later, from the files alone
    before = (tmp_path / "page.html").read_bytes()
    run("eval.py", *args, "--save_latents=1", "--score_only=1")
    assert (tmp_path / "page.html").read_bytes() == before


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_sheet_in_a_browser(stage, tmp_path):
    red = Image.new("RGB", (200, 120), (250, 10, 20))
    sheet, picture = tmp_path / "sheet.html", tmp_path / "page.png"
    data = write_data(tmp_path, [example(0, images=[red], question=EVIL)])
    stage("sheet", data=data, sheet=str(sheet))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", "--window-size=1000,900", sheet.as_uri()],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = np.abs(pixels(picture).astype(int) - (250, 10, 20)).max(-1) <= 4
    assert shown.sum() >= 0.98 * 200 * 120  # the query image is drawn
    done = subprocess.run(
        [*command, "--dump-dom", sheet.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    assert "1 of 1 examples" in title  # no script has changed it
