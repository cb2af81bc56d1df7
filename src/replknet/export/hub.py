"""A model folder in timm's Hugging Face format: weights, configuration, card."""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf
from torch import nn

from replknet._errors import RunError, UsageError
from replknet._files import make_folder, permit_as_usual, write_text
from replknet.models.family import ARCHITECTURES
from replknet.models.weights import CITATION, LICENSE, PAPER, RELEASE, WEIGHTS

_log = logging.getLogger(__name__)


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: list[str] | None = None,
    data_config: dict[str, Any] | None = None,
    results: dict[str, float] | None = None,
    trained_on: str | None = None,
    license: str = LICENSE,  # noqa: A002 - the card's own word
    overwrite: bool = False,
) -> Path:
    """Write `model` as timm and the Hugging Face hub read it: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: made by timm or `replknet.models.create_model`; in any form.
        folder: written as a whole or not at all.
        class_names: one a class.
        data_config: what pictures must be prepared like, where that differs from the model's own configuration:
            `input_size`, `mean`, `std`, `crop_pct`, `crop_mode`.
        results: measured scores for the card, in per cent, by name: `{"top-1 on CIFAR-10": 91.2}`.
        trained_on: data set for the card.
        license: SPDX identifier of the weights.
        overwrite: replace an existing model folder.

    Raises:
        UsageError: the folder exists or, to be overwritten, holds other things than a model; the model is not timm's,
            or the names do not fit its outputs.
    """
    folder = Path(folder)
    if not hasattr(model, "pretrained_cfg"):
        raise UsageError(f"{type(model).__name__} was not built by timm, so timm could not build it again")
    if class_names is not None and len(class_names) != model.num_classes:
        raise UsageError(f"{len(class_names)} class names for {model.num_classes} outputs")
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; choose another name or ask to overwrite it")
    if reason := _why_not_replaceable(folder):
        raise UsageError(f"{folder} {reason}, so it is not overwritten; choose another name")
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        draft = Path(parent) / "model"
        config = {"label_names": class_names} if class_names else {}
        save_for_hf(
            model,
            str(draft),
            model_config=config,
            model_args=_model_args(model),
            safe_serialization=True,
            data_config=data_config,
        )
        _state_trained(draft / "config.json")
        card = model_card(model, folder.name, results, trained_on, license, data_config)
        write_text(draft / "README.md", card)
        permit_as_usual(draft / "model.safetensors")
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    return folder


# What `save_model` writes and the hub's own client adds.
_MODEL_FILES = ("config.json", "model.safetensors", "README.md", ".gitattributes", ".cache")


def _why_not_replaceable(folder: Path) -> str | None:
    """None where replacing `folder` loses nothing but a model, else what stands against it."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "is a file"
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in _MODEL_FILES):
        return f"holds other things than a model ({foreign[0]})"
    return None


def _state_trained(config: Path) -> None:
    """Leave out the tag of the architecture's default weights, which these are not."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["pretrained_cfg"].pop("tag", None)
    write_text(config, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def push_model(folder: str | Path, repo: str, *, private: bool = False, message: str = "Add model") -> str:
    """Upload a folder written by `save_model`; returns its address. Credentials are huggingface_hub's own business.

    Raises:
        UsageError: no such folder, or a name that is none.
        RunError: the hub refused or could not be reached.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder: it has no config.json")
    check_repo(repo)
    api = HfApi(library_name="replknet")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise RunError(f"the hub did not take {repo}: {error}. `hf auth login` signs in") from error
    except Exception as error:
        # Errors of the connection belong to the HTTP library underneath, which is another with every major version.
        raise RunError(f"the hub at {api.endpoint} could not be reached for {repo}: {error}") from error
    return str(address)


def check_repo(repo: str) -> None:
    """Raise UsageError unless `repo` is a name as `owner/model`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name on the hub: {error}") from error


def model_card(
    model: nn.Module,
    title: str,
    results: dict[str, float] | None,
    trained_on: str | None,
    license: str,  # noqa: A002
    data_config: dict[str, Any] | None = None,
) -> str:
    """The folder's README.md: metadata for the hub, what the model is, how it scored, how to use and cite it."""
    cfg: dict[str, Any] = {**model.pretrained_cfg, **(data_config or {})}  # type: ignore[dict-item]
    architecture = str(cfg.get("architecture", type(model).__name__))
    own = architecture in ARCHITECTURES
    entry = WEIGHTS.get(f"{architecture}.{cfg.get('tag', '')}")
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    import_line = "import replknet  # registers the architecture\n" if own else ""
    lines = [
        "---\ntags:\n- image-classification\n- timm\npipeline_tag: image-classification\nlibrary_name: timm",
        f"license: {license}\n---\n\n# {title}\n",
        f"- architecture: {architecture}" + (f" ({PAPER}, {RELEASE})" if own else ""),
        f"- parameters: {params:.1f} M",
        f"- input: {'x'.join(map(str, cfg.get('input_size', ())))}, mean {cfg.get('mean')}, std {cfg.get('std')}",
        f"- outputs: {model.num_classes}",
        f"- trained on: {trained_on or (' > '.join(entry.trained_on) if entry and cfg.get('file') else 'not stated')}",
        "",
        "## Results\n",
        _results(results),
        "\n## Use\n",
        f"```python\nimport timm\n{import_line}",
        f'model = timm.create_model("hf-hub:OWNER/{title}", pretrained=True).eval()',
        f'features = timm.create_model("hf-hub:OWNER/{title}", pretrained=True, features_only=True)',
        "```\n" + ("\nThe architecture is in the package replknet: `pip install replknet`.\n" if own else ""),
    ]
    if own:
        lines.append(f"## Citation\n\n```bibtex\n{CITATION}\n```\n")
    return "\n".join(lines)


def _results(results: dict[str, float] | None) -> str:
    if not results:
        return "None were measured when this card was written."
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in results.items())
    return f"| measured | % |\n|---|---|\n{rows}"


def _model_args(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments by which a RepLKNet differs from the named architecture."""
    config: dict[str, Any] = getattr(model, "config", None) or {}
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    named = ARCHITECTURES.get(str(cfg.get("architecture")))
    if named is None or not config:
        return {}
    defaults = {"dw_ratio": 1.0, "ffn_ratio": 4.0, "stem_stride": 4, "in_chans": 3, "norm_features": False}
    args = {key: config[key] for key in (*defaults, *named) if config[key] != {**defaults, **named}.get(key)}
    form = str(model.form)  # type: ignore[attr-defined]
    return {**args, "form": form} if form != "train" else args
