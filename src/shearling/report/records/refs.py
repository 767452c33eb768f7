"""What every kind of result file says alike: which model it speaks of, and when it was written."""

from __future__ import annotations

from shearling.model.refs import ModelRef
from shearling.report.records.fields import Fields


def read_ref(fields: Fields) -> ModelRef:
    """A model from the object that names it."""
    return ModelRef(fields.label("name"), fields.text("fingerprint"))


def read_created(fields: Fields) -> str:
    """When a file was written, or nothing where it does not say."""
    created = fields.raw("created")
    return created if isinstance(created, str) else ""
