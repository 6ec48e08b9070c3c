"""score.noise inside a kernel: the same hash, bit for bit, and zeta to about 3e-5.

Logits are in units of log2 here, so zeta is too: exp2 and log2 are one instruction each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from keyformer.score import GUMBEL_STD

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SCALED_STD = tl.constexpr(GUMBEL_STD * 1.4426950408889634)


@triton.jit
def mix(bits):
    """score._mix on uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def spread(counter):
    """What a counter adds to the hash: far apart for consecutive ones; uint32."""
    return counter.to(tl.uint32) * 0x9E3779B9


@triton.jit
def head_row(row, sequence, head):
    """The hash of (seed, layer), ``row``, taken on to a sequence and a query head."""
    row = mix(row.to(tl.uint32) ^ spread(sequence))
    return mix(row ^ spread(head))


@triton.jit
def query_row(row, position, ONCE: tl.constexpr):
    """The hash of a head taken on to queries; drawn once, zeta is that of position 0."""
    if ONCE:
        position = position * 0
    return mix(row ^ spread(position))


@triton.jit
def _log2(x):
    """With an absolute error of 2e-7, in one instruction."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def divide(x, y):
    """With an error of 2 units in the last place, in two instructions."""
    if INTERPRETED:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@triton.jit
def uniform(row, column):
    """A number in (0, 1) for hashes of queries and keys that broadcast."""
    bits = row + column
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    # The first 23 bits of mix() as the fraction of a number in [1, 2), moved to (0, 1).
    fraction = (bits >> 9) ^ (bits >> 25)
    return (fraction | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522


@triton.jit
def exponential(row, column):
    """-log2 of :func:`uniform`: exp2 of the logits divided by it is the noisy softmax."""
    number = uniform(row, column)
    rest = 1 - number
    # Near 1, where the error of a logarithm is as large as its value, its series.
    series = rest * (LOG2_E + rest * HALF_LOG2_E)
    return tl.where(rest < 0.0078125, series, -_log2(number))


@triton.jit
def zeta(row, column, NOISE: tl.constexpr):
    """zeta of Eq. 4 times log2(e), but for a constant, which no softmax sees."""
    if NOISE == "gumbel":
        return -_log2(exponential(row, column))
    else:
        return normal_quantile(uniform(row, column)) * SCALED_STD


@triton.jit
def normal_quantile(p):
    """The standard normal's quantile by sqrt(2) * erfinv(2 p - 1), single precision.

    erfinv after M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011).
    """
    x = 2 * p - 1
    w = -tl.log(4 * p * (1 - p))
    near = w - 2.5
    a = 2.81022636e-08
    a = 3.43273939e-07 + a * near
    a = -3.5233877e-06 + a * near
    a = -4.39150654e-06 + a * near
    a = 0.00021858087 + a * near
    a = -0.00125372503 + a * near
    a = -0.00417768164 + a * near
    a = 0.246640727 + a * near
    a = 1.50140941 + a * near
    far = tl.sqrt(w) - 3
    b = -0.000200214257
    b = 0.000100950558 + b * far
    b = 0.00134934322 + b * far
    b = -0.00367342844 + b * far
    b = 0.00573950773 + b * far
    b = -0.0076224613 + b * far
    b = 0.00943887047 + b * far
    b = 1.00167406 + b * far
    b = 2.83297682 + b * far
    return 1.4142135623730951 * x * tl.where(w < 5, a, b)
