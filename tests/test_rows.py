"""Examples that are read where they are needed; `test_hosts.py` has hosts that read no more than they sweep."""

import numpy as np
import pytest

from madjax.data.npz import read_npz
from madjax.detector import _Joined


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 6), slice(4, 9), slice(7, 7), slice(0, 9), slice(None)])
def test_joined_arrays_are_sliced_as_one(rows):
    first, second = np.arange(8).reshape(4, 2), np.arange(8, 18).reshape(5, 2)
    joined, whole = _Joined(first, second), np.concatenate([first, second])
    assert (joined.shape, joined.ndim) == (whole.shape, whole.ndim)
    np.testing.assert_array_equal(joined[rows], whole[rows])
    np.testing.assert_array_equal(np.asarray(joined), whole)


def test_numbers_in_an_npz_stay_in_the_file(tmp_path):
    made = {
        "a": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "image": np.arange(240, dtype=np.uint8).reshape(5, 4, 4, 3),
        "text": np.array(["x", "yz"]),
        "none": np.zeros((0, 3)),
    }
    np.savez(tmp_path / "x.npz", **made)
    loaded = read_npz("here", tmp_path / "x.npz", mapped=True)
    assert {name for name, array in loaded.items() if isinstance(array, np.memmap)} == {"a", "image"}
    np.savez_compressed(tmp_path / "y.npz", **made)
    for arrays in (loaded, read_npz("here", tmp_path / "y.npz", mapped=True)):
        assert arrays.keys() == made.keys()
        for name, array in made.items():
            np.testing.assert_array_equal(arrays[name], array)
    with pytest.raises(ValueError, match="read-only"):
        loaded["image"][0] = 1
