"""What a run's folder tells of a training, for those who did not see it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from mlx_trainer.config import Config, ConfigError, load_config
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.monitoring import MetricsTracker, MonitoringError


@frozen
class Run:
    """What a run's folder tells of a training; each is empty where the folder has it not."""

    config: Config | None
    facts: Mapping[str, Any]
    metrics: MetricsTracker

    @property
    def data(self) -> Mapping[str, Any]:
        """The figures of the rows."""
        data = self.facts.get("data")
        return data if isinstance(data, Mapping) else {}

    def values(self, metric: str) -> list[float]:
        """Return a metric's finite values, in the order of steps."""
        try:
            return [value for value in self.metrics.series(metric)[1] if math.isfinite(value)]
        except MonitoringError:  # never recorded
            return []

    @property
    def base(self) -> Mapping[str, Any]:
        """Name and commit of the base model."""
        model = self.facts.get("model")
        return model if isinstance(model, Mapping) else {}


def run_of(folder: Path) -> Run:
    """Return what `folder` says as a run's, or the run's folder that it lies in; raises MonitoringError, ModelError.

    An adapter lies one level below, a checkpoint's two.
    """
    places = (folder, *folder.absolute().parents[:2])
    root = next((place for place in places if (place / "environment.json").is_file()), None)
    if root is None:
        return Run(None, {}, MetricsTracker())
    facts, metrics = read_json(root / "environment.json"), root / "metrics.jsonl"
    try:
        config = load_config(root / "config.yaml")
    except ConfigError:  # of another version
        config = None
    return Run(
        config,
        facts if isinstance(facts, dict) else {},
        MetricsTracker.read(metrics) if metrics.is_file() else MetricsTracker(),
    )
