"""Arithmetic that is the same to the bit on every machine.

It stands for functions of numpy and of the C library, whose last bits differ between processors and versions: sums of
products in one order, and functions out of additions, multiplications and square roots alone, which IEEE 754 rounds in
one way.
"""

import math

import numpy as np


def dot(a, b):
    """Sum of products over the first axis, of length 2 or 3."""
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


def apply(matrix, points):
    """Matrices (..., m, n) times points (..., n), as (..., m); n is 2 or 3."""
    total = matrix[..., 0] * points[..., None, 0]
    for i in range(1, points.shape[-1]):
        total += matrix[..., i] * points[..., None, i]
    return total


def norm(vector):
    return np.sqrt(dot(vector, vector))


def cos_sin(angle):
    """Cosine and sine of angles within a few turns, in radians, float64."""
    # The series need few terms within an eighth of a turn: the rest is quarters, which only swap and mirror them.
    quarters = np.rint(angle * (2 / math.pi))
    rest = angle - quarters * (math.pi / 2)
    square = rest * rest
    cos, sin = np.zeros_like(rest), np.zeros_like(rest)
    for n in range(18, 0, -2):
        cos = (cos + 1) * square / -(n * (n - 1))
        sin = (sin + 1) * square / -(n * (n + 1))
    cos, sin = cos + 1, (sin + 1) * rest
    quarters = quarters.astype(np.int64) & 3
    return np.choose(quarters, [cos, -sin, -cos, sin]), np.choose(quarters, [sin, cos, -sin, -cos])


def exp_minus(a):
    """exp(-a) of numbers from 0 up, float32."""
    # 2**-(whole + share) is put together from the exponent's bits, and a series of share.
    a = np.minimum(a * np.float32(1 / math.log(2)), 100)
    whole = np.floor(a)
    share = (a - whole) * np.float32(-math.log(2))
    total = np.ones_like(share)
    for n in range(8, 0, -1):
        total = total * share * np.float32(1 / n) + 1
    return total * ((127 - whole.astype(np.int32)) << 23).view(np.float32)
