"""Other people's error messages about a configuration, in one line that says what to do."""

import re
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_lab.cli.nearest import did_you_mean
from ssl_lab.errors import UserError

_PACKAGE = Path(__file__).parents[1]
COMPOSING = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def explain(error: Exception) -> UserError:
    """A `UserError` for what Hydra, OmegaConf or the YAML parser raised while composing."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return UserError(
            f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML, {error.problem}"
        )
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error.__cause__, OmegaConfBaseException) and not str(error):
        return _omegaconf(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return UserError(
            f"{group}={name} does not exist, a YAML asks for it; {did_you_mean(name, error.options or [])}"
        )
    if needed := re.match(r"You must specify '([^']+)'", str(error)):
        group = needed[1].partition("@")[0]
        options = re.findall(r"^\s+(\S+)$", str(error), re.MULTILINE)
        named = f" ({' | '.join(options)})" if options else ""
        return UserError(
            f"{group} is not chosen: write {group}=NAME{named} or experiment=NAME; `ssl-lab list` shows both"
        )
    return UserError(_one_line(str(error)))


def _omegaconf(error: OmegaConfBaseException) -> UserError:
    text = _one_line(str(error.msg or error))
    return UserError(f"{error.full_key}: {text}" if error.full_key and error.full_key not in text else text)


def explain_build(error: InstantiationException, cfg: DictConfig | None = None) -> UserError | None:
    """A `UserError` when an object could not be made from its YAML because of the YAML, None when the code is wrong."""
    cause = error.__cause__
    key = m[1] if (m := re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)) else ""
    if isinstance(cause, InstantiationException):
        return explain_build(cause, cfg)
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, ImportError | AttributeError) and "Error locating target" in str(error):
        target = m[1] if (m := re.search(r"Error locating target '([^']+)'", str(error))) else "?"
        root = cause.__cause__ or cause
        return UserError(f"{key}._target_={target} cannot be loaded: {_one_line(str(root))}")
    if isinstance(cause, TypeError) and _raised_by_call(cause):
        if wrong := re.search(r"unexpected keyword argument '(\w+)'", str(cause)):
            return UserError(f"{key}.{wrong[1]}: there is no such argument; {_accepted(cfg, key, wrong[1])}")
        if missing := re.search(r"missing \d+ required .*arguments?: (.+)", str(cause)):
            return UserError(
                f"{key} lacks {missing[1]}: add it to the YAML or write {key}.{missing[1].split(chr(39))[1]}=..."
            )
    if isinstance(cause, ValueError) and _raised_by_us(cause):
        return UserError(f"{key}: {_one_line(str(cause))}")
    return None


def _raised_by_us(error: BaseException) -> bool:
    """A check of our own, not one of a library below, said no."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _raised_by_call(error: BaseException) -> bool:
    """The call itself failed, not something inside the callee."""
    trace = error.__traceback__
    return trace is not None and trace.tb_next is None


def _accepted(cfg: DictConfig | None, key: str, wrong: str) -> str:
    from ssl_lab.cli.signature import signature_of

    node: Any = None if cfg is None else OmegaConf.select(cfg, key)
    signature = signature_of(str(node["_target_"])) if isinstance(node, DictConfig) and "_target_" in node else None
    return "take it out" if signature is None else did_you_mean(wrong, signature.arguments)


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("See http", "full_key:", "object_type=")))
