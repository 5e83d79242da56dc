"""The one type that every page speaks, float64 arrays, and how a parameter is seen as a matrix."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
"""A float64 array of any shape; a 0-dimensional one stands for a scalar that was computed from arrays."""

Function = TypeVar("Function", bound=Callable[..., Any])


def as_matrix(x: Array) -> Array:
    """Flatten a parameter to (rows, rest): row $i$ is the leading index $i$, `x[i].reshape(-1)`.

    Args:
        x: An array with at least two dimensions and at least one element.

    Returns:
        A view of shape (x.shape[0], x.size / x.shape[0]).

    Examples:
        >>> as_matrix(np.zeros((6, 3, 2, 2))).shape
        (6, 12)
    """
    return x.reshape(x.shape[0], -1)


def quiet(function: Function) -> Function:
    """Let infinities and NaN pass through `function` as IEEE 754 says, without NumPy's warnings.

    Examples:
        >>> quiet(lambda x: x - x)(np.array([np.inf, 1.0]))
        array([nan,  0.])
    """
    return np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")(function)
