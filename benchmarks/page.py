"""Time from the click on Fuse to the picture, through a headless browser, for a 256x256 pair.

    python benchmarks/page.py          (on an otherwise idle machine; a minute)

The page runs in a process of its own and the clock in the browser: it starts at the click and
stops when the fused image is loaded. After each click, this process takes the time of the network's
pass alone. The load average is printed before and after, as other work on the machine is in the
figures.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine, make_parser, positive

# isort: split
from browser import Browser, missing, served

from args_setting import TASKS, AppArgs
from cli import UserError, run_script, setup_runtime
from inference import optimise
from network import ASFEFusion
from weights import load_weights, shipped_path

CLICK = """
const done = arguments[0], start = performance.now();
document.querySelector('#fuse').click();
const timer = setInterval(() => {
    const image = document.querySelector('#fused img');
    if (image && image.complete && image.naturalWidth) {
        clearInterval(timer);
        done(performance.now() - start);
    }
}, 2);
"""


def click_to_picture(user: Browser, task: str) -> float:
    """Seconds for the example of a task, whose sources are on the page already."""
    user.click(f"#example-{task}")
    user.wait(lambda: user.picture("#image1") and user.picture("#blend"))
    user.wait(lambda: not user.picture("#fused") and not user.text("#numbers"))
    seconds = user.driver.execute_async_script(CLICK) / 1000
    user.wait(lambda: "Qabf" in user.text("#numbers"))  # the next click finds an idle page
    return seconds


def pass_alone(model: ASFEFusion) -> float:
    """Seconds of the network for a pair of 256x256."""
    black = np.zeros((256, 256), np.uint8)
    started = time.perf_counter()
    model.fuse(black, black)
    return time.perf_counter() - started


def main(args: argparse.Namespace) -> None:
    if reason := missing():
        raise UserError(reason)
    print(machine("gradio", "torch"))
    print("load average before:", *(f"{load:.1f}" for load in os.getloadavg()))
    tasks, times, passes = list(TASKS), [], []
    model = optimise(load_weights(shipped_path("compact", tasks[0]), setup_runtime(AppArgs()))[0])
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as address:
        user = Browser(Path(folder))
        try:
            user.open(address)
            for task in tasks:  # the first passes allocate
                click_to_picture(user, task)
                pass_alone(model)
            for k in range(args.repeats):
                times.append(click_to_picture(user, tasks[k % 3]))
                passes.append(pass_alone(model))
        finally:
            user.close()
    print("load average after: ", *(f"{load:.1f}" for load in os.getloadavg()))
    for name, seconds in (("click to picture", times), ("the pass alone", passes)):
        middle, p95 = statistics.median(seconds), np.quantile(seconds, 0.95)
        figures = f"median {middle:.2f} s, p95 {p95:.2f} s, longest {max(seconds):.2f} s"
        print(f"{name}, {len(seconds)} times: {figures}")
    ratios = [click / alone for click, alone in zip(times, passes, strict=True)]
    print(f"a click takes {statistics.median(ratios):.1f} times as long as the pass (median)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=40)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
