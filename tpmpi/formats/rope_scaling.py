"""RoPE that is stretched for longer texts, as facts of ModelConfig: a divisor for each pair's frequency, and what else there is.

Each function returns keyword arguments of ModelConfig.  Pair i of `dim` numbers has the plain frequency theta^(-2i/dim).
As Hugging Face transformers and llama.cpp compute it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def frequencies(theta: float, dim: int) -> np.ndarray:
    """Of each pair, in radians a position.  [dim/2] float64"""
    return theta ** -(np.arange(0, dim, 2) / dim)


def linear(dim: int, max_positions: int, factor: float) -> dict:
    """Every position counts 1/factor of one.   (Chen et al. 2023)"""
    return {'rope_divisors': (factor,) * (dim // 2), 'max_positions': int(max_positions * factor)}


def dynamic(max_positions: int, factor: float) -> dict:
    """theta grows with a text beyond max_positions: NTK scaling, unstretched up to there."""
    return {'rope_dynamic_factor': factor, 'rope_original_positions': max_positions, 'max_positions': int(max_positions * factor)}


def llama3(theta: float, dim: int, factor: float, low_freq_factor: float, high_freq_factor: float, original: int) -> dict:
    """Pairs that turn less than low_freq_factor times in the original length are slower by the factor; those that turn more
    than high_freq_factor times stay; between them it changes smoothly."""
    turns = original * frequencies(theta, dim) / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return {'rope_divisors': divisors(kept, factor)}


def yarn(theta: float, dim: int, max_positions: int, factor: float, original: int, beta_fast: float = 32.0,
         beta_slow: float = 1.0, truncate: bool = True, magnitude: float | None = None) -> dict:
    """As linear for pairs that turn at most beta_slow times in the original length, not at all for those that turn beta_fast
    times; the turned numbers are larger by 0.1 ln(factor) + 1, or by `magnitude`.   (Peng et al. 2023)"""
    low, high = (dim * (math.log(original / (2 * math.pi)) - math.log(turns)) / (2 * math.log(theta))  # a quotient can overflow
                 for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return {'rope_divisors': divisors(kept, factor), 'rope_magnitude': yarn_magnitude(factor) if magnitude is None else magnitude,
            'max_positions': max(max_positions, int(original * factor))}


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much larger the turned numbers are."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope(max_positions: int, original: int, short: Sequence[float], long: Sequence[float], factor: float | None = None,
             magnitude: float | None = None) -> dict:
    """A divisor for each pair, others for texts longer than the original length.   (Ding et al. 2024)"""
    factor = max_positions / original if factor is None else factor
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {'rope_divisors': tuple(map(float, short)), 'rope_long_divisors': tuple(map(float, long)),
            'rope_original_positions': original, 'rope_magnitude': magnitude}


def divisors(kept: np.ndarray, factor: float) -> tuple[float, ...]:
    """Of frequencies of which the part `kept` stays as it is and the rest is divided by the factor."""
    return tuple((1 / (kept + (1 - kept) / factor)).tolist())
