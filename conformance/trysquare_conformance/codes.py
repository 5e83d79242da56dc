"""What is right where two codes are: a code stands for an interval, of which the point nearest to the reference counts.

At a boundary between two codes rounding decides which of them is taken. A code is therefore judged by how far the
scaled value of the reference lies outside of the interval of that code: nothing if it lies inside, and otherwise the
distance that rounding would have to bridge, which the budget of the scaled value allows or not.
"""

import numpy as np

from trysquare_conformance.budget import STORED
from trysquare_conformance.case import Array
from trysquare_reference import blockwise8bit


def nearest_point(codes: Array, s: Array, qmap: Array) -> Array:
    """The point of each code's interval that lies nearest to s.

    The interval of an unsigned code 1 begins above 0. Where s is 0 and code 1 was taken, a number counts that is larger
    than what storing a 0 may add and smaller than any rounding error that makes a 0 positive.

    Examples:
        >>> q = blockwise8bit.dynamic_map(signed=True)
        >>> nearest_point(np.array([127.0, 255.0, 254.0]), np.array([0.0, 1.0, 1.0]), q).round(3)
        array([0.   , 1.   , 0.996])
    """
    index = np.asarray(codes).astype(np.uint8)
    low, high = blockwise8bit.interval(index, qmap)
    point = np.minimum(np.maximum(s, low), high)
    zero_as_one = np.logical_and(s == 0, index == 1) if qmap[0] == 0 else np.zeros(s.shape, dtype=bool)
    return np.asarray(np.where(zero_as_one, 4 * STORED["float32"].smallest, point))
