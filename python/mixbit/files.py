"""Files that are never half written, and JSON documents with a format name and a version."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mixbit.errors import MixbitError

PathLike = str | os.PathLike[str]

_TEMPORARY = ".mixbit-tmp"


def write_atomic(path: PathLike, write: Callable[[BinaryIO], None]) -> Path:
    """Calls `write` on a temporary file beside `path`, then renames it: readers see the old file or the whole new one.

    Raises:
        MixbitError: The folder does not exist or cannot be written; nothing is left behind.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_TEMPORARY, dir=target.parent or ".")
    except OSError as error:
        raise MixbitError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise MixbitError(f"cannot write {str(target)!r}: {error.strerror or error}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def remove_temporaries(folder: PathLike) -> None:
    """Deletes what writers that were killed left behind; call it where one process owns the folder."""
    for path in Path(folder).glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def file_digest(path: PathLike) -> str:
    """Names a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Writes bytes atomically."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    return write_atomic(path, write)


def write_text(path: PathLike, text: str) -> Path:
    """Writes UTF-8 text atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_document(path: PathLike, format_name: str, version: int, body: dict[str, Any]) -> Path:
    """Writes `{"format": ..., "version": ..., **body}` as indented JSON, atomically; keys keep their order."""
    document = {"format": format_name, "version": version, **body}
    return write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_document(path: PathLike, format_name: str, version: int) -> dict[str, Any]:
    """Reads what `write_document` wrote and returns it whole.

    Raises:
        MixbitError: The file is missing, truncated, of another format, or newer than `version`.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a text file"
        raise MixbitError(f"cannot read {str(source)!r}: {reason}") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise MixbitError(
            f"{str(source)!r} is not a whole JSON document (line {error.lineno}: {error.msg}); "
            f"expected a {format_name} file"
        ) from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != format_name:
        raise MixbitError(f"{str(source)!r} is not a {format_name} file: its format is {found!r}")
    found_version = document.get("version")
    if not isinstance(found_version, int) or found_version < 1:
        raise MixbitError(f"{str(source)!r} has version {found_version!r}; expected a whole number from 1 to {version}")
    if found_version > version:
        raise MixbitError(
            f"{str(source)!r} has version {found_version}, newer than this mixbit reads ({version}); upgrade mixbit"
        )
    return document
