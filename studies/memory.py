"""How much memory a case will need, by its headers alone, so that not too many run at once.

The factors and how they were measured are in limits.py. A case that is alone and still needs too
much takes tiles by itself, see tiles.py.
"""

import math

import limits
from args_setting import SIZES
from cli import UserError
from fusing import ImageRequest
from images import header_size
from studies.cases import Case

USABLE = 0.9  # of the memory of a worker, which Dask ends at .95
SLICE = 512 * 512  # pixels of a slice, where the headers were not read


def bytes_of_case(case: Case) -> int:
    """About how many bytes of memory a process needs for a case; 0 if its headers do not tell."""
    size = case.trained.size
    try:
        image, volumes = sizes_of(case)
    except (UserError, OSError):  # it will fail, with a line
        return 0
    grid = max(volumes, default=0) * limits.BYTES_ON_GRID
    read = sum(volumes) * limits.BYTES_OF_VOXEL
    network = limits.BYTES_OF_PROCESS[size] + limits.needed_bytes(image, SIZES[size])
    return network + read + grid


def sizes_of(case: Case) -> tuple[int, list[int]]:
    """Pixels of an image or slice that goes through the network, and the voxels of both volumes."""
    request = case.request
    if isinstance(request, ImageRequest):
        return math.prod(header_size(request.pair.path1, request.pair.readings[0])), []
    from volumes.io import shape_of  # its packages are an extra

    shapes = [shape_of(source.path) for source in (request.source1, request.source2)]
    slices = [math.prod(sorted(shape)[-2:]) if len(shape) > 1 else SLICE for shape in shapes]
    tile = request.slicing.tile**2 or max(slices)
    return min(tile, max(slices)), [math.prod(shape) for shape in shapes]
