"""What does a page to look at look like? One HTML file, its pictures inside, that loads nothing."""

import base64
import html
import io
import re

from data import TAGS
from files import write_then_rename

THUMBNAIL = (320, 320)  # pixels: a picture is at most as large on a page
# in the page, as its pictures are: one file can be sent around and opens without a network
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}\n"
    "article{border-top:1px solid #ccc;padding:1em 0;overflow-wrap:anywhere}"
    "figure{display:inline-block;margin:0 1em 1em 0;\nvertical-align:top}"
    "img{max-width:320px;max-height:320px;border:1px solid #ddd;\nmin-width:130px;min-height:130px;"
    "object-fit:contain}"
    "figcaption{font-size:12px;max-width:320px}\n"
    ".think{color:#777}"
    ".latent{background:#d33;color:#fff}"
    ".parser{color:#06c}"
    ".answer{color:#080;font-weight:bold}\n"
    "b.tag{padding:0 .2em;border-radius:3px}"
    "pre{white-space:pre-wrap;font:inherit}"
)


def figure(image, caption):
    """A PIL image (RGB), shrunk to THUMBNAIL, and a line of text below it, as HTML."""
    small = image.copy()  # thumbnail() works in place
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90, subsampling=0)  # colours stay as sharp as shapes
    pixels = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{pixels}">'
        f"<figcaption>{html.escape(str(caption))}</figcaption></figure>"
    )


def coloured(response):
    """A response as HTML: each tag and what it holds in the colour of its kind.

    All other markup is shown, not obeyed. A model may leave a tag open, or close one that is not.
    """
    pieces, opened = [], []
    # the parentheses make split() keep the tags
    for piece in re.split(f"({TAGS.pattern})", response):
        shown = html.escape(piece)
        name = piece.strip("</>")
        if not TAGS.fullmatch(piece):
            pieces.append(shown)
        elif not piece.startswith("</"):
            pieces.append(f'<span class="{name}"><b class="tag">{shown}</b>')
            opened.append(name)
        else:
            # the tag is shown within the colour that it ends
            pieces.append(f'<b class="tag">{shown}</b>')
            while name in opened:
                pieces.append("</span>")
                if opened.pop() == name:
                    break
    return "".join(pieces) + "</span>" * len(opened)


def card(title, category, figures, question, response, note):
    """A question and what was said to it, as HTML: texts, and figures that are HTML already."""
    return (
        f"<p><b>{html.escape(title)}</b> {html.escape(str(category or ''))}</p>"
        f"{''.join(figures)}"
        f"<pre>{html.escape(question)}</pre><pre>{coloured(response)}</pre>"
        f"<p>{html.escape(note)}</p>"
    )


def write_page(path, title, cards):
    """Write a page of cards (HTML, one below the other) under a title (text)."""
    # a name of a run or a file may hold any sign
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = f"<h1>{title}</h1>" + "".join(f"<article>{card}</article>" for card in cards)
    page = f'<!doctype html><html lang="en">{head}{body}</html>'
    # bytes, since a text would be written in the system's own encoding; a file's name may hold what
    # is no Unicode
    write_then_rename(path, lambda p: p.write_bytes(page.encode(errors="replace")))
