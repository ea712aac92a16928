"""What a GGUF file says and ``transformers`` passes over in silence, which would leave another model."""

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taperlit.errors import TaperlitError

MEND = "give the model's own folder or its name on the hub instead of the GGUF file"
HEAD, TABLE = "output.weight", "token_embd.weight"
# What the shapes of the tensors say too, or what no logit depends on.
_ELSEWHERE = {
    "attention.head_count_kv", "block_count", "context_length", "embedding_length", "expert_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "feed_forward_length", "pooling_type",
    "rope.scaling.finetuned", "shortconv.l_cache", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size",
    "ssm.time_step_rank", "tensor_data_layout", "vocab_size",
}  # fmt: skip
# Gemma's files do not say how attention is scaled: by a head's width, but in the largest model, known by its blocks.
_BLOCKS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}


def check_gguf(path: Path, name: str, lm: Any) -> None:
    """Refuse a model that is not all that its GGUF file says.

    Nothing here depends on what ``transformers`` reads: tensors that became no parameter are found by counting, and
    what the header says is looked for in the model. A key that is not known here is refused, unless it says 0.

    Args:
        path: of the file.
        name: of the model, for messages.
        lm: what ``transformers`` made of the file; all its parameters were found there.

    Raises:
        TaperlitError: names a tensor, or a key of the header, that the model does not have.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = _value(reader.fields["general.architecture"])
    _check_tensors(name, reader.tensors, architecture, lm)
    has = _has(lm)
    for key, said in _header(reader.fields, architecture, lm.config.get_text_config()).items():
        if key not in _ELSEWHERE and not _among(said, has.get(key, (0,))):
            raise TaperlitError(
                f"{name}: {architecture}.{key} is {said}, but not in the model that transformers makes of it; {MEND}."
            )


def _check_tensors(name: str, tensors: Sequence[Any], architecture: str, lm: Any) -> None:
    """Refuse a file with more values than the model has, or fewer."""
    by_name = {tensor.name: tensor for tensor in tensors}
    state = lm.state_dict()
    own = {value.data_ptr(): key for key, value in reversed(state.items())}.values()  # the first name of a tied one
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    if tied and HEAD in by_name and np.array_equal(by_name[HEAD].data, by_name[TABLE].data):
        del by_name[HEAD]  # files of BLOOM and Falcon have it twice
    count, wanted = sum(int(tensor.n_elements) for tensor in by_name.values()), sum(state[key].numel() for key in own)
    if count == wanted:
        return
    left = sorted(by_name.keys() - _names(own, architecture, lm.config.get_text_config().num_hidden_layers))
    if not left:
        raise TaperlitError(f"{name} holds {count} values, and what transformers makes of it {wanted}; {MEND}.")
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    raise TaperlitError(f"{name}: {left[0]}{more} has no place in the model that transformers makes of it; {MEND}.")


def _names(keys: Iterable[str], architecture: str, blocks: int) -> set[str]:
    """What parameters are called in a file."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds.get(architecture, MODEL_ARCH.LLAMA), blocks)
    found = set()
    for key in keys:
        for part in ("gate_up_proj", "gate_proj", "up_proj"):  # of experts: a file has them apart
            words = key.replace("gate_up_proj", part).split(".")
            for start in range(3):  # some are known by what they are called in the model without its head
                if name := table.get_name(".".join(words[start:]), (".weight", ".bias")):
                    found |= {name, f"{name}.weight"}
    return found


def _value(field: Any) -> Any:
    """What a field of a header says: a text, a number, or a list of them."""
    from gguf import GGUFValueType

    text = field.types[-1] == GGUFValueType.STRING
    values = [bytes(field.parts[i]).decode() if text else field.parts[i][0].item() for i in field.data]
    return values[0] if len(values) == 1 else values


def _header(fields: dict[str, Any], architecture: str, config: Any) -> dict[str, Any]:
    """What a header says of the model, by key, and what llama.cpp takes for said; not what says nothing."""
    start = f"{architecture}."
    header = {key[len(start) :]: _value(field) for key, field in fields.items() if key.startswith(start)}
    way = header.get("rope.scaling.type")
    if way in (None, "none"):
        header.pop("rope.scaling.original_context_length", None)  # Phi-3's files have it anyway
    if way == "none":
        header.pop("rope.scaling.factor", None)
    if architecture in _BLOCKS_OF_LARGEST:
        largest = config.num_hidden_layers == _BLOCKS_OF_LARGEST[architecture]
        width = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        header.setdefault("attention.scale", width**-0.5)
    return header


def _has(lm: Any) -> dict[str, Collection[Any]]:
    """What a model has of what a header can say: the values that agree, by key; for other keys it is 0."""
    config = lm.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    rope = ropes.get("full_attention", ropes)
    way = rope.get("rope_type")

    def field(name: str) -> Any:
        return getattr(config, name, None) or 0

    def of_modules(*names: str) -> set[Any]:
        values = (getattr(module, name, None) for module in lm.modules() for name in names)
        return {value for value in values if isinstance(value, float | int)}

    widths, eps = of_modules("head_dim"), of_modules("eps", "variance_epsilon")
    return {
        "attention.causal": (True,),
        "attention.head_count": (field("num_attention_heads"),),
        "attention.key_length": widths,
        "attention.layer_norm_epsilon": eps,
        "attention.layer_norm_rms_epsilon": eps,
        "attention.max_alibi_bias": (8 if config.model_type == "bloom" or field("alibi") else 0,),
        "attention.scale": of_modules("scaling"),
        "attention.sliding_window": (field("sliding_window"),),
        "attention.value_length": widths,
        "attn_logit_softcapping": (field("attn_logit_softcapping"),),
        "embedding_scale": (0, 1),
        "expert_gating_func": (2 if config.model_type == "minimax_m2" else 1,),  # a sigmoid, or a softmax
        "expert_used_count": (field("num_experts_per_tok"),),
        "expert_weights_norm": (field("norm_topk_prob"),),
        "expert_weights_scale": (0, 1),
        "final_logit_softcapping": (field("final_logit_softcapping"),),
        "logit_scale": (0, 1),
        "residual_scale": (0, 1),
        "rope.dimension_count": {2 * len(buffer) for key, buffer in lm.named_buffers() if key.endswith("inv_freq")},
        "rope.freq_base": (rope.get("rope_theta"),),
        "rope.freq_base_swa": (ropes.get("sliding_attention", rope).get("rope_theta"),),
        "rope.scale_linear": (0, rope.get("factor", 1)),
        "rope.scaling.attn_factor": (0, 1),
        "rope.scaling.factor": (0, rope.get("factor", 1)),
        "rope.scaling.original_context_length": (rope.get("original_max_position_embeddings"),),
        "rope.scaling.type": ("none" if way == "default" else way,),
        "use_parallel_residual": (field("use_parallel_residual"),),
    }


def _among(said: Any, values: Collection[Any]) -> bool:
    """Whether a value is one of some, but for its rounding to float32 in a file."""
    if isinstance(said, list):  # one a layer
        return not any(said)
    if isinstance(said, str):
        return said in values
    return any(isinstance(value, float | int) and math.isclose(said, value, rel_tol=1e-6) for value in values)
