"""`identity`: removes nothing. For measuring what the loop itself costs, and for tests."""

from __future__ import annotations

from patchslim.errors import BadSchedule
from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import Tokens


class Identity(Method):
    """Keeps every token."""

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Is never called: a schedule that removes anything is refused before."""
        raise BadSchedule(
            f"identity removes nothing, but the schedule keeps {keep} of {tokens.patches}."
        )

    def fewest(self, patches: int) -> int:
        """Returns all patches."""
        return patches
