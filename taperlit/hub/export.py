"""A folded model as a folder of ``transformers``, compared with itself as it is read back before the folder appears."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from taperlit.checkpoint.atomic import write_directory
from taperlit.errors import TaperlitError
from taperlit.hub.agreement import Agreement, agreement_of, check_tokens, logits_and_mean_square, rounding_of
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.families import FAMILIES, as_causal_lm
from taperlit.hub.load import quiet
from taperlit.hub.model_card import model_card
from taperlit.hub.origin import Origin
from taperlit.hub.stock import LARGEST_MEAN_SQUARE, NotStockError, registered_model, stock_model, structure_of
from taperlit.structure import Structure
from taperlit.transformer import Transformer

DTYPES = (torch.float32, torch.bfloat16)
# Largest difference of logits, relative to the largest: rounding through many layers. In bfloat16 a model may also
# differ three times as much as the folded one does by its own weights' and activations' rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEADROOM = 2.0**8  # other text may have larger mean squares than the text that was looked at: as many times as this


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        directory: the folder.
        agreement: see there.
        reason: why the stock class cannot hold the model, so that it loads after ``import taperlit`` alone; None where
            ``transformers`` needs nothing else.
    """

    directory: Path
    agreement: Agreement
    reason: str | None


@torch.no_grad()
def export_transformers(
    model: CausalLM | Transformer,
    structure: Structure | None,
    directory: str | Path,
    tokenizer_json: str | None = None,
    dtype: torch.dtype = torch.float32,
    end_of_text: str | None = None,
    results: Mapping[str, float] | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a folded model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads, all or nothing.

    Where all norms that share the config's epsilon are gone, or kept as an explicit map, the folder needs nothing but
    ``transformers``: its norms are identities (:mod:`taperlit.hub.stock`). Otherwise it loads after ``import taperlit``
    (:mod:`taperlit.hub.registered`). Neither runs remote code.

    Args:
        model: folded, in float32; one of ours becomes GPT-2, Llama or another that has its shape.
        structure: what folding did.
        directory: made here.
        tokenizer_json: the text for ``tokenizer.json``, or None.
        dtype: of the weights, float32 or bfloat16.
        end_of_text: the tokenizer's token that ends a text, where the model comes without a ``tokenizer_config.json``.
        results: figures for the model card, by what they are.
        force: replace a directory that exists.
        report: is told, a line each, what was measured before the folder appears.

    Raises:
        TaperlitError: the model is not folded, of a class that came with its own code, or of no stock shape; a dtype
            that is neither; the model as read back differs from the folded one by more than rounding; or the directory
            exists or cannot be written.
    """
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        why = ": norms are made identities by a gain of 2^40, and float16 ends at 65504" if name == "float16" else ""
        raise TaperlitError(f"Export to transformers has float32 and bfloat16, not {name}{why}.")
    if structure is None:
        raise TaperlitError(
            "The model is not folded; fold it first, with `taperlit fold` or taperlit.fold(model, run)."
        )
    origin = "a taperlit Transformer"
    if isinstance(model, Transformer):
        model = as_causal_lm(model)
        structure = _renamed(structure, model)
    else:
        origin = model.origin.name
    lm = model.lm
    if not type(lm).__module__.startswith(("transformers.", "taperlit.")):
        raise TaperlitError(f"{origin} is a {type(lm).__name__}, which is no class of transformers' own.")
    structure = structure_of(lm, structure)
    tokens = check_tokens(model, tokenizer_json)
    wanted, mean_square = logits_and_mean_square(model, [*structure["identities"], *structure["scales"]], tokens)
    exported, reason = _exported(lm, structure, dtype)
    rounding = 0.0 if dtype is torch.float32 else rounding_of(model, tokens, wanted, dtype)
    agreements = []

    def fill(partial: Path) -> None:
        with quiet():
            exported.save_pretrained(partial)
        _carry(partial, model.origin, tokenizer_json, end_of_text)
        agreement = agreement_of(partial, dtype, tokens, wanted, rounding, mean_square)
        agreements.append(agreement)
        for line in describe(agreement, reason):
            report(line)
        _require_agreement(agreement, dtype, reason)
        card = model_card(origin, type(lm).__name__, structure, agreement, reason, dtype, results)
        (partial / "README.md").write_text(card, encoding="utf-8")
        for path in partial.glob("*.safetensors"):  # which safetensors makes for the user alone, whatever the umask
            shutil.copymode(partial / "README.md", path)

    return Exported(write_directory(Path(directory), fill, force), agreements[0], reason)


def describe(agreement: Agreement, reason: str | None) -> list[str]:
    """What was measured, and how the folder loads, in lines."""
    loads = "with transformers alone" if reason is None else f"after `import taperlit`, since {reason}"
    return [
        f"loads {loads}",
        f"exported against folded, {agreement.tokens} tokens: largest logit difference {agreement.logits:.2e} "
        f"({agreement.relative:.1e} of the largest logit), mean KL divergence {agreement.divergence:.1e} nats",
        f"largest mean square where a norm was: {agreement.mean_square:.4g} (root {agreement.mean_square**0.5:.4g})",
    ]


def _renamed(structure: Structure, model: CausalLM) -> Structure:
    """The record of structure of a model of ours, with the names that it has as a causal language model."""
    family = next(family for family in FAMILIES if family.lm == type(model.lm).__name__)
    places = {ours: f"lm.{theirs}" for theirs, several in family.pairs(len(model.blocks)) for ours in several}

    def renamed(parameter: str) -> str:
        module, _, leaf = parameter.rpartition(".")
        return f"{places[module]}.{leaf}"

    return Structure(
        identities={
            places[name]: list(dict.fromkeys(map(renamed, weights)))
            for name, weights in structure["identities"].items()
        },
        scales={places[name]: scale for name, scale in structure["scales"].items()},
        biases={new: [*model.get_parameter(new).shape] for new in map(renamed, structure["biases"])},
        untied=[renamed(name) for name in structure["untied"]],
        difference=structure["difference"],
    )


def _exported(lm: nn.Module, structure: Structure, dtype: torch.dtype) -> tuple[Any, str | None]:
    """The model to write, and why it is not of the stock class, if it is not."""
    try:
        return stock_model(lm, structure, dtype), None
    except NotStockError as stock:
        try:
            return registered_model(lm, structure, dtype), str(stock)
        except NotStockError as reason:
            raise TaperlitError(f"{type(lm).__name__} cannot be exported: {reason}.") from reason


def _require_agreement(agreement: Agreement, dtype: torch.dtype, reason: str | None) -> None:
    """Refuse to write a model that is not the folded one.

    Raises:
        TaperlitError: says by how much.
    """
    if reason is None and not agreement.mean_square * HEADROOM < LARGEST_MEAN_SQUARE:
        raise TaperlitError(
            f"The residual stream reaches a mean square of {agreement.mean_square:.2g} on the checked tokens; norms "
            f"made identities are exact below {LARGEST_MEAN_SQUARE:.2g}, and other text needs {HEADROOM:g} times as "
            "much room. Train with a scale anchor (taperlit.ScaleAnchor)."
        )
    name = str(dtype).removeprefix("torch.")
    tolerance = max(TOLERANCE[dtype], 3 * agreement.rounding)
    if not agreement.relative <= tolerance:
        mend = "export in float32"
        if dtype is torch.float32:
            mend = "something was put on the model that its class has not, a forward hook say; remove it"
        raise TaperlitError(
            f"Read back, the exported model's logits differ from the folded model's by {agreement.relative:.2g} "
            f"relative to the largest, more than {name} rounds ({tolerance:.2g}), so nothing is written: {mend}."
        )


def tokenizer_files(carried: Mapping[str, str], tokenizer_json: str | None, end_of_text: str | None) -> dict[str, str]:
    """The texts of the files that ``AutoTokenizer`` reads, by name; none where there is no tokenizer.

    Args:
        carried: the small files that a pretrained model came with.
        tokenizer_json: the tokenizer's own file, or None.
        end_of_text: its token that ends a text, where the model came without a ``tokenizer_config.json``.
    """
    if tokenizer_json is None:
        return {}
    files = {name: text for name, text in carried.items() if name not in ("config.json", "generation_config.json")}
    if "tokenizer_config.json" not in files:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if end_of_text is not None:
            config |= {"bos_token": end_of_text, "eos_token": end_of_text}
        files["tokenizer_config.json"] = json.dumps(config, indent=2) + "\n"
    return {**files, "tokenizer.json": tokenizer_json}


def _carry(folder: Path, origin: Origin, tokenizer_json: str | None, end_of_text: str | None) -> None:
    """Write the tokenizer, and the generation config that the model came with, or else one that knows where to end."""
    for name, text in tokenizer_files(origin.files, tokenizer_json, end_of_text).items():
        (folder / name).write_text(text, encoding="utf-8")
    path = folder / "generation_config.json"
    if path.name in origin.files:
        path.write_text(origin.files[path.name], encoding="utf-8")
    elif tokenizer_json is not None and end_of_text is not None:
        end = Tokenizer.from_str(tokenizer_json).token_to_id(end_of_text)
        words = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        words = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, **words}
        path.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
