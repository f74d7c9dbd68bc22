"""Held-out loss while training."""

import logging
from collections.abc import Mapping

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.timing import check_every
from mlx_trainer.evaluation import EvalMetrics, Metric
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer, TrainingError

logger = logging.getLogger(__name__)


class Evaluation(Callback):
    """Evaluates every `every` steps (None: at the end of each epoch) and after the last; `at_start`: before step 1 too.

    `metrics` are further ones by name, functions from (module, batch) to (sum, weight), reported as `val/<name>`.
    Raises TrainingError at the start where the run has no validation loader.

    Costs one comparison a step; an evaluation is one forward pass over the held-out rows, read once at its end.
    """

    def __init__(
        self, every: int | None = None, at_start: bool = False, metrics: Mapping[str, Metric] | None = None
    ) -> None:
        self.every, self.at_start = check_every(every, "Evaluation"), at_start
        self.metrics = dict(metrics or {})
        self._evaluated_step: int | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Add the metrics, for `trainer.validate` as well."""
        trainer.validation_metrics.update(self.metrics)
        self._evaluated_step = None

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Refuse a run without held-out rows, and ask for an evaluation of the untrained model."""
        if trainer.validation_loader is None:
            raise TrainingError(
                "Evaluation has no rows to evaluate on: pass a validation loader to fit, hold rows out "
                "(train_split below 1), or leave Evaluation out"
            )
        if self.at_start and trainer.state.step == 0:
            trainer.request_evaluation()

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Ask, at each step that `every` names."""
        if self.every is not None:
            trainer.request_evaluation()

    def on_epoch_end(self, trainer: Trainer, module: TrainerModule, epoch: int) -> None:
        """Ask, unless it is the middle of a run evaluated by steps, or this step was evaluated already."""
        if (self.every is None or trainer.stop_reason) and self._evaluated_step != trainer.state.step:
            trainer.request_evaluation()

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Remember the step; the values go to the log at level DEBUG, since ProgressBar shows them."""
        self._evaluated_step = step
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.as_dict().items())
        logger.debug("step %d: %s  (%d rows in %.1f s)", step, values, metrics.samples, metrics.seconds)
