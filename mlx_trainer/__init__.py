"""Fine-tune language models with Apple's MLX: a Trainer with a fixed loop, and callbacks for everything else."""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_trainer import runtime

__version__ = "0.1.0"

# On a Linux CPU, MLX gets an optimized BLAS.
runtime.prepare()

if TYPE_CHECKING:
    from mlx_trainer.callback import Callback as Callback
    from mlx_trainer.callbacks import EMA as EMA
    from mlx_trainer.callbacks import EarlyStopping as EarlyStopping
    from mlx_trainer.callbacks import Evaluation as Evaluation
    from mlx_trainer.callbacks import GradientClipping as GradientClipping
    from mlx_trainer.callbacks import LambdaCallback as LambdaCallback
    from mlx_trainer.callbacks import Ledger as Ledger
    from mlx_trainer.callbacks import LossSpike as LossSpike
    from mlx_trainer.callbacks import MemoryMonitor as MemoryMonitor
    from mlx_trainer.callbacks import MetricsLogger as MetricsLogger
    from mlx_trainer.callbacks import ModelCheckpoint as ModelCheckpoint
    from mlx_trainer.callbacks import NaNGuard as NaNGuard
    from mlx_trainer.callbacks import ProgressBar as ProgressBar
    from mlx_trainer.callbacks import SampleGenerator as SampleGenerator
    from mlx_trainer.callbacks import TensorBoardLogger as TensorBoardLogger
    from mlx_trainer.config import AdaLoRAConfig as AdaLoRAConfig
    from mlx_trainer.config import LoRAConfig as LoRAConfig
    from mlx_trainer.data import Batch as Batch
    from mlx_trainer.data import DataPipeline as DataPipeline
    from mlx_trainer.evaluation import EvalMetrics as EvalMetrics
    from mlx_trainer.evaluation import GeneratedSample as GeneratedSample
    from mlx_trainer.models import AdaLoRAModule as AdaLoRAModule
    from mlx_trainer.models import CausalLMModule as CausalLMModule
    from mlx_trainer.models import MistralLoRAModule as MistralLoRAModule
    from mlx_trainer.module import LossOutput as LossOutput
    from mlx_trainer.module import TrainerModule as TrainerModule
    from mlx_trainer.preference import DPOModule as DPOModule
    from mlx_trainer.preference import ORPOModule as ORPOModule
    from mlx_trainer.trainer import Trainer as Trainer
    from mlx_trainer.trainer import TrainingResult as TrainingResult

_ROOMS = {
    "callback": ("Callback",),
    "callbacks": (
        "EMA",
        "EarlyStopping",
        "Evaluation",
        "GradientClipping",
        "LambdaCallback",
        "Ledger",
        "LossSpike",
        "MemoryMonitor",
        "MetricsLogger",
        "ModelCheckpoint",
        "NaNGuard",
        "ProgressBar",
        "SampleGenerator",
        "TensorBoardLogger",
    ),
    "config": ("AdaLoRAConfig", "LoRAConfig"),
    "data": ("Batch", "DataPipeline"),
    "evaluation": ("EvalMetrics", "GeneratedSample"),
    "models": ("AdaLoRAModule", "CausalLMModule", "MistralLoRAModule"),
    "module": ("LossOutput", "TrainerModule"),
    "preference": ("DPOModule", "ORPOModule"),
    "trainer": ("Trainer", "TrainingResult"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import mlx_trainer` itself is quick."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'mlx_trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlx_trainer.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOM_OF]
