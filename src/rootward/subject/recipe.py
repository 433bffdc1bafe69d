"""The training recipe, its record and the training itself under one name (`plan`, `training`, `folders`)."""

from rootward.subject.folders import default_objective, save_model, start_model, train_folder
from rootward.subject.plan import RECORD, Lora, Recipe, TrainingRecord, order
from rootward.subject.training import deterministic, step_loss, train, trained_parameters

__all__ = [
    "RECORD",
    "Lora",
    "Recipe",
    "TrainingRecord",
    "default_objective",
    "deterministic",
    "order",
    "save_model",
    "start_model",
    "step_loss",
    "train",
    "train_folder",
    "trained_parameters",
]
