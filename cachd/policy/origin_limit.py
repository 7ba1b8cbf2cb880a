"""Decides how many requests one origin gets at once, by what it refuses (429, 503) while it serves others.

unlimited --refusals--> as many as it serves --a time without refusals--> half as many more, and so on
"""

from __future__ import annotations

FIRST_HOLD_SECONDS, LONGEST_HOLD_SECONDS = 60.0, 600.0
_FEWEST_REFUSALS = 2
_REFUSED = 0.25  # fraction of the requests; large origins refuse fewer than this now and then


class OriginLimit:
    """What one origin has shown. `most`: requests that it gets at once; None for no limit.

    `running`: the requests and other tasks that run now. `serving`: the requests that it answers now.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.running = self.serving = 0
        self._answered = self._refused = 0  # since the limit was last changed
        self._hold, self._until = FIRST_HOLD_SECONDS, 0.0
        self._was_raised = False

    @property
    def raised_at(self) -> float:
        """When the limit is raised, if nothing is refused before."""
        return self._until

    def allows(self, now: float) -> bool:
        """Whether one more task may run."""
        if self.most is None:
            return True
        if now >= self._until:
            self.most += max(1, self.most // 2)
            self._answered = self._refused = 0
            self._until, self._was_raised = now + self._hold, True
        return self.running < self.most

    def answered(self) -> None:
        """Note that a request is answered. It counts as serving until `ended`."""
        self.serving += 1
        self._answered += 1

    def ended(self) -> None:
        """Note that an answer ended."""
        self.serving -= 1

    def refused(self, now: float) -> bool:
        """Note a refusal. Returns whether the origin serves other requests, so that this one may wait."""
        self._refused += 1
        if not self.serving:
            return False
        of_all = self._answered + self._refused
        if self._refused >= _FEWEST_REFUSALS and self._refused >= _REFUSED * of_all:
            self.most = self.serving if self.most is None else max(1, min(self.most, self.serving))
            if self._was_raised:  # the raise was too much: wait longer for the next one
                self._hold = min(2 * self._hold, LONGEST_HOLD_SECONDS)
            self._answered = self._refused = 0
            self._was_raised = False
        self._until = now + self._hold
        return True
