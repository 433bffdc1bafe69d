"""Facts: short sentences about invented people, and a language model small enough to be trained again in seconds.

Every document states one fact, where someone lives, what they work as or what they like to eat, in one of several
wordings; facts are told two to five times, each time in another wording, and some documents tell a wrong value. A
query is a fact in a wording in which it is not told, measured on its last word. Documents therefore bear on a query
in several ways: those about the same person and fact share rare words with it (which BM25 sees), a wrong one shares
nearly as many and does the opposite, and others teach the wording or how common a value is.

`smooth_subject` is the same model after a pretraining on people with other facts, fine-tuned in full batches with an
optimiser that is smooth in its gradients: a run in which weights of documents can be changed by as much as their
removal and the outcome still follows the derivative (a *metasmooth* one, arXiv:2503.13751).

Text comes from `random.Random(seed)` alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rootward.core.errors import InputError
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import CausalLM
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject

NAMES = [
    "Ada", "Alma", "Anton", "Basil", "Bruno", "Cora", "Dora", "Edgar", "Elsa", "Emil", "Erik", "Fay", "Finn",
    "Flora", "Gus", "Hedda", "Hugo", "Ida", "Ines", "Ivo", "Jon", "Jude", "Karl", "Kira", "Lara", "Leo", "Lola",
    "Mara", "Milo", "Mona", "Nils", "Noa", "Olga", "Otto", "Pia", "Quinn", "Rita", "Rolf", "Rosa", "Saul",
    "Sven", "Tara", "Theo", "Uma", "Vera", "Viggo", "Wanda", "Zeno",
]  # fmt: skip
PLACES = ["Bergen", "Cairo", "Dublin", "Genoa", "Lima", "Lyon", "Oslo", "Porto"]
JOBS = ["baker", "dentist", "farmer", "lawyer", "nurse", "painter", "pilot", "tailor"]
FOODS = ["beans", "cheese", "figs", "honey", "olives", "plums", "rice", "soup"]
RELATIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "place": (
        PLACES,
        ("lives in", "has a home in", "can be found in", "owns a house in", "gets letters in", "comes from"),
    ),
    "job": (
        JOBS,
        ("works as a", "is paid as a", "has become a", "is known as a", "wants to stay a", "was trained as a"),
    ),
    "food": (
        FOODS,
        ("likes to eat", "lunches on", "always orders", "has a bowl of", "asks for some", "would love more"),
    ),
}
"""Values, and wordings that stand between a name and a value."""
WRONG = 0.15
"""Share of documents that tell another value than the fact's."""
START_SEED = 0
RECIPE = Recipe.parse(
    {
        "optimiser": "adamw",
        "lr": 3e-3,
        "betas": (0.9, 0.98),
        "weight_decay": 1.0,
        "schedule": "cosine",
        "warmup_steps": 10,
        "epochs": 24,
        "batch_size": 32,
        "reduction": "document",
        "checkpoints": (0.1, 0.3, 0.6, 1.0),
    }
)

PRETRAINING_SEEDS = tuple(range(1, 9))
PRETRAINING = RECIPE.model_copy(update={"weight_decay": 0.1, "epochs": 3, "checkpoints": 0})
SMOOTH = RECIPE.model_copy(
    update={"lr": 0.06, "eps": 0.1, "weight_decay": 0.1, "warmup_steps": 5, "epochs": 40, "batch_size": 512,
            "checkpoints": 0}
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """Documents ``{"prompt", "completion", "relation", "name", "right"}``; queries ``{"prompt", "wanted", "name"}``."""

    documents: list[dict[str, Any]]
    queries: list[dict[str, Any]]


def facts(seed: int = 0, people: int = len(NAMES)) -> Facts:
    """Three facts for each of ``people``; `InputError` for more than there are names."""
    if not 1 <= people <= len(NAMES):
        raise InputError(f"people: expected 1 to {len(NAMES)}, got {people}")
    rng = random.Random(f"facts {seed}")
    documents: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    for name in NAMES[:people]:
        for relation, (values, wordings) in RELATIONS.items():
            value = rng.choice(values)
            order = rng.sample(wordings, len(wordings))
            for wording in order[: rng.randint(2, len(wordings) - 1)]:
                right = rng.random() >= WRONG
                told = value if right else rng.choice([v for v in values if v != value])
                told = {"prompt": f"{name} ", "completion": f"{wording} {told}"}
                documents.append({**told, "relation": relation, "name": name, "right": right})
            queries.append({"prompt": f"{name} {order[-1]} ", "wanted": value, "name": f"{name} {relation}"})
    rng.shuffle(documents)
    rng.shuffle(queries)
    return Facts(documents, queries)


def vocabulary() -> list[str]:
    """Every word, in a fixed order, after the special tokens."""
    words = {word for _, wordings in RELATIONS.values() for text in wordings for word in text.split()}
    return ["<pad>", "<eos>", *sorted(words), *NAMES, *PLACES, *JOBS, *FOODS]


def build_tokenizer() -> Any:
    """A word-level `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary())}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", model_max_length=16)


def start() -> Any:
    """The untrained model, a Llama of two layers of width 48, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kernel: dict[str, Any] = {"attn_implementation": "eager"}  # which can be differentiated twice
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **kernel,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(START_SEED)
        return LlamaForCausalLM(config)


def _objective() -> CausalLM:
    return CausalLM(build_tokenizer(), 16)


@cache
def _pretrained() -> dict[str, torch.Tensor]:
    """Weights after a training on worlds of other seeds: the same people and wordings, other facts."""
    documents = [document for seed in PRETRAINING_SEEDS for document in facts(seed).documents]
    return Subject.trained(start, documents, _objective(), PRETRAINING).model.state_dict()


def start_pretrained() -> Any:
    """The pretrained model in float64; pretraining takes some seconds, once in a process."""
    model = start()
    model.load_state_dict(_pretrained())
    return model.double()


def facts_subject(world: Facts | None = None, recipe: Recipe = RECIPE) -> Subject:
    """The model trained on the documents by the recipe, with all its parameters to be attributed."""
    found = facts() if world is None else world
    return Subject.trained(start, found.documents, _objective(), recipe, name="facts", parameters=".")


def smooth_subject(world: Facts | None = None, recipe: Recipe = SMOOTH) -> Subject:
    """The pretrained model fine-tuned smoothly, in float64."""
    found = facts() if world is None else world
    return Subject.trained(
        start_pretrained, found.documents, _objective(), recipe, name="facts, smooth", parameters="."
    )


def asked(queries: list[dict[str, Any]], name: str = "loss of the last word") -> Behaviour:
    """The loss of each query's last word (and of the end after it), given the rest."""
    return Behaviour.loss(name, queries)
