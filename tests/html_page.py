"""A web page as a list of its elements, for tests."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page as its elements (tag, attributes) and its text; raises where elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.pieces, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    @property
    def text(self):
        return " ".join(self.pieces)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.pieces.append(data)
