"""Fuse one pair with an exported network; needs onnxruntime and OpenCV, no PyTorch.

python onnx_example.py result/compact_PET-MRI.onnx pet.png mri.png fused.png   (8-bit images)
"""

import sys

import cv2
import numpy as np
import onnxruntime


def stop(message: str) -> None:
    """Print an error in one line and end with exit code 2."""
    print("onnx_example.py: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def read(path: str) -> np.ndarray:
    """An image of 8 bits as RGB, (H, W, 3) in [0, 1]; ends the program if it is none."""
    image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        stop(f"{path}: no such file, or not an image")
    if image.dtype != np.uint8:
        stop(f"{path}: pixels are {image.dtype}, expected 8 bits")
    if min(image.shape[:2]) < 16:
        stop(f"{path}: is {image.shape[0]}x{image.shape[1]}, expected at least 16x16")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) / 255


if len(sys.argv) != 5 or not sys.argv[4].lower().endswith(".png"):
    stop("expected four files: NETWORK.onnx SOURCE1 SOURCE2 FUSED.png")
network, path1, path2, out = sys.argv[1:]
images = read(path1), read(path2)
if images[0].shape != images[1].shape:
    height, width, other_height, other_width = *images[0].shape[:2], *images[1].shape[:2]
    stop(f"{path1} is {height}x{width}, {path2} is {other_height}x{other_width}, expected equal")
luma1, luma2 = (image @ [0.299, 0.587, 0.114] for image in images)
batches = {
    "img1": luma1[None, None].astype("float32"),
    "img2": luma2[None, None].astype("float32"),
}
try:
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (fused,) = session.run(None, batches)  # (1, 1, H, W) in [0, 1]
except Exception as error:  # its exceptions have no class in common
    stop(f"{network}: {error}")
colour = images[0] - luma1[..., None]  # what colour adds to the luma of PET or SPECT
luma = fused[0, 0, ..., None].clip(0, 1)
room = np.where(colour > 0, 1 - luma, luma)  # up to white or down to black, of each channel
share = np.minimum(1, room / np.maximum(np.abs(colour), 1e-9)).min(axis=2, keepdims=True)
image = ((luma + share * colour) * 255).round().astype("uint8")  # luma and hue stay
if not cv2.imwrite(out, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
    stop(f"{out}: cannot be written")
print(f"fused image: {out}")
