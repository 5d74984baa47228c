"""What `ssl-lab plan` foretells beside the first steps of the run itself, one experiment after another.

    python experiments/plan_cpu/check.py OUT.jsonl "experiment=quickstart" "experiment=mae_cifar10 data.path=FOLDER" ...

A line of OUT.jsonl is one experiment; what it holds already is not run again. Without experiments it prints the table.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 48  # of a run; the later half is timed, when libraries have planned most of the shapes
SHORT = [
    f"duration={STEPS}steps",
    "eval=[]",
    "baselines=false",
    f"trainer.log_every_n_steps={STEPS // 2}",
    "logger=[csv]",
]
LIMITS = {"params": 0.10, "flops": 0.10, "memory": 0.15, "step": 0.20}


def ssl_lab(*words: str) -> str:
    """Output of a command; one that fails ends the check of its experiment."""
    done = subprocess.run([sys.executable, "-m", "ssl_lab", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout


def foretold(words: list[str], folder: Path) -> dict[str, float]:
    ssl_lab("plan", *words, f"out={folder / 'plan.json'}")
    plan = json.loads((folder / "plan.json").read_text())
    return {
        "params": plan["trained"],
        "flops": plan["flops"] * plan["batch"],
        "memory": sum(plan["memory"].values()),
        "step": plan["step_seconds"],
        "samples": plan["batch"] * plan["accumulate"],
    }


def measured(words: list[str], folder: Path, samples: int) -> dict[str, float]:
    """Parameters that learn, FLOPs and step time, without waiting for data, of the whole batch; memory of the run."""
    ssl_lab("bench", *words, "rounds=1", "memory=false", "loop=false", f"out={folder / 'bench.json'}")
    bench = json.loads((folder / "bench.json").read_text())
    ssl_lab(*words, *SHORT, f"out={folder / 'run'}")
    with open(folder / "run/metrics.csv") as file:
        row = [row for row in csv.DictReader(file) if row["time/samples_per_s"]][-1]
    return {
        "params": bench["rows"][0]["params"],
        "flops": bench["flops"],
        "memory": float(row["memory/peak_gb"]) * 1e9,
        "step": (1 - float(row["time/data_wait"])) * samples / float(row["time/samples_per_s"]),
    }


def check(words: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        plan = foretold(words, Path(folder))
        run = measured(words, Path(folder), plan.pop("samples"))
    ratio = {name: plan[name] / run[name] for name in LIMITS}
    return {"experiment": words[0].partition("=")[2], "plan": plan, "run": run, "ratio": ratio}


def table(rows: list[dict]) -> str:
    """Foretold / measured and by how much they differ; beyond the limits in bold."""
    head = ["experiment", "parameters, M", "GFLOP a step", "memory, GB", "step, ms"]
    scale = {"params": 1e-6, "flops": 1e-9, "memory": 1e-9, "step": 1e3}
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * len(LIMITS)]
    for row in rows:
        cells = [row["experiment"]]
        for name, limit in LIMITS.items() if "error" not in row else ():
            off = f"{row['ratio'][name] - 1:+.0%}"
            off = f"**{off}**" if abs(row["ratio"][name] - 1) > limit else off
            cells.append(f"{row['plan'][name] * scale[name]:.4g} / {row['run'][name] * scale[name]:.4g}, {off}")
        lines.append(f"| {' | '.join(cells)} | {row.get('error', '')}")
    return "\n".join(lines)


def main(out: Path, experiments: list[str]) -> None:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["experiment"] for row in rows}
    for experiment in experiments:
        words = shlex.split(experiment)
        if (name := words[0].partition("=")[2]) in done:
            continue
        try:
            row = check(words)
        except RuntimeError as error:
            row = {"experiment": name, "error": str(error)}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
