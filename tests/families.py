"""Tiny random models of transformers' own families: two layers, under 50 thousand parameters, nothing downloaded.

``FAMILIES`` says per family how to build and run it and what is true of its norms, written down by hand from the
published formulas, so that the tests hold the library against something it did not compute itself.
"""

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, INNER, LAYERS = 64, 16, 2, 32, 2
IMAGE = 8  # pixels per side, in patches of 4


@dataclass(frozen=True)
class Kind:
    """The formula of one norm: ``(h - mean if centred) / sqrt(mean square + eps) * (offset + weight) + bias``."""

    centred: bool = False
    offset: float = 0.0
    eps: float = 1e-6
    gain: bool = True
    bias: bool = False

    def __str__(self) -> str:
        name = "layernorm" if self.centred else "rms"
        gain = "no gain" if not self.gain else f"gain {self.offset:g} + weight" if self.offset else "gain weight"
        return f"{name}, {gain}, {'bias, ' if self.bias else ''}eps {self.eps:g}"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        build: makes the plain model.
        inputs: makes the keyword arguments of its forward.
        foldable: glob patterns of the norms whose every reader is a linear map (but for the final one).
        kind: the formula of its norms.
        final: the norm before the head, where it folds.
        refused: glob pattern of norms that cannot fold -> words of the reason.
        others: glob pattern -> the formula of norms that differ from ``kind``.
        unknown: patterns of norms that are no TaperNorm's kind: Cohere's gains are (heads, d), its mean over d alone.
        output: the field of the output that the run returns.
        tied: the final norm's reader is the embedding's matrix.
        untouched: patterns of parameters that inference does not use.
        limit: largest relative difference that a right fold makes in a float64 model; more than rounding only where the
            model's own forward rounds to float32 what a norm is folded into.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    foldable: tuple[str, ...]
    kind: Kind
    final: str | None = None
    refused: dict[str, str] | None = None
    others: dict[str, Kind] | None = None
    unknown: tuple[str, ...] = ()
    output: str = "logits"
    tied: bool = False
    untouched: tuple[str, ...] = ()
    limit: float = 1e-9

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A model in evaluation mode whose every parameter carries noise, so that no gain is 1 and no bias 0."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3))
        return model.to(dtype).eval()

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
        """The inputs, those with a fraction in the model's dtype."""
        torch.manual_seed(seed)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs().items()}

    def run(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The logits (or embeddings, for models without a head)."""
        return getattr(model(**batch), self.output)

    def kind_of(self, name: str) -> Kind:
        """The formula of the norm ``name``."""
        for pattern, kind in (self.others or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                return kind
        return self.kind

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of all its norms."""
        return (*self.foldable, *(self.refused or {}), *((self.final,) if self.final else ()))


def norm_formula(h: Tensor, kind: Kind, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm in float64: (..., d) to the same shape."""
    h = h.double()
    if kind.centred:
        h = h - h.mean(-1, keepdim=True)
    y = h / (h.square().mean(-1, keepdim=True) + kind.eps).sqrt()
    if kind.gain:
        y = y * (kind.offset + weight.double())
    return y + bias.double() if kind.bias else y


def linear_formula(h: Tensor, kind: Kind, c: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The sample-independent branch in float64, from its own gain and bias."""
    h = h.double()
    if kind.centred:
        h = h - h.mean(-1, keepdim=True)
    y = c.double() * h
    if kind.gain:
        y = y * (kind.offset + weight.double())
    return y + bias.double() if kind.bias else y


def close_with_random_maps(norms: dict[str, nn.Module], seed: int = 0) -> None:
    """Give tapered norms random ``c``, gains and biases and close their gate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms.values():
            norm.alignment.copy_(torch.rand((), generator=generator) + 0.3)
            for parameter in (norm.taper_weight, norm.taper_bias):
                if parameter is not None:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.3 * noise.to(parameter.dtype))
    next(iter(norms.values())).gate.set(0.0)


def tokens() -> dict[str, Tensor]:
    """Two rows of nine tokens."""
    return {"input_ids": torch.randint(3, VOCAB, (2, 9))}


def many_tokens() -> dict[str, Tensor]:
    """As many as it takes until every expert has got some."""
    return {"input_ids": torch.randint(3, VOCAB, (4, 24))}


def source_and_target() -> dict[str, Tensor]:
    """Tokens for an encoder and a decoder."""
    return {"input_ids": torch.randint(3, VOCAB, (2, 7)), "decoder_input_ids": torch.randint(3, VOCAB, (2, 5))}


def pixels() -> dict[str, Tensor]:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


def sound() -> dict[str, Tensor]:
    """Two mel spectrograms, and tokens for the decoder."""
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, VOCAB, (2, 5))}


# How most configs of language models and of image models name the sizes.
_common = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
)  # fmt: skip
_image = dict(
    hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=IMAGE,
    patch_size=4, layer_norm_eps=2e-5,
)  # fmt: skip


def _of(head: str, config: str, sizes: dict[str, object]) -> nn.Module:
    if "num_experts_per_tok" in sizes:
        sizes = {**sizes, "experts_implementation": "eager"}  # torch's grouped kernel takes no float64
    return getattr(tf, head)(getattr(tf, config)(**sizes))


def _made(head: str, config: str, **sizes: object) -> Callable[[], nn.Module]:
    """A builder of ``head`` from the sizes, in the config's own words."""
    return partial(_of, head, config, sizes)


def _plain(family: str, config: str | None = None, **changes: object) -> Callable[[], nn.Module]:
    """A builder of a causal language model from the sizes above and what else its config says."""
    return _made(f"{family}ForCausalLM", config or f"{family}Config", **{**_common, **changes})


_t5 = dict(
    vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, layer_norm_epsilon=2e-5,
    decoder_start_token_id=0, use_cache=False,
)  # fmt: skip
_t5_norms = ("encoder.block.*.layer_norm", "decoder.block.*.layer_norm", "encoder.final_layer_norm")
_layernorm = Kind(centred=True, bias=True, eps=2e-5)
_rms = Kind(eps=2e-5)
_gemma = Kind(offset=1.0, eps=2e-5)
_llama_layers = ("model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")


def _llama_like(family: str, *, tied: bool = False, kind: Kind = _rms, **rest: object) -> Family:
    """Llama's names: two pre-norms per layer and a final norm."""
    config = {"rms_norm_eps": 2e-5, "tie_word_embeddings": tied, **rest.pop("config", {})}
    inputs = many_tokens if "num_experts_per_tok" in config else tokens
    return Family(_plain(family, **config), inputs, _llama_layers, kind, "model.norm", tied=tied, **rest)


FAMILIES: dict[str, Family] = {
    "GPT-2": Family(
        _made(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            n_positions=32,
            layer_norm_epsilon=2e-5, bos_token_id=1, eos_token_id=2, use_cache=False,
        ),
        tokens, ("transformer.h.*.ln_1", "transformer.h.*.ln_2"), _layernorm, "transformer.ln_f", tied=True,
    ),
    "GPT-NeoX": Family(
        _plain("GPTNeoX", layer_norm_eps=2e-5, use_parallel_residual=True),
        tokens, ("gpt_neox.layers.*layernorm",), _layernorm, "gpt_neox.final_layer_norm",
    ),
    "GPT-J": Family(
        _made(
            "GPTJForCausalLM", "GPTJConfig", vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            n_positions=32,
            rotary_dim=4, layer_norm_epsilon=2e-5, bos_token_id=1, eos_token_id=2, use_cache=False,
        ),
        tokens, ("transformer.h.*.ln_1",), _layernorm, "transformer.ln_f",
    ),
    "OPT": Family(
        _made(
            "OPTForCausalLM", "OPTConfig", vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=32, word_embed_proj_dim=WIDTH, use_cache=False,
            pad_token_id=0,
        ),
        tokens, ("model.decoder.layers.*_layer_norm",), Kind(centred=True, bias=True, eps=1e-5),
        "model.decoder.final_layer_norm", tied=True,
    ),
    "BLOOM": Family(
        _made(
            "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS,
            layer_norm_epsilon=2e-5, use_cache=False, pad_token_id=0,
        ),
        tokens, ("transformer.h.*layernorm",), _layernorm, "transformer.ln_f", tied=True,
        refused={"transformer.word_embeddings_layernorm": "add"},
    ),
    "Falcon": Family(
        _plain(
            "Falcon", layer_norm_epsilon=2e-5, parallel_attn=True, multi_query=True, new_decoder_architecture=False,
            alibi=False, bias=False,
        ),
        tokens, ("transformer.h.*.input_layernorm",), _layernorm, "transformer.ln_f", tied=True,
    ),
    "Falcon (new decoder)": Family(
        _plain("Falcon", layer_norm_epsilon=2e-5, new_decoder_architecture=True, num_kv_heads=1, alibi=False),
        tokens, ("transformer.h.*.ln_attn", "transformer.h.*.ln_mlp"), _layernorm, "transformer.ln_f", tied=True,
    ),
    "Phi": Family(
        _plain("Phi", layer_norm_eps=2e-5, qk_layernorm=False),
        tokens, ("model.layers.*.input_layernorm",), _layernorm, "model.final_layernorm",
    ),
    "StarCoder2": Family(
        _plain("Starcoder2", norm_epsilon=2e-5, num_key_value_heads=1),
        tokens, _llama_layers, _layernorm, "model.norm", tied=True,
    ),
    "MPT": Family(
        _made(
            "MptForCausalLM", "MptConfig", vocab_size=VOCAB, d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS,
            max_seq_len=32,
            expansion_ratio=2, layer_norm_epsilon=2e-5, use_cache=False, pad_token_id=0,
        ),
        tokens, ("transformer.blocks.*.norm_?",), Kind(centred=True, eps=2e-5), "transformer.norm_f", tied=True,
    ),
    "Llama": _llama_like("Llama", config={"num_key_value_heads": 1}),
    "Mistral": _llama_like("Mistral", config={"num_key_value_heads": 1, "sliding_window": 4}),
    "Mixtral": _llama_like(
        "Mixtral", config={"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    ),
    "Qwen2": _llama_like("Qwen2", tied=True, config={"num_key_value_heads": 1}),
    "Qwen2-MoE": _llama_like(
        "Qwen2Moe",
        config={
            "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "Qwen3": _llama_like(
        "Qwen3", config={"num_key_value_heads": 1, "head_dim": 8}, refused={"model.layers.*.self_attn.?_norm": "mul"},
    ),
    "Gemma": _llama_like("Gemma", tied=True, kind=_gemma, config={"num_key_value_heads": 1, "head_dim": 8}),
    "Gemma2": Family(
        _plain("Gemma2", num_key_value_heads=1, head_dim=8, rms_norm_eps=2e-5, sliding_window=4),
        tokens, ("model.layers.*.input_layernorm", "model.layers.*.pre_feedforward_layernorm"), _gemma, "model.norm",
        refused={
            "model.layers.*.post_attention_layernorm": "add", "model.layers.*.post_feedforward_layernorm": "add",
        },
        tied=True,
    ),
    "Gemma3": Family(
        _plain("Gemma3", "Gemma3TextConfig", num_key_value_heads=1, head_dim=8, rms_norm_eps=2e-5, sliding_window=4),
        tokens, ("model.layers.*.input_layernorm", "model.layers.*.pre_feedforward_layernorm"), _gemma, "model.norm",
        refused={
            "model.layers.*.post_attention_layernorm": "add", "model.layers.*.post_feedforward_layernorm": "add",
            "model.layers.*.self_attn.?_norm": "mul",
        },
        tied=True,
    ),
    "OLMo": Family(
        _plain("Olmo"),
        tokens, _llama_layers, Kind(centred=True, gain=False, eps=1e-5), "model.norm",
    ),
    "OLMo2": Family(
        _plain("Olmo2", rms_norm_eps=2e-5), tokens, (), _rms, "model.norm",
        refused={
            "model.layers.*.post_attention_layernorm": "add", "model.layers.*.post_feedforward_layernorm": "add",
            "model.layers.*.self_attn.?_norm": "mul",
        },
    ),
    "SmolLM3": _llama_like("SmolLM3", tied=True, config={"num_key_value_heads": 1}),
    "Granite": _llama_like(
        "Granite",
        config={"num_key_value_heads": 1, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 1},
    ),
    "Cohere": Family(
        _plain("Cohere", layer_norm_eps=2e-5, num_key_value_heads=1),
        tokens, ("model.layers.*.input_layernorm",), Kind(centred=True, eps=2e-5), "model.norm", tied=True,
    ),
    "Cohere (QK-norm)": Family(
        _plain("Cohere", layer_norm_eps=2e-5, use_qk_norm=True),
        tokens, ("model.layers.*.input_layernorm",), Kind(centred=True, eps=2e-5), "model.norm", tied=True,
        unknown=("model.layers.*.self_attn.?_norm",),
    ),
    "Cohere2": Family(
        _plain("Cohere2", layer_norm_eps=2e-5, num_key_value_heads=1, sliding_window=4, head_dim=8),
        tokens, ("model.layers.*.input_layernorm",), Kind(centred=True, eps=2e-5), "model.norm", tied=True,
    ),
    "Nemotron": Family(
        _plain("Nemotron", norm_eps=2e-5, num_key_value_heads=1, head_dim=8),
        tokens, _llama_layers, Kind(centred=True, offset=1.0, bias=True, eps=2e-5), "model.norm",
    ),
    "T5": Family(
        _made("T5ForConditionalGeneration", "T5Config", **_t5), source_and_target, _t5_norms, _rms,
        refused={"decoder.final_layer_norm": "mul"},
    ),
    "T5 v1.1": Family(
        _made(
            "T5ForConditionalGeneration", "T5Config", **_t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            scale_decoder_outputs=False,
        ),
        source_and_target, _t5_norms, _rms, "decoder.final_layer_norm", tied=True,
    ),
    "ViT": Family(
        _made("ViTForImageClassification", "ViTConfig", **_image, num_labels=5),
        pixels, ("vit.*.layernorm_before", "vit.*.layernorm_after"), _layernorm, "vit.layernorm",
    ),
    "CLIP text": Family(
        _made(
            "CLIPTextModelWithProjection", "CLIPTextConfig", vocab_size=VOCAB, hidden_size=WIDTH,
            intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=32,
            projection_dim=8, layer_norm_eps=2e-5, pad_token_id=0, bos_token_id=1, eos_token_id=VOCAB - 1,
        ),
        tokens, ("text_model.encoder.layers.*.layer_norm?",), _layernorm,
        "text_model.final_layer_norm", output="text_embeds",
    ),
    "CLIP vision": Family(
        _made("CLIPVisionModelWithProjection", "CLIPVisionConfig", **_image, projection_dim=8),
        pixels, ("vision_model.encoder.layers.*.layer_norm?",), _layernorm,
        "vision_model.post_layernorm", refused={"vision_model.pre_layrnorm": "add"}, output="image_embeds",
    ),
    "BERT": Family(
        _made("BertForMaskedLM", "BertConfig", **{**_common, "use_cache": False}, layer_norm_eps=2e-5),
        tokens, ("bert.encoder.layer.1.output.LayerNorm",), _layernorm, "cls.predictions.transform.LayerNorm",
        refused={
            "bert.embeddings.LayerNorm": "add", "bert.encoder.layer.*.attention.output.LayerNorm": "add",
            "bert.encoder.layer.0.output.LayerNorm": "add",
        },
        tied=True,
    ),
    "DeepSeek-V3": Family(
        _plain(
            "DeepseekV3", rms_norm_eps=2e-5, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
        ),
        many_tokens, (*_llama_layers, "model.layers.*.self_attn.*_a_layernorm"), _rms, "model.norm",
        others={"model.layers.*.self_attn.*_a_layernorm": Kind(eps=1e-6)},
        limit=1e-6,  # the router rounds its folded matrix to float32
    ),
    "Mamba": Family(
        _made(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=WIDTH, state_size=4, expand=2,
            num_hidden_layers=LAYERS, conv_kernel=3, time_step_rank=2, layer_norm_epsilon=2e-5, pad_token_id=0,
            use_cache=False,
        ),
        tokens, (), _rms, "backbone.norm_f", tied=True,
        refused={"backbone.layers.*.norm": "weight"},  # the block asks its norm for its weight's dtype
    ),
    "Whisper": Family(
        _made(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, num_mel_bins=8, d_model=WIDTH,
            encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_source_positions=10,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
        ),
        sound,
        ("model.encoder.layers.*_layer_norm", "model.decoder.layers.*_layer_norm", "model.encoder.layer_norm"),
        Kind(centred=True, bias=True, eps=1e-5), "model.decoder.layer_norm", tied=True,
    ),
    "Phi-3": _llama_like("Phi3", config={"num_key_value_heads": 1}),
    "StableLM": Family(
        _plain("StableLm", layer_norm_eps=2e-5, num_key_value_heads=1), tokens, _llama_layers, _layernorm, "model.norm",
    ),
    "GLM-4": _llama_like(
        "Glm4", config={"num_key_value_heads": 1, "head_dim": 8},
        refused={"model.layers.*.post_self_attn_layernorm": "add", "model.layers.*.post_mlp_layernorm": "add"},
    ),
    "GPT-OSS": _llama_like(
        "GptOss",
        config={"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "Llama-4": Family(
        _plain(
            "Llama4", "Llama4TextConfig", num_key_value_heads=1, head_dim=8, rms_norm_eps=2e-5, num_local_experts=2,
            intermediate_size_mlp=INNER,
        ),
        many_tokens, ("model.layers.*.input_layernorm",), _rms, "model.norm",
        refused={"model.layers.*.post_attention_layernorm": "mul"},  # the router's scores scale the experts' inputs
        unknown=("model.layers.*.self_attn.qk_norm",),
    ),
    "Qwen3-Next": Family(
        _plain(
            "Qwen3Next", rms_norm_eps=2e-5, num_key_value_heads=1, head_dim=8, linear_conv_kernel_dim=2,
            linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=2,
            num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        many_tokens, _llama_layers, _gemma, "model.norm", refused={"model.layers.1.self_attn.?_norm": "mul"},
        unknown=("model.layers.0.linear_attn.norm",),
    ),
    "ModernBERT": Family(
        _made(
            "ModernBertForMaskedLM", "ModernBertConfig", **{k: v for k, v in _common.items() if k != "use_cache"},
            norm_eps=2e-5, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2,
        ),
        tokens, ("model.layers.1.attn_norm", "model.layers.*.mlp_norm", "model.final_norm"),
        Kind(centred=True, eps=2e-5), "head.norm", refused={"model.embeddings.norm": "add"}, tied=True,
    ),
    "DINOv2": Family(
        _made("Dinov2ForImageClassification", "Dinov2Config", **_image, mlp_ratio=2, num_labels=5),
        pixels, ("dinov2.*.norm1", "dinov2.*.norm2"), _layernorm, refused={"dinov2.layernorm": "mean"},
        untouched=("dinov2.embeddings.mask_token",),
    ),
    "Swin": Family(
        _made(
            "SwinForImageClassification", "SwinConfig", image_size=IMAGE, patch_size=2, embed_dim=8, depths=[1, 1],
            num_heads=[2, 2], window_size=2, mlp_ratio=2, layer_norm_eps=2e-5, num_labels=5,
        ),
        pixels, ("swin.*.layernorm_after", "swin.*.downsample.norm"), _layernorm,
        refused={
            "swin.embeddings.norm": "add", "swin.layernorm": "mean",
            "swin.*.layernorm_before": "pad",  # windows are filled with zeros after the norm: its bias is not theirs
        },
        others={"swin.*.downsample.norm": Kind(centred=True, bias=True, eps=1e-5),
                "swin.embeddings.norm": Kind(centred=True, bias=True, eps=1e-5)},
    ),
    "ConvNeXt": Family(
        _made(
            "ConvNextForImageClassification", "ConvNextConfig", image_size=IMAGE, patch_size=2, num_stages=2,
            hidden_sizes=[8, 16], depths=[1, 1], num_labels=5,
        ),
        pixels, ("convnext.encoder.*.layernorm",), Kind(centred=True, bias=True, eps=1e-6), "convnext.layernorm",
        others={"convnext.layernorm": Kind(centred=True, bias=True, eps=1e-12)},
        unknown=("convnext.embeddings.layernorm", "convnext.encoder.stages.1.downsampling_layer.0"),
    ),
    "Wav2Vec2": Family(
        _made(
            "Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, conv_dim=(8, 8), conv_kernel=(4, 2),
            conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, layer_norm_eps=2e-5, pad_token_id=0,
            apply_spec_augment=False,
        ),
        lambda: {"input_values": torch.randn(2, 40)},
        ("wav2vec2.feature_projection.layer_norm", "wav2vec2.encoder.layers.*layer_norm"), _layernorm,
        "wav2vec2.encoder.layer_norm",
        unknown=(
            "wav2vec2.feature_extractor.conv_layers.0.layer_norm",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.0",
        ),
        untouched=("wav2vec2.masked_spec_embed",),
    ),
    "RWKV": Family(
        _made(
            "RwkvForCausalLM", "RwkvConfig", vocab_size=VOCAB, hidden_size=WIDTH, attention_hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS, context_length=32, layer_norm_epsilon=2e-5, use_cache=False,
        ),
        tokens, (), _layernorm, "rwkv.ln_out",
        refused={"rwkv.blocks.0.pre_ln": "add", "rwkv.blocks.*.ln?": "mul"},
        others={"rwkv.ln_out": Kind(centred=True, bias=True, eps=1e-5)},
    ),
}  # fmt: skip


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(math.prod(p.shape) for p in model.parameters())
