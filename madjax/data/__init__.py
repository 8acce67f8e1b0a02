"""Data sets, normalizations and splits."""

from madjax.data.digits import digits
from madjax.data.images import ImageSet, load_images
from madjax.data.normalization import NORMALIZATIONS, Normalize, parse_normalization
from madjax.data.splits import balanced_subset, split_by_class

__all__ = [
    "NORMALIZATIONS",
    "ImageSet",
    "Normalize",
    "balanced_subset",
    "digits",
    "load_images",
    "parse_normalization",
    "split_by_class",
]
