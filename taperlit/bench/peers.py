"""``transformers``' models of the same shape and with the same weights, to be measured beside ours."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from taperlit.decode.onnx_engine import OnnxEngine
from taperlit.decode.onnx_export import DTYPES, onnx_engine
from taperlit.transformer import Transformer, TransformerConfig

_LLAMA = {
    "tok_embed.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.": "self_attn.",
    "blocks.": "model.layers.",
}
_GPT2 = {
    "tok_embed.weight": "transformer.wte.weight",
    "pos_embed.weight": "transformer.wpe.weight",
    "final_norm": "transformer.ln_f",
    "head.weight": "lm_head.weight",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "blocks.": "transformer.h.",
}


class Unavailable(Exception):
    """A peer cannot be measured here; the message says why."""


def transformers_model(config: TransformerConfig) -> nn.Module:
    """``transformers``' Llama or GPT-2 of the same shape, with its own random weights.

    Raises:
        Unavailable: ``transformers`` is not installed or has no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    transformers.logging.set_verbosity_error()
    c = config
    shape: dict[str, Any] = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tied}
    # No token ends a text, and none is padding.
    shape |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kind: Any
    if (c.norm, c.position, c.mlp, c.bias) == ("rmsnorm", "rope", "swiglu", False):
        kind = transformers.LlamaForCausalLM
        shape |= {
            "hidden_size": c.d_model,
            "intermediate_size": c.d_inner,
            "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head,
            "num_key_value_heads": c.kv_heads,
            "max_position_embeddings": c.block_size,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
        }
    elif (c.norm, c.position, c.mlp, c.bias, c.kv_heads) == ("layernorm", "learned", "gelu", True, c.n_head):
        kind = transformers.GPT2LMHeadModel
        shape |= {
            "n_embd": c.d_model,
            "n_inner": c.d_inner,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_positions": c.block_size,
            "layer_norm_epsilon": c.norm_eps,
        }
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        raise Unavailable("transformers has no model of this shape among Llama and GPT-2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(kind.config_class(attn_implementation="sdpa", **shape)).eval()


@torch.no_grad()
def converted(model: Transformer) -> nn.Module:
    """A plain model of ours as ``transformers``' own, with the same weights, on the same device.

    Raises:
        Unavailable: see :func:`transformers_model`.
    """
    theirs = transformers_model(model.config)
    llama = model.config.norm == "rmsnorm"
    state = _renamed(model.state_dict(), _LLAMA if llama else _GPT2)
    if not llama:
        for i in range(model.config.n_layer):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"transformer.h.{i}.attn.{name}_proj.{kind}") for name in "qkv"]
                state[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat(parts)
        # Its Conv1D holds (d_in, d_out).
        state = {k: v.t() if "c_" in k and k.endswith("weight") else v for k, v in state.items()}
    theirs.load_state_dict(state)
    return theirs.to(model.head.weight.device)


def onnxruntime_engine(model: Transformer, batch_size: int, length: int, dtype: torch.dtype) -> OnnxEngine:
    """A model of ours exported to ONNX and opened in onnxruntime, on the CPU.

    Raises:
        Unavailable: onnx or onnxruntime is not installed, or has no such dtype.
    """
    for name in ("onnx", "onnxruntime"):
        if find_spec(name) is None:
            raise Unavailable(f"{name} is not installed")
    if dtype not in DTYPES:
        raise Unavailable(f"the ONNX export has no {str(dtype).removeprefix('torch.')}")
    return onnx_engine(model, batch_size, length, dtype)


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed
