"""The decoding engine: built once from a model, it owns its cache; prefill, then one token per row and step."""

from collections.abc import Callable
from typing import Literal
from weakref import ref

import torch
from torch import Tensor, nn

from taperlit.compare import largest_difference
from taperlit.decode.cache import Cache
from taperlit.decode.decoder import read_decoder
from taperlit.decode.graph import captured
from taperlit.decode.layout import Layouts, fastest_layouts, same_layouts
from taperlit.decode.loop import Decoding
from taperlit.decode.norms import RmsForm, fastest_rms_form
from taperlit.decode.product import Layout
from taperlit.errors import TaperlitError
from taperlit.transformer import Transformer, TransformerConfig

Backend = Literal["eager", "compile"]
CHECKED_TOKENS = 8
FLOAT32_ROUNDING = 1e-4  # of logits, relative to the largest, through many layers


class Engine(Decoding):
    """Decodes with a model of ours, normalized, tapered or folded; the same code runs for all three.

    Example::

        engine = Engine(model, batch_size=2)
        texts = engine.generate([[5, 7, 11], [2]], max_new_tokens=20)

    Weights are read when the engine is built: q/k/v and gate/up become one product each. When it is built it compares
    itself with the model's own forward pass on a few tokens. A model that is trained on needs another engine.

    Args:
        model: a :class:`taperlit.Transformer`: plain, tapered, or folded.
        batch_size: rows decoded together.
        length: most tokens per row, prompt included; None is the model's ``block_size``.
        device: where it runs; None is the model's.
        dtype: of weights and activations; None is the model's.
        backend: ``eager``; or ``compile``, by ``torch.compile`` with static shapes, and on a GPU as a CUDA graph;
            ``auto`` is ``compile`` on a GPU and ``eager`` elsewhere.
        layout: how matrices lie in memory, one for all or for each product; ``auto`` measures.
        rms_form: which operations compute an RMSNorm; ``auto`` measures, and is ``fused`` where it is compiled.

    Attributes:
        cache: keys and values; float32 on the CPU, where attention in half precision is several times slower.

    Raises:
        TaperlitError: a model or a part of it that decoding does not know, a ``length`` beyond the model's context, or
            outputs that differ from the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int = 1,
        length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend | Literal["auto"] = "auto",
        layout: Layouts | Layout | Literal["auto"] = "auto",
        rms_form: RmsForm | Literal["auto"] = "auto",
    ) -> None:
        if not isinstance(model, Transformer):
            raise TaperlitError(f"The decoding engine takes taperlit's Transformer, not a {type(model).__name__}.")
        self.config = config = model.config
        like = model.tok_embed.weight
        device = torch.device(device) if device is not None else like.device
        super().__init__(batch_size, length, config.block_size, config.vocab_size, device)
        self.dtype = dtype if dtype is not None else like.dtype
        if backend == "auto":
            backend = "compile" if self.device.type == "cuda" else "eager"
        self.backend: Backend = backend
        place = (config, batch_size, self.device, self.dtype, backend == "compile")
        self.layout: Layouts = fastest_layouts(*place) if layout == "auto" else same_layouts(layout, *place)
        if rms_form == "auto":
            rows = torch.ones(batch_size, config.d_model, device=self.device, dtype=self.dtype)
            rms_form = "fused" if backend == "compile" else fastest_rms_form(rows)
        self.rms_form: RmsForm = rms_form
        self.decoder = read_decoder(model, self.device, self.dtype, self.layout, rms_form)
        self.cache = Cache(config, batch_size, self.length, self.device, self.cache_dtype(self.device, self.dtype))
        self._pad = torch.zeros(batch_size, dtype=torch.int64, device=self.device)  # slots left of each prompt
        self._mask: Tensor | None = None  # (B, 1, 1, S) for eager steps, where prompts were padded
        self._slot = torch.zeros(1, dtype=torch.int64, device=self.device)  # where static steps write next
        self._slots = torch.arange(self.cache.slots, device=self.device)
        self._step: Callable[[Tensor], Tensor] = self._step_eager
        if backend == "compile":
            with torch.inference_mode():
                self._step = captured(self._step_static, torch.zeros_like(self._pad))
        self._versions: list[tuple[ref[Tensor], int]] = []
        self._check(model)
        tensors = (*model.parameters(), *model.buffers())
        self._versions = [(ref(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]

    @staticmethod
    def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values for a model's."""
        return torch.float32 if device.type == "cpu" else dtype

    @classmethod
    def cache_bytes(
        cls, config: TransformerConfig, batch_size: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> int:
        """What an engine's cache takes, without building one."""
        return Cache.bytes(config, batch_size, length, cls.cache_dtype(device, dtype))

    def bytes_per_step(self, filled: int) -> int:
        """Bytes that a step after so many tokens reads at least: all weights, and the keys and values it attends to."""
        slots = filled + 1 if self.backend == "eager" else self.cache.slots
        return sum(t.numel() * t.itemsize for t in self.decoder.tensors()) + self.cache.storage[:, :, :, :slots].nbytes

    def _read(self, rows: list[list[int]]) -> Tensor:
        self._require_unchanged()
        T = max(map(len, rows))
        pads = [T - len(row) for row in rows]
        # Shorter ones are padded on the left, with what overflows no more than they do: their own first token, which as
        # the first one sees itself alone too.
        tokens = torch.tensor([row[:1] * pad + row for pad, row in zip(pads, rows, strict=True)], device=self.device)
        self._pad.copy_(torch.tensor(pads))
        self._slot.fill_(T)
        self._mask = mask = None
        position = torch.arange(T, device=self.device).expand(self.batch_size, T)
        if any(pads):
            pad, slots = self._pad[:, None, None, None], self._slots
            position = (position - self._pad[:, None]).clamp(min=0)
            self._mask = torch.zeros(
                self.batch_size, 1, 1, len(slots), device=self.device, dtype=self.cache.storage.dtype
            )
            self._mask.masked_fill_(slots < pad, -torch.inf)
            # A token of the padding sees itself, so that it has a value that is not NaN; nothing else sees it.
            key, query = slots[:T], slots[:T, None]
            mask = (key <= query) & (key >= pad) | (key == query)
        if self.backend == "compile":
            self.cache.storage.zero_()  # static steps read all slots, and a NaN times 0 is NaN
        x = self.decoder.hidden(tokens.flatten(), position.flatten(), self.cache.attend_prompt(T, mask))
        return self.decoder.logits(x.view(self.batch_size, T, -1)[:, -1])

    def _append(self, tokens: Tensor) -> Tensor:
        return self._step(tokens)

    def _step_eager(self, tokens: Tensor) -> Tensor:
        slot, mask = self.filled, self._mask
        position: Tensor | int = slot
        if mask is not None:
            position, mask = slot - self._pad, mask.narrow(3, 0, slot + 1)
        return self.decoder.logits(self.decoder.hidden(tokens, position, self.cache.attend(slot, mask)))

    def _step_static(self, tokens: Tensor) -> Tensor:
        """A step whose place is on the device, so that one graph serves all steps."""
        seen = (self._slots <= self._slot) & (self._slots >= self._pad[:, None])  # (B, S)
        attend = self.cache.attend_static(self._slot, seen[:, None, None])
        x = self.decoder.hidden(tokens, self._slot - self._pad, attend)
        self._slot.add_(1)
        return self.decoder.logits(x)

    def _require_unchanged(self) -> None:
        """Refuse to go on where weights in the model's own memory are new ones, and the copied ones old.

        Raises:
            TaperlitError: the model's tensors were written to since the engine was built, as torch counts it.
        """
        for reference, version in self._versions:
            if (tensor := reference()) is not None and tensor._version != version:
                raise TaperlitError("The model's weights were changed since the engine was built; build another.")

    @torch.no_grad()
    def _check(self, model: Transformer) -> None:
        """Compare with the model's own forward pass.

        Raises:
            TaperlitError: they differ by more than the rounding of the dtype, or it overflows.
        """
        T = min(CHECKED_TOKENS, self.length)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (self.batch_size, T), generator=generator)
        wanted = model(tokens.to(model.tok_embed.weight.device)).to(self.device)
        got = [self.prefill(tokens[:, : max(T - 1, 1)])]
        if T > 1:
            got.append(self.step(tokens[:, -1].to(self.device)))
        self.filled = 0
        logits, wanted = torch.stack(got, 1), wanted[:, -len(got) :]
        if self.dtype is torch.float16 and wanted.isfinite().all() and not logits.isfinite().all():
            raise TaperlitError("The model overflows in float16; decode with dtype float32 or bfloat16.")
        difference = largest_difference(logits, wanted)
        coarser = max(torch.finfo(dtype).eps for dtype in (self.dtype, model.tok_embed.weight.dtype))
        if not difference <= max(FLOAT32_ROUNDING, 12 * coarser):
            raise TaperlitError(
                f"The decoding engine's logits differ from the model's own by {difference:.2g}: something was put on "
                "the model that decoding does not read; remove it."
            )
