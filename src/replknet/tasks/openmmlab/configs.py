"""Configs of OpenMMLab's Runner: read with clear errors, or taken out of a checkpoint without running it."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from replknet._errors import UsageError

_OLD_FORM = {
    "data": "train_dataloader, val_dataloader, test_dataloader",
    "optimizer": "optim_wrapper",
    "optimizer_config": "optim_wrapper",
    "lr_config": "param_scheduler",
    "runner": "train_cfg",
    "total_epochs": "train_cfg",
    "total_iters": "train_cfg",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config": "default_hooks.logger",
    "evaluation": "val_evaluator and train_cfg.val_interval",
    "dist_params": "env_cfg",
    "workflow": "train_cfg",
    "resume_from": "load_from with resume",
}
"""Keys of configs for MMSegmentation 0.x and MMDetection 2.x, and what stands in their place."""
_UNMISTAKABLE = set(_OLD_FORM) - {"data", "optimizer"}


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """The config in a file, its bases resolved.

    Args:
        path: a .py, .yaml or .json config in the current form.
        options: dotted keys to values that win over the file's: `{'train_dataloader.batch_size': 2}`.

    Raises:
        UsageError: no such file, not a config, one in the form of the 0.x or 2.x releases, or a wrong option.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no config {path}")
    if path.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise UsageError(f"{path} is not a config: its name must end in .py, .yaml or .json")
    if path.suffix == ".py":
        _refuse_old_form(_assigned_names(path), path)
    try:
        config = Config.fromfile(path)
    except Exception as error:
        # A config is code and may raise anything.
        raise UsageError(f"config {path}: {_first_line(error)}") from error
    _refuse_old_form(set(config.keys()), path)
    if options:
        _merge(config, options)
    return config


def parse_options(words: list[str]) -> dict[str, Any]:
    """`['train_cfg.max_iters=100', 'model.test_cfg.mode=slide']` as a mapping; values in Python's notation, or text."""
    options = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UsageError(f"--cfg_options {word}: write key=value, for example train_dataloader.batch_size=2")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return options


def config_of_checkpoint(contents: Mapping[str, Any], source: str) -> Config:
    """The config that the Runner put into a checkpoint; its text is read as data, not executed.

    Raises:
        UsageError: there is none, or one that is more than data.
    """
    meta = contents.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        raise UsageError(f"{source} does not hold its config; give the one it was trained with by --config")
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise ValueError(f"line {statement.lineno} is not an assignment")
            values[statement.targets[0].id] = _literal(statement.value)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"the config inside {source} is not plain data ({error}); give one by --config") from error
    return Config(values)


def _literal(node: ast.expr) -> Any:
    """A value written with constants, lists, tuples, dicts and `dict(key=value)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    return ast.literal_eval(node)


def _assigned_names(path: Path) -> set[str]:
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} is not Python: {_first_line(error)}") from error
    assignments = [statement for statement in body if isinstance(statement, ast.Assign)]
    return {target.id for statement in assignments for target in statement.targets if isinstance(target, ast.Name)}


def _refuse_old_form(names: set[str], path: Path) -> None:
    if not names & _UNMISTAKABLE:
        return
    found = sorted(names & set(_OLD_FORM))
    renamed = "; ".join(f"{name} is now {_OLD_FORM[name]}" for name in found)
    raise UsageError(f"{path} is in the form of MMSegmentation 0.x / MMDetection 2.x: {renamed}. See recipes/")


def _merge(config: Config, options: Mapping[str, Any]) -> None:
    for key in options:
        _check_key(config, key)
    try:
        config.merge_from_dict(dict(options))
    except Exception as error:
        # mmengine raises KeyError, TypeError or AssertionError from inside for a key that leads nowhere.
        raise UsageError(f"--cfg_options: {_first_line(error)}") from error


def _check_key(config: Config, key: str) -> None:
    """A misspelt beginning of a key would silently make a new entry that nothing reads."""
    node: Any = config
    *parents, _ = key.split(".")
    for depth, part in enumerate(parents):
        children = node if isinstance(node, (Config, ConfigDict, Mapping)) else None
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif children is not None and part in children:
            node = children[part]
        else:
            raise UsageError(f"--cfg_options {key}: the config has no {'.'.join(parents[: depth + 1])}")


def _first_line(error: BaseException) -> str:
    """One line that tells what happened, without the quotes that KeyError adds."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
