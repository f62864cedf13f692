"""Stored results: a JSON file with a line for each row, replaced as a whole whenever a row comes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

SWEPT = ("device", "alternatives", "program", "peers", "axis", "errors")  # the tables of a sweep
FUSED = ("fused", "two steps", "layers")  # those of quantised results
# The lists of rows in a file, beside the environment that they were measured in.
TABLES = (*SWEPT, "dims", *FUSED)


class StoreError(Exception):
    """Why results cannot be stored or read."""


class Results:
    """The results of a run, kept in memory and, where a path is given, in a file that is complete at any time."""

    def __init__(self, path: Path | None, environment: dict) -> None:
        self.data: dict = {"environment": environment}
        self._path = path
        if path:
            _check_writable(path)

    def add(self, table: str, row: dict) -> None:
        """Appends a row to a table."""
        self.data.setdefault(table, []).append(_rounded(row))
        self._save()

    def note(self, key: str, value: object) -> None:
        """Stores something that is not a row of a table."""
        self.data[key] = value
        self._save()

    def _save(self) -> None:
        if self._path:
            part = _part(self._path)
            part.write_text(text(self.data))
            os.replace(part, self._path)


def load(paths: Sequence[Path]) -> list[dict]:
    """The results of files, each with every table, empty where it has none.

    Raises:
        StoreError: a file cannot be read, or holds something else.
    """
    return [_load(path) for path in paths]


def text(data: dict) -> str:
    """Results as JSON, a line for each row."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _load(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(data, dict) or "environment" not in data or not any(data.get(table) for table in TABLES):
        raise StoreError(f"{path}: expected what `jax-hadacore bench --json` writes, found no table of it")
    return {**{table: [] for table in TABLES}, **data}


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise StoreError(f"{path}: expected a file to write, found a folder")
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _rounded(value):
    """Five digits are more than the measurements repeat."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
