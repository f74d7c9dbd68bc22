"""Configuration files: YAML 1.2 and JSON, `extends`, later files over earlier ones, overrides over all."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.option import show
from mlx_trainer.config.schema import Config

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000
OVERRIDE = "override"

Tree = dict[str, Any]


def load_config(*paths: str | Path, overrides: Mapping[str, object] | None = None) -> Config:
    """Return the configuration of `paths`, later ones winning, and of `overrides` ({"lora.rank": 8}), winning over all.

    Raises ConfigError with one line for each problem: file, key, value, and what would be right.
    """
    from mlx_trainer.config.structure import structure

    layers = [layer for path in paths for layer in _with_bases(Path(path), ())]
    layers.append((OVERRIDE, nested(overrides or {})))
    tree: Tree = {}
    origins: dict[str, str] = {}
    for source, layer in layers:
        tree = deep_merge(tree, layer)
        origins |= dict.fromkeys(_dotted(layer), source)
    return structure(tree, origins, source=str(paths[-1]) if paths else "configuration")


def deep_merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    """Return `lower` with `upper` laid over it: sections are merged, the values in them, mappings too, are replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def nested(dotted: Mapping[str, object]) -> Tree:
    """Return {"lora": {"rank": 8}} for {"lora.rank": 8}."""
    tree: Tree = {}
    for key, value in dotted.items():
        section, dot, name = key.partition(".")
        tree = deep_merge(tree, {section: {name: value} if dot else value})
    return tree


def read_tree(path: Path) -> Tree:
    """Return the mapping in a YAML or JSON file; ConfigError names the file and, for broken syntax, the line."""
    text = _read_text(path)
    try:
        tree = _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a configuration") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {show(tree)}; a configuration is a mapping of sections, such as `lora:`")
    _check_size(tree, path)
    return {key: value for key, value in tree.items() if value is not None}


def _with_bases(path: Path, children: tuple[Path, ...]) -> list[tuple[str, Tree]]:
    """Return the file's layer after those it extends, the deepest base first."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " -> ".join(str(file) for file in (*children, path))
        raise ConfigError(f"{children[0]}: extends itself: {chain}")
    tree = read_tree(path)
    base = tree.pop("extends", None)
    if base is None:
        return [(str(path), tree)]
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: extends is {show(base)}; it must be the path of one file, relative to this one")
    return [*_with_bases(path.parent / base, (*children, path)), (str(path), tree)]


def _read_text(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: is not a configuration file; its name must end in .yaml, .yml or .json")
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not path.is_dir():  # opening a pipe or device may never return
            raise ConfigError(f"{path}: is no regular file; save the configuration as one")
        if found.st_size > MAX_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_BYTES:,} bytes, too many for a configuration")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _parse_yaml(text: str) -> object:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        # The pure parser reads YAML 1.2 everywhere (1e-4 is a number, no is text) and refuses a key written twice.
        tree: object = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{' '.join(str(error.problem).split())}") from None
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return tree


def _parse_json(text: str) -> object:
    try:
        tree: object = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    return tree


def _unique(pairs: list[tuple[str, object]]) -> Tree:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen = [key for key, _ in pairs]
        raise ValueError(f"found duplicate key {next(key for key in seen if seen.count(key) > 1)!r}")
    return tree


def _check_size(tree: object, path: Path) -> None:
    """Refuse trees that aliases blow up (or tie into a knot): a few bytes of YAML can stand for billions of values."""
    waiting, seen = [tree], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigError(f"{path}: has more than {MAX_VALUES:,} values once its aliases are followed")
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ConfigError(f"{path}: the key {show(wrong[0])} is not text")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in tree.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names += _dotted(value, f"{prefix}{key}.")
    return names
