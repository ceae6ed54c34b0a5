"""Entry point of torch.hub: a ready model in one call.

    import torch

    model = torch.hub.load(REPO_OR_FOLDER, "asfe_fusion", task="CT-MRI")
    fused = model.fuse(ct, mri)

With a local folder add source="local". `fuse` is documented in network.py. On an x86 CPU the paper
size is faster after `torch.set_flush_denormal(True)`, which must come before any work of torch.
"""

from pathlib import Path

from args_setting import ALL_TASKS, ROOT, SIZES
from network import ASFEFusion, load_weights

dependencies = ["torch", "numpy", "safetensors"]


def asfe_fusion(
    task: str = "CT-MRI",
    size: str = "compact",
    weights: str | Path | None = None,
    device: str = "cpu",
) -> ASFEFusion:
    """ASFE-Fusion in evaluation mode, with weights loaded.

    Args:
        task: "CT-MRI", "PET-MRI", "SPECT-MRI" or "all" (pairs of any other kind); says which of the
            shipped weights to load.
        size: "compact" (shipped) or "paper" (give its weights).
        weights: a safetensors or published `.pth` file in place of the shipped one.
        device: where the model goes.

    Raises:
        ValueError: unknown task or size, or weights that are absent, damaged or of another size.
    """
    for name, value, choices in (("task", task, ALL_TASKS), ("size", size, SIZES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    path = Path(weights) if weights else ROOT / "model_pre" / f"{size}_{task}.safetensors"
    model, metadata = load_weights(path, device)
    if metadata["size"] != size:
        raise ValueError(f"weights {path} are of size {metadata['size']}, size is {size!r}")
    return model
