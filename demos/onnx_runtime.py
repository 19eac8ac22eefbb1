"""An artefact as an ONNX file, run without torch: python demos/onnx_runtime.py A.safetensors *.png.

Needs `pip install 'visual-prompt-tuning[onnx]'`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import vpt
from vpt.export import export


def main() -> None:
    """Export, then classify images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    args = parser.parse_args()

    model = vpt.load(args.artefact)
    files, difference = export(model, args.artefact.with_suffix(".onnx"))
    print(f"wrote {files[0]}: logits within {difference:.0e} of torch's")

    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    names, preprocess = json.loads(known["class_names"]), json.loads(known["preprocess"])
    batch = np.stack([prepare(Image.open(path), preprocess) for path in args.images])
    (logits,) = session.run(None, {"images": batch})
    for path, row in zip(args.images, logits, strict=True):
        print(f"{path}: {names[row.argmax()]}, probability {softmax(row).max():.1%}")


def prepare(image: Image.Image, preprocess: dict) -> np.ndarray:
    """An image as the file takes it, (3, size, size): resized, cropped at the centre, normalised.

    By Pillow alone, for `crop_mode` center.
    """
    size = preprocess["image_size"]
    shorter = int(size / preprocess["crop_pct"])
    scale = shorter / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    filters = Image.Resampling[preprocess["interpolation"].upper()]
    image = image.convert("RGB").resize((width, height), filters)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    normal = (pixels - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    return normal.transpose(2, 0, 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (C,) of logits (C,)."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


if __name__ == "__main__":
    main()
