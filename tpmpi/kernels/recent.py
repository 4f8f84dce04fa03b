"""What kernels make of a step's host data once, for all layers."""

from __future__ import annotations

from collections.abc import Callable

MOST = 64  # results that are kept: a step has a few for each group of layers


class Recent:
    """Results of functions, found again by the identity of their first argument."""

    def __init__(self, most: int = MOST):
        self._results, self._most = {}, most

    def of(self, owner, make: Callable, *arguments):
        """make(owner, *arguments), or what it gave before."""
        key = id(owner), *arguments
        if key not in self._results:
            if len(self._results) >= self._most:
                self._results.clear()
            self._results[key] = owner, make(owner, *arguments)  # which keeps the owner alive, and so the id its own
        return self._results[key][1]
