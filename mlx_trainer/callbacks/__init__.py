"""The callbacks that ship with the trainer, one file each. `docs/callbacks.md` tells how to write another."""

from mlx_trainer.callbacks.early_stopping import EarlyStopping
from mlx_trainer.callbacks.ema import EMA
from mlx_trainer.callbacks.evaluation import Evaluation
from mlx_trainer.callbacks.gradient_clipping import GradientClipping
from mlx_trainer.callbacks.lambda_callback import LambdaCallback
from mlx_trainer.callbacks.ledger import Ledger
from mlx_trainer.callbacks.loss_spike import LossSpike
from mlx_trainer.callbacks.memory_monitor import MemoryMonitor
from mlx_trainer.callbacks.metrics_logger import MetricsLogger
from mlx_trainer.callbacks.model_checkpoint import ModelCheckpoint
from mlx_trainer.callbacks.nan_guard import NaNGuard
from mlx_trainer.callbacks.progress_bar import ProgressBar
from mlx_trainer.callbacks.sample_generator import SampleGenerator
from mlx_trainer.callbacks.tensorboard_logger import TensorBoardLogger

__all__ = [
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
]
