"""Stands in for a transformers tokenizer: words are tokens."""

from __future__ import annotations


class WordTokenizer:
    """Id 0 begins a text, 1 is a special word, 2 an added control token; unknown words get the next id."""

    all_special_ids = (0, 1)

    def __init__(self, words: int = 500):
        self.ids = {"<begin>": 0, "<special>": 1, "<tool>": 2} | {f"word{i}": i + 3 for i in range(words)}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [self.ids.setdefault(word, len(self.ids)) for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def get_vocab(self):
        return self.ids

    def get_added_vocab(self):
        return {"<tool>": 2}

    def decode(self, ids):
        words = {i: word for word, i in self.ids.items()}
        return " ".join(words[i] for i in ids)
