"""How often somebody may do something: a burst of times at once, and so many a second in the long run."""

from __future__ import annotations

import math
import time


class Rate:
    """The account of one who is bounded; it begins with the whole burst."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._each_s = 1 / per_s
        self._burst_s = burst / per_s
        self._paid_until = -math.inf  #: monotonic seconds; what was taken is paid for by then

    def take(self, times: float = 1) -> float:
        """Count `times`, and return by how many seconds that was too early; 0 is in order.

        What was too early counts too: whoever does not wait comes ever earlier.
        """
        now = time.monotonic()
        self._paid_until = max(self._paid_until, now - self._burst_s) + times * self._each_s
        return max(0.0, self._paid_until - now)
