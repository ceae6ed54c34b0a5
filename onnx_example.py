"""Fuse one pair with an exported network; needs onnxruntime and OpenCV, no PyTorch.

python onnx_example.py result/compact_PET-MRI.onnx pet.png mri.png fused.png   (8-bit images)
"""

import sys

import cv2
import onnxruntime

network, path1, path2, out = sys.argv[1:]
images = [cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB) / 255 for path in (path1, path2)]
luma1, luma2 = (image @ [0.299, 0.587, 0.114] for image in images)
batches = {
    "img1": luma1[None, None].astype("float32"),
    "img2": luma2[None, None].astype("float32"),
}
session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
(fused,) = session.run(None, batches)  # (1, 1, H, W) in [0, 1]
colour = images[0] - luma1[..., None]  # what colour adds to the luma of PET or SPECT
image = ((fused[0, 0, ..., None] + colour).clip(0, 1) * 255).round().astype("uint8")
cv2.imwrite(out, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
