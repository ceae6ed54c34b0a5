"""Weights files side by side on the validation patients of train_asfe.py.

    python benchmarks/validate.py --weights a.safetensors b.safetensors --task CT-MRI

`held_out` says whether the file's own metadata show that its training kept these patients apart; a
file that has seen them has an advantage. The score, the sum of SSIM, VIF and Qabf, is what
train_asfe.py chooses its best weights by.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # the root first: metrics.py is there and here

from timing import describe_device, write_json  # noqa: E402

from args_setting import ROOT, TASKS, TrainArgs, run_script  # noqa: E402
from dataset import TrainPairs, case_of  # noqa: E402
from network import load_weights, pick_device  # noqa: E402
from train_asfe import SCORE, VALIDATION_PAIRS, measure, split_pairs, spread  # noqa: E402


def held_out(metadata: dict, task: str, data_dir: Path, cases: set[str]) -> bool:
    """Whether the training that the metadata describe kept all these patients for validation."""
    settings = metadata.get("settings", {})
    if "val" not in settings or metadata.get("task") != task or settings.get("init"):
        return False  # made before validation, for more than this task, or from other weights
    kept = TrainArgs(
        task=task,
        data_dir=data_dir,
        val=settings["val"],
        val_cases=tuple(settings.get("val_cases", ())),
        leave_out=tuple(settings.get("leave_out", ())),
    )
    return cases.isdisjoint(map(case_of, split_pairs(kept)[0]))


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.DEVICE)
    settings = TrainArgs(task=args.task, data_dir=args.data_dir)
    _, pairs = split_pairs(settings)
    cases = set(map(case_of, pairs))
    images = TrainPairs(spread(pairs, VALIDATION_PAIRS), patch=1).images
    document = {"about": describe_device(device), "pairs": len(images), "cases": sorted(cases)}
    document["weights"] = []
    for path in args.weights:
        model, metadata = load_weights(path, device)
        means, _ = measure(model, images, settings)
        score = round(sum(means[name] for name in SCORE), 4)
        entry = {"file": f"{path.parent.name}/{path.name}", "score": score, **means}
        entry["held_out"] = held_out(metadata, args.task, args.data_dir, cases)
        document["weights"].append(entry)
        print(entry, flush=True)
    write_json(args.json, document)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--task", default="CT-MRI", choices=tuple(TASKS))
    parser.add_argument("--data_dir", type=Path, default=ROOT / "HMIFDatasets")
    parser.add_argument("--DEVICE", default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
