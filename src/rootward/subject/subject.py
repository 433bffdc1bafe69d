"""`Subject`: a model, its documents, its objective and how it was trained."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from torch import Tensor, nn

from rootward.core.errors import ArtefactError, InputError
from rootward.core.hashing import digest_json
from rootward.core.progress import Progress, silent
from rootward.subject.checkpoints import Checkpoint, Moments, check_moments, checkpoint_of, read_moments
from rootward.subject.documents import Documents, load_documents
from rootward.subject.encode import Encoded
from rootward.subject.folders import default_objective, start_model
from rootward.subject.loading import base_of, is_adapter, load_model, model_hash
from rootward.subject.objectives import Objective
from rootward.subject.plan import Recipe, TrainingRecord
from rootward.subject.training import train

ADAPTER_PARAMETERS = r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\.modules_to_save\."
PLACEHOLDERS = ("documents", "out", "model", "seed")
WEIGHTS = ("*.safetensors", "*.bin")


def check_retrain(template: str) -> str:
    """The owner's command to retrain the subject: a template with {documents}, {out} and optionally {seed}.

    ``{model}`` is another name of ``{out}``. Returns it as given; raises `InputError` for an unknown or missing
    placeholder, or quotes and braces that do not close. Braces of the command itself are doubled.
    """
    try:
        fields = [
            (name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None
        ]
        shlex.split(template)
    except ValueError as error:
        raise InputError(
            f"retrain: {error} in {template!r}; write a brace of the command itself as {{{{ or }}}}"
        ) from error
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS or spec or conversion:
            raise InputError(
                f"retrain: unknown placeholder {{{name}}} in {template!r}; there are {{documents}}, "
                f"{{out}} (or {{model}}) and {{seed}}"
            )
    names = {name for name, _, _ in fields}
    names |= {"out"} if "model" in names else set()
    missing = [f"{{{name}}}" for name in ("documents", "out") if name not in names]
    if missing:
        raise InputError(
            f"retrain: expected {' and '.join(missing)} in {template!r}, so that the command knows what "
            "to read and write"
        )
    return template


class Subject:
    """A model, its documents, its objective, and the recipe or command that trains it again.

    Args:
        model: any `torch.nn.Module`.
        documents: what it was trained on; anything that `load_documents` takes.
        objective: how documents become losses.
        recipe: how it was trained, if that is known.
        checkpoints: folders of its weights during training, or `Checkpoint` values.
        start: for retraining a model from memory: a function that builds the untrained model, the same every time.
        retrain: the owner's command (`check_retrain`).
        parameters: regular expression for the parameters to attribute, of those that training changed.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: Any,
        objective: Objective,
        *,
        name: str = "subject",
        recipe: Recipe | None = None,
        record: TrainingRecord | None = None,
        base: Path | None = None,
        adapter_base: Path | str | None = None,
        path: Path | None = None,
        checkpoints: Sequence[Path | Checkpoint] = (),
        start: Callable[[], nn.Module] | None = None,
        retrain: str | None = None,
        parameters: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.model, self.objective = name, model, objective
        self.documents: Documents = load_documents(documents)
        self.encoded: Encoded = objective.encode(self.documents)
        self.recipe, self.record, self.base, self.path = recipe, record, base, path
        self.adapter_base = adapter_base
        self.checkpoints: tuple[Path | Checkpoint, ...] = tuple(checkpoints)
        self.retrain_command = check_retrain(retrain) if retrain is not None else None
        self.parameters = parameters or _default_parameters(model, recipe)
        self.notes: tuple[str, ...] = tuple(notes)
        self._start = start
        self._left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Subject({self.name!r}, {len(self.documents)} documents, {type(self.model).__name__})"

    @classmethod
    def load(
        cls,
        path: str | Path,
        documents: Any,
        *,
        base: str | Path | None = None,
        retrain: str | None = None,
        max_tokens: int | None = None,
        response_only: bool | None = None,
        parameters: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        start: str | Path | None = None,
        limit: int | None = None,
    ) -> Subject:
        """A causal language model from a folder, with its recipe and checkpoints where Rootward trained it.

        Args:
            path: a `from_pretrained` or PEFT adapter folder.
            documents: what it was trained on (file, folder or rows).
            base: folder of an adapter's base model.
            retrain: the owner's command, for a model trained elsewhere.
            max_tokens: longest document in tokens; by default that of the recorded training, or the context.
            response_only: train on replies only; by default as recorded, or True.
            parameters: regular expression for the parameters to attribute.
            device: where to put the model.
            dtype: type of the weights.
            limit: read at most this many documents.
            start: folder of the model that training began from, if trained elsewhere or if the record's has moved.

        Raises:
            InputError, ArtefactError: see `load_documents` and `load_model`.
        """
        path = Path(path)
        loaded = load_documents(documents, limit=limit)
        if retrain is not None:
            check_retrain(retrain)
        record = TrainingRecord.load(path) if path.is_dir() else None
        model, tokenizer = load_model(path, base=base, device=device, dtype=dtype)
        settings: dict[str, Any] = record.objective if record is not None else {}
        whole = settings.get("response_only", True) if response_only is None else response_only
        objective = default_objective(model, tokenizer, str(path), max_tokens or settings.get("max_tokens"), whole)
        notes: list[str] = []
        if record is not None and record.documents_hash != loaded.hash:
            notes.append(
                f"the documents differ from those of the recorded training ({record.documents} usable "
                "ones): it cannot be repeated with them"
            )
        if start is not None and not Path(start).is_dir():
            raise InputError(f"start = {start}: no such folder; expected the model that training began from")
        began = Path(start) if start is not None else Path(record.base) if record is not None and record.base else None
        return cls(
            model,
            loaded,
            objective,
            name=path.resolve().name,
            recipe=record.recipe if record else None,
            record=record,
            base=began,
            adapter_base=base_of(path, base) if is_adapter(path) else None,
            path=path,
            checkpoints=[path / name for name in record.checkpoints] if record else (),
            retrain=retrain,
            parameters=parameters,
            notes=notes,
        )

    @classmethod
    def trained(
        cls,
        start: Callable[[], nn.Module],
        documents: Any,
        objective: Objective,
        recipe: Recipe,
        *,
        name: str = "subject",
        parameters: str | None = None,
        progress: Progress = silent,
    ) -> Subject:
        """Train what ``start()`` builds on the documents by the recipe; checkpoints and moments stay in memory.

        Args:
            start: builds the untrained model, the same every time: it is called again for every retraining.
            documents: what to train on; anything that `load_documents` takes.
            objective: how documents become losses.
            recipe: how to train; its ``checkpoints`` say which are kept, ``lora`` has no meaning here.
            name: the subject's name.
            parameters: regular expression for the parameters to attribute.
            progress: told after every step.

        Raises:
            InputError: see `load_documents`; or the recipe asks for adapters.
            NumericalError: see `train`.
        """
        if recipe.lora is not None:
            raise InputError("recipe.lora: the start function has to build the adapters itself; leave it out")
        loaded, model, kept = load_documents(documents), start(), list[Checkpoint]()
        record = train(
            model,
            objective.encode(loaded),
            objective,
            recipe,
            progress=progress,
            on_checkpoint=lambda step, there, moments: kept.append(checkpoint_of(there, step, moments)),
            documents_hash=loaded.hash,
        )
        return cls(
            model.eval(),
            loaded,
            objective,
            name=name,
            recipe=recipe,
            record=record,
            checkpoints=kept,
            start=start,
            parameters=parameters,
        )

    def without(self, positions: Sequence[int], reason: str) -> Subject:
        """The same model and documents, of which those at these places of ``encoded`` are not used.

        They are counted in ``encoded.dropped`` under the reason and named in ``notes``, get no score, and are part of
        the `fingerprint`. What is worked out from the recipe (steps, rates) counts the documents that are left.

        Raises `InputError` where none is left.
        """
        gone = set(positions)
        kept = [example for n, example in enumerate(self.encoded) if n not in gone]
        if not kept:
            raise InputError(f"{self.name}: expected documents that can be used, none of {len(gone)} can ({reason})")
        if not gone:
            return self
        found = copy(self)
        found.encoded = Encoded(kept, {**self.encoded.dropped, reason: len(gone)})
        first = self.encoded[min(gone)]
        note = f"{len(gone)} documents left out, {reason}: first document {first.id} (row {first.row})"
        found.notes = (*self.notes, note)
        found._left_out = (*self._left_out, *(self.encoded[n].id for n in sorted(gone)))
        return found

    @property
    def device(self) -> torch.device:
        """Where the model's parameters lie."""
        return next(self.model.parameters()).device

    def fingerprint(self) -> dict[str, str]:
        """Hashes of all that decides a result: model, documents (in order), objective, parameters, dtype."""
        return {
            "model": model_hash(self.model),
            "documents": self.documents.hash,
            "objective": digest_json(self.objective.describe()),
            "parameters": self.parameters or "default",
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            **({"left out": digest_json(self._left_out)} if self._left_out else {}),
        }

    def origin(self) -> dict[str, str]:
        """Hashes of what else the training left: the start model's weights, each checkpoint's, and the recipe.

        Methods and baselines that look at the start or at checkpoints depend on them. They go by the files' bytes, so
        a folder that has moved is still the same; a start that is not there is "missing". What is in memory goes by
        its weights and moments.
        """
        found: dict[str, str] = {}
        if self._start is not None:
            found["start"] = model_hash(self.start_model())
        elif self.base is not None:
            found["start"] = _files_hash(self.base)
        for number, kept in enumerate(self.checkpoints):
            found[f"checkpoint {number}"] = _files_hash(kept) if isinstance(kept, Path) else _state_hash(kept)
        if self.recipe is not None:
            found["recipe"] = digest_json(self.recipe.model_dump(mode="json"))
        return found

    def start_model(self, seed: int | None = None) -> nn.Module:
        """A fresh copy of the model before training; ``seed`` replaces the recipe's (for new adapters).

        Without a recipe (a model trained elsewhere) it is what lies in the start's folder. Raises `InputError` where
        neither a start folder nor a start function is known.
        """
        if self._start is not None:
            model = self._start()
            if model is self.model:
                raise InputError(
                    f"{self.name}: the start function gave the subject's own model; it has to build a new one each time"
                )
            return model
        if self.base is None:
            raise InputError(
                f"{self.name}: no recipe and start are known, so it cannot be retrained here; give "
                f'retrain = "command {{documents}} {{out}}"'
            )
        if not self.base.is_dir():
            raise ArtefactError(
                f"{self.name}: training began from {self.base}, which is not there any more; give its "
                "folder: start = ..."
            )
        below = self.adapter_base if is_adapter(self.base) else None
        if self.recipe is None:
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            return load_model(self.base, base=below, device=self.device, dtype=dtype)[0]
        recipe = self.recipe if seed is None else self.recipe.with_seed(seed)
        return start_model(self.base, recipe, adapter_base=below, device=self.device)[0]

    @property
    def has_start(self) -> bool:
        """Whether the model that training began from is known: its folder, or a function that builds it."""
        return self._start is not None or self.base is not None

    @property
    def start_function(self) -> Callable[[], nn.Module] | None:
        """The function that gives the untrained model, None where a folder or a command does."""
        return self._start

    @property
    def can_retrain(self) -> bool:
        """Whether retraining is possible here: by recipe and start, or by the owner's command."""
        return self.retrain_command is not None or (self.recipe is not None and self.has_start)

    def _checkpoint(self, index: int) -> Path | Checkpoint:
        if not -len(self.checkpoints) <= index < len(self.checkpoints):
            raise InputError(f"{self.name}: expected a checkpoint from 0 to {len(self.checkpoints) - 1}, got {index}")
        return self.checkpoints[index]

    def moments(self, index: int) -> Moments | None:
        """What the optimiser remembered at ``checkpoints[index]``, by parameter name; None where it is not kept.

        Raises `ArtefactError` where it is damaged or belongs to another model.
        """
        kept = self._checkpoint(index)
        where = str(kept) if isinstance(kept, Path) else f"checkpoint {index}"
        found = read_moments(kept) if isinstance(kept, Path) else kept.moments
        return None if found is None else check_moments(found, self.model, where)

    @contextmanager
    def at_checkpoint(self, index: int) -> Iterator[Subject]:
        """The subject with the weights of ``checkpoints[index]``; afterwards its own, bit for bit."""
        kept = self._checkpoint(index)
        if isinstance(kept, Path):
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            state = load_model(kept, base=self.adapter_base, device=self.device, dtype=dtype)[0].state_dict()
        else:
            state = kept.state
        with self._with_weights(state, str(kept) if isinstance(kept, Path) else f"checkpoint {index}"):
            yield self

    @contextmanager
    def at_start(self) -> Iterator[Subject]:
        """The subject with the weights that training began from; afterwards its own, bit for bit."""
        with self._with_weights(self.start_model().state_dict(), "the start of training"):
            yield self

    @contextmanager
    def _with_weights(self, theirs: Mapping[str, Tensor], what: str) -> Iterator[None]:
        mine = self.model.state_dict()
        if set(mine) != set(theirs):
            raise ArtefactError(f"{what}: holds other weights than {self.name}: {sorted(set(mine) ^ set(theirs))[:3]}")
        kept = {name: value.clone() for name, value in mine.items()}
        try:
            self.model.load_state_dict(theirs)
            yield
        finally:
            self.model.load_state_dict(kept)


def _files_hash(folder: Path) -> str:
    """Hash of a model folder's weight files by name; "missing" without any."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    found: dict[str, str] = {}
    for path in files:
        with path.open("rb") as handle:
            found[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digest_json(found) if found else "missing"


def _state_hash(kept: Checkpoint) -> str:
    """Hash of a checkpoint in memory: its weights, and the moments where there are any."""
    moments = kept.moments
    first, second = ({}, {}) if moments is None else (moments.first, moments.second)
    result = hashlib.sha256()
    for part in (kept.state, first, second):
        for name, value in sorted(part.items()):
            result.update(f"{name}|{tuple(value.shape)}|{value.dtype}\n".encode())
            result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _default_parameters(model: nn.Module, recipe: Recipe | None) -> str | None:
    """What training changed: an adapter's weights, or what the recipe names; None leaves it to capture's default."""
    if hasattr(model, "peft_config"):
        return ADAPTER_PARAMETERS
    return recipe.parameters if recipe is not None and recipe.parameters != ".*" else None
