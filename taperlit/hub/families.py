"""GPT-2's and the Llama family's weights in our ``Transformer``, and back: one table of names per family."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from taperlit.checkpoint.assign import assign, build_hollow
from taperlit.compare import largest_difference
from taperlit.consumers import run_quietly
from taperlit.errors import TaperlitError
from taperlit.hub.causal_lm import CausalLM
from taperlit.hub.load import build_pretrained
from taperlit.hub.origin import Origin
from taperlit.norm import Affine, TaperNorm, shared_gate, tapered_norms
from taperlit.structure import Structure, apply_structure
from taperlit.surgery import taper
from taperlit.transformer import Embedding, Linear, RopeScaling, Transformer, TransformerConfig

CHECKED_TOKENS = 16
FLOAT32_ROUNDING = 1e-4  # of logits, relative to the largest, through many layers
CONTEXT, WINDOW = "max_position_embeddings", "sliding_window"


@dataclass(frozen=True)
class Family:
    """What ``transformers`` calls the parts of our ``Transformer``.

    Args:
        model_type: the family's name in a ``config.json``.
        lm: the class of its language model.
        norm: the class of its norms.
        modules: its modules outside of the blocks, and ours.
        blocks: its list of blocks.
        block: the modules of each of its blocks, and ours; where one of its holds several of ours, their outputs lie
            one after another.
        fields: the fields of our config, and those of its config that hold the same; where several do, they must agree.
        fixed: the fields of our config that the family has no choice in.
        neutral: fields of its config that must have one of these values, the first where it says nothing: the others
            are features that ours has not.
        act: the field of its config that holds the MLP's activation.
        acts: by our kind of MLP, the activations that make it, the first of which is written; the first of all is where
            the config says nothing.
        made: further fields of a config that is made for it.
        rotary: the module that makes its rotary positions, or None where they are learned.
    """

    model_type: str
    lm: str
    norm: str
    modules: dict[str, str]
    blocks: str
    block: dict[str, tuple[str, ...]]
    fields: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]
    neutral: dict[str, tuple[Any, ...]]
    acts: dict[str, tuple[str, ...]]
    act: str = "hidden_act"
    made: dict[str, Any] = field(default_factory=dict)
    rotary: str | None = None

    def pairs(self, n_layer: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each module of its, and those of ours that it holds."""
        for theirs, ours in self.modules.items():
            yield theirs, (ours,)
        for i in range(n_layer):
            for theirs, several in self.block.items():
                yield f"{self.blocks}.{i}.{theirs}", tuple(f"blocks.{i}.{ours}" for ours in several)

    def read(self, theirs: Mapping[str, Any]) -> TransformerConfig:
        """Our config for one of its, as a dictionary.

        A sliding window shorter than the context becomes the context: up to there both attend to everything.

        Raises:
            TaperlitError: it has a feature that ours has not; the field is named.
        """
        for name, values in self.neutral.items():
            value = theirs.get(name, values[0])
            if any(one not in values for one in (value if isinstance(value, list) else [value])):
                self._refuse(f"{name} is {value!r}, not {' or '.join(map(repr, values))}")
        fields = {**self.fixed, "mlp": self._read_mlp(theirs)}
        for ours, names in self.fields.items():
            if any(theirs.get(name) != theirs.get(names[0]) for name in names):
                self._refuse(" and ".join(f"{name} {theirs.get(name)!r}" for name in names) + " differ")
            fields[ours] = theirs.get(names[0])
        window = theirs.get(WINDOW) if theirs.get("use_sliding_window", True) else None
        if window is not None:
            fields["block_size"] = min(fields["block_size"], window)
        if self.rotary is not None:
            fields |= self._read_rope(theirs)
        return TransformerConfig(**fields)

    def _read_mlp(self, theirs: Mapping[str, Any]) -> str:
        kinds = {name: mlp for mlp, names in self.acts.items() for name in names}
        if (name := theirs.get(self.act, next(iter(kinds)))) not in kinds:
            self._refuse(f"{self.act} is {name!r}, not {' or '.join(map(repr, kinds))}")
        return kinds[name]

    def _read_rope(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        # transformers 5 has one dictionary for all of it, 4 has the base outside of it.
        rope = {**theirs, **(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        fields: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", 10000.0))}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if (share := rope.get("partial_rotary_factor")) not in (None, 1):
            self._refuse(f"partial_rotary_factor is {share!r}, not 1")
        if kind == "llama3":
            rope.setdefault("original_max_position_embeddings", theirs[CONTEXT])
            fields["rope_scaling"] = {key: rope[key] for key in RopeScaling.__annotations__}
        elif kind != "default":
            self._refuse(f"rope_type is {kind!r}, not 'default' or 'llama3'")
        return fields

    def write(self, config: TransformerConfig) -> dict[str, Any]:
        """Its config for one of ours, as far as it can say it."""
        theirs = {"model_type": self.model_type, "architectures": [self.lm], **self.made}
        for ours, names in self.fields.items():
            theirs |= dict.fromkeys(names, getattr(config, ours))
        if config.mlp in self.acts:
            theirs[self.act] = self.acts[config.mlp][0]
        if self.rotary is not None:
            theirs["rope_theta"] = config.rope_theta
            if config.rope_scaling is not None:
                theirs["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
        return theirs

    def _refuse(self, what: str) -> NoReturn:
        raise TaperlitError(
            f"{self.lm} cannot become taperlit's Transformer: {what} in its config; run it as it is, with "
            "transformers' own generate()."
        )


_SIZES = {
    "vocab_size": ("vocab_size",),
    "block_size": (CONTEXT,),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_kv_head": ("num_key_value_heads",),
    "d_model": ("hidden_size",),
    "d_ff": ("intermediate_size",),
    "d_head": ("head_dim",),
    "tied": ("tie_word_embeddings",),
}
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ATTENTION = {"layer_types": ("full_attention", "sliding_attention")}  # in a context that a window has room for
_GATED = {"swiglu": ("silu", "swish"), "glu": ("sigmoid",)}
_LLAMA_MODULES = {"model.embed_tokens": "tok_embed", "model.norm": "final_norm", "lm_head": "head"}
_LLAMA_NORMS = {"input_layernorm": ("attn_norm",), "post_attention_layernorm": ("mlp_norm",)}
_LLAMA_ATTENTION = {f"self_attn.{name}": (f"attn.{name}",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_LLAMA_MLP = {f"mlp.{name}": (f"mlp.{name}",) for name in ("gate_proj", "up_proj", "down_proj")}
_LLAMA = {"norm": "rmsnorm", "position": "rope"}

LLAMA = Family(
    model_type="llama",
    lm="LlamaForCausalLM",
    norm="LlamaRMSNorm",
    modules=_LLAMA_MODULES,
    blocks="model.layers",
    block={**_LLAMA_NORMS, **_LLAMA_ATTENTION, **_LLAMA_MLP},
    # attention_bias is of the output's map too, where ours follows `bias`.
    fields={
        **_SIZES,
        "norm_eps": ("rms_norm_eps",),
        "bias": ("mlp_bias", "attention_bias"),
        "qkv_bias": ("attention_bias",),
    },
    fixed=_LLAMA,
    neutral=_ATTENTION,
    acts=_GATED,
    made=_NO_TOKENS,
    rotary="model.rotary_emb",
)
MISTRAL = Family(
    model_type="mistral",
    lm="MistralForCausalLM",
    norm="MistralRMSNorm",
    modules=_LLAMA_MODULES,
    blocks="model.layers",
    block={**_LLAMA_NORMS, **_LLAMA_ATTENTION, **_LLAMA_MLP},
    fields={**_SIZES, "norm_eps": ("rms_norm_eps",)},
    fixed={**_LLAMA, "bias": False},
    neutral=_ATTENTION,
    acts=_GATED,
    made={**_NO_TOKENS, WINDOW: None},
    rotary="model.rotary_emb",
)
QWEN2 = Family(
    model_type="qwen2",
    lm="Qwen2ForCausalLM",
    norm="Qwen2RMSNorm",
    modules=_LLAMA_MODULES,
    blocks="model.layers",
    block={**_LLAMA_NORMS, **_LLAMA_ATTENTION, **_LLAMA_MLP},
    fields={**_SIZES, "norm_eps": ("rms_norm_eps",)},
    fixed={**_LLAMA, "bias": False, "qkv_bias": True},
    neutral=_ATTENTION,
    acts=_GATED,
    made=_NO_TOKENS,
    rotary="model.rotary_emb",
)
PHI3 = Family(
    model_type="phi3",
    lm="Phi3ForCausalLM",
    norm="Phi3RMSNorm",
    modules=_LLAMA_MODULES,
    blocks="model.layers",
    block={
        **_LLAMA_NORMS,
        "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "self_attn.o_proj": ("attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
    fields={**_SIZES, "norm_eps": ("rms_norm_eps",)},
    fixed={**_LLAMA, "bias": False},
    neutral=_ATTENTION,
    acts=_GATED,
    made=_NO_TOKENS,
    rotary="model.rotary_emb",
)
STARCODER2 = Family(
    model_type="starcoder2",
    lm="Starcoder2ForCausalLM",
    norm="LayerNorm",
    modules=_LLAMA_MODULES,
    blocks="model.layers",
    block={**_LLAMA_NORMS, **_LLAMA_ATTENTION, "mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)},
    fields={**_SIZES, "norm_eps": ("norm_epsilon",), "bias": ("use_bias",), "qkv_bias": ("use_bias",)},
    fixed={"norm": "layernorm", "position": "rope"},
    neutral=_ATTENTION,
    acts={"gelu": ("gelu_pytorch_tanh", "gelu_new"), "relu": ("relu",)},
    made=_NO_TOKENS,
    rotary="model.rotary_emb",
)
GPT2 = Family(
    model_type="gpt2",
    lm="GPT2LMHeadModel",
    norm="LayerNorm",
    modules={
        "transformer.wte": "tok_embed",
        "transformer.wpe": "pos_embed",
        "transformer.ln_f": "final_norm",
        "lm_head": "head",
    },
    blocks="transformer.h",
    block={
        "ln_1": ("attn_norm",),
        "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attn.c_proj": ("attn.o_proj",),
        "ln_2": ("mlp_norm",),
        "mlp.c_fc": ("mlp.up_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
    fields={
        "vocab_size": ("vocab_size",),
        "block_size": ("n_positions",),
        "n_layer": ("n_layer",),
        "n_head": ("n_head",),
        "d_model": ("n_embd",),
        "d_ff": ("n_inner",),
        "norm_eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
    fixed={"norm": "layernorm", "position": "learned", "bias": True},
    neutral={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    acts={"gelu": ("gelu_new", "gelu_pytorch_tanh"), "relu": ("relu",)},
    act="activation_function",
    made=_NO_TOKENS,
)

FAMILIES = (GPT2, LLAMA, QWEN2, STARCODER2, MISTRAL, PHI3)
"""Those that are known; a model of ours becomes one of the first that it fits."""


def as_transformer(model: nn.Module) -> Transformer:
    """Our ``Transformer`` with the weights of a ``transformers`` model, for the decoding engine and the exports.

    Before it is returned its rotary frequencies and its logits on a few tokens are compared with the model's own.

    Example::

        engine = Engine(as_transformer(load_pretrained("HuggingFaceTB/SmolLM2-135M")), length=1024)

    Args:
        model: a :class:`taperlit.hub.causal_lm.CausalLM` or what is in one: GPT-2, Llama, Mistral, Qwen2, Phi-3 or
            StarCoder2; plain, tapered, or folded. A ``Transformer`` is returned as it is. The result shares its memory
            but for GPT-2's matrices, which lie transposed: train or fold only one of the two.

    Returns:
        The same function, on the same device and in the same dtype, in the model's mode. Its context is the sliding
        window where the model has a shorter one. It has no dropout.

    Raises:
        TaperlitError: it is of another class, its config has a feature or it has a module that ours has not, or
            something was put on it that changes its logits.
    """
    if isinstance(model, Transformer):
        return model
    lm = model.lm if isinstance(model, CausalLM) else model
    family = next((family for family in FAMILIES if family.lm == type(lm).__name__), None)
    if family is None:
        raise TaperlitError(
            f"{type(lm).__name__} cannot become taperlit's Transformer, which {', '.join(f.lm for f in FAMILIES)} can; "
            "run it as it is, with transformers' own generate()."
        )
    theirs: Any = lm
    tied = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight  # folding may have parted them
    config = replace(family.read(theirs.config.to_dict()), tied=tied)
    ours = build_hollow(lambda: Transformer(config))
    _move(lm, ours, [((name,), several) for name, several in family.pairs(config.n_layer)], family)
    if family.rotary is not None:
        _check_rotary(ours, lm.get_submodule(family.rotary))
    _check_logits(lm, ours)
    return ours.train(model.training)


def as_causal_lm(model: Transformer) -> CausalLM:
    """A model of ours as ``transformers``' own: GPT-2, Llama, Qwen2, StarCoder2 or Mistral, whichever has its shape.

    Args:
        model: plain, tapered, or folded. The result shares its memory but for GPT-2's matrices, which lie transposed,
            and a table with ``embed_norm``: train or fold only one of the two.

    Returns:
        The same function, on the same device and in the same dtype, in the model's mode; its logits were compared.

    Raises:
        TaperlitError: ``transformers`` is not installed, or none of these has the model's shape; or something was
            put on the model that changes its logits.
    """
    source = _without_embed_norm(model)
    config = replace(source.config, tied=source.head.weight is source.tok_embed.weight)
    family = next((family for family in FAMILIES if _fits(family, config)), None)
    if family is None:
        names = ("norm", "position", "mlp", "bias", "qkv_bias", "n_head", "n_kv_head", "d_head")
        shape = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        raise TaperlitError(
            f"transformers has no model of this shape ({shape}) among {', '.join(f.lm for f in FAMILIES)}; keep it as "
            "taperlit's Transformer."
        )
    origin = Origin("taperlit", {"config.json": json.dumps(family.write(config))})
    theirs = build_hollow(lambda: build_pretrained(origin))
    _move(source, theirs.lm, [(several, (name,)) for name, several in family.pairs(config.n_layer)], family)
    if family.rotary is not None:
        _check_rotary(model, theirs.lm.get_submodule(family.rotary))
    _check_logits(model, theirs.lm)
    return theirs.train(model.training)


def _without_embed_norm(model: Transformer) -> Transformer:
    """The same function where no norm is between the embedding and the blocks; all but the table is the model's."""
    if not model.config.embed_norm:
        return model
    made, embedding = copy.copy(model), copy.copy(model.tok_embed)
    embedding._parameters = dict(embedding._parameters)
    made._modules = {**model._modules, "tok_embed": embedding}
    made.fold_embed_norm()
    return made


def _fits(family: Family, config: TransformerConfig) -> bool:
    if family is LLAMA and config.d_model % config.n_head:
        return False  # its config refuses such heads, and Mistral's does not
    try:
        return family.read(family.write(config)) == config
    except TaperlitError:
        return False


def _move(
    source: nn.Module, target: nn.Module, pairs: list[tuple[tuple[str, ...], tuple[str, ...]]], family: Family
) -> None:
    """Give a hollow model another's structure, tapered norms and tensors.

    Args:
        source: that has them.
        target: as its constructor builds it, its parameters without memory.
        pairs: the names of modules in ``source`` and of those in ``target`` that hold the same; either may be several.
        family: the one of both that is not ours.

    Raises:
        TaperlitError: a module of the source is of a kind that has no place in the target, or is left over.
    """
    structure: Structure = {"identities": {}, "scales": {}, "biases": {}, "untied": [], "difference": 0.0}
    tapered: dict[str, TaperNorm] = {}
    taken: set[nn.Parameter] = set()
    for froms, tos in pairs:
        for name in froms:
            module, place = source.get_submodule(name), target.get_submodule(tos[0])
            _require_known(name, module, place, family)
            taken |= {*module.parameters()}
            if isinstance(module, nn.Identity):
                structure["identities"][tos[0]] = []
            elif isinstance(module, Affine):
                shape, bias = [*module.weight.shape], module.bias is not None
                structure["scales"][tos[0]] = {"shape": shape, "centred": module.centred, "bias": bias}
            elif isinstance(module, TaperNorm):
                tapered[tos[0]] = module
            elif isinstance(place, nn.Linear) and module.bias is not None and place.bias is None:  # folding made it
                structure["biases"] |= {f"{to}.bias": [target.get_submodule(to).weight.shape[0]] for to in tos}
    if left := next((name for name, parameter in source.named_parameters() if parameter not in taken), None):
        raise TaperlitError(f"{left} was added to the {type(source).__name__}, and has no place elsewhere; remove it.")
    apply_structure(target, structure)
    values = {key: value for froms, tos in pairs for key, value in _values(source, froms, target, tos)}
    if tapered:
        taper(target, tapered)
        values |= _adopt_gate(source, target, tapered)
    assign(target, values, type(source).__name__)
    target.to(next(source.parameters()).device)  # what is computed and not stored, as are rotary positions


def _require_known(name: str, module: nn.Module, place: nn.Module, family: Family) -> None:
    """Refuse a module that computes something else than its place is for.

    Raises:
        TaperlitError: it is named.
    """
    kind = type(module)
    if isinstance(place, nn.Embedding):
        known = kind in (nn.Embedding, Embedding)
    elif isinstance(place, nn.Linear) or _is_transposed(place):
        known = kind in (nn.Linear, Linear) or _is_transposed(module)
    elif isinstance(module, TaperNorm):
        # A class between, as FakeLN, computes something else.
        known = kind.__bases__[0] is TaperNorm and not module.gain_offset
        known = known and module.centred == (family.fixed["norm"] == "layernorm")
    else:
        known = kind in (nn.Identity, Affine, nn.RMSNorm, nn.LayerNorm) or kind.__name__ == family.norm
    if not known:
        what, mend = f"a {kind.__name__}", "run the model as it is"
        if kind.__module__.startswith("peft."):
            what, mend = "an adapter of peft's", "call taperlit.hub.lora.merge_lora(model) first"
        elif isinstance(module, TaperNorm):
            mend = "fold the model first"
        raise TaperlitError(f"{name} is {what}, which has no place in another model; {mend}.")
    if (eps := _eps(module)) is not None and eps != _eps(place):
        raise TaperlitError(
            f"{name} has an epsilon of {eps:g}, and the model's config says {_eps(place):g}; make it so."
        )


def _eps(norm: nn.Module) -> float | None:
    if isinstance(norm, TaperNorm):
        return norm.kind.eps
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear map that holds its matrix as (d_in, d_out): GPT-2's."""
    return type(module).__name__ == "Conv1D"


def _values(
    source: nn.Module, froms: tuple[str, ...], target: nn.Module, tos: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of modules by their names in another model, split or joined as that has them."""
    parts = []
    for name in froms:
        module = source.get_submodule(name)
        # One gate is all norms': it is adopted apart.
        part = {key: value for key, value in module.state_dict().items() if not key.startswith("gate.")}
        if _is_transposed(module):
            part["weight"] = part["weight"].t()
        parts.append(part)
    for key in parts[0]:
        value = parts[0][key] if len(parts) == 1 else torch.cat([part[key] for part in parts])
        places = [target.get_submodule(to) for to in tos]
        sizes = [cast(Tensor, place.weight).shape[0] for place in places] if len(places) > 1 else []
        for to, place, piece in zip(tos, places, [value] if len(tos) == 1 else value.split(sizes), strict=True):
            yield f"{to}.{key}", (piece.t() if key == "weight" and _is_transposed(place) else piece).contiguous()


def _adopt_gate(source: nn.Module, target: nn.Module, tapered: dict[str, TaperNorm]) -> dict[str, Tensor]:
    """Make room for what a source's norms have, and give the values of the gate, which are in no norm's own state."""
    gate = shared_gate(source)
    assert gate is not None
    values = {}
    for name, norm in tapered_norms(target).items():
        old = tapered[name]
        norm.alignment_fit = old.alignment_fit
        if old.taper_bias is not None:
            norm.add_bias()
        if old.first_alignment is not None:
            norm.separate_first()
        if norm.owns_gate:
            values = {f"{name}.gate.{key}": value for key, value in gate.state_dict().items()}
    return values


def _check_rotary(ours: Transformer, theirs: nn.Module) -> None:
    """Compare the frequencies of rotary positions, which a few tokens would hardly show.

    Raises:
        TaperlitError: they differ by more than the rounding of theirs.
    """
    assert ours.rope is not None
    frequencies, made = ours.rope.frequencies().double(), cast(Tensor, theirs.inv_freq)
    rounding = 4 * max(torch.finfo(made.dtype).eps, torch.finfo(torch.float32).eps)
    same = made.shape == frequencies.shape and bool(
        ((made.double() - frequencies).abs() <= rounding * frequencies.abs()).all()
    )
    if not same or getattr(theirs, "attention_scaling", 1.0) != 1.0:
        raise TaperlitError(
            f"{type(theirs).__name__} makes other rotary positions than its config says; load the model anew."
        )


def _check_logits(source: nn.Module, target: nn.Module) -> None:
    """Compare two models' logits on a few tokens.

    Raises:
        TaperlitError: they differ by more than the rounding of their dtype, or are not finite.
    """
    config = (source if isinstance(source, Transformer) else cast(Transformer, target)).config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, min(CHECKED_TOKENS, config.block_size)), generator=generator)
    wanted, got = (_logits(model, tokens) for model in (source, target))
    if not wanted.isfinite().all():
        raise TaperlitError(
            f"The {type(source).__name__}'s logits are not finite, so nothing can be compared; its weights are damaged."
        )
    difference = largest_difference(wanted, got)
    if not difference <= max(FLOAT32_ROUNDING, 12 * torch.finfo(wanted.dtype).eps):
        raise TaperlitError(
            f"As a {type(target).__name__} the {type(source).__name__} has other logits, by {difference:.2g} relative "
            "to the largest: something was put on it that is neither weights nor config, a forward hook say; remove it."
        )


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    tokens = tokens.to(next(model.parameters()).device)

    def run() -> Tensor:
        output = model(tokens) if isinstance(model, Transformer) else model(input_ids=tokens, use_cache=False).logits
        return cast(Tensor, output)

    return cast(Tensor, run_quietly(model, run, torch.no_grad()))
