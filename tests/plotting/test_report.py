"""The report's HTML: complete, escaped, self-contained."""

import base64
import re
from html.parser import HTMLParser

from replknet.plotting._figures import new_figure
from replknet.plotting.report import Report, Section, Table, render


class Balanced(HTMLParser):
    """Fails on a tag that closes what is not open."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_everything_given_is_shown_and_escaped():
    figure = new_figure(2, 1)
    figure.add_subplot().plot([1, 2])
    report = Report(
        title="<Title> & more",
        summary='say "so"',
        tiles=(("99 %", "right & wrong"),),
        sections=(
            Section("One", "text <b>", figures=((figure, 'a "picture"'),)),
            Section("Two", tables=(Table((("row", "1 < 2"),), ("head", "value"), "caption"),), commands=("a", "b > c")),
        ),
        footer="the end",
    )
    page = render(report)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    text = "".join(parser.text)
    for piece in ("<Title> & more", 'say "so"', "99 %", "text <b>", "1 < 2", "head", "caption", "a\nb > c", "the end"):
        assert piece in text
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert 'alt="a &quot;picture&quot;"' in page


def test_a_report_is_the_same_every_time():
    def page():
        figure = new_figure(2, 1)
        figure.add_subplot().plot([1, 2])
        return render(Report("t", "s", sections=(Section("One", figures=((figure, "f"),)),)))

    assert page() == page()
