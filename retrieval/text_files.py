"""Text files: UTF-8 lines with their numbers, gzip by suffix, and output that is whole or absent."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from rarezoo.retrieval.storage import CannotWriteError, partial_beside


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Stream the lines of a UTF-8 file (a leading byte order mark is dropped), gzip-compressed when it ends in `.gz`.

    Args:
        path: the file.

    Yields:
        (number, line): the line number counted from 1, and the line without its line break.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, or the gzip data is damaged; the message gives file and line.
    """
    path = Path(path)
    number = 0
    with _open_bytes(path) as file:
        try:
            # Only "\n" ends a line: text may hold U+2028, form feeds and other characters that str.splitlines cuts at.
            for number, line in enumerate(file, start=1):
                yield number, _decoded(line.rstrip(b"\r\n"), f"{path}, line {number}", first=number == 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}, after line {number}: damaged gzip data ({error}); fetch the file again"
            ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of one UTF-8 file, gzip-compressed when it ends in `.gz`. Raises as `read_lines` does."""
    path = Path(path)
    try:
        with _open_bytes(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip data ({error}); fetch the file again") from error
    return _decoded(content, str(path), first=True)


def _open_bytes(path: Path) -> BinaryIO:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _decoded(content: bytes, where: str, first: bool) -> str:
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}); "
            "convert the file to UTF-8, for instance with iconv"
        ) from None


@contextlib.contextmanager
def open_text(path: Path, compressed: bool = False) -> Iterator[TextIO]:
    """Open a UTF-8 file for writing, "\\n" as line break; gzip without a time stamp: equal text, equal bytes."""
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(path.open("wb"))
        if compressed:
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0)
            stream = cast(BinaryIO, stack.enter_context(packed))
        yield stack.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))


@contextlib.contextmanager
def write_errors_for(target: Path) -> Iterator[None]:
    """Report what the system says about a failed write as one `CannotWriteError` for `target`.

    Errors about what the block reads (a missing shard, say) carry no error number of the system and pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise CannotWriteError(target, error) from error


@contextlib.contextmanager
def file_written_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that becomes `path` when the block ends without an error.

    After an error nothing is left of it, and a file that was at `path` is as it was.

    Raises:
        CannotWriteError: the folder cannot be written, or the disk is full.
    """
    partial = partial_beside(path)
    try:
        with write_errors_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
