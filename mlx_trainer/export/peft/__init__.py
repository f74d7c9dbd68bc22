"""Adapters between mlx-lm's layout and PEFT's, each way checked by the logits."""

from mlx_trainer.export.peft.converting import Converted, from_peft, in_mlx_layout, to_peft
from mlx_trainer.export.peft.layout import is_peft, read_peft, write_peft

__all__ = ["Converted", "from_peft", "in_mlx_layout", "is_peft", "read_peft", "to_peft", "write_peft"]
