"""What a folder holds, and a disk that is full."""

from contextlib import contextmanager
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def file_limit(size: int):
    """Writing more than `size` bytes to one file fails as on a full disk.

    It holds for the whole process, and so for a file that takes pytest's report: never beyond the writing itself.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
