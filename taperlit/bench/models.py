"""The models that are measured: random weights, and what tapering and folding make of the same weights."""

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn

from taperlit.errors import TaperlitError
from taperlit.folding import fold
from taperlit.norm import shared_gate, tapered_norms, update_alignment
from taperlit.training.policy import Policy, apply_policy
from taperlit.transformer import Transformer, TransformerConfig

CALIBRATED_TOKENS = 64
EMBEDDING, ADDED, LOGITS = 0.5, 0.25, 3.0  # spreads: of embeddings, of what all blocks add, of the logits


@torch.no_grad()
def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A plain model whose next tokens are neither all alike nor all equally likely, in eval mode.

    As initialized for training, logits hardly differ, and a model with a tied head repeats its last token for ever:
    here the final norm's gains have random signs, so that a token is not likeliest after itself. What the blocks add is
    small beside the embedding, so that tokens are of about one length and the model stays in its bounds without norms.

    Args:
        config: of the model.
        seed: the same one gives the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=EMBEDDING, generator=generator)
        elif isinstance(module, nn.Linear) and module is not model.head:
            damped = ADDED / math.sqrt(config.n_layer) if name.endswith(("o_proj", "down_proj")) else 1.0
            module.weight.normal_(std=damped / math.sqrt(module.in_features), generator=generator)
            if module.bias is not None:
                module.bias.normal_(std=0.1, generator=generator)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.weight.uniform_(0.8, 1.2, generator=generator)
            if isinstance(module, nn.LayerNorm):
                module.bias.normal_(std=0.1, generator=generator)
    if not config.tied:
        model.head.weight.normal_(std=EMBEDDING, generator=generator)
    signs = torch.rand(config.d_model, generator=generator).sub_(0.5).sign_()
    cast(Tensor, model.final_norm.weight).mul_(signs * (LOGITS / EMBEDDING / math.sqrt(config.d_model)))
    if model.rope is not None:
        model.rope.reset_parameters()
    return model.eval()


def tapered(model: Transformer, policy: Policy, gate: float = 0.0, seed: int = 0) -> Transformer:
    """A copy of a plain model as training would taper it: alignment scalars by their statistics, then the gate.

    Args:
        model: plain.
        policy: which norms, see :func:`taperlit.training.policy.apply_policy`.
        gate: where it is left.
        seed: of the random tokens that the statistics are of.
    """
    model = copy.deepcopy(model)
    apply_policy(model, policy)
    norms = list(tapered_norms(model).values())
    shared = shared_gate(model)
    if shared is None:
        raise TaperlitError(f"The policy {policy!r} tapers nothing; choose internal or all.")
    generator = torch.Generator().manual_seed(seed)
    count = min(CALIBRATED_TOKENS, model.config.block_size)
    tokens = torch.randint(model.config.vocab_size, (2, count), generator=generator)
    with torch.enable_grad():  # a norm gathers statistics where it is trained
        model.train()
        model(tokens)
    update_alignment(norms, ema_rate=1.0)
    for norm in norms:
        norm.freeze()
    shared.set(gate)
    return model.eval()


def folded(explicit: Transformer) -> Transformer:
    """A tapered model whose gate is 0, folded in a copy."""
    model = copy.deepcopy(explicit)
    tokens = torch.arange(min(8, model.config.block_size))[None] % model.config.vocab_size
    fold(model, lambda: model(tokens), keep=False)
    return model
