"""Frozen features of images: those of a trained backbone, or radiomic ones.

The backbone needs its weights on this machine.

The backbone is torchvision's ResNet-18 (He et al., CVPR 2016), its weights those of ImageNet. The
radiomic features are a histogram, uniform local binary patterns (Ojala et al., IEEE TPAMI 2002) and
co-occurrence statistics (Haralick et al., IEEE Trans. SMC 1973).

Legend: H W pixels, F features. A luma is (H, W) uint8.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern
from torch import nn

from cli import UserError
from weights import load_plain

MEAN, STD, SIDE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224  # of ImageNet's training


def extractor(kind: str) -> tuple[Callable[[ndarray], ndarray], str]:
    """The features of `kind` (auto, backbone or radiomic) as a function of a luma, and their name.

    Nothing is downloaded. UserError if the backbone is asked for and its weights are not here.
    """
    path = backbone_path()
    if kind == "radiomic" or (kind == "auto" and not path.is_file()):
        reason = "" if kind == "radiomic" else f" (no backbone weights at {path})"
        return radiomics, f"radiomic features{reason}"
    if not path.is_file():
        raise UserError(f"--features backbone needs {path}, see docs/claims.md; or use radiomic")
    return backbone(path), f"features of ResNet-18, {path}"


def radiomics(luma: ndarray) -> ndarray:
    """(F,) radiomic features of a luma; F is 36."""
    histogram = np.histogram(luma, 16, (0, 256))[0] / luma.size
    patterns = local_binary_pattern(luma, 8, 1, "uniform")
    lbp = np.histogram(patterns, 10, (0, 10))[0] / luma.size
    pairs = graycomatrix(luma // 16, [1], [0, np.pi / 2], 16, symmetric=True, normed=True)
    names = ("contrast", "homogeneity", "energy", "correlation", "dissimilarity")
    return np.concatenate([histogram, lbp, *(graycoprops(pairs, n).ravel() for n in names)])


def backbone_path() -> Path:
    """Where torch.hub keeps the weights of ResNet-18, whether they are there or not."""
    from torchvision.models import ResNet18_Weights

    name = ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def backbone(path: Path) -> Callable[[ndarray], ndarray]:
    """ResNet-18 before its last layer, a luma -> (512,); UserError if the weights do not fit."""
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    try:
        model.load_state_dict(load_plain(path))
    except Exception:  # a parser of strange bytes may stumble in any way
        raise UserError(f"weights {path}: damaged, or not those of ResNet-18") from None
    model.fc = nn.Identity()
    model.eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    @torch.inference_mode()
    def features(luma: ndarray) -> ndarray:
        image = torch.tensor(luma)[None, None].float() / 255
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
        return model((image - mean) / std)[0].numpy().astype(np.float64)

    return features
