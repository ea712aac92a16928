"""The README.md of an exported model: what was removed, from what, how, and what it cost."""

import json
import re
from collections.abc import Mapping

import torch

from taperlit.hub.agreement import Agreement
from taperlit.hub.stock import places_of
from taperlit.structure import Structure

PAPER = "https://arxiv.org/abs/2602.10408"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    origin: str,
    kind: str,
    structure: Structure,
    agreement: Agreement,
    reason: str | None,
    dtype: torch.dtype,
    results: Mapping[str, float] | None = None,
) -> str:
    """Write a model card.

    Args:
        origin: the name of the model that it was made from, or other words for it.
        kind: the name of its class.
        structure: what folding did.
        agreement: what the export measured.
        reason: why it does not load in the stock class, or None where it does.
        dtype: of its weights.
        results: figures that were measured before and after, by what they are; the card says where there are none.
    """
    gone, kept = [*structure["identities"]], [*structure["scales"]]
    stock = reason is None
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- taperlit", "- norm-free"]
    if _HUB_NAME.fullmatch(origin):
        head.append(f"base_model: {json.dumps(origin)}")
    need = "" if stock else "import taperlit  # pip install 'taperlit[hub]'; registers the class, no remote code\n"
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {origin} without {'its norms' if stock else f'{len(gone)} of its norms'}",
        "",
        f"A `{kind}` whose normalization layers were tapered away in training and folded into the linear maps after "
        f"them, by the method of [Gated Normalization Removal and Scale Anchoring in Pre-Norm Transformers]({PAPER}), "
        "with [taperlit](https://pypi.org/project/taperlit/).",
        "",
        "## What was removed",
        "",
        f"{len(gone)} norms of {origin}: what is in their place asks for no token's mean square or variance.",
        "",
        *(f"- `{pattern}` ({count})" for pattern, count in places_of(gone).items()),
        "",
    ]
    if kept:
        lines += [f"Kept as an explicit linear map, since the head shares the embedding's matrix: {_code(kept)}.", ""]
    if structure["untied"]:
        lines += [f"The head has a matrix of its own now: {_code(structure['untied'])}.", ""]
    if stock:
        lines += [
            "The stock class still calls its norms. Their epsilon of 2^80 and gain of 2^40 make them identities, "
            "exactly, in float32 and bfloat16 (not in float16, where such a gain overflows). Leave these gains out of "
            "training.",
            "",
        ]
    else:
        lines += [f"It is no stock class, since {reason}.", ""]
    lines += ["## What it cost", ""]
    if results:
        lines += ["| measured | |", "|---|---|", *(f"| {name} | {value:.6g} |" for name, value in results.items())]
    else:
        lines += ["The loss before and after was not measured when this was written."]
    lines += [
        "",
        f"Of the export alone, in {str(dtype).removeprefix('torch.')} against the folded model in float32, on "
        f"{agreement.tokens} tokens: largest logit difference {agreement.logits:.2e}, mean KL divergence "
        f"{agreement.divergence:.1e} nats. The largest mean square where a norm was is {agreement.mean_square:.4g}.",
        "",
        "## How to load it",
        "",
        "```python",
        f"{need}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        "```",
        "",
        "No licence is given here: it follows from what the model was made from and trained on.",
    ]
    return "\n".join(lines) + "\n"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
