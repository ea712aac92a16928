"""What was tried to taper without loss: each idea is an overlay of a run's config that changes one thing.

docs/experiments.md says what came of each.
"""

import copy
from typing import Any

# The part of a run's config that each idea changes, beside what runs.Run spells out.
IDEAS: dict[str, dict[str, Any]] = {
    "end_80": {"taper": {"gate": {"init_args": {"end": 0.8}}}},
    "end_100": {"taper": {"gate": {"init_args": {"end": 1.0}}}},
    "warmup_20": {"taper": {"gate": {"init_args": {"warmup": 0.2, "end": 0.8}}}},
    "linear": {"taper": {"gate": {"init_args": {"shape": "linear"}}}},
    "skip": {"taper": {"guard": {"init_args": {"skip": True}}}},
    "token_fit": {"taper": {"alignment": {"init_args": {"fit": "token"}}}},
}


def changes_the_model(idea: str) -> bool:
    """Whether a baseline is another one with the idea than without it."""
    return set(IDEAS[idea]) != {"taper"}


def with_idea(config: dict[str, Any], idea: str, tapered: bool) -> dict[str, Any]:
    """A run's config with an idea's changes.

    Args:
        config: of the run; left as it is.
        idea: name in ``IDEAS``.
        tapered: the run has a taper; without one what the idea changes of it is left out.
    """
    changes = {section: own for section, own in IDEAS[idea].items() if tapered or section != "taper"}
    return merged(config, changes)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested options, with the latter's values where both have one."""
    made = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], value) if both else copy.deepcopy(value)
    return made
