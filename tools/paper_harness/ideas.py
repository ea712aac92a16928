"""What was tried to taper without loss: each idea is an overlay of a run's config that changes one thing.

docs/experiments.md says what came of each.
"""

import copy
from typing import Any

PLAIN = ("gelu", "relu")  # MLPs of two matrices, not three: of equal size if they are half as wide again


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested options, with the latter's values where both have one."""
    made = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], value) if both else copy.deepcopy(value)
    return made


def _slot(name: str, callback: str, **init_args: Any) -> dict[str, Any]:
    return {"taper": {name: {"class_path": f"taperlit.{callback}", "init_args": init_args}}}


def _option(name: str, **init_args: Any) -> dict[str, Any]:
    return {"taper": {name: {"init_args": init_args}}}


def _mlp(kind: str) -> dict[str, Any]:
    return {"model": {"overrides": {"mlp": kind}}}


# The part of a run's config that each idea changes, beside what runs.Run spells out.
IDEAS: dict[str, dict[str, Any]] = {
    "end_80": _option("gate", end=0.8),
    "end_100": _option("gate", end=1.0),
    "early": _option("gate", warmup=0.02, end=0.12),
    "warmup_20": _option("gate", warmup=0.2, end=0.8),
    "warmup_auto": _option("gate", warmup="auto", end=0.8),
    "linear": _option("gate", shape="linear"),
    "depth": _option("gate", stages="depth"),
    "kind": _option("gate", stages="kind"),
    "token_fit": _option("alignment", fit="token"),
    "track": _option("alignment", track=0.0),
    "fade": _option("anchor", fade=0.5),
    "decay": _slot("decay", "DecayWithGate"),
    "fade_decay": merged(_option("anchor", fade=0.5), _slot("decay", "DecayWithGate")),
    "lr_dip": _slot("lr_dip", "LearningRateDip"),
    "moments": _option("alignment", moments=True),
    "skip": _option("guard", skip=True),
    "hold": merged(_slot("hold", "GateHold"), _option("guard", skip=True)),
    "tail": _slot("tail", "TailPenalty", residual="model.final_norm"),
    "tail_random": _slot("tail", "TailPenalty", residual="model.final_norm", random_every=4),
    "rows": _slot("rows", "EqualRows"),
    "writes": _slot("writes", "BoundedWrites"),
    "bias": {"model": {"taper_bias": True}},
    "fan_in": {"model": {"overrides": {"init": "fan_in"}}},
    "embed_norm": {"model": {"overrides": {"embed_norm": True}}},
    "unit": {"model": {"overrides": {"init": "fan_in", "embed_norm": True}}},
    "glu": _mlp("glu"),
    "gelu": _mlp("gelu"),
    "relu": _mlp("relu"),
    # What won, one at a time, together.
    "fade_80": merged(_option("gate", end=0.8), _option("anchor", fade=0.5)),
    "fade_early": merged(_option("gate", warmup=0.02, end=0.12), _option("anchor", fade=0.5)),
    "fade_bias": merged(_option("anchor", fade=0.5), {"model": {"taper_bias": True}}),
    "fade_token_fit": merged(_option("anchor", fade=0.5), _option("alignment", fit="token")),
    "fade_attention": merged(_option("anchor", fade=0.5), {"model": {"taper": "attention"}}),  # which norms cost what
    "early_bias": merged(_option("gate", warmup=0.02, end=0.12), {"model": {"taper_bias": True}}),
    "gelu_fade": merged(_mlp("gelu"), _option("anchor", fade=0.5)),
    "gelu_tail": merged(_mlp("gelu"), _slot("tail", "TailPenalty", residual="model.final_norm", random_every=4)),
}

OURS = "fade"
"""What we taper with, in the sizes named ``_unit``."""


def of_the_model(idea: str) -> str | None:
    """The idea that is what this one changes of a run without a taper too, and nothing else; None if that is nothing.

    So a baseline is trained once for all ideas that have its model.
    """
    changes = _of_any_model(IDEAS[idea])
    return next(name for name, alone in IDEAS.items() if alone == changes) if changes else None


def _of_any_model(changes: dict[str, Any]) -> dict[str, Any]:
    """What an idea changes of a run without a taper too: the model's shape."""
    overrides = changes.get("model", {}).get("overrides")
    return {"model": {"overrides": overrides}} if overrides else {}


def with_idea(config: dict[str, Any], idea: str, tapered: bool) -> dict[str, Any]:
    """A run's config with an idea's changes.

    Args:
        config: of the run; left as it is.
        idea: name in ``IDEAS``.
        tapered: the run has a taper; without one what the idea changes of it is left out.
    """
    changes = IDEAS[idea] if tapered else _of_any_model(IDEAS[idea])
    made = merged(config, changes)
    shape = made["model"]["overrides"]
    if changes.get("model", {}).get("overrides", {}).get("mlp") in PLAIN:
        shape["d_ff"] = 3 * shape["d_ff"] // 2
    return made
