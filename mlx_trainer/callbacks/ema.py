"""An average of what trains, which is what is evaluated and what the run ends with."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_trainer.callback import Callback
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.step import StepContext
from mlx_trainer.trainer import Trainer


class EMA(Callback):
    """Keeps an exponential moving average of the trained parameters, in float32, and gives it out in their place.

        average = keep * average + (1 - keep) * parameters                                 after each update
        keep    = 0 at first, then `decay`, with `warmup` min(decay, (1 + n) / (10 + n)) after n updates

    as documented for `tf.train.ExponentialMovingAverage`. Evaluations and what is generated at them see the average,
    training goes on with the parameters as they are. The finished run's result (`adapter/`) holds the average, and so
    does the module then. Checkpoints hold both, the parameters as trained in the module's own files and the average in
    `callbacks.safetensors`, whichever of them is best. Refused updates leave it alone. List it after SampleGenerator,
    whose answers are then the average's. Raises ValueError for a decay that is not between 0 and 1.

    Costs 4 bytes for each trained parameter, while evaluating also a copy in their own type; on the device, parameters
    and average are read and the average written once in each step; nothing on the host.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA: decay is {decay}; it must be above 0 and below 1, and 0.99 to 0.9999 are usual")
        self.decay, self.warmup = decay, warmup
        self._trained: Any = None
        self._ended = False

    def fingerprint(self) -> dict[str, Any]:
        """What decides on the result."""
        return {"ema": [self.decay, self.warmup]}

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Begin; only `fit` has an average."""
        self._fitting, self._ended, self._trained = stage == "fit", False, None

    def initial_arrays(self, module: TrainerModule) -> dict[str, Any]:
        """The parameters, as an average of none."""
        average = tree_map(lambda p: p.astype(mx.float32), module.model.trainable_parameters())
        return {"average": average, "updates": mx.array(0, mx.uint32)}

    def update_arrays(self, arrays: dict[str, Any], parameters: Any, context: StepContext) -> dict[str, Any]:
        """Take the updated parameters into the average."""
        n = arrays["updates"].astype(mx.float32)
        keep = mx.minimum(self.decay, (1 + n) / (10 + n)) if self.warmup else mx.array(self.decay)
        keep = mx.where(n == 0, 0.0, keep)
        average = tree_map(lambda a, p: keep * a + (1 - keep) * p.astype(mx.float32), arrays["average"], parameters)
        return {"average": average, "updates": arrays["updates"] + 1}

    def result_parameters(self, module: TrainerModule) -> Any:
        """The average, in the types of the parameters."""
        return tree_map(lambda a, p: a.astype(p.dtype), self.arrays["average"], module.model.trainable_parameters())

    def on_evaluation_start(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Put the average into the model."""
        if self._fitting:
            self._trained = module.model.trainable_parameters()
            module.model.update(self.result_parameters(module))

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Put the trained parameters back."""
        self._put_back(module)

    def on_exception(self, trainer: Trainer, module: TrainerModule, error: BaseException) -> None:
        """Put them back where the evaluation failed, before they are saved."""
        self._put_back(module)

    def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
        """Know that the run ended well."""
        self._ended = True

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Leave the average in the model of a run that ended well."""
        if self._ended:
            module.model.update(self.result_parameters(module))

    def _put_back(self, module: TrainerModule) -> None:
        if self._trained is not None:
            module.model.update(self._trained)
            self._trained = None
