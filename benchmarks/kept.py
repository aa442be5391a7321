"""Results in a JSON file, part by part, so that an interrupted measurement goes on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import Job
from .options import write_json


class Kept:
    """The parts whose results are in a JSON file. They are not run again.

    Args:
        path: the path of the file, which need not exist.
        name: the field of the file that lists the parts.
        fields: the fields that identify a part. An empty list is the same as no value.
        about: the other fields of the file.
    """

    def __init__(self, path: Path, name: str, fields: Sequence[str], about: Mapping[str, Any]):
        self._path, self._name, self._fields, self._about = path, name, fields, about
        found = json.loads(path.read_text())[name] if path.exists() else []
        self._parts: dict[str, Job] = {self._key(part): part for part in found}

    @property
    def parts(self) -> list[Job]:
        return list(self._parts.values())

    def find(self, job: Job) -> Job | None:
        """The part with the results of ``job``, or ``None`` if it has to run."""
        return self._parts.get(self._key(job))

    def add(self, part: Job) -> None:
        """Add a part, or replace the part with the same identity, and write the file."""
        self._parts[self._key(part)] = part
        write_json(self._path, {**self._about, self._name: self.parts})

    def _key(self, part: Job) -> str:
        values = (part.get(field) for field in self._fields)
        return json.dumps([None if value == [] else value for value in values])
