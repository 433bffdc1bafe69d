"""LogIX: K-FAC, and by ``method`` "ekfac" or "logra" (random Kronecker projection of rank 64, Fisher of its gradients).

LogIX 0.1.1 declares Python < 3.11 and runs on 3.11 when installed regardless. It attributes weights, not biases, and
takes the Fisher matrix of the data's own labels. Full gradients are scored as they are logged, batch by batch (on
disk they would be as large as documents x weights); LoGra's small ones are stored and read back, as LogIX has it.

Damping is one absolute number for all modules; a relative one is times the mean of all eigenvalues that it fitted.
Its scores have the other sign, <(G + damping)^-1 grad L_q, grad L_n>. The modules of a causal language model must be
told apart by their names from those not asked for, since it looks for names within names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from exchange import Answer, class_losses, token_losses
from logix import LogIX, LogIXScheduler
from torch import Tensor


def _batches(answer: Answer, names: tuple[str, ...], size: int) -> Iterator[tuple[list[str], tuple[Tensor, ...]]]:
    """Names of rows, and the rows."""
    tensors = [answer.data[n] for n in names]
    for first in range(0, len(tensors[0]), size):
        rows = tuple(t[first : first + size] for t in tensors)
        yield [str(first + k) for k in range(len(rows[0]))], rows


def _log(run: LogIX, answer: Answer, ids: list[str], rows: tuple[Tensor, ...]) -> None:
    """One batch under LogIX's hooks."""
    model, (inputs, labels) = answer.model, rows
    with run(data_id=ids):
        model.zero_grad()
        if answer.task.kind == "causal_lm":
            token_losses(model(input_ids=inputs, use_cache=False).logits, inputs, labels).backward()
        else:
            class_losses(model(inputs), labels).backward()


def _mean_eigenvalue(run: LogIX, modules: list[str]) -> float:
    """Mean over all eigenvalues of the Fisher matrix that LogIX fitted."""
    total, count = 0.0, 0
    for name in modules:
        factors = run.state.get_state("covariance_state")[name]
        if "grad" in factors:
            values = factors["grad"].diagonal()
        elif hasattr(run.state, "ekfac_eigval_state"):
            values = run.state.get_state("ekfac_eigval_state")[name]
        else:
            values = torch.outer(factors["backward"].diagonal(), factors["forward"].diagonal())
        total, count = total + values.sum().item(), count + values.numel()
    return total / count


def main() -> None:
    """Fit, log the queries, and score the documents for every damping."""
    answer = Answer("logix-ai")
    task, model = answer.task, answer.model
    method = task.method or "kfac"
    lm = task.kind == "causal_lm"
    documents, queries = (
        (("train_ids", "train_trained"), ("query_ids", "query_trained")) if lm else (("x", "y"), ("query_x", "query_y"))
    )
    logra = method == "logra"
    work = answer.folder / "logix"
    work.mkdir()
    settings = work / "config.yaml"
    settings.write_text(f"root_dir: {work}\n")
    run = LogIX("peer", str(settings))
    run.watch(model, name_filter=list(task.modules))
    scheduler = LogIXScheduler(
        run, lora="random" if logra else "none", hessian="raw" if logra else method, save="grad" if logra else "none"
    )
    with answer.timed("factors"):
        for _ in scheduler:
            for ids, rows in _batches(answer, documents, task.batch):
                _log(run, answer, ids, rows)
            run.finalize()
        if not logra:
            run.state.get_covariance_svd_state()
    watched = list(run.logger.modules_to_name.values())
    if len(watched) != len(task.modules):
        raise SystemExit(f"expected {len(task.modules)} modules, LogIX watches {len(watched)}: {watched}")
    with answer.timed("scores"):
        run.eval()
        run.setup({"grad": ["log"]})
        ((ids, rows),) = _batches(answer, queries, len(answer.data[queries[0]]))
        _log(run, answer, ids, rows)
        query_log = run.get_log(copy=True)
    mean = _mean_eigenvalue(run, watched) if task.damping_kind == "relative" else 1.0
    answer.write(_scores(run, answer, query_log, documents, [d * mean for d in task.damping], logra))


def _scores(
    run: LogIX, answer: Answer, query_log: Any, documents: tuple[str, ...], dampings: list[float], stored: bool
) -> list[Tensor]:
    """Scores ``[q,n]`` in our sign, per absolute damping."""
    with answer.timed("scores"):
        hessian = "raw" if stored else "kfac"
        solved = []
        for damping in dampings:
            eigenvalues = getattr(run.state, "ekfac_eigval_state", None)
            kept = {k: v.clone() for k, v in eigenvalues.items()} if eigenvalues else {}
            if stored:  # the inverse that it finds in place it would take for any damping
                run.state.covariance_inverse(damping)
            solved.append(run.influence.precondition(query_log, damping=damping, hessian=hessian))
            if eigenvalues:  # it adds the damping to its own eigenvalues, where the next damping would find it
                eigenvalues.update(kept)
        if stored:
            loader = run.build_log_dataloader(batch_size=64)
            found: list[Any] = [run.compute_influence_all(q, loader, precondition=False)["influence"] for q in solved]
            return [-scores for scores in found]
        parts: list[list[Any]] = [[] for _ in dampings]
        for ids, rows in _batches(answer, documents, answer.task.batch):
            _log(run, answer, ids, rows)
            log = run.get_log()
            for part, query in zip(parts, solved, strict=True):
                part.append(run.compute_influence(query, log, precondition=False)["influence"])
        return [-torch.cat(part, dim=1) for part in parts]


if __name__ == "__main__":
    main()
