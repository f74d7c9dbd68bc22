"""How long a measurement is."""

from attrs import frozen

from mlx_trainer.config import ConfigError

SECONDS = 30.0
FEWEST_STEPS = 3


@frozen
class Extent:
    """So many `steps` are measured after `warmup` others; None lets time and shapes decide.

    Without `warmup`, warming up ends when every shape of batches was seen once, or with the first epoch. Without
    `steps`, measuring ends after `seconds`, and not before `FEWEST_STEPS` steps. Raises ConfigError for less than 1.
    """

    steps: int | None = None
    warmup: int | None = None
    seconds: float = SECONDS

    def __attrs_post_init__(self) -> None:
        for name, value in (("--steps", self.steps), ("--warmup", self.warmup)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be a whole number, at least 1")

    def warm(self, steps: int, *, every_shape_seen: bool, epoch_over: bool) -> bool:
        """Whether the steps so far were enough to warm up."""
        return every_shape_seen or epoch_over if self.warmup is None else steps >= self.warmup

    def enough(self, steps: int, seconds: float) -> bool:
        """Whether so many measured steps, in so many seconds, are enough."""
        if self.steps is not None:
            return steps >= self.steps
        return steps >= FEWEST_STEPS and seconds >= self.seconds

    def __str__(self) -> str:
        warmup = "until every shape is compiled or an epoch is over" if self.warmup is None else f"{self.warmup} steps"
        measured = f"about {self.seconds:.0f} s" if self.steps is None else f"{self.steps} steps"
        return f"warm-up {warmup}, then {measured} measured"
