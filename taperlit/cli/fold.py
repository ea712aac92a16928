"""``taperlit fold``: a checkpoint whose gate is 0 into a model without those norms."""

import math
from typing import Literal

from taperlit.checkpoint.atomic import named, require_apart
from taperlit.errors import TaperlitError

CHECKED_TOKENS = 64  # at most: each is a float64 forward pass, of which one shows a wrong fold as well as many


def fold_checkpoint(
    ckpt: str, out: str | None = None, force: bool = False, tied: Literal["untie", "scale"] = "untie"
) -> None:
    """Fold a checkpoint whose gate is 0 into a model without those norms.

    Folded and unfolded are compared in float64 on the run's validation text before anything is written.

    Args:
        ckpt: a checkpoint of ``taperlit fit``.
        out: directory to write; by default ``<checkpoint's name>-folded`` beside the checkpoint.
        force: replace ``out`` if it exists.
        tied: for an All-Taper model whose head shares the embedding's matrix: give the head its own, or keep the final
            norm's linear map as an explicit scale.

    Raises:
        TaperlitError: an unusable checkpoint, one without tapered norms, a gate that is not 0, a fold that would change
            the outputs, or ``out`` exists, or is or holds the checkpoint.
    """
    path = named(ckpt)
    directory = named(out) if out is not None else path.with_name(f"{path.stem}-folded")
    require_apart(path, directory)
    if directory.exists() and not force:
        raise TaperlitError(f"{directory} exists; name another --out or pass --force.")
    # Here, so that the help and a wrong option are told without torch.
    from taperlit.checkpoint.folded import load_checkpoint, write_folded
    from taperlit.folding import fold, refuse_pointwise
    from taperlit.norm import tapered_norms
    from taperlit.stress.probe import brief_line
    from taperlit.structure import describe, untie
    from taperlit.transformer import Transformer

    loaded = load_checkpoint(path)
    model = loaded.model
    refuse_pointwise(model)
    norms = tapered_norms(model)
    sizes = {name: sum(math.prod(p.shape) for p in norm.parameters(recurse=False)) for name, norm in norms.items()}
    del norms
    if not sizes:
        raise TaperlitError(f"{ckpt} has no tapered norms (model.taper is none), so there is nothing to fold.")
    if loaded.sample is None:
        raise TaperlitError(f"{ckpt} holds no validation blocks to check the folding on; it was not made by this fit.")
    blocks = loaded.sample.long()
    tokens = blocks[:, : min(blocks.shape[1] - 1, CHECKED_TOKENS // len(blocks))]
    own_head = isinstance(model, Transformer) and tied == "untie" and model.config.tied and "final_norm" in sizes
    if own_head:
        untie(model, "head.weight")  # as fold would, after a first look at the model that this saves
    structure = fold(model, lambda: model(tokens), tied=tied, keep=False)
    if own_head:
        structure["untied"].append("head.weight")
    difference = structure["difference"]
    print(f"largest difference, folded against unfolded, on {tokens.numel()} validation tokens: {difference:.2e}")
    write_folded(directory, model, structure, loaded.tokenizer_json, force, loaded.step)
    gone = structure["identities"]
    print(f"removed {len(gone)} norms with {sum(sizes[name] for name in gone)} parameters:")
    print("\n".join(f"  {line}" for line in describe(structure)))
    print(f"wrote {directory}")
    print(brief_line(model, blocks[:, :-1], loaded.tokenizer_json)[0])
