import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pumice.loader import clean
from pumice.report.markup import Markup, element, join


@given(st.text(), st.text())
def test_text_stays_text_and_an_attribute_an_attribute(text, value):
    parsed = ElementTree.fromstring(element("a", text, element("b", "inner"), title=value))
    assert (parsed.text or "") == clean(text)
    assert parsed.attrib == {"title": clean(value)}
    assert [child.tag for child in parsed] == ["b"]


def test_what_is_not_there_is_left_out():
    assert element("td", None, "x", class_=None, data_value=3) == '<td data-value="3">x</td>'
    assert element("details", open=True) == "<details open></details>"
    assert element("details", open=False) == "<details></details>"
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_only_markup_is_taken_as_it_is():
    assert join("<b>", Markup("<b>")) == "&lt;b&gt;<b>"
    assert not isinstance(Markup("<b>") + "<i>", Markup)  # a sum with plain text is plain text, and is escaped
