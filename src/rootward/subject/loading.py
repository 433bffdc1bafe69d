"""Models from disk: a `from_pretrained` folder or a PEFT adapter folder. Never from the network.

What the libraries only warn about is an error here: a weight that the folder lacks (it would stay random),
adapter weights that did not arrive in the model, a tokenizer with ids that the model does not have.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rootward.core.errors import ArtefactError, InputError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ADAPTER = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def parse_dtype(name: str) -> torch.dtype:
    """Name to type; `InputError` lists the names."""
    if name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse_device(name: str | torch.device) -> torch.device:
    """Device by name; `InputError` for one that does not exist here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected 'cpu', 'cuda' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {name!r} was asked for and this torch sees no CUDA device; use device = 'cpu'")
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars; put back as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft asks transformers for a property under its old name; nothing a user could act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_config(path: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model folder; missing or damaged is an `ArtefactError`."""
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: expected a model folder with {name}, found none") from error
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{path / name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path / name}: expected a JSON object, got {type(value).__name__}")
    return value


def is_adapter(path: str | Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (Path(path) / ADAPTER).exists()


def base_of(path: str | Path, base: str | Path | None = None) -> Path | str:
    """The base model of an adapter folder: the argument, else what the adapter names.

    A name that is no folder is returned as it is, for the local model cache. Raises `ArtefactError` if
    nothing is named.
    """
    path = Path(path)
    if base is not None:
        if not Path(base).is_dir():
            raise ArtefactError(
                f"base = {str(base)!r}: no such folder; it should hold the model that the adapter {path} was trained on"
            )
        return Path(base).resolve()
    named = read_config(path, ADAPTER).get("base_model_name_or_path")
    if not named:
        raise ArtefactError(f'{path}: the adapter does not name its base model; give it: base = "path/to/base"')
    for candidate in (Path(named), path / named, path.parent / named):
        if (candidate / "config.json").exists():
            return candidate.resolve()
    return str(named)


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    attention: str | None = None,
) -> tuple[nn.Module, Any | None]:
    """A causal language model and its tokenizer (None if the folder has none), in eval mode.

    Args:
        path: a `from_pretrained` folder, or a PEFT adapter folder. Of an adapter the adapter's weights are
            trainable and the base's are not.
        base: folder of the adapter's base model, where the adapter names none or another place.
        device: where to put it.
        dtype: type of the weights, a name of `DTYPES`.
        attention: transformers' attention implementation ("sdpa", "eager"); None leaves its choice.

    Raises:
        ArtefactError: something is missing, damaged, or does not belong together; the message says what to
            give.
    """
    path, where, kind = Path(path), parse_device(device), parse_dtype(dtype)
    if not path.is_dir():
        raise ArtefactError(f"{path}: no such model folder")
    with quiet():
        if is_adapter(path):
            model, tokenizer = _load_adapter(path, base, kind, attention)
        else:
            model, tokenizer = _load_full(path, kind, attention), load_tokenizer(path)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer, str(path))
    return model.to(where).eval(), tokenizer


def _load_full(path: Path | str, dtype: torch.dtype, attention: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if isinstance(path, Path):
        read_config(path, "config.json")
        if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            raise ArtefactError(f"{path}: has config.json and no weights; expected model.safetensors or its shards")
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path), local_files_only=True, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged shard raises one of five libraries' own types
        raise ArtefactError(
            f"{path}: cannot be loaded as a causal language model: {type(error).__name__}: {error}"
        ) from error
    model, info = loaded
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ArtefactError(
            f"{path}: {len(missing)} weights are missing and would be random, first {missing[0]}; save the model again"
        )
    return model


def _load_adapter(
    path: Path, base: str | Path | None, dtype: torch.dtype, attention: str | None
) -> tuple[nn.Module, Any | None]:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    found = base_of(path, base)
    try:
        inner = _load_full(found, dtype, attention)
    except ArtefactError as error:
        raise ArtefactError(
            f'{path}: the adapter\'s base model could not be loaded; give its folder: base = "path/to/base" ({error})'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns about is checked below, as an error
            model = PeftModel.from_pretrained(
                inner, str(path), is_trainable=True, local_files_only=True, torch_device="cpu"
            )
            stored = load_peft_weights(str(path), device="cpu", local_files_only=True)
    except Exception as error:  # peft, safetensors and torch each have their own types
        raise ArtefactError(
            f"{path}: the adapter does not load on the base {found}: {type(error).__name__}: {error}"
        ) from error
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(set(live) ^ set(stored)) or sorted(
        k for k in live if not torch.equal(live[k].cpu(), stored[k].to(live[k].dtype))
    )
    if wrong:
        raise ArtefactError(
            f"{path}: {len(wrong)} adapter weights did not arrive in the model, first {wrong[0]}; is {found} its base?"
        )
    return model.to(dtype), load_tokenizer(path) or (load_tokenizer(found) if isinstance(found, Path) else None)


def load_tokenizer(path: Path) -> Any | None:
    """The folder's tokenizer, None if it has none; `ArtefactError` if it is damaged."""
    if not any((path / name).exists() for name in _TOKENIZER):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ArtefactError(f"{path}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error


def check_vocabulary(model: nn.Module, tokenizer: Any, where: str) -> None:
    """`ArtefactError` if the tokenizer can give an id that the model's embedding does not have."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ArtefactError(
            f"{where}: the tokenizer's highest id is {highest} and the model's vocabulary has {rows} "
            "entries; they do not belong together"
        )


def context_of(model: nn.Module) -> int | None:
    """Longest input in tokens by the model's config, None if it names none."""
    config: Any = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters and buffers, sorted by name."""
    result = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        result.update(f"{name}|{tuple(value.shape)}|{value.dtype}\n".encode())
        result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
