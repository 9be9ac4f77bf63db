"""What does a page to look at look like? One HTML file that holds its pictures and asks nothing of anyone."""

import html
import re

from data import TAGS, write_then_rename

STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
article{border-top:1px solid #ccc;padding:1em 0;overflow-wrap:anywhere}figure{display:inline-block;margin:0 1em 1em 0;
vertical-align:top}img{max-width:320px;max-height:320px;border:1px solid #ddd}figcaption{font-size:12px;max-width:320px}
.think{color:#777}.latent{background:#d33;color:#fff}.parser{color:#06c}.answer{color:#080;font-weight:bold}
b.tag{padding:0 .2em;border-radius:3px}pre{white-space:pre-wrap;font:inherit}"""


def coloured(response):
    """A response as HTML: each tag and what it holds in the colour of its kind; all other markup is shown, not obeyed."""
    pieces = []
    for piece in re.split(f"({TAGS.pattern})", response):
        name = piece.strip("</>")
        if not TAGS.fullmatch(piece):
            pieces.append(html.escape(piece))
        elif piece.startswith("</"):
            pieces.append(f'<b class="tag">{html.escape(piece)}</b></span>')
        else:
            pieces.append(f'<span class="{name}"><b class="tag">{html.escape(piece)}</b>')
    return "".join(pieces)


def write_page(path, title, cards):
    """One file that holds its pictures and asks nothing of anyone."""
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>"
        + "".join(f"<article>{card}</article>" for card in cards)
        + "</html>"
    )
    write_then_rename(path, lambda p: p.write_bytes(text.encode()))
