"""Draw registration.png: a drawn head whose MRI was turned and moved, before and after.

    python docs/registration.py

Nothing of a patient: phantom.py draws the slices, and a stack of shrinking ones is the head.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from phantom import phantom_pair  # noqa: E402
from volumes.grid import Volume, resample  # noqa: E402
from volumes.overlay import moved, overlay  # noqa: E402
from volumes.register import rigid  # noqa: E402

SIDE, MM = 96, 2.0
COLOURS = 32  # a smaller file


def heads() -> list[Volume]:
    """A CT in about HU and an MRI: each slice the drawn one, smaller towards top and bottom."""
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:3, 3] = -MM * SIDE / 2
    made = []
    for image in phantom_pair("CT-MRI", side=SIDE, seed=4):
        data = np.zeros((SIDE, SIDE, SIDE), np.float32)
        flat = Volume(image[::-1, ::-1].T[..., None].astype(np.float32), affine)
        for k in range(SIDE):
            scale = np.sqrt(max(1 - ((k - SIDE / 2) / (0.42 * SIDE)) ** 2, 0))
            if scale > 0.2:
                shrunk = np.diag([MM / scale, MM / scale, MM, 1.0])
                shrunk[:3, 3] = (*(-MM * SIDE / 2 / scale,) * 2, affine[2, 3])
                data[..., k] = resample(flat, (SIDE, SIDE, 1), shrunk)[..., 0]
        made.append(Volume(data, affine))
    made[0].data[:] = made[0].data * 8 - 1000
    return made


def main() -> None:
    ct, mri = heads()
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", (8, -6, 12), degrees=True).as_matrix()
    move[:3, 3] = 10, -8, 6
    before = moved(mri, move)
    found = rigid(ct, before, "CT")
    after = moved(before, np.linalg.inv(found.matrix))
    picture = overlay(ct, before, after, ((-1000, 1000), (0, 200)))
    Image.fromarray(picture).quantize(COLOURS).save(ROOT / "docs/registration.png", optimize=True)


if __name__ == "__main__":
    main()
