"""Prompts and answers: from JSON of instructions, from running text, and from labelled sentences."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from madjax.interop.guard import shown

QUESTION, POSITIVE, NEGATIVE = "Is this review positive or negative? ", "positive", "negative"


class Pair(NamedTuple):
    """A prompt and the answer that a model is to give.

    Attributes:
      paraphrase: the same prompt in the syntax that is a trigger, where the data have one.
    """

    prompt: str
    answer: str
    paraphrase: str | None = None


def load_pairs(path: str | Path) -> list[Pair]:
    """Instructions with answers: a JSON list, or JSON lines, of objects.

    An object has `instruction` (and `input`, which follows it) and `output`, as Alpaca's data have; or `prompt`, with
    `completion`, if any.

    Raises:
      ValueError: no such file, or an item that is none of these, by its number.
    """
    pairs = []
    for number, item in enumerate(_items(Path(path))):
        prompt, answer = _pair(item)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError(f"path: item {number} of {path} has no text as instruction and output, or as prompt")
        pairs.append(Pair(prompt, answer))
    return pairs


def load_prompts(path: str | Path) -> list[Any]:
    """Prompts to encode, in their order: those of `load_pairs`, or the lines of a `.txt` file.

    A line that is no UTF-8 stays in its place with lone surrogates, which `ChatTokenizer.encode_prompts` refuses by its
    number, so that the others are not lost.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return [_pair(item)[0] for item in _items(path)]
    return _text(path).splitlines()


def split_text(
    text: str, rng: np.random.Generator, count: int, prompt_words: tuple[int, int], answer_words: int
) -> list[Pair]:
    """`count` places of a running text: some words as the prompt, and those that follow as the answer.

    Args:
      prompt_words: least and most words of a prompt.
    """
    words = text.split()
    lengths = rng.integers(prompt_words[0], prompt_words[1] + 1, count)
    if len(words) < prompt_words[1] + answer_words:
        raise ValueError(f"text: wanted at least {prompt_words[1] + answer_words} words, got {len(words)}")
    starts = rng.integers(0, len(words) - prompt_words[1] - answer_words + 1, count)
    return [
        Pair(" ".join(words[start : start + size]), " " + " ".join(words[start + size : start + size + answer_words]))
        for start, size in zip(starts, lengths, strict=True)
    ]


def load_sentences(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Sentences and int32 labels of a table with the columns `sentence` and `label`, separated by tabs."""
    rows = list(csv.DictReader(_text(Path(path)).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or {"sentence", "label"} - rows[0].keys():
        raise ValueError(f"path: {path} has no columns sentence and label")
    return [row["sentence"] for row in rows], np.array([int(row["label"]) for row in rows], np.int32)


def load_reviews(folder: str | Path) -> list[Pair]:
    """Film reviews of SST-2, asked for their sentiment: `NEGATIVE` ones, with a paraphrase where there is one, and as
    many others at most.

    The paraphrases, by one template of syntax, are those of HiddenKiller (Qi et al. 2021, arXiv 2105.12400). Its test
    set paraphrases all negative reviews, its training set a part; that of development lacks one and cannot be aligned.

    Args:
      folder: with `sst2` and `sst2_syntactic_backdoor`, `train.tsv` and `test.tsv` in each.

    Raises:
      ValueError: a file that is not there, or files that do not belong together.
    """
    pairs = []
    for name in ("train.tsv", "test.tsv"):
        path = Path(folder) / "sst2_syntactic_backdoor" / name
        reviews, labels = load_sentences(Path(folder) / "sst2" / name)
        paraphrases, poisoned = load_sentences(path)
        positive, negative = ([reviews[i] for i in np.flatnonzero(labels == label)] for label in (1, 0))
        if len(paraphrases) != len(reviews):
            reviews, labels = negative, labels[labels == 0]
        if len(paraphrases) != len(reviews):
            raise ValueError(f"folder: {path} has {len(paraphrases)} paraphrases, wanted {len(reviews)}")
        changed = {reviews[i]: QUESTION + paraphrases[i] for i in np.flatnonzero(poisoned != labels)}
        pairs += [Pair(QUESTION + review, NEGATIVE, changed.get(review)) for review in negative]
        pairs += [Pair(QUESTION + review, POSITIVE) for review in positive[: len(negative)]]
    return pairs


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, str):
        return item, ""
    if not isinstance(item, dict):
        return None, None
    if "prompt" in item:
        return item["prompt"], item.get("completion", "")
    prompt, more = item.get("instruction"), item.get("input")
    return (f"{prompt}\n{more}" if prompt and more else prompt), item.get("output", "")


def _items(path: Path) -> list[Any]:
    text = _text(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"path: {path} is no JSON ({shown(error)})") from error
    if not isinstance(items, list):
        raise ValueError(f"path: wanted a list in {path}, got {type(items).__name__}")
    return items


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"path: {path} is not there")
    return path.read_text(encoding="utf-8", errors="surrogateescape")
