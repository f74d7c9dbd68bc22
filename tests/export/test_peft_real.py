"""Adapters that travel, with the real peft and transformers at the other end: logits agree to 1e-4 in float32."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.export.checking import logits_of, sample_ids
from mlx_trainer.export.peft import from_peft, to_peft
from mlx_trainer.models import CausalLMModule, ModelError, load_model
from mlx_trainer.models.adapter_config import lora_of
from mlx_trainer.trainer import Trainer
from tests.export.families import configuration
from tests.models.batches import labelled
from tests.tiny import VOCABULARY, tiny_mistral

REASON = "peft and torch are not installed (pip install 'mlx-trainer[interop]')"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft 0.21.2 with transformers 5.23
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:PiSSA changes the base weights:UserWarning",  # what the conversion that PEFT documents does for a moment
    "ignore:OLoRA changes the base weights:UserWarning",
)

IDS = sample_ids(VOCABULARY)
ATTENTION = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mistral(tmp_path_factory.mktemp("base"), transformers5=True)


def torch_base(base: Path) -> Any:
    """The base model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def torch_logits(model: Any) -> np.ndarray:
    """The logits of `IDS` there."""
    with torch.no_grad():
        return model.eval()(torch.tensor(np.array(IDS)).long()).logits.numpy()


def opened_there(base: Path, folder: Path) -> Any:
    """The adapter in `folder` on the base, as PEFT opens it; every one of its tensors must have been taken."""
    model = peft.PeftModel.from_pretrained(torch_base(base), folder)
    from safetensors.numpy import load_file

    taken = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in taken.items()} == {n: v.shape for n, v in written.items()}
    assert all(np.array_equal(taken[name].numpy(), written[name]) for name in written)
    return model


def trained_here(base: Path, lora: LoRAConfig, start: Path | None = None) -> CausalLMModule:
    """A module after three steps of the real trainer, from a fresh adapter or from the one in `start`."""
    arguments = {"dtype": "float32", "learning_rate": 0.02, "warmup_steps": 0, "schedule": "constant"}
    module = CausalLMModule(str(base), lora=lora, max_seq_length=64, **arguments)
    if start is not None:
        module.load(start)
    result = Trainer(max_steps=3).fit(module, [labelled((9, 5, 7)), labelled((4, 8), seed=1)])
    assert result.steps == 3
    return module


def trained_there(base: Path, folder: Path, **options: Any) -> Any:
    """A PEFT model after three steps of AdamW, and saved into `folder` as PEFT does it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    start = start_of(model, folder) if isinstance(options.get("init_lora_weights"), str) else {}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    ids = torch.tensor(np.array(IDS)).long()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder, **start)
    return model


def start_of(model: Any, folder: Path) -> dict[str, str]:
    """Save the start of a PiSSA or OLoRA adapter, as PEFT's guide does, to be taken off in the end."""
    config = model.peft_config["default"]
    kind, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(folder / "start")
    config.init_lora_weights = kind
    return {"path_initial_model_for_weight_conversion": str(folder / "start")}


def apart(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())


def test_the_base_is_the_same_here_and_there(base: Path) -> None:
    """What every other test of this file stands on."""
    assert apart(logits_of(load_model(base, dtype="float32"), IDS), torch_logits(torch_base(base))) <= TOLERANCE


@pytest.mark.parametrize("targets", [ATTENTION, ALL, ["q_proj", "lm_head"], ["model.layers.1.mlp.up_proj"]])
def test_an_adapter_trained_here_gives_the_same_logits_there(tmp_path: Path, base: Path, targets: list[str]) -> None:
    """LoRA; and merging it there gives our logits too, which are not the base's."""
    module = trained_here(base, LoRAConfig(rank=4, alpha=6.0, dropout=0.1, target_modules=targets))
    module.save(tmp_path / "adapter")
    done = to_peft(tmp_path / "adapter", tmp_path / "peft")
    assert done.difference is not None
    ours, there = logits_of(module, IDS), opened_there(base, tmp_path / "peft")
    assert apart(ours, torch_logits(there)) <= TOLERANCE
    assert apart(ours, torch_logits(there.merge_and_unload())) <= TOLERANCE
    assert apart(ours, logits_of(load_model(base, dtype="float32"), IDS)) > 100 * TOLERANCE


FAMILY: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa", "dropout": 0.0},
    "OLoRA": {"init_lora_weights": "olora", "dropout": 0.0},
    "ranks and alphas": {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"up_proj": 3}},
}


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("targets", [ATTENTION, [*ALL, "lm_head"]])
def test_each_member_of_the_family_gives_the_same_logits_there(
    tmp_path: Path, base: Path, member: str, targets: list[str]
) -> None:
    """Trained here, saved here, exported, opened there."""
    options = {name: value for name, value in FAMILY[member].items() if name != "alpha_pattern" or targets != ATTENTION}
    module = trained_here(base, LoRAConfig(rank=4, alpha=6.0, target_modules=targets, **options))
    module.save(tmp_path / "adapter")
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    ours = logits_of(module, IDS)
    assert apart(ours, torch_logits(opened_there(base, tmp_path / "peft"))) <= TOLERANCE
    assert apart(ours, logits_of(load_model(base, dtype="float32"), IDS)) > 100 * TOLERANCE


def mlx_lm_adapter(base: Path, folder: Path, kind: str, **parameters: Any) -> mx.array:
    """Write an adapter of mlx-lm's own layers, all of it random, with mlx-lm's own configuration; return its logits."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    model = load_model(base, dtype="float32")
    model.freeze()
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    drawn = {
        name: value * (1 + 0.1 * mx.random.normal(value.shape)) + 0.05 * mx.random.normal(value.shape)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(drawn.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
    config = {"model": str(base), "fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    save_config(config, folder / "adapter_config.json")
    return logits_of(model, IDS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("keys", [["self_attn.q_proj", "self_attn.v_proj"], ["mlp.down_proj", "lm_head"]])
def test_an_adapter_of_mlx_lm_gives_the_same_logits_there(
    tmp_path: Path, base: Path, kind: str, keys: list[str]
) -> None:
    """mlx-lm's LoRA and DoRA, whose scale of 20/3 no whole alpha can express, in transformers to 1e-4."""
    ours = mlx_lm_adapter(base, tmp_path / "adapter", kind, rank=4, scale=20 / 3 / 4, dropout=0.0, keys=keys)
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_dora"]) == (7, kind == "dora")
    assert apart(ours, torch_logits(opened_there(base, tmp_path / "peft"))) <= TOLERANCE


def test_an_embedding_goes_there_and_comes_back(tmp_path: Path, base: Path) -> None:
    """mlx-lm's LoRA of the embedding; PEFT then saves the embedding itself too, which is seen to be the base's."""
    keys = ["model.embed_tokens", "self_attn.q_proj"]
    ours = mlx_lm_adapter(base, tmp_path / "adapter", "lora", rank=4, scale=2.0, dropout=0.0, keys=keys)
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    there = opened_there(base, tmp_path / "peft")
    assert apart(ours, torch_logits(there)) <= TOLERANCE
    there.save_pretrained(tmp_path / "again")
    from_peft(tmp_path / "again", tmp_path / "back")
    assert apart(ours, mlx_lm_logits(base, tmp_path / "back")) <= TOLERANCE


def mlx_lm_logits(base: Path, folder: Path) -> mx.array:
    """The logits of the adapter in `folder` as mlx-lm itself opens it."""
    from mlx_lm.tuner.utils import load_adapters

    return logits_of(load_adapters(load_model(base, dtype="float32"), str(folder)), IDS)


MADE_THERE: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION},
    "LoRA, all linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "use_dora": True},
    "DoRA, all layers": {"r": 4, "lora_alpha": 6, "target_modules": ALL, "use_dora": True},
    "one block": {"r": 4, "lora_alpha": 6, "target_modules": ALL, "layers_to_transform": [1]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ATTENTION,
        "rank_pattern": {"v_proj": 8},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3},
    },
    "PiSSA, converted": {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "init_lora_weights": "pissa"},
    "OLoRA, converted": {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "init_lora_weights": "olora"},
}


@pytest.mark.parametrize("made", MADE_THERE)
def test_an_adapter_made_there_trains_on_here_and_goes_back(tmp_path: Path, base: Path, made: str) -> None:
    """Equal logits here; three more steps here change them; and they are the same there again."""
    model = trained_there(base, tmp_path / "peft", **MADE_THERE[made])
    from_peft(tmp_path / "peft", tmp_path / "adapter")
    there = torch_logits(model)
    assert apart(there, mlx_lm_logits(base, tmp_path / "adapter")) <= TOLERANCE
    lora = lora_of(tmp_path / "adapter")
    assert lora is not None
    module = trained_here(base, lora, tmp_path / "adapter")
    ours = logits_of(module, IDS)
    assert apart(there, ours) > 100 * TOLERANCE
    module.save(tmp_path / "on")
    to_peft(tmp_path / "on", tmp_path / "back")
    assert apart(ours, torch_logits(opened_there(base, tmp_path / "back"))) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2", ["self_attn.q_proj", "self_attn.v_proj"]),  # with biases, which DoRA leaves alone
        ("phi3", ["self_attn.qkv_proj", "mlp.gate_up_proj"]),  # queries, keys and values in one layer
        ("cohere", ["self_attn.k_proj", "mlp.down_proj"]),  # a head that is the embedding, and layer norms
        ("olmo2", ["self_attn.o_proj", "mlp.up_proj"]),
    ],
)
def test_dora_of_other_families_gives_the_same_logits_there(tmp_path: Path, family: str, keys: list[str]) -> None:
    """Models that transformers made and saved, with random weights and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**configuration(family)))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    assert apart(logits_of(load_model(base, dtype="float32"), IDS), torch_logits(torch_base(base))) <= TOLERANCE
    ours = mlx_lm_adapter(base, tmp_path / "adapter", "dora", rank=4, scale=2.0, dropout=0.0, keys=keys)
    assert to_peft(tmp_path / "adapter", tmp_path / "peft").notes == ()
    there = opened_there(base, tmp_path / "peft")
    found = apart(ours, torch_logits(there))
    assert found <= TOLERANCE
    assert 100 * found < apart(ours, torch_logits(there.unload()))  # cohere makes all logits small


def test_rslora_stays_rslora_where_it_comes_from_peft(tmp_path: Path, base: Path) -> None:
    """PEFT's scale is alpha / √rank = 3, and is 3 here."""
    trained_there(base, tmp_path / "peft", r=4, lora_alpha=6, use_rslora=True, target_modules=ATTENTION)
    from_peft(tmp_path / "peft", tmp_path / "adapter")
    parameters = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["scale"], parameters["rank"]) == (3.0, 4)


def test_pissa_as_it_stands_is_refused_with_the_way_out(tmp_path: Path, base: Path) -> None:
    """Its adapter belongs to what is left of the base, which nobody else has."""
    options = {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "pissa"}
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ModelError, match=r"init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion"):
        from_peft(tmp_path / "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


REFUSED: dict[str, Any] = {
    "modules_to_save": ["lm_head"],
    "bias": "lora_only",
    "trainable_token_indices": [1, 2],
    "layer_replication": [(0, 2), (1, 2)],
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_mlx_lm_has_nothing_for_is_refused_by_name(tmp_path: Path, base: Path, option: str) -> None:
    """As PEFT itself writes it; and nothing is left."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION, **{option: REFUSED[option]})
    peft.get_peft_model(torch_base(base), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ModelError, match=rf"adapter_config\.json has {option} .*which mlx-lm has nothing for"):
        from_peft(tmp_path / "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_another_peft_method_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    """VeRA."""
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"])
    peft.get_peft_model(torch_base(base), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ModelError, match="has peft_type 'VERA'; only LORA"):
        from_peft(tmp_path / "peft", tmp_path / "adapter")
