"""What other data than those of a run are called in its results."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.cli.resume import flat

_SOURCES, _PARTS = ("train", "test"), ("train", "test", "eval_views")  # what an evaluator sees of the data


def data_name(own: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """Empty where `used` are the run's `own` data, else the settings that differ, or the path or class of another set.

    Both are configurations of data; a tokenizer is left out, since the run's serves all data.
    """
    there, here = _facts(own), _facts(used)
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    named = dict[str, None]()
    if any(key.startswith(_SOURCES) and key.endswith("_target_") for key in differing):
        test = {key: value for key, value in here.items() if key.startswith("test.")}
        named |= dict.fromkeys(str(v) for key, v in test.items() if v and key.rpartition(".")[2] == "path")
        named = named or {str(test.get("test._target_")).rpartition(".")[2]: None}
        differing = [key for key in differing if not key.startswith(_SOURCES) and key in there]
    named |= dict.fromkeys(f"{key.partition('.')[2]}={here.get(key)}" for key in differing)
    return ", ".join(named)


def _facts(data: Mapping[str, Any]) -> dict[str, Any]:
    pairs = flat({part: data.get(part) for part in _PARTS})
    return {key: value for key, value in pairs if "tokenizer" not in key.split(".")}
