"""Files that nobody ever sees half of."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write `path`, whose folder exists: readers see the old file or the whole new one. Raises OSError."""
    # Opened by name and not by `tempfile`, whose files only their owner can read.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
