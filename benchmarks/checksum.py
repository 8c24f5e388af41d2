"""What the checksums of a checkpoint's files cost: MB of a file in the page cache for each second of one core. Prints JSON.

python -m benchmarks.checksum

sum_of_file   as a checkpoint is checked and its marker written (`parallel.integrity.sum_of`)
xxh3, crc32   the hash alone, and the standard library's
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import xxhash

from parallel.integrity import sum_of

SIZE = 1 << 30


def rate(work: Callable[[], object], tries: int = 3) -> int:
    """MB a second of processor time, the best of some tries."""
    seconds = []
    for _ in range(tries):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return round(SIZE / 1e6 / min(seconds))


def main() -> None:
    """Measures on random bytes."""
    content = os.urandom(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_bytes(content)
        results = {
            "sum_of_file": rate(lambda: sum_of(file)),
            "xxh3": rate(lambda: xxhash.xxh3_64(content).digest()),
            "crc32": rate(lambda: zlib.crc32(content)),
        }
    print(json.dumps({f"{name}_mb_per_second": value for name, value in results.items()}, indent=2))


if __name__ == "__main__":
    main()
