"""Names of parts, shared by layouts of users' own files."""

from vpt.data.images import Samples

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def train_and_test(parts: dict[str, Samples]) -> dict[str, Samples]:
    """Parts train + test (+ val), or all where nothing is held out."""
    if "test" in parts:
        return parts
    if "val" in parts:  # train/ and val/ alone, as in ImageNet: what is held out is the test
        return {"train": parts["train"], "test": parts["val"]}
    return {"all": parts["train"]}
