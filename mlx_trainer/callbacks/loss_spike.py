"""Steps whose loss jumps far above the recent ones."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx

from mlx_trainer.callback import Callback, Gradients
from mlx_trainer.callbacks.nan_guard import described
from mlx_trainer.module import TrainerModule
from mlx_trainer.step import StepContext
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)

Policy = Literal["warn", "skip", "rollback"]


class LossSpike(Callback):
    """Tells of a loss above mean + `threshold`·σ of the last `window` accepted ones, as Levanter's SkipStep does.

    It begins once half of the window is filled. Under "warn" such a step is taken, "skip" leaves parameters and
    optimizer state as they are, and "rollback" also goes back to the newest checkpoint (`Trainer.request_rollback`),
    where the recent losses are those of then. A skipped loss is not among the recent ones. The warning comes at the
    next log point and names the rows; `train/loss_spike` is the share of such steps. A loss that is not finite is none:
    that is for NaNGuard. Raises ValueError for arguments that make no sense.

    Costs nothing on the host between log points; on the device, `window` losses are looked at in each step.
    """

    def __init__(self, policy: Policy = "warn", threshold: float = 6.0, window: int = 128) -> None:
        if policy not in ("warn", "skip", "rollback"):
            raise ValueError(f'LossSpike: policy is {policy!r}; it must be "warn", "skip" or "rollback"')
        if not threshold > 0 or window < 4:
            raise ValueError(
                f"LossSpike: threshold is {threshold} and window {window}; they must be above 0, and 4 steps or more"
            )
        self.policy, self.threshold, self.window = policy, threshold, window

    def fingerprint(self) -> dict[str, Any]:
        """What decides on which updates are made; telling of them decides on nothing."""
        return {} if self.policy == "warn" else {"loss_spike": [self.policy, self.threshold, self.window]}

    def initial_arrays(self, module: TrainerModule) -> dict[str, Any]:
        """The last losses, oldest overwritten first, and how many there were."""
        return {"losses": mx.zeros(self.window), "count": mx.array(0, mx.uint32)}

    def update_arrays(self, arrays: dict[str, Any], parameters: Any, context: StepContext) -> dict[str, Any]:
        """Add this loss, where it is finite."""
        finite = mx.isfinite(context.loss)
        here = finite & (mx.arange(self.window) == arrays["count"] % self.window)
        return {
            "losses": mx.where(here, context.loss, arrays["losses"]),
            "count": arrays["count"] + finite.astype(mx.uint32),
        }

    def transform_gradients(
        self, gradients: Gradients, context: StepContext
    ) -> tuple[Gradients, Mapping[str, mx.array]]:
        """Report 1 where it is a spike; the gradients stay."""
        return gradients, {"loss_spike": self._is_spike(context.loss).astype(mx.float32)}

    def accept_update(self, loss: mx.array, gradients: Gradients, context: StepContext) -> mx.array:
        """Refuse a spike, unless the policy only warns."""
        return mx.array(True) if self.policy == "warn" else ~self._is_spike(loss)

    def _is_spike(self, loss: mx.array) -> mx.array:
        losses, count = self.arrays["losses"], mx.minimum(self.arrays["count"], self.window)
        filled, divisor = mx.arange(self.window) < count, mx.maximum(count, 1)
        mean = mx.where(filled, losses, 0).sum() / divisor
        deviation = mx.sqrt(mx.where(filled, mx.square(losses - mean), 0).sum() / divisor)
        # Equal losses have no deviation; what float32 rounds in their mean is no spike.
        limit = mean + self.threshold * deviation + 1e-5 * mx.abs(mean)
        return (count >= self.window // 2) & (loss > limit) & mx.isfinite(loss)

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Tell of the spikes since the last log, and ask for what the policy says."""
        spikes = [record for record in trainer.recent_steps if record.values["loss_spike"]]
        if not spikes:
            return
        losses = ", ".join(f"{record.loss:.4g}" for record in spikes)
        text = f"the loss jumped to {losses} in {described(spikes)}"
        logger.warning("%s; %s", text, "the update was made" if self.policy == "warn" else "no update was made")
        if self.policy == "rollback" and spikes[-1].step > trainer.rollbacks.last_step:
            trainer.request_rollback(text)
