"""Judge stored features by the project's own evaluators, so that every row of the record has one protocol.

python score.py features.npz [metrics.json]      # arrays train (N, D), train_label (N,), test (M, D), test_label (M,)
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from ssl_lab.evals.collapse import Collapse
from ssl_lab.evals.knn import KNN
from ssl_lab.evals.linear import Linear
from ssl_lab.evals.low_shot import LowShot
from ssl_lab.evals.results import write
from ssl_lab.evals.runner import run_all


class Stored(torch.nn.Module):
    """A method whose features were computed elsewhere."""

    def embed(self, batch):
        return batch["image"]


class Arrays:
    def __init__(self, path: str) -> None:
        self.arrays = np.load(path)
        self.classes = [str(c) for c in range(int(self.arrays["train_label"].max()) + 1)]

    def eval_loader(self, split, limit=None):
        x, y = torch.from_numpy(self.arrays[split]), torch.from_numpy(self.arrays[f"{split}_label"])
        yield {"image": x, "target": y, "index": torch.arange(len(y))}


if __name__ == "__main__":
    evaluators = {"knn": KNN(), "linear": Linear(), "low_shot": LowShot(), "collapse": Collapse()}
    rows = run_all(evaluators, Stored(), Arrays(sys.argv[1]))
    if len(sys.argv) > 2:
        write(Path(sys.argv[2]), rows)
    shown = [r for r in rows if "/" not in r.name or r.evaluator == "low_shot"]
    print(json.dumps({f"{r.evaluator}/{r.name}": round(r.value, 2) for r in shown}))
