"""What a header claims, compared with its file's length before memory is asked for.

Source: zlib's "Maximum compression factor" (zlib_tech.html), 1032:1 for deflate.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from cli import UserError

MAX_VOXELS = 2**30  # of a volume, 4 GiB as float32
PACKED = 1032  # bytes that deflate unpacks from one, at most


def check_claim(path: Path, shape: Sequence[int], itemsize: int, packed: bool) -> None:
    """Compare the size in a header with the file's length, before memory is asked for.

    Args:
        path: the file.
        shape: what its header claims, of any length.
        itemsize: bytes of a voxel, at least; 0 if they are in another file.
        packed: compressed by deflate, or perhaps.

    Raises:
        UserError: an axis without voxels, more voxels than MAX_VOXELS or than the file can hold.
    """
    voxels = math.prod(int(n) for n in shape)  # of any size, without overflow
    claim = f"{path}: its header claims {'x'.join(map(str, shape))} voxels"
    if min(shape, default=0) < 1:
        raise UserError(f"{claim}, expected at least one along each axis")
    length = path.stat().st_size
    if voxels * itemsize > length * (PACKED if packed else 1):
        raise UserError(f"{claim}, more than its {length} bytes can hold; truncated or damaged")
    if voxels > MAX_VOXELS:
        raise UserError(f"{claim}, expected at most {MAX_VOXELS}; crop or resample it")
