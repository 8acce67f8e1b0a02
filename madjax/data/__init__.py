"""Data sets and splits."""

from madjax.data.digits import digits
from madjax.data.splits import CountedExamples, count_examples, split_by_class

__all__ = ["CountedExamples", "count_examples", "digits", "split_by_class"]
