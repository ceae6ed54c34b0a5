"""Entry point of torch.hub: a ready model in one call.

    import torch

    model = torch.hub.load(REPO_OR_FOLDER, "asfe_fusion", task="CT-MRI")
    fused = model.fuse(ct, mri)

With a local folder add source="local". `fuse` is documented in network.py. On an x86 CPU the paper
size is faster after `torch.set_flush_denormal(True)`, which must come before any work of torch.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

dependencies = ["torch", "numpy", "safetensors"]
ROOT = Path(__file__).resolve().parent
MODULES = ("args_setting", "cli", "network", "inference", "weights")  # each after what it imports


def import_apart() -> dict[str, ModuleType]:
    """Our modules by name, imported as `asfe_fusion.<name>`.

    The caller may have a `network` or a `weights` of its own, loaded already or later. So ours
    bear their short names only while they import each other.
    """
    loaded = {name: sys.modules.get(f"asfe_fusion.{name}") for name in MODULES}
    if all(loaded.values()) and Path(loaded["weights"].__file__).parent == ROOT:
        return loaded
    sys.modules.setdefault("asfe_fusion", ModuleType("asfe_fusion"))  # the parent, for pickle
    theirs = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        for name in MODULES:
            path = ROOT / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"asfe_fusion.{name}", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = sys.modules[spec.name] = loaded[name] = module
            spec.loader.exec_module(module)
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(theirs)
    return loaded


def asfe_fusion(
    task: str = "CT-MRI",
    size: str = "compact",
    weights: str | Path | None = None,
    device: str = "cpu",
):
    """ASFE-Fusion (network.ASFEFusion) in evaluation mode, with weights loaded.

    Args:
        task: "CT-MRI", "PET-MRI", "SPECT-MRI" or "all" (pairs of any other kind); says which of the
            shipped weights to load.
        size: "compact" (shipped) or "paper" (give its weights).
        weights: a safetensors or published `.pth` file in place of the shipped one.
        device: where the model goes.

    Raises:
        ValueError: unknown task or size, or weights that are absent, damaged or of another size.
    """
    ours = import_apart()
    settings = ours["args_setting"]
    for name, value, choices in (
        ("task", task, settings.ALL_TASKS),
        ("size", size, settings.SIZES),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    path = Path(weights) if weights else ours["weights"].shipped_path(size, task)
    return ours["inference"].optimise(ours["weights"].load_sized(path, size, device))
