"""What most commands begin with: their settings, the subject, and whether the output folder may be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootward.cli.config import config_text, parse_options, resolve
from rootward.cli.output import Talk, clean, shown
from rootward.cli.settings import Settings, SubjectSettings
from rootward.core.errors import InputError

if TYPE_CHECKING:
    from rootward.subject.subject import Subject

COMMON = ("config", "config_option", "json", "quiet", "debug", "overwrite", "print_config", "dry_run")
LISTS = {"method": "methods", "baseline": "baselines"}


def settings_of(command: str, given: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Any:
    """The command's settings from what was typed; ``extra`` replaces some of it."""
    flags = {key: value for key, value in given.items() if key not in COMMON} | dict(extra or {})
    for flag, name in LISTS.items():
        if flag in flags:
            flags[name] = flags.pop(flag)
    if "option" in flags:
        flags["options"] = parse_options(flags.pop("option"), "--option", depth=2)
    if flags.pop("no_report", False):
        flags["report"] = False
    for key in ("retain", "same_queries", "allow_few", "skip_not_finite"):  # not thrown: the file's word
        if flags.get(key) is False:
            flags[key] = None
    file = given.get("config") or given.get("config_option")
    return resolve(command, flags, file)


def print_config(command: str, settings: Settings, talk: Talk) -> int:
    """The resolved settings as TOML (or in the JSON document)."""
    talk.say(config_text(command, settings).rstrip("\n"))
    talk.result(command, {"config": settings.model_dump(mode="json")})
    return 0


def quiet_libraries() -> None:
    """Silence transformers' advice; what matters of it is an error or a note of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def load_subject(settings: SubjectSettings, talk: Talk, retrain: str | None = None) -> Subject:
    """The subject, with what must be known of its documents said on stderr."""
    from rootward.subject.documents import load_documents
    from rootward.subject.subject import Subject

    documents = load_documents(settings.documents, limit=settings.limit)  # quick to fail, before the model
    quiet_libraries()
    subject = Subject.load(
        settings.model,
        documents,
        base=settings.base,
        start=settings.start,
        retrain=retrain,
        max_tokens=settings.max_tokens,
        response_only=settings.response_only,
        parameters=settings.parameters,
        device=settings.device,
        dtype=settings.weights_dtype,
    )
    if settings.skip_not_finite:
        from rootward.capture.finite import without_not_finite

        subject = without_not_finite(subject, settings.token_budget, talk.progress)
    for note in subject_notes(subject):
        talk.note(note)
    return subject


def subject_notes(subject: Subject) -> list[str]:
    """What a reader must know about the documents and the subject."""
    encoded, documents = subject.encoded, subject.documents
    notes = [clean(note) for note in subject.notes]
    if documents.duplicates:
        notes.append(f"{_are(documents.duplicates)} an exact copy of an earlier one; copies get the same score")
    if encoded.truncated:
        notes.append(f"{_are(encoded.truncated)} longer than the context and cut on the right")
    for reason, count in {**documents.skipped, **encoded.dropped}.items():
        notes.append(f"left out: {count} ({reason})")
    return notes


def _are(count: int) -> str:
    return "1 document is" if count == 1 else f"{count} documents are"


def check_folder(out: Path, marks: tuple[str, ...], what: str) -> None:
    """`InputError` where ``out`` is a file, or a folder with other things in it than ``what``."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {shown(out)}: expected a folder, got a file; give another name")
    if not out.is_dir() or any((out / mark).exists() for mark in marks):
        return
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and not all(any(Path(name).match(mark) for mark in marks) for name in others):
        raise InputError(
            f"--out {shown(out)}: the folder holds other things ({', '.join(others[:3])}) and no {what}; "
            "give another folder"
        )
