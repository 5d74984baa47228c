"""The texts of `--help`, and which verb a command line means."""

import json
from pathlib import Path

from ssl_lab.cli import catalog
from ssl_lab.cli.nearest import did_you_mean
from ssl_lab.errors import UserError

VERBS = {
    "train": "train a method; the verb may be left out",
    "evaluate": "judge the features of a checkpoint or of imported weights",
    "generate": "text from a language model: a run, or imported weights",
    "chat": "questions about pictures, to a run that sees and speaks",
    "demo": "a page in the browser: upload a picture, ask, and see where the answer looked",
    "transcribe": "what is said in sound files, by a run of speech recognition",
    "export": "write a checkpoint as timm, Hugging Face or plain safetensors weights",
    "bench": "time training steps, alone or beside other libraries",
    "plan": "parameters, FLOPs, memory, time and cost of a run before it starts",
    "scaling": "runs of several sizes and lengths, their scaling law, and the best size for a budget",
    "tokenizer": "train a tokenizer, and say how many bytes a token holds",
    "list": "experiments, methods, backbones and data sets to choose from",
    "shards": "write a data set of images, with or without captions, as .tar shards",
    "doctor": "what this machine has: versions, devices, attention kernels, data, disk",
}
EXAMPLES = {
    "train": [
        "ssl-lab experiment=quickstart",
        "ssl-lab method=mae data=shapes duration=1000steps optim.lr=1e-3",
        "ssl-lab -m experiment=quickstart seed=0,1,2",
        "ssl-lab experiment=quickstart --cfg job",
    ],
    "evaluate": ["ssl-lab evaluate ckpt=runs/quickstart/0/checkpoints/last.ckpt eval=[knn,linear]"],
    "generate": [
        'ssl-lab generate ckpt=runs/causal_lm/0 prompt="a small red" temperature=0.8 seed=1',
        'ssl-lab generate ckpt=gguf:model.gguf chat=true prompt="What is the capital of France?" temperature=0',
    ],
    "chat": [
        'ssl-lab chat ckpt=runs/llava_shapes/0 image=picture.png prompt="what shape is the largest object?"',
        "ssl-lab chat ckpt=runs/llava_shapes/0 image=picture.png",
    ],
    "demo": ["ssl-lab demo ckpt=runs/llava_shapes/0", "ssl-lab demo ckpt=runs/llava_shapes/0 port=8080"],
    "transcribe": [
        "ssl-lab transcribe ckpt=runs/conformer_digits/0 audio=recording.wav words=true",
        "ssl-lab transcribe ckpt=runs/conformer_digits/0 audio=/my/recordings num_beams=8",
    ],
    "export": ["ssl-lab export ckpt=runs/quickstart/0/checkpoints/last.ckpt to=timm"],
    "bench": [
        "ssl-lab bench experiment=quickstart",
        "ssl-lab bench experiment=quickstart against=[transformers,timm]",
        "ssl-lab bench suite=small before=earlier/table.json",
    ],
    "plan": [
        "ssl-lab plan experiment=quickstart",
        "ssl-lab plan experiment=mae_in1k data.path=/my/imagenet gpu=h100 devices=64",
    ],
    "scaling": [
        "ssl-lab scaling experiment=gpt_shakespeare data.path=input.txt",
        "ssl-lab scaling method=causal_lm eval=[perplexity] sizes=[16,32,64] durations=[250steps,500steps,1000steps]",
    ],
    "tokenizer": [
        "ssl-lab tokenizer data.path=my.txt vocab_size=8192 out=tokenizers/mine",
        "ssl-lab tokenizer data.path=/my/parquet data.column=[en,de] kind=wordpiece",
    ],
    "list": ["ssl-lab list", "ssl-lab list mae"],
    "shards": ["ssl-lab shards data=folder data.path=/my/images out=/my/shards per_shard=5000"],
    "doctor": ["ssl-lab doctor", "ssl-lab doctor data.path=/my/images"],
}


def verb_of(words: list[str], folders: list[Path]) -> tuple[str | None, list[str]]:
    """The verb that leads `words`, or None, and what follows it. A lone word that is no verb is a `UserError`."""
    if not words or "=" in words[0] or words[0][:1] in ("+", "~"):
        return None, words
    word = words[0]
    if word in VERBS:
        return word, words[1:]
    if word in catalog.choices("experiment", folders):
        raise UserError(f"'{word}' is an experiment, not a verb: write experiment={word}")
    raise UserError(f"'{word}' is not a verb; {did_you_mean(word, list(VERBS))}. Everything else is key=value")


def help_text(verb: str | None, folders: list[Path]) -> str:
    """What `ssl-lab --help` or `ssl-lab <verb> --help` prints."""
    return _overview() if verb is None else _verb(verb, folders)


def _overview() -> str:
    verbs = "\n".join(f"  {name:<11}{text}" for name, text in VERBS.items())
    return f"""ssl-lab <verb> [group=choice] [key=value] ...

{verbs}

  ssl-lab <verb> --help   groups, keys and examples of a verb
  -m, --multirun          one run for each combination of values: seed=0,1,2; launcher.jobs=2 at a time,
                          launcher=slurm on a cluster, sweeper=optuna for values that follow the results
  --config-dir DIR        a folder with your own YAML files, laid out like conf/
  --cfg job               print the resolved configuration and stop
  --version

Examples
{_indent(EXAMPLES["train"])}"""


def _verb(verb: str, folders: list[Path]) -> str:
    parts = [
        f"ssl-lab {verb} {'[word] ...' if verb == 'list' else '[group=choice] [key=value] ...'}\n\n  {VERBS[verb]}"
    ]
    if verb != "list":
        root = catalog.root(verb)
        nested = [g for g in ("backbone", "connector", "views") if "method" in root.groups]
        lines = [
            f"{group:<12}{', '.join(found)}{_note(group, root.groups)}"
            for group in [*root.groups, *nested]
            if group != "local" and (found := catalog.choices(group, folders))
        ]
        if lines:
            parts.append("Groups\n" + _indent(lines))
        plain: dict[str, object] = {}
        for key, value in root.keys.items():
            inside = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            plain |= {k: v for k, v in inside.items() if not isinstance(v, dict)}
        parts.append(
            "Keys\n" + _indent([f"{f'{k}={_shown(v)}':<33} {root.comments.get(k, '')}" for k, v in plain.items()])
        )
    parts.append("Examples\n" + _indent(EXAMPLES[verb]))
    return "\n\n".join(parts)


def _note(group: str, defaults: dict[str, object]) -> str:
    default = defaults.get(group)
    return f"  (default {default})" if isinstance(default, str) and default != "???" else ""


def _shown(value: object) -> str:
    if isinstance(value, str) and value.startswith("${"):
        return "..."
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def _indent(lines: list[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
