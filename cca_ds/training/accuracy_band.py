"""The end of a run whose accuracy, real images against generated ones, has left a band."""

from __future__ import annotations

from typing import Any

AVERAGE = "rewards/accuracies_average"
AVERAGED_STEPS = 50  # each step's weight in the average is one of so many
_CHANCE = 0.5  # where the average begins: a policy that equals its reference prefers neither


class AccuracyBand:
    """A moving average of `rewards/accuracies`, and whether it has been within the band and has left it.

    A run begins outside most bands and, while the learning rate warms up, stays there; so only one that has been within
    its band can leave it.

    Args:
        bounds: lowest and highest average with which the run goes on; None: any, and nothing is averaged.
    """

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self.bounds, self.average, self._entered = bounds, _CHANCE, False

    @property
    def left(self) -> bool:
        """Whether the run is to end."""
        return self._entered and not self._within()

    def update(self, values: dict[str, float]) -> dict[str, float]:
        """Count a step; returns the average's tag.

        Args:
            values: the step's tags. One without pairs to compare, or whose policy is still the reference, is left out.
        """
        if self.bounds is None:
            return {}
        if values.get("rewards/margins"):
            self.average += (values["rewards/accuracies"] - self.average) / AVERAGED_STEPS
            self._entered |= self._within()
        return {AVERAGE: self.average}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty without a band."""
        if self.bounds is None:
            return {}
        return {"average": self.average, "entered": self._entered, "bounds": list(self.bounds)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; without it the average begins anew, and a band that was changed is to be
        entered anew. Raises ValueError for an average that is no share.
        """
        self.average = float(state.get("average", _CHANCE))
        if not 0.0 <= self.average <= 1.0:
            raise ValueError(f"an average accuracy of {self.average}")
        same = self.bounds is not None and state.get("bounds") == list(self.bounds)
        self._entered = same and bool(state.get("entered", False))

    def _within(self) -> bool:
        return self.bounds is not None and self.bounds[0] <= self.average <= self.bounds[1]
