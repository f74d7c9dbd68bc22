"""Fine-tune Mistral-7B with LoRA on your own chats: `python recipes/mistral_lora.py chats.jsonl [model] [folder]`."""

import sys

from mlx_trainer import (
    DataPipeline,
    Evaluation,
    GradientClipping,
    LoRAConfig,
    MemoryMonitor,
    MistralLoRAModule,
    ModelCheckpoint,
    NaNGuard,
    ProgressBar,
    TensorBoardLogger,
    Trainer,
)


def main(chats: str, model: str = "mistralai/Mistral-7B-Instruct-v0.3", run: str = "runs/chats") -> None:
    """Train on nine tenths of `chats`; `model` is a name on the Hub or a folder, also that of a 4-bit copy."""
    module = MistralLoRAModule(model, lora=LoRAConfig(rank=16, alpha=32))
    data = DataPipeline(chats, tokenizer=module.tokenizer)
    callbacks = [GradientClipping(max_norm=1.0), NaNGuard(), MemoryMonitor(), ProgressBar(), Evaluation(every=50)]
    callbacks += [ModelCheckpoint(run, every=100, keep_last=3), TensorBoardLogger(f"{run}/tensorboard")]
    Trainer(max_epochs=3, accumulate=4, callbacks=callbacks, run_dir=run).fit(module, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
