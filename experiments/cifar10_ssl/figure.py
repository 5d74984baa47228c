"""The table and the figure of this record from the raw metrics beside it: `python figure.py` (needs matplotlib)."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = {
    "simclr": "SimCLR", "moco": "MoCo v2", "moco_v3": "MoCo v3", "dino": "DINO", "dinov2": "DINOv2", "ijepa": "I-JEPA",
    "mae": "MAE", "lightly_simclr": "lightly's SimCLR",
}  # fmt: skip
COLUMNS = {
    "kNN": ("knn", "top1"), "linear": ("linear", "top1"), "linear, 1 % of labels": ("low_shot", "top1_1pct"),
    "linear, 10 %": ("low_shot", "top1_10pct"),
}  # fmt: skip
PIXELS = {"kNN": 45.4, "linear": 41.0}


def results() -> dict[str, dict[str, float]]:
    """Percent by run, such as `dino_seed0`, and column."""
    found = {}
    for file in sorted(HERE.glob("*_seed*/metrics.json")):
        rows = {
            (r["evaluator"], r["name"]): r["value"] for r in json.loads(file.read_text()) if r["subject"] == "trained"
        }
        found[file.parent.name] = {column: rows[key] for column, key in COLUMNS.items() if key in rows}
    return found


def main() -> None:
    """Print the table's rows, best first, and write figure.png."""
    rows = sorted(results().items(), key=lambda item: -item[1]["linear"])
    for run, values in rows:
        method, _, seed = run.rpartition("_seed")
        cells = " | ".join(f"{values[column]:.1f}" if column in values else "" for column in COLUMNS)
        print(f"| {NAMES[method]}, seed {seed} | {cells} |")
    shown = [(run, values) for run, values in rows if run.endswith("seed0")][::-1]
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(13, 0.45 * len(shown) + 1.2), sharey=True)
    labels = [NAMES[run.rpartition("_seed")[0]] for run, _ in shown]
    for axis, column in zip(axes, COLUMNS, strict=True):
        values = [values.get(column, 0.0) for _, values in shown]
        colours = ["#b0b0b0" if label.startswith("lightly") else "#3b6fb6" for label in labels]
        axis.bar_label(axis.barh(labels, values, color=colours), fmt="%.1f", padding=2, fontsize=8)
        if column in PIXELS:
            axis.axvline(PIXELS[column], color="#c04040", linestyle=":", linewidth=1)
        axis.set_title(column, fontsize=10)
        axis.set_xlim(0, 85)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "CIFAR-10, half an hour on two CPU cores each, accuracy in percent (dotted: raw pixels)", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
