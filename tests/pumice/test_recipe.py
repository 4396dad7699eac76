import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.errors import ModelError, UsageError
from pumice.passes.prune_spec import Magnitude, SparseGPT, parse_prune
from pumice.patterns import Pattern
from pumice.recipe import Recipe, format_recipe, read_recipe


@given(
    st.builds(
        Recipe,
        prune=st.lists(
            st.sampled_from([Magnitude(Pattern(1, 4), 0.5), SparseGPT(Pattern(group=(2, 4)), refits=3, keep=("a*",))])
        ).map(tuple),
        permute=st.booleans(),
        reconstruct=st.integers(0, 1000),
        keep_float=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
        smooth=st.floats(0, 1),
        rounding=st.sampled_from(["nearest", "gptq"]),
        correct_bias=st.booleans(),
    )
)
def test_a_file_holds_the_recipe(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipes") / "recipe.toml"
    path.write_text(format_recipe(recipe, "why\nand how"), encoding="utf-8")
    assert read_recipe(path) == recipe


def test_what_is_as_always_is_not_written():
    assert format_recipe(Recipe()) == "\n"
    assert format_recipe(Recipe(permute=True), "mine") == "# mine\npermute = true\n"


def test_changes_may_be_text():
    recipe = Recipe(permute=True).but(prune="magnitude:1x4:0.5", keep_float="fc", smooth=None, equalize=False)
    assert recipe == Recipe((Magnitude(Pattern(1, 4), 0.5),), True, keep_float=("fc",), equalize=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune = 1", "prune is 1, and should be a list of texts"),
        ("permute = 1", "permute is 1, and should be a bool"),
        ("smooth = true", "smooth is true, and should be a float"),
        ("prune = ['magnitude:9x9:0.5']", "pattern '9x9' is not known"),
        ("speed = 3", "no recipe has 'speed'; the keys are prune, permute"),
        ("rounding = 'up'", "no rounding 'up'; there are nearest, gptq"),
        ("smooth = 2", "smooth 2 is not between 0 and 1"),
        ("prune = [", "not a recipe, which is a TOML file"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ModelError, match=rf"bad.toml: .*{message}"):
        read_recipe(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"none.toml: cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="no calibration method 'luck'"):
        Recipe(calibration_method="luck")


def test_what_makes_nothing_zero_reconstructs_nothing():
    base = Recipe(reconstruct=100, reconstruct_whole=True, smooth=0.5)
    filters, blocks = parse_prune("filters:0.25"), parse_prune("magnitude:1x4:0.5")
    assert base.pruning([filters]) == Recipe(prune=(filters,), smooth=0.5)
    assert base.pruning([]) == Recipe(smooth=0.5)
    both = base.pruning([filters, blocks])
    assert (both.reconstruct, both.reconstruct_whole, both.removals) == (100, True, (filters,))
