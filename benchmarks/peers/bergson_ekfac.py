"""Bergson: its EK-FAC pipeline (`bergson ekfac`: K-FAC with eigenvalue correction), in this process, float32.

Causal language models only: the pipeline reads a transformers model and a tokenised data set from disk. Its scores are
of the other sign (``higher_is_better``: a proponent's is positive). Every damping after the first resumes the pipeline
with the query gradients and the factors in place. Its own time includes that it reads the model anew for each step.

The pipeline refuses batches of more tokens than the model has positions. Rotary embeddings do not depend on that
number, so the configuration beside the weights says as many as a batch has tokens; other models get smaller batches.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.config.config import DataConfig as BergsonData
from bergson.config.config import (
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians import pipeline
from datasets import Dataset
from exchange import Answer
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast


def _save_dataset(ids: Tensor, trained: Tensor, folder: Path) -> str:
    """A tokenised data set on disk; untrained tokens are labelled -100."""
    labels = ids.masked_fill(~trained, -100)
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": [ids.shape[1]] * len(ids)}
    Dataset.from_dict(columns).save_to_disk(folder)
    return str(folder)


def _save_model(source: Path, folder: Path, config: PretrainedConfig, tokens: int) -> tuple[str, int]:
    """The same weights, a tokenizer (it is asked for and not used), and room for ``tokens``; returns what there is."""
    shutil.copytree(source, folder)
    if getattr(config, "rope_parameters", None) and config.rope_parameters.get("rope_type") == "default":
        config.max_position_embeddings = max(tokens, config.max_position_embeddings)
        config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(config.vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    return str(folder), min(tokens, config.max_position_embeddings)


def main() -> None:
    """Query gradients, factors, and scores for every damping."""
    answer = Answer("bergson")
    task, data, folder = answer.task, answer.data, answer.folder / "bergson"
    if task.kind != "causal_lm":
        raise SystemExit("expected a causal language model: bergson's EK-FAC pipeline takes no other")
    names = {name for name, m in answer.model.named_modules() if isinstance(m, nn.Linear)}
    prefix = answer.model.base_model_prefix + "."
    unwanted = ",".join(sorted(name.removeprefix(prefix) for name in names - set(task.modules))) or None
    room = task.batch * data["train_ids"].shape[1]
    model, room = _save_model(answer.folder / "model", folder / "model", answer.model.config, room)
    documents = _save_dataset(data["train_ids"], data["train_trained"], folder / "documents")
    queries = _save_dataset(data["query_ids"], data["query_trained"], folder / "queries")
    answer.model = None

    fit = pipeline.approximate_hessians

    def timed_fit(*arguments: Any) -> Any:
        with answer.timed("factors"):
            return fit(*arguments)

    pipeline.approximate_hessians = timed_fit
    run, method = folder / "run", "kfac"
    scores = []
    start = time.perf_counter()
    for k, damping in enumerate(task.damping):
        if k:  # the factors and the query gradients stay
            shutil.rmtree(run / f"{method}_query")
            shutil.rmtree(run / "scores")
        inversion = "damped_inverse" if task.damping_kind == "relative" else "absolute_damped_inverse"
        pipeline.hessian_pipeline(
            IndexConfig(
                str(run), model=model, data=BergsonData(documents), token_batch_size=room, filter_modules=unwanted
            ),
            HessianConfig(method=method, ev_correction=task.method != "kfac"),
            ScoreConfig(),
            PreprocessConfig(),
            HessianPipelineConfig(
                query=QuerySetConfig(dataset=queries),
                inversion_cfg=InversionConfig(inversion, damping, apply_batch_size=len(data["query_ids"])),
                resume=k > 0,
            ),
        )
        found = np.array(load_scores(run / "scores")[:], dtype=np.float32)
        scores.append(-torch.from_numpy(found).view(len(data["train_ids"]), -1).T)
    answer.seconds["scores"] = time.perf_counter() - start - answer.seconds["factors"]
    answer.write(scores)


if __name__ == "__main__":
    main()
