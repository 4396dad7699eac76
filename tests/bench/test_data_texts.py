import numpy as np

from bench.data_texts import Snippets, draw, parse_snippets, parse_word_pairs


def test_parse_word_pairs_skips_comments():
    pairs = parse_word_pairs("# a comment\n# Word 1\tWord 2\tHuman (mean)\ntiger\tcat\t7.35\n\nbook\ttiger\t2\r\n")
    assert pairs.left == ["tiger", "book"]
    assert pairs.right == ["cat", "tiger"]
    assert pairs.rating.tolist() == [7.35, 2.0]
    assert pairs.words() == ["book", "cat", "tiger"]


def test_parse_snippets_leaves_out_what_was_rated_zero_and_keeps_tabs_in_texts():
    snippets = parse_snippets("1_1\t-0.6\tToo\ttepid. \r\n2\t0.0\tNeither\n3\t1.5\tFun\n")
    assert snippets.text == ["Too\ttepid.", "Fun"]
    assert snippets.labels().tolist() == [False, True]


def test_draw_is_disjoint_and_repeats():
    snippets = Snippets([str(i) for i in range(20)], np.arange(20.0))
    learned, held = draw(snippets, 12, 6)
    assert (len(learned.text), len(held.text)) == (12, 6)
    assert not set(learned.text) & set(held.text)
    assert [float(text) for text in held.text] == held.rating.tolist()
    assert draw(snippets, 12, 6)[1].text == held.text


def test_draw_takes_fewer_where_there_are_not_so_many():
    learned, held = draw(Snippets(["a", "b", "c"], np.ones(3)), 12, 2)
    assert (len(learned.text), len(held.text)) == (1, 2)
