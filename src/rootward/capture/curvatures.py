"""The curvature that a method is given: fitted once for what several methods share, or read from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rootward.capture.fit import SAMPLING, Fit, FitConfig, FitRecord, Fitted
from rootward.capture.fitparts import Parts
from rootward.capture.inputs import MethodInputs
from rootward.capture.joint import fit_joint
from rootward.capture.rescaling import Scale
from rootward.core.errors import InputError
from rootward.core.hashing import digest_json
from rootward.core.registry import MethodConfig
from rootward.curvature.base import Damping
from rootward.curvature.joint import JointCurvature
from rootward.curvature.saved import (
    check_curvature,
    has_curvature,
    load_curvature,
    load_joint,
    save_curvature,
    save_joint,
)


class FitOptions(MethodConfig):
    """The options of a method that fits a curvature: what begins with ``fit_`` decides how its factors are made."""

    fit_labels: Literal["auto", "data", "sampled", "exact"] = Field(
        default="auto", description="auto: all labels by probability where outputs are few, else sampled from the model"
    )
    fit_draws: int = Field(default=1, ge=1, description="labels sampled per document")
    fit_documents: int | None = Field(default=None, ge=1, description="by default as many as fit_agreement needs")
    fit_covariance_documents: int | None = Field(default=None, ge=1, description="by default by tokens per width")
    fit_agreement: float = Field(default=0.98, gt=0, lt=1, description="with scores from an endless sample")
    fit_seed: int = Field(default=0, ge=0, description="of the sampled labels and documents")
    fit_bf16: Literal["auto", "never"] = Field(
        default="auto", description="auto: wide products of the fit in bfloat16 where the processor has it"
    )

    def fit_config(self, kind: Literal["diagonal", "kfac", "ekfac"]) -> FitConfig:
        """How a curvature of this kind is fitted with these options."""
        return FitConfig(
            kind=kind,
            labels=self.fit_labels,
            draws=self.fit_draws,
            documents=self.fit_documents,
            covariance_documents=self.fit_covariance_documents,
            agreement=self.fit_agreement,
            seed=self.fit_seed,
            bf16=self.fit_bf16,
        )


def kept_in(folder: str | None, checkpoint: int | None) -> Path | None:
    """Where a checkpoint's curvature is: in a folder below the given one, which has that of the subject's own weights.

    None for ``checkpoint`` is the subject's own weights; without a folder nothing is kept.
    """
    if folder is None:
        return None
    return Path(folder) if checkpoint is None else Path(folder) / f"checkpoint-{checkpoint}"


def curvature_key(inputs: MethodInputs, config: FitConfig, scales: Mapping[str, Scale] | None = None) -> dict[str, Any]:
    """All that decides a curvature: model, documents, objective, parameters, coordinates and the fit's config."""
    found: dict[str, Any] = {**inputs.subject.fingerprint(), "layout": inputs.tracked.layout.hash}
    if scales is not None:
        sides = [float(side.double().sum()) for name in inputs.tracked.layout.names for side in scales[name]]
        found["scales"] = digest_json(sides)[:16]
    # what "auto" means here: two machines must not share a key for different numbers
    settings = {**config.model_dump(mode="json"), "bf16": config.quick(inputs.subject.model), "sampling": SAMPLING}
    return found | {f"fit.{name}": value for name, value in settings.items()}


def fitted(
    inputs: MethodInputs,
    config: FitConfig,
    damping: Damping,
    folder: Path | None = None,
    scales: Mapping[str, Scale] | None = None,
) -> Fitted:
    """The curvature at the subject's present weights.

    Args:
        inputs: model, documents and batches; what was fitted before with the same inputs is used again.
        config: how it is fitted.
        damping: what the curvature has by default; how it is fitted does not depend on it.
        folder: read it from here; where there is none, fit it and keep it here. A fit that was stopped goes on.
        scales: rescale gradients first.

    Raises:
        InputError: the folder is a file.
        ArtefactError: the folder holds a curvature of another model, other documents or settings.
        NumericalError: a loss or covariance that is not finite.
    """
    if folder is not None:
        _check_folder(folder)
    key = curvature_key(inputs, config, scales)
    identity = digest_json(key)
    kept = folder is not None and has_curvature(folder)
    if folder is not None and kept:
        check_curvature(folder, key)
    found: Fitted
    if identity in inputs.fits:
        found = inputs.fits[identity]
    elif folder is not None and kept:
        curvature, record = load_curvature(folder, key)
        found = Fitted(curvature, FitRecord.model_validate(record))
    else:
        parts = None if folder is None else Parts(folder, identity, str(inputs.subject.device))
        found = replace(_fit(inputs, config, scales), parts=parts).run()
    if folder is not None and not kept:
        save_curvature(folder, found.curvature, key, found.record.model_dump(mode="json"))
        Parts(folder, identity).clear()
    inputs.fits[identity] = found
    return replace(found, curvature=found.curvature.damped(damping))


def _check_folder(folder: Path) -> None:
    """`InputError` where the folder, or what it is to lie in, is a file: before the fit, not after its first part."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise InputError(f"folder: expected a folder, got a file {there}; give a folder, which is made if need be")


def joined(
    inputs: MethodInputs, config: FitConfig, base: Fitted, count: int, folder: Path | None = None
) -> JointCurvature:
    """The ``count`` largest entries of the eigenbasis of the EK-FAC fitted with this config, taken jointly.

    At the subject's present weights, with the base's damping over the whole matrix; kept in the base's ``folder``.
    """
    key = digest_json({**curvature_key(inputs, config), "joint": count})
    if key not in inputs.fits:
        kept = None if folder is None else load_joint(folder, base.curvature, key)
        inputs.fits[key] = kept or fit_joint(_fit(inputs, config, None), base.curvature, count)
        if folder is not None and kept is None:
            save_joint(folder, inputs.fits[key], key)
    found: JointCurvature = inputs.fits[key]
    return found.damped(replace(base.curvature.damping, scope="whole"))


def _fit(inputs: MethodInputs, config: FitConfig, scales: Mapping[str, Scale] | None) -> Fit:
    subject = inputs.subject
    return Fit(
        subject.model,
        subject.objective,
        subject.encoded,
        inputs.tracked,
        config,
        token_budget=inputs.token_budget,
        progress=inputs.progress,
        scales=scales,
    )
