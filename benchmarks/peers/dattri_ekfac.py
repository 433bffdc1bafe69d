"""Dattri: `IFAttributorEKFAC`, and by ``method`` "trak" (`TRAKAttributor`) or "arnoldi" (`IFAttributorArnoldi`).

Classification only: in 0.3.0 EK-FAC's covariance fails on inputs with a token axis. It is run as released, which means
with eigenvectors applied transposed, and with weights and biases laid end to end where a weight's column is meant.
EK-FAC takes the Fisher matrix of the labels that it is given: those of the data, as in its examples; "ekfac_sampled"
hands labels drawn from the model to the fit instead. A relative damping is times the mean of all eigenvalues, and for
the other two methods, which know no such mean, damping must be absolute.

Its scores have the other sign: <grad, inverse grad> of losses, or of margins (TRAK), which fall where losses rise.
"""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.influence_function import IFAttributorArnoldi, IFAttributorEKFAC
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from exchange import Answer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 1024  # documents whose gradients are alive at a time in scoring: it repeats the queries' for every batch


def _tasks(model: nn.Module) -> tuple[AttributionTask, AttributionTask, Any]:
    """Attribution of the mean loss, of the margin, and the probability of the right class."""
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(params: Any, data: Any) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, data[0]), data[1])

    def negative_log(params: Any, data: Any) -> Tensor:
        return loss(params, (data[0].unsqueeze(0), data[1].unsqueeze(0)))

    def margin(params: Any, data: Any) -> Tensor:
        nll = negative_log(params, data)  # log(p / (1 - p))
        return -nll - torch.log(-torch.expm1(-nll))

    def probability(params: Any, data: Any) -> Tensor:
        return torch.exp(-negative_log(params, data))

    return AttributionTask(loss, model, state), AttributionTask(margin, model, state), probability


def main() -> None:
    """Fit and score."""
    answer = Answer("dattri")
    task, data, model = answer.task, answer.data, answer.model
    method = task.method or "ekfac"
    if task.kind != "classification":
        raise SystemExit("expected a classification task: dattri's EK-FAC takes no other")
    if method in ("trak", "arnoldi") and task.damping_kind != "absolute":
        raise SystemExit(f"expected absolute damping for {method}")
    documents = TensorDataset(data["x"], data["y"])
    queries = DataLoader(TensorDataset(data["query_x"], data["query_y"]), batch_size=len(data["query_x"]))
    loss_task, margin_task, probability = _tasks(model)
    scoring = DataLoader(documents, batch_size=min(len(documents), BATCH))
    scores: list[Tensor] = []
    if method.startswith("ekfac"):
        fitted = documents
        if method == "ekfac_sampled":
            with torch.no_grad():
                fitted = TensorDataset(data["x"], torch.multinomial(model(data["x"]).softmax(-1), 1).squeeze(-1))
        attributor = IFAttributorEKFAC(loss_task, module_name=list(task.modules), device="cpu")
        with answer.timed("factors"):
            attributor.cache(DataLoader(fitted, batch_size=task.batch))
        mean = torch.cat([v.flatten() for v in attributor.cached_lambdas.values()]).mean().item()
        for damping in task.damping:
            attributor.damping = damping * (mean if task.damping_kind == "relative" else 1.0)
            with answer.timed("scores"):
                scores.append(-attributor.attribute(scoring, queries).T)
    else:
        for damping in task.damping:
            if method == "trak":
                settings = {"proj_seed": task.seed, **task.options}
                attributor = TRAKAttributor(margin_task, probability, settings, regularization=damping)
            else:
                settings = {"seed": task.seed, **task.options}
                attributor = IFAttributorArnoldi(loss_task, regularization=damping, **settings)
            with answer.timed("factors"):
                attributor.cache(DataLoader(documents, batch_size=task.batch))
            with answer.timed("scores"):
                found = attributor.attribute(queries) if method == "trak" else attributor.attribute(scoring, queries)
                scores.append(-found.T)
    answer.write(scores)


if __name__ == "__main__":
    main()
