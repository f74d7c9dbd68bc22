"""Teach Mistral-7B which of two answers is better: `python recipes/preference.py prefs.jsonl [model] [folder]`."""

import sys

from mlx_trainer import (
    DataPipeline,
    DPOModule,
    Evaluation,
    GradientClipping,
    LoRAConfig,
    ModelCheckpoint,
    NaNGuard,
    ProgressBar,
    TensorBoardLogger,
    Trainer,
)


def main(preferences: str, model: str = "mistralai/Mistral-7B-Instruct-v0.3", run: str = "runs/preference") -> None:
    """Train with DPO on nine tenths of the pairs; ORPOModule(model, orpo_lambda=0.1, …) takes its place for ORPO."""
    module = DPOModule(model, beta=0.1, lora=LoRAConfig(rank=16, alpha=32), learning_rate=2e-5)
    data = DataPipeline(preferences, tokenizer=module.tokenizer, pairs=True)
    callbacks = [GradientClipping(max_norm=1.0), NaNGuard(), ProgressBar(), Evaluation(every=50)]
    callbacks += [ModelCheckpoint(run, every=100, keep_last=3), TensorBoardLogger(f"{run}/tensorboard")]
    Trainer(max_epochs=1, accumulate=8, callbacks=callbacks, run_dir=run).fit(module, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
