"""What options say about each other."""

import pytest

from mlx_trainer.config import ConfigError, load_config, unwise

DATA: dict[str, object] = {"data.dataset_path": "chats.jsonl"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"training.method": "full"},
            "training.method full would lose its small updates in model.dtype float16; "
            "set model.dtype to float32 or bfloat16",
        ),
        (
            {"training.method": "full", "model.dtype": "float32", "training.loraplus_lr_ratio": 16.0},
            "training.loraplus_lr_ratio is for adapters; leave it out, or set training.method to lora",
        ),
        (
            {"training.method": "full", "model.dtype": "float32", "training.adapter": "sft"},
            "training.adapter is an adapter to train on, and training.method full has none; merge it first "
            "(mlx-trainer merge) and name what comes out as model.model_name, or set training.method to lora",
        ),
        (
            {"adalora.target_r": 4, "training.adapter": "sft"},
            "adalora.target_r begins at new adapters of its own; leave it out, or training.adapter",
        ),
        (
            {"training.trainable_layers": 4, "lora.layers_to_transform": [1]},
            "training.trainable_layers and lora.layers_to_transform both choose blocks; leave one of them out",
        ),
        (
            {"training.method": "full", "model.dtype": "float32", "adalora.target_r": 4},
            "adalora.target_r is for training.method lora alone; leave it out, or set that",
        ),
        (
            {"adalora.target_r": 17},
            "adalora.target_r 17 is above lora.rank (16), which ranks begin at",
        ),
        (
            {"adalora.target_r": 4, "lora.use_dora": True},
            "adalora.target_r has a start and layers of its own; leave out lora.use_dora and lora.init_lora_weights",
        ),
        (
            {"adalora.target_r": 4, "training.ema_decay": 0.99},
            "training.ema_decay would bring back the ranks that adalora.target_r takes away; leave one of them out",
        ),
        (
            {"adalora.target_r": 4, "adalora.tinit": 6, "adalora.tfinal": 4, "training.max_steps": 10},
            "adalora.tinit 6 and adalora.tfinal 4 leave none of training.max_steps (10) for ranks to fall; lower them",
        ),
        (
            {"training.recompute": "mlp", "data.layout": "padded"},
            "training.recompute mlp needs unpadded batches; "
            "set data.layout to auto, or training.recompute to auto or none",
        ),
        (
            {"training.method": "dpo", "preference.loss_type": "ipo", "preference.label_smoothing": 0.1},
            "preference.label_smoothing has no part in preference.loss_type ipo; "
            "set that to sigmoid, or label_smoothing to 0",
        ),
        (
            {"evaluation.patience": 3, "data.train_split": 1},
            "evaluation.patience needs a held-out loss, and there are no held-out rows: "
            "set data.train_split below 1 or data.validation_path",
        ),
        (
            {"data.validation_path": "chats.jsonl"},
            "data.validation_path has 'chats.jsonl', which is in data.dataset_path too: a loss on trained rows says "
            "nothing; leave it out, and data.train_split holds rows back",
        ),
        (
            {"data.dataset_path": {"a.jsonl": 1, "b.jsonl": 2}, "data.validation_path": ["c.jsonl", "b.jsonl"]},
            "data.validation_path has 'b.jsonl', which is in data.dataset_path too: a loss on trained rows says "
            "nothing; leave it out, and data.train_split holds rows back",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(overrides: dict[str, object], sentence: str) -> None:
    """The error names both keys and says what to set."""
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=DATA | overrides)
    assert str(caught.value) == f"override: {sentence}"


def test_the_same_options_apart_are_fine() -> None:
    """A rule refuses the pair only: each of its options is allowed without the other."""
    for overrides in (
        {"training.method": "full", "model.dtype": "bfloat16"},
        {"evaluation.patience": 3},
        {"evaluation.patience": 3, "data.train_split": 1, "data.validation_path": "held_out.jsonl"},
        {"data.train_split": 1},
    ):
        load_config(overrides=DATA | overrides)


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        ({}, ()),
        (
            {"training.neftune_noise_alpha": 20.0},
            ("training.neftune_noise_alpha 20 is above the 15 that its paper tried; 5 is usual",),
        ),
        (
            {"training.loraplus_lr_ratio": 100.0},
            ("training.loraplus_lr_ratio 100 lets lora_b learn at 0.02; ratios of 4 to 16 are usual",),
        ),
        (
            {"adalora.deltaT": 10},
            ("adalora.deltaT has no effect without adalora.target_r; set that, or leave it out",),
        ),
        (
            {"training.learning_rate": 2e-3},
            ("training.learning_rate 0.002 is high for LoRA; 0.0002 is usual, and above 0.001 runs often diverge",),
        ),
        (
            {"training.learning_rate": 2e-4, "training.method": "full", "model.dtype": "float32"},
            (
                "training.learning_rate 0.0002 is high for full fine-tuning; "
                "2e-05 is usual, and above 0.0001 runs often diverge",
            ),
        ),
        ({"training.learning_rate": 1e-2, "training.optimizer": "sgd"}, ()),
        (
            {"training.batch_size": 1, "training.gradient_accumulation_steps": 1},
            (
                "training.batch_size times training.gradient_accumulation_steps is 1: a step of one row is noisy; "
                "8 to 32 rows are usual",
            ),
        ),
        (
            {"training.batch_size": 1, "training.gradient_accumulation_steps": 1, "training.batch_tokens": 4096},
            ("training.batch_size 1 has no effect beside training.batch_tokens; set one of them",),
        ),
        ({"training.batch_tokens": 2048}, ()),
        (
            {"training.batch_tokens": 2047},
            (
                "training.batch_tokens 2047 is less than model.max_seq_length (2048): a row that is longer makes a "
                "batch of one row and up to 2048 tokens; set at least 2048, or lower model.max_seq_length",
            ),
        ),
        ({"data.max_bad_share": 0.5}, ()),
        (
            {"data.max_bad_share": 0.6},
            ("data.max_bad_share 0.6 trains on what is left of files that are mostly bad; 0.05 is usual",),
        ),
        (
            {"training.max_steps": 100, "training.save_steps": 50},
            ("training.warmup_steps 100 does not fit training.max_steps (100): it will be cut to 10",),
        ),
        (
            {"training.max_grad_norm": None},
            ("training.max_grad_norm is off: one bad batch can undo many steps; 1 is usual",),
        ),
        (
            {"lora.rank": 300, "lora.alpha": 300},
            ("lora.rank 300 is nearly as costly as training.method full; 8 to 64 are usual",),
        ),
        (
            {"lora.rank": 2},
            ("lora.alpha 32 is 16 times lora.rank, which multiplies every update; one to two times is usual",),
        ),
        ({"lora.use_rslora": True}, ()),
        (
            {"lora.use_rslora": True, "lora.rank": 4},
            (
                "lora.alpha 32 is 16 times the root of lora.rank, which multiplies every update; "
                "a scale of 1 to 4 is usual",
            ),
        ),
        (
            {"lora.init_lora_weights": "pissa"},
            (
                "lora.dropout 0.05 with lora.init_lora_weights pissa drops inputs of the weights' largest parts, "
                "trained and frozen alike; the authors train without: set lora.dropout to 0",
            ),
        ),
        ({"lora.init_lora_weights": "olora", "lora.dropout": 0}, ()),
        (
            {"lora.dropout": 0.5},
            ("lora.dropout 0.5 drops most of what an adapter could learn from; 0 to 0.1 is usual",),
        ),
        (
            {"data.train_split": 1},
            ("data.train_split 1 holds no rows back: there is no evaluation, and over-fitting goes unseen",),
        ),
        ({"data.train_split": 1, "data.validation_path": "held_out.jsonl"}, ()),
        (
            {"training.max_steps": 80, "training.warmup_steps": 8},
            ("training.save_steps 100 is beyond training.max_steps (80): only the end of the run is saved",),
        ),
        (
            {"training.method": "dpo"},
            ("training.learning_rate 0.0002 is high for DPO; 2e-05 is usual, and above 0.0001 runs often diverge",),
        ),
        (
            {"training.method": "orpo", "preference.orpo_lambda": 0.2, "preference.beta": 0.2},
            ("preference.beta has no effect with training.method orpo; it belongs to dpo",),
        ),
        (
            {"preference.orpo_lambda": 0.2},
            ("preference.orpo_lambda has no effect with training.method lora; it belongs to orpo",),
        ),
        ({"data.train_split": 0.2}, ("data.train_split 0.2 leaves most rows untrained; 0.9 is usual",)),
    ],
)
def test_unwise_settings_are_told_and_not_refused(overrides: dict[str, object], sentences: tuple[str, ...]) -> None:
    """Each unwise setting has one sentence with what is usual; the defaults have none."""
    assert unwise(load_config(overrides=DATA | overrides)) == sentences
