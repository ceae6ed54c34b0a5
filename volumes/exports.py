"""What other programs read values from: the source without the grid, moved onto it.

A fused volume holds brightness. `--moved` writes the other source on the same voxels, in its own
unit, so that a viewer can lay it over the source that has the grid.

Legend: I J K voxels as stored, see volumes/grid.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from volumes.grid import Volume
from volumes.intensity import WINDOWS, Scaling, units_doubt
from volumes.io import Header, stream_nifti
from volumes.pair import Together

AS_STORED = "as stored"  # the unit of values that have none, as those of an MRI


@dataclass(frozen=True)
class MovedSource:
    """A source on the grid of the result, and what its values are."""

    number: int  # 1 or 2
    modality: str  # CT, PET, SPECT or MRI
    volume: Volume  # on the grid, values as its file has them
    unit: str  # SUV (g/ml, by body weight), Bq/ml, counts, HU, or as stored
    factor: float  # what turns the file's values into the unit

    @property
    def described(self) -> dict:
        """The same for the sidecar."""
        return {
            "source": self.number,
            "modality": self.modality,
            "unit": self.unit,
            "factor_from_file": self.factor,
        }

    def write(self, file: BinaryIO, packed: bool) -> None:
        """Write NIfTI in float32; the unit is in its description and in the intent's name.

        Args:
            packed: compressed by gzip.
        """
        text = f"{self.modality} (source {self.number}) on the grid of the result, {self.unit}"
        header = Header(self.volume.affine, self.volume.code, text, unit=self.unit)
        data = self.volume.data.astype(np.float32, copy=False)
        stream_nifti(
            file, data if self.factor == 1 else data * np.float32(self.factor), header, packed
        )


def moved_source(together: Together, scalings: Sequence[Scaling], modality: str) -> MovedSource:
    """The source that does not have the grid.

    A PET is in SUV where the fused volume and its colour bar are.

    Args:
        scalings: of source 1 and source 2.
        modality: of source 1.
    """
    number = together.mover
    volume = (together.source1, together.source2)[number - 1]
    unit = scalings[number - 1].method.get("unit")
    modality = modality if number == 1 else "MRI"
    if modality == "PET" and unit == "g/ml" and volume.suv:
        return MovedSource(number, modality, volume, "SUV", volume.suv)
    if modality == "CT" and not is_hu(volume.data, scalings[number - 1]):
        unit = AS_STORED
    return MovedSource(number, modality, volume, unit or volume.unit or AS_STORED, 1.0)


def is_hu(data: np.ndarray, scaling: Scaling) -> bool:
    """Whether a CT's values are HU: a window by its name has checked that, one in numbers not."""
    if (scaling.method["level"], scaling.method["width"]) in WINDOWS.values():
        return True
    return not units_doubt(data, "wide")
