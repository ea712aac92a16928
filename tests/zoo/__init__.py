"""A zoo of small modules, each with the verdict that ``fold`` owes it; see ``docs/folding_zoo.md``."""

from importlib import import_module

from zoo.case import CASES

THEMES = (
    "linears",
    "biases",
    "weights",
    "axes",
    "tokens",
    "choices",
    "uses",
    "sharing",
    "attention",
    "blocks",
    "experts",
    "convolutions",
    "runs",
    "outputs",
    "hidden",
    "pretrained",
)

for theme in THEMES:
    import_module(f"zoo.{theme}")

__all__ = ["CASES"]
