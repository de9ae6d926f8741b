"""Load models, LoRA adapters and tokenizers, and compute fingerprints that identify them.

Holdfast loads checkpoints only through this file.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..files.artifacts import sha256_file
from .layers import set_layers_path

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
_ADAPTER_CONFIG = "adapter_config.json"
# ImportError: an attention implementation whose package is not installed.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HFValidationError)


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded, apart from their dtype and device.

    attn_implementation: the name in transformers; None leaves the choice to transformers. trust_remote_code: whether to
    run code that comes with a model. layers_path: dotted path of the decoder blocks; None finds them by shape.
    device_map: how accelerate spreads one model over devices ("auto", …); None puts it on one device.
    """

    attn_implementation: str | None = None
    trust_remote_code: bool = False
    layers_path: str | None = None
    device_map: str | dict[str, str] | None = None


_PLAIN = LoadOptions()


def _located(path: str | Path) -> tuple[str, str | None]:
    """Split "org/model@revision" into the Hub name and the revision. A folder has no revision."""
    name, separator, revision = str(path).rpartition("@")
    return (name, revision) if separator and name and not Path(path).exists() else (str(path), None)


def adapter_base(path: str | Path) -> str | None:
    """Return the name (with "@revision") or path of a LoRA folder's base model, or None if `path` is no LoRA folder.

    Raises:
        UserError: an adapter configuration that does not name its base model.
    """
    config = Path(path) / _ADAPTER_CONFIG
    if not config.is_file():
        return None
    try:
        facts = json.loads(config.read_text())
        base, revision = facts["base_model_name_or_path"], facts.get("revision")
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{config} does not name its base model ({error}): save the adapter again") from error
    return f"{base}@{revision}" if base and revision and not Path(base).exists() else base


def load_tokenizer(path: str | Path, options: LoadOptions = _PLAIN) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. For a LoRA folder without a tokenizer, load that of its base model.

    Raises:
        UserError: no tokenizer can be read.
    """
    base = adapter_base(path)
    if base is not None and not (Path(path) / "tokenizer_config.json").is_file():
        path = base
    _require_reachable(path)
    try:
        name, revision = _located(path)
        return AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=options.trust_remote_code
        )
    except _LOAD_ERRORS as error:
        raise UserError(f"no tokenizer could be read from {path}: {_first_line(error)}") from error


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    options: LoadOptions = _PLAIN,
) -> PreTrainedModel | PeftModel:
    """Load a causal LM in eval mode, with every weight present and finite. A LoRA folder gives its base plus adapter.

    Args:
        path: a folder or a Hub name, with "@revision" if it is not the main revision.
        dtype: "float32", "bfloat16", "float16" or "auto" (as saved).
        device: the device of the model; None leaves it on the CPU. Ignored if `options` has a device map.

    Raises:
        UserError: weights that are absent, truncated, of a wrong shape, missing from the file, or not finite.
    """
    base = adapter_base(path)
    full = _load_full(base if base is not None else path, dtype, options)
    model = full if base is None else _load_adapter(full, Path(path))
    _require_finite(model, path)
    if device is not None and options.device_map is None:
        nn.Module.to(model, device)
    return model.eval()


def _require_reachable(path: str | Path) -> None:
    """Raise UserError for a missing path that can only be a local folder.

    Looking it up on the Hub would take long to fail.
    """
    name, _ = _located(path)
    if not Path(path).exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"model {path} does not exist: pass a folder with config.json, or a Hub name such as org/model")


def _load_full(path: str | Path, dtype: str, options: LoadOptions) -> PreTrainedModel:
    _require_reachable(path)
    try:
        name, revision = _located(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision or "main", dtype=dtype, output_loading_info=True,
            attn_implementation=options.attn_implementation, trust_remote_code=options.trust_remote_code,
            device_map=options.device_map,
        )  # fmt: skip
    except _LOAD_ERRORS as error:
        raise UserError(f"model {path} could not be loaded: {_first_line(error)}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"model {path} lacks {len(missing)} weights ({missing[0]}, …): the checkpoint is incomplete")
    if options.layers_path is not None:
        set_layers_path(model, options.layers_path)
    return model


def _load_adapter(model: PreTrainedModel, path: Path) -> PeftModel:
    try:
        adapted = PeftModel.from_pretrained(model, str(path), is_trainable=False)
        with safe_open(path / "adapter_model.safetensors", framework="pt") as stored:
            names = set(stored.keys())
    except _LOAD_ERRORS as error:
        raise UserError(f"adapter {path} could not be loaded: {_first_line(error)}") from error
    missing = sorted(set(get_peft_model_state_dict(adapted)) - names)
    if missing:
        raise UserError(f"adapter {path} lacks {len(missing)} weights ({missing[0]}, …): the checkpoint is incomplete")
    return adapted


@torch.no_grad()
def _require_finite(model: nn.Module, path: str | Path) -> None:
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise UserError(
                f"model {path} does not fit into the devices' memory (weight {name} was left on disk); use more "
                "devices, or a smaller --dtype"
            )
        if not torch.isfinite(weight).all():
            raise UserError(f"model {path} has NaN or infinite values in {name}: use an earlier checkpoint")


def load_config(path: str | Path, options: LoadOptions = _PLAIN) -> PretrainedConfig:
    """Load only the configuration of a model, without weights. For a LoRA folder, load that of its base model.

    Raises:
        UserError: no configuration can be read.
    """
    base = adapter_base(path)
    path = base if base is not None else path
    _require_reachable(path)
    try:
        name, revision = _located(path)
        return AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=options.trust_remote_code
        )
    except _LOAD_ERRORS as error:
        raise UserError(f"no model configuration could be read from {path}: {_first_line(error)}") from error


def model_fingerprint(path: str | Path) -> str:
    """Return the hex sha256 of the names and contents of the weight files. For a LoRA folder it includes the base.

    Raises:
        UserError: no model, or no weight files, at the path.
    """
    _require_reachable(path)
    folder = Path(path)
    if not folder.exists():
        try:
            name, revision = _located(path)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*WEIGHT_PATTERNS, "*.json"]))
        except _LOAD_ERRORS as error:
            raise UserError(f"model {path} could not be found: {_first_line(error)}") from error
    files = [file for pattern in WEIGHT_PATTERNS[:1] for file in sorted(folder.glob(pattern))]
    files = files or [file for pattern in WEIGHT_PATTERNS[1:] for file in sorted(folder.glob(pattern))]
    if not files:
        raise UserError(f"model {path} holds no weights ({', '.join(WEIGHT_PATTERNS)}): pass a saved model")
    facts = [(file.name, _content_sha256(file)) for file in files]
    base = adapter_base(folder)
    if base is not None:
        facts.append(("base", model_fingerprint(base)))
    return _sha256_json(facts)


def _content_sha256(file: Path) -> str:
    # The Hub cache names large files by their sha256, so there is no need to read tens of gigabytes again.
    target = file.resolve()
    if file.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    return sha256_file(file)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex sha256 of the vocabulary (token to id, added tokens included) and the chat template."""
    return _sha256_json([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])


def check_compatible(
    config: PretrainedConfig, instruct_config: PretrainedConfig, names: tuple[str, str] = ("base", "instruct")
) -> None:
    """Raise UserError if two models differ in a property without which their activations cannot be compared.

    Args:
        names: the names of the two models, for the error message.
    """
    first, second = config.get_text_config(), instruct_config.get_text_config()
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        value, instruct_value = getattr(first, name, None), getattr(second, name, None)
        if value != instruct_value:
            raise UserError(
                f"{names[0]} and {names[1]} differ in {name}: {value} and {instruct_value}; only models of the same "
                "architecture and size, of which one was trained from the other, can be compared"
            )


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
