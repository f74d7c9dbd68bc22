"""Preference training: the better and the worse of two answers, with DPO or ORPO."""

from mlx_trainer.preference.losses import LossType
from mlx_trainer.preference.module import DPOModule, ORPOModule, PreferenceModule
from mlx_trainer.preference.precomputing import precompute_reference

__all__ = ["DPOModule", "LossType", "ORPOModule", "PreferenceModule", "precompute_reference"]
