"""A configuration as text that loads back equal."""

from io import StringIO

from attrs import asdict

from mlx_trainer.config.schema import Config


def to_yaml(config: Config) -> str:
    """Return every option of `config`, defaults too, as YAML in the schema's order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    yaml.dump(asdict(config), text)
    return text.getvalue()
