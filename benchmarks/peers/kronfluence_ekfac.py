"""Kronfluence: EK-FAC as its README shows it, default `FactorArguments` and `ScoreArguments`, all queries in one batch.

Its scores have the other sign, <grad L_q, (G + damping)^-1 grad L_n>. ``method``: any strategy of kronfluence
("ekfac", "kfac", "diagonal", "identity"). A relative damping is its own heuristic (``damping_factor=None``: a fraction
of each module's mean eigenvalue, 0.1 in the release) with another fraction.
"""

from __future__ import annotations

from typing import Any

import torch
from exchange import Answer, class_losses, token_losses
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor import config as factor_config
from kronfluence.task import Task as KronfluenceTask
from torch import Tensor, nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """Tensors with one row per document."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)


class Losses(KronfluenceTask):
    """Summed losses; with ``sample`` the labels come from the model (true Fisher)."""

    def __init__(self, causal: bool, modules: list[str]) -> None:
        self.causal, self.modules = causal, modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Loss of a batch."""
        if self.causal:
            ids, trained = batch
            return token_losses(model(input_ids=ids, use_cache=False).logits, ids, trained, sample)
        x, y = batch
        return class_losses(model(x), y, sample)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The queries' own loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """The modules of the task."""
        return self.modules


def main() -> None:
    """Factors once, then scores for every damping."""
    answer = Answer("kronfluence")
    task, data = answer.task, answer.data
    causal = task.kind == "causal_lm"
    names = ("train_ids", "train_trained", "query_ids", "query_trained") if causal else ("x", "y", "query_x", "query_y")
    documents, queries = Rows(*(data[n] for n in names[:2])), Rows(*(data[n] for n in names[2:]))
    losses = Losses(causal, list(task.modules))
    model = prepare_model(answer.model, losses)
    output = str(answer.folder / "kronfluence")
    analyzer = Analyzer("peer", model, losses, cpu=True, disable_tqdm=True, output_dir=output)
    with answer.timed("factors"):
        analyzer.fit_all_factors(
            "factors",
            documents,
            per_device_batch_size=task.batch,
            factor_args=FactorArguments(strategy=task.method or "ekfac"),
        )
    scores = []
    for k, damping in enumerate(task.damping):
        relative = task.damping_kind == "relative"
        if relative:
            factor_config.HEURISTIC_DAMPING_SCALE = damping
        with answer.timed("scores"):
            analyzer.compute_pairwise_scores(
                scores_name=f"scores{k}",
                factors_name="factors",
                query_dataset=queries,
                train_dataset=documents,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=task.batch,
                score_args=ScoreArguments(damping_factor=None if relative else damping),
            )
            found: Any = analyzer.load_pairwise_scores(f"scores{k}")
            scores.append(-found["all_modules"])
    answer.write(scores)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
