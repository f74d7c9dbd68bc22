"""A training to be killed: `python -m tests.faults.victim FOLDER STEPS` begins it, or continues it where it was.

It saves at every second step in the background, and evaluates, logs, answers prompts and writes its ledger. Each
process says "began" with its step when the first is about to be taken, and at its end what a stop had cost.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_trainer import (
    Callback,
    Evaluation,
    GradientClipping,
    Ledger,
    ModelCheckpoint,
    NaNGuard,
    SampleGenerator,
    TensorBoardLogger,
    Trainer,
    TrainerModule,
)
from mlx_trainer.callbacks import MetricsLogger
from tests.toy import ToyLoader, ToyModule, toy_batches


class Speaking(ToyModule):
    """Answers with its first weight."""

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[str]:
        return [f"{prompt} {self.model.layers[0].weight[0, 0].item()}" for prompt in prompts]


class Told(Callback):
    """Says where the process began, and how much it did after it was asked to stop."""

    steps = saves = 0

    def on_step_start(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        if trainer.step_output is None:
            print("began", step - 1, flush=True)
        self.steps += trainer.stop_reason is not None

    def on_checkpoint(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        self.saves += trainer.stop_reason is not None

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        print(json.dumps({"steps": self.steps, "saves": self.saves}), flush=True)


def main(folder: Path, steps: int) -> None:
    """Train until `steps`, from wherever the run is."""
    callbacks = [
        Told(),
        NaNGuard(),
        GradientClipping(1.0),
        Evaluation(every=4),
        SampleGenerator(["Hello"], every=6),
        MetricsLogger(),
        TensorBoardLogger(),
        Ledger(),
        ModelCheckpoint(every=2, keep_last=2, monitor="val/loss"),
    ]
    trainer = Trainer(
        max_epochs=10**9,
        max_steps=steps,
        accumulate=2,
        callbacks=callbacks,
        log_every=2,
        run_dir=folder,
        resume="auto",
    )
    held_out = toy_batches((3, 2), seed=1)
    trainer.fit(Speaking(), ToyLoader(toy_batches((4, 3, 4, 2, 4, 4, 3))), held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
