"""Time from the click on Fuse to the picture, through a headless browser, for a 256x256 pair.

    python benchmarks/page.py          (on an otherwise idle machine; a minute)

The page runs in a process of its own and the clock in the browser: it starts at the click and
stops when the fused image is loaded. The load average is printed before and after, as other work
on the machine is in the figures.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from machine import machine, make_parser, positive

# isort: split
from browser import Browser, missing, served

from args_setting import TASKS
from cli import UserError, run_script

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


def main(args: argparse.Namespace) -> None:
    if reason := missing():
        raise UserError(reason)
    print(machine("gradio", "torch"))
    print("load average before:", *(f"{load:.1f}" for load in os.getloadavg()))
    tasks = list(TASKS)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as address:
        user = Browser(Path(folder))
        try:
            user.open(address)
            for task in tasks:  # the first passes allocate
                click_to_picture(user, task)
            times = [click_to_picture(user, tasks[k % 3]) for k in range(args.repeats)]
        finally:
            user.close()
    print("load average after: ", *(f"{load:.1f}" for load in os.getloadavg()))
    middle, p95 = statistics.median(times), np.quantile(times, 0.95)
    figures = f"median {middle:.2f} s, p95 {p95:.2f} s, longest {max(times):.2f} s"
    print(f"click to picture, {len(times)} clicks: {figures}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=40)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
