import pytest

from pumice.errors import UsageError
from pumice.passes.prune_spec import OBC, Filters, Heads, Magnitude, NearZero, SparseGPT, Wanda, parse_prune
from pumice.patterns import Pattern

BLOCK, GROUP = Pattern(1, 4), Pattern(group=(2, 4))

SPECS = {
    "magnitude:1x4:0.9": Magnitude(BLOCK, 0.9),
    "magnitude:unstructured:0.8:global": Magnitude(Pattern(), 0.8, "global"),
    "magnitude:2:4": Magnitude(GROUP),
    "magnitude:4:8:keep=head*": Magnitude(Pattern(group=(4, 8)), keep=("head*",)),
    "magnitude:4x1:0.5:norm=l2:keep=head*,stem*": Magnitude(Pattern(4, 1), 0.5, norm="l2", keep=("head*", "stem*")),
    "magnitude:4x4:1e-05:erk": Magnitude(Pattern(4, 4), 1e-05, "erk"),
    "magnitude:16x4:0.5:sensitivity:only=fc*": Magnitude(Pattern(16, 4), 0.5, "sensitivity", only=("fc*",)),
    "near-zero:2x4:0.001:relative": NearZero(Pattern(2, 4), 0.001, True),
    "wanda:2:4": Wanda(GROUP),
    "sparsegpt:1x4:0.5:damping=0.1:refits=30": SparseGPT(BLOCK, 0.5, damping=0.1, refits=30),
    "obc:1x4:0.5:erk:damping=0.001": OBC(BLOCK, 0.5, "erk", damping=0.001),
    "filters:0.3:by=norm-scale:everywhere:multiple=16": Filters(0.3, "norm-scale", True, 16),
    "heads:0.25:only=encoder*": Heads(0.25, only=("encoder*",)),
}


@pytest.mark.parametrize("text", SPECS)
def test_text_and_spec_turn_into_each_other(text):
    assert parse_prune(text) == SPECS[text]
    assert str(SPECS[text]) == text


def test_options_come_in_any_order():
    spec = parse_prune(" magnitude:1x4:.5:keep=a,b:global:norm=l2 ")
    assert spec == Magnitude(BLOCK, 0.5, "global", "l2", keep=("a", "b"))


def test_n_of_m_says_its_amount():
    assert parse_prune("sparsegpt:2:4").amount == 0.5
    assert parse_prune("magnitude:1:4").amount == 0.75


@pytest.mark.parametrize(
    "text",
    [
        "", "1x4:0.9", "magnitude", "magnitude:1x4", "magnitude:1x4:90", "magnitude:1x4:-0.1", "magnitude:1x4:nan",
        "magnitude:2:4:0.5", "magnitude:1x4:0.5:norm=l3", "magnitude:1x4:0.5:global:global", "magnitude:1x4:0.5:keep=",
        "random:1x4:0.5", "wanda:1x4:0.5:norm=l2", "near-zero:1x4", "filters", "filters:2", "filters:0.3:by=size",
        "heads:0.25:by=l1", "magnitude:1x4:0.5:global:erk", "sparsegpt:1x4:0.5:refits=1.5", "magnitude:0.5:1x4",
    ],
)  # fmt: skip
def test_a_wrong_spec_shows_the_right_form(text):
    with pytest.raises(UsageError, match=r"for example magnitude:1x4:0.9"):
        parse_prune(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magnitude:3x4:0.5", "pattern '3x4' is not known; there are unstructured, 1x4, 4x1, 2x4, 4x4, 16x4 or N:M"),
        ("magnitude:4:2", "pattern '4:2' is not known"),
        ("magnitude:0:4", "pattern '0:4' is not known"),
        ("magnitude:2:4:global", "2:4 removes the same share everywhere"),
        ("near-zero:2:4", "a threshold decides how much goes"),
        ("sparsegpt:1x4:0.5:damping=0", "damping=0 of sparsegpt is not above 0"),
        ("sparsegpt:1x4:0.5:refits=1000", "refits=1000 of sparsegpt is not between 0 and 100"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_prune(text)


def test_only_and_keep():
    spec = parse_prune("magnitude:1x4:0.5:only=layer.*:keep=*.head")
    assert spec.keeps("layer.1") is None
    assert spec.keeps("layer.head") == "keep=*.head"
    assert spec.keeps("stem") == "only=layer.*"
