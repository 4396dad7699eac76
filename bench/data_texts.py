"""Texts for a sentence encoder: word similarity, film reviews, and other texts to calibrate on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.data_packages import find_package, read_tar, read_wheel

SEED = 20240817
_WORD = re.compile(r"[a-z]{3,12}")
_SETS = {
    "movieReview": "movieReviewSnippets",
    "amazonReview": "amazonReviewSnippets",
    "nytEditorial": "nytEditorialSnippets",
    "tweets": "tweets",
}


@dataclass(frozen=True)
class WordPairs:
    """Pairs of words and how similar people found them."""

    left: list[str]
    right: list[str]
    rating: npt.NDArray[np.float64]

    def words(self) -> list[str]:
        """Every word once, sorted."""
        return sorted({*self.left, *self.right})


@dataclass(frozen=True)
class Snippets:
    """Sentences with the mean of their ratings, -4 (most negative) to 4."""

    text: list[str]
    rating: npt.NDArray[np.float64]

    def part(self, first: int, end: int) -> Snippets:
        """Those from ``first`` to before ``end``."""
        return Snippets(self.text[first:end], self.rating[first:end])

    def labels(self) -> npt.NDArray[np.bool_]:
        """True where people found the sentence positive."""
        return self.rating > 0


def read_word_pairs(folder: Path) -> dict[str, WordPairs]:
    """WordSim-353 and SimLex-999, from the test data in gensim's wheel."""
    package = find_package(folder, "gensim-*.whl")
    files = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}
    return {
        name: parse_word_pairs(read_wheel(package, f"gensim/test/test_data/{file}").decode("utf-8"))
        for name, file in files.items()
    }


def parse_word_pairs(table: str) -> WordPairs:
    """Lines ``word<TAB>word<TAB>rating``; lines that begin with ``#`` are comments."""
    rows = [line.split("\t") for line in table.splitlines() if line.strip() and not line.startswith("#")]
    return WordPairs([row[0] for row in rows], [row[1] for row in rows], np.array([float(row[2]) for row in rows]))


def read_snippets(folder: Path, kind: str) -> Snippets:
    """One set of vaderSentiment's distribution: ``movieReview``, ``amazonReview``, ``nytEditorial`` or ``tweets``."""
    source = find_package(folder, "vaderSentiment-*.tar.gz").read_bytes()
    inner = read_tar(source, "/hutto_ICWSM_2014.tar.gz")
    return parse_snippets(read_tar(inner, f"/{_SETS[kind]}_GroundTruth.txt").decode("utf-8"))


def parse_snippets(table: str) -> Snippets:
    """Lines ``id<TAB>mean rating<TAB>text``; sentences that people rated exactly 0 are left out."""
    rows = [line.rstrip("\r\n").split("\t", 2) for line in io.StringIO(table) if line.strip()]
    kept = [(row[2].strip(), float(row[1])) for row in rows if float(row[1]) != 0]
    return Snippets([text for text, _ in kept], np.array([rating for _, rating in kept]))


def draw(snippets: Snippets, train: int, test: int) -> tuple[Snippets, Snippets]:
    """Two disjoint seeded samples, fewer where there are not so many."""
    order = np.random.default_rng(SEED).permutation(len(snippets.text))
    parts = order[:test], order[test : test + train]
    held, learned = (Snippets([snippets.text[i] for i in part], snippets.rating[part]) for part in parts)
    return learned, held


def unlabelled_texts(folder: Path, excluded: set[str]) -> list[str]:
    """Every sentence of the four sets once, in their order, but for those ``excluded``; ratings are not used."""
    texts = dict.fromkeys(text for kind in _SETS for text in read_snippets(folder, kind).text)
    return [text for text in texts if text not in excluded]


def vocabulary(texts: Iterable[str], excluded: set[str]) -> list[str]:
    """Every word of the texts that has 3 to 12 small letters and is not ``excluded``, sorted."""
    return sorted({word for text in texts for word in _WORD.findall(text)} - excluded)


def calibration_texts(folder: Path, sentences: int, words: int, evaluated: set[str]) -> list[str]:
    """Sentences of newspaper and shop reviews, then single words out of them that are not in ``evaluated``.

    Single words are there because word similarity feeds them; neither source is evaluated.
    """
    texts = read_snippets(folder, "nytEditorial").text + read_snippets(folder, "amazonReview").text
    generator = np.random.default_rng(SEED)
    drawn = [texts[i] for i in generator.choice(len(texts), sentences, replace=False)]
    single = vocabulary(texts, evaluated)
    return drawn + [single[i] for i in generator.choice(len(single), words, replace=False)]
