"""What decides on a run's numbers, by name: each checkpoint holds it, and a resumed run is compared with it.

Three kinds of names. What decides on the trained numbers (`Identity.decisive`: data, base model, seed, optimizer,
learning rate, …) must be as it was, or its change be allowed by name. What is meant to be changed (`Identity.settings`:
how long, how often, which callbacks) is told in the log. The configuration is not compared where it has none.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten

from mlx_trainer import __version__
from mlx_trainer.checkpoint import CheckpointError
from mlx_trainer.side_by_side import streams
from mlx_trainer.traced import UNSIGNED, leaves

if TYPE_CHECKING:
    from mlx_trainer.loaders import Loader
    from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)

VERSIONS = {"mlx": version("mlx"), "mlx_trainer": __version__}
"""The same numbers, bit for bit, are promised for the same ones."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A module, callback or loader that says what of it decides on the trained numbers."""

    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values by the name under which a change is told, and allowed."""


@attrs.frozen(eq=False)
class Identity:
    """What a run is, as its checkpoints tell it."""

    decisive: Mapping[str, Any]
    """What changes the trained numbers where it is changed."""
    settings: Mapping[str, Any]
    """What may be changed; it is told."""
    config: Mapping[str, Any] | None
    """The resolved configuration, where there is one."""
    frozen_sums: Mapping[str, mx.array]
    """Of the parameters that do not train, see `frozen_sums`."""

    @classmethod
    def of(cls, trainer: "Trainer", loader: "Loader") -> Self:
        """The identity of a run whose model and optimizer are built; reads no parameter yet."""
        model = trainer.module.model
        decisive = {
            "seed": trainer.seed,
            "accumulate": trainer.accumulate,
            "batches_per_epoch": len(loader),
            "parameter_types": sorted({type_name(leaf) for leaf in leaves(model.trainable_parameters())}),
            **optimizer_settings(trainer.optimizer),
        }
        for part in (loader, *trainer.events.callbacks, trainer.module):
            decisive |= part.fingerprint() if isinstance(part, Fingerprinted) else {}
        settings = {
            **attrs.asdict(trainer.limits),
            "total_steps": trainer.total_steps,
            "log_every": trainer.log_every,
            "cpu_streams": len(streams()),  # sums have another order with two
            "callbacks": sorted(callback.name for callback in trainer.events.callbacks),
        }
        return cls(plain(decisive), plain(settings), plain(trainer.config), frozen_sums(model))

    def as_dict(self) -> dict[str, Any]:
        """For `state.json`. Reads the sums of the frozen parameters."""
        told = {"fingerprint": self.fingerprint(), "settings": self.settings, "config": self.config}
        return {**told, "versions": VERSIONS}

    def fingerprint(self) -> dict[str, Any]:
        """What decides, and the digest of the frozen parameters; reads their sums."""
        sums = {name: int(value.item()) for name, value in self.frozen_sums.items()}  # type: ignore[arg-type]
        frozen = hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16] if sums else None
        return {**self.decisive, "frozen_parameters": frozen}

    def check(self, path: Path, saved: Mapping[str, Any], allowed: Collection[str]) -> None:
        """Tell what differs from the checkpoint at `path`; raise CheckpointError for what decides and is not allowed.

        `allowed` are names, "dataset" for any "dataset/…", or "all".
        """
        if "fingerprint" not in saved:
            logger.warning("%s does not say what it was trained with, so nothing can be compared", path)
            return
        decisive = changes(saved["fingerprint"], self.fingerprint())
        refused = {name: text for name, text in decisive.items() if not {"all", *spellings(name)} & set(allowed)}
        if refused:
            names = list(dict.fromkeys(name.partition("/")[0] for name in refused))
            raise CheckpointError(
                f"cannot resume from {path}, because the numbers would be those of another run: "
                f"{'; '.join(refused.values())}. Put back what it was, or allow the change: "
                f"Trainer(allow_changes={names!r}), on the command line --run.allow_changes {','.join(names)}"
            )
        for text in decisive.values():
            logger.warning("resumed with another %s, which was allowed", text)
        self._tell(saved)

    def _tell(self, saved: Mapping[str, Any]) -> None:
        told = changes(saved["versions"], VERSIONS) | changes(saved["settings"], self.settings)
        told |= changes(dict(flat(saved["config"] or {})), dict(flat(self.config))) if self.config else {}
        for text in (text for name, text in told.items() if name != "run.resume"):
            logger.info("changed since the checkpoint: %s", text)
        if "total_steps" in told:
            logger.info("a learning rate that falls until the end of the run now does so until the new end")


def optimizer_settings(optimizer: optimizers.Optimizer) -> dict[str, Any]:
    """Its class and constants; of a learning rate only a constant one, as a schedule is a function without a name."""
    constants = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
    simple = {name: value for name, value in constants.items() if isinstance(value, (int, float, list, tuple))}
    found = {"optimizer": type(optimizer).__name__, **simple}
    if "learning_rate" in optimizer.state and "learning_rate" not in optimizer._schedulers:
        found["learning_rate"] = float(f"{optimizer.learning_rate.item():.7g}")  # as float32 has it
    return found


def frozen_sums(model: nn.Module) -> dict[str, mx.array]:
    """The sum of the bits of each parameter that does not train, as unsigned integers; lazy.

    A checkpoint with adapters does not hold the base model, and its file may have changed under the same name. Integer
    sums are the same on every device. They cost one reading of the weights, in the first checkpoint and at a resume;
    what is only put in another order within one array has the same sum.
    """
    every, trained = dict(tree_flatten(model.parameters())), dict(tree_flatten(model.trainable_parameters()))
    return {
        f"{name} {type_name(leaf)} {list(leaf.shape)}": leaf.reshape(-1).view(UNSIGNED[leaf.itemsize]).sum()
        for name, leaf in every.items()
        if name not in trained
    }


def type_name(array: mx.array) -> str:
    """Such as "float32"."""
    return str(array.dtype).removeprefix("mlx.core.")


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """`name: was → is` for each name whose value differs; what is absent is none.

    >>> changes({"seed": 1, "eps": 1e-8}, {"seed": 2, "eps": 1e-8, "betas": [0.9, 0.99]})
    {'seed': 'seed: 1 → 2', 'betas': 'betas: none → [0.9, 0.99]'}
    """
    names = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
    return {name: f"{name}: {shown(was.get(name))} → {shown(now.get(name))}" for name in names}


def shown(value: Any) -> str:
    """A value as a message has it."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


def spellings(name: str) -> Iterable[str]:
    """The names that allow a change of `name`."""
    return name, name.partition("/")[0]


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested mappings with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: a tuple is a list there."""
    return json.loads(json.dumps(value))
