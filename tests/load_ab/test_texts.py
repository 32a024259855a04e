"""Pieces of text: exact lengths, running text, no two that begin alike; and the ids of random prompts."""

from __future__ import annotations

import pytest
from load_ab.word_tokenizer import WordTokenizer

from sgl_hq.launch.load_ab.texts import MARK_TOKENS, TextPieces, ordinary_ids
from sgl_hq.launch.workload import WorkloadError


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"w{i}" for i in range(50)) + " <special>")
    return tmp_path / "book.txt"


def test_pieces_have_the_length_asked_for_and_differ_from_the_first_tokens(book):
    pieces = TextPieces(WordTokenizer(), book, seed=1)
    taken = [pieces.take(length) for length in [2, 3, 50, 170] * 500]
    assert [len(piece) for piece in taken] == [2, 3, 50, 170] * 500
    assert len({piece[:MARK_TOKENS] for piece in taken}) == 2000


def test_the_text_runs_on_from_piece_to_piece_and_begins_again_at_its_end(book):
    tokenizer = WordTokenizer()
    pieces = TextPieces(tokenizer, book, seed=1)
    words = tokenizer.decode([token for _ in range(10) for token in pieces.take(14)[MARK_TOKENS:]]).split()
    numbers = [int(word[1:]) for word in words]  # ValueError if the special word came along
    assert len(numbers) == 120 and all((b - a) % 50 == 1 for a, b in zip(numbers, numbers[1:]))


def test_the_seed_chooses(book):
    one, same, other = [TextPieces(WordTokenizer(), book, seed).take(30) for seed in (1, 1, 2)]
    assert one == same and one[:MARK_TOKENS] != other[:MARK_TOKENS] and one[MARK_TOKENS:] != other[MARK_TOKENS:]


def test_a_text_too_poor_to_tell_pieces_apart_is_refused(tmp_path):
    (tmp_path / "book.txt").write_text("a b c " * 100)
    pieces = TextPieces(WordTokenizer(), tmp_path / "book.txt", seed=1)
    assert len({pieces.take(20) for _ in range(9)}) == 9
    with pytest.raises(WorkloadError, match="3 different tokens, enough to tell 9 pieces apart: give a longer text"):
        pieces.take(20)


def test_a_text_that_is_none_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match="the text .*none.txt cannot be read"):
        TextPieces(WordTokenizer(), tmp_path / "none.txt", seed=1)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(WorkloadError, match="cannot be read as UTF-8"):
        TextPieces(WordTokenizer(), tmp_path / "latin.txt", seed=1)
    (tmp_path / "empty.txt").write_text(" <special> ")
    with pytest.raises(WorkloadError, match="has no tokens"):
        TextPieces(WordTokenizer(), tmp_path / "empty.txt", seed=1)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        TextPieces(WordTokenizer(), None, seed=1).take(1)


def test_the_packages_texts_are_long_enough_to_be_read():
    words = TextPieces(WordTokenizer(), None, seed=1).take(60_000)
    assert len(set(words)) > 5_000


def test_ordinary_ids_leave_out_special_and_added_tokens():
    assert ordinary_ids(WordTokenizer(words=3)) == [3, 4, 5]
