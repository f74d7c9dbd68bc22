"""A callback made of functions."""

import difflib
from collections.abc import Callable
from typing import Any

from mlx_trainer.callback import HOST_EVENTS, TRACED_EVENTS, Callback
from mlx_trainer.callbacks.timing import check_every

EVENTS = (*HOST_EVENTS, *TRACED_EVENTS)


class LambdaCallback(Callback):
    """Functions by the name of their event, called with its arguments: `on_fit_end=lambda trainer, module: …`.

    `every=N` calls the events of a step at each Nth step only. Two in one run need different names.
    Raises TypeError, with the nearest event, for a name that is none.

    Costs what the functions cost; at events without a function, nothing.
    """

    def __init__(self, name: str = "LambdaCallback", every: int | None = None, **events: Callable[..., Any]) -> None:
        self.name, self.every = name, check_every(every, name)
        for event, function in events.items():
            if event not in EVENTS:
                nearest = difflib.get_close_matches(event, EVENTS, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"events are {', '.join(EVENTS)}"
                raise TypeError(f"{event} is not an event; {hint}")
            setattr(self, event, function)
