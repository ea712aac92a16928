"""Keys and values of every layer in fixed storage, and attention over them.

Shapes: B rows, T prompt tokens, H query heads, K key/value heads, n = H + 2K, S slots, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from taperlit.decode.decoder import Attend
from taperlit.transformer import TransformerConfig

SLOTS_PER_STEP = 16  # slots are rounded up to it: kernels with a mask want aligned rows


class Cache:
    """The cache of B rows that grow together, each token in one slot.

    Args:
        config: of the model.
        batch_size: B.
        length: slots wanted; S is this, rounded up.
        device: where it lives.
        dtype: of keys and values.
    """

    def __init__(
        self, config: TransformerConfig, batch_size: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.n_head, self.n_kv_head, self.d_head = config.n_head, config.kv_heads, config.head_width
        # Keys and values side by side, so that one copy writes both: (n_layer, B, 2K, S, D).
        self.storage = torch.zeros(self._shape(config, batch_size, length), device=device, dtype=dtype)
        self.keys, self.values = self.storage[:, :, : self.n_kv_head], self.storage[:, :, self.n_kv_head :]

    @staticmethod
    def _shape(config: TransformerConfig, batch_size: int, length: int) -> tuple[int, int, int, int, int]:
        slots = -(-length // SLOTS_PER_STEP) * SLOTS_PER_STEP
        return config.n_layer, batch_size, 2 * config.kv_heads, slots, config.head_width

    @classmethod
    def bytes(cls, config: TransformerConfig, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """What such a cache takes, without taking it."""
        return math.prod(cls._shape(config, batch_size, length)) * dtype.itemsize

    @property
    def slots(self) -> int:
        """S."""
        return self.storage.shape[3]

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) of one token per row into queries (B, K, H / K, D), in the cache's dtype, and (B, 2K, D)."""
        q, kv = qkv.split_with_sizes((self.n_head, 2 * self.n_kv_head), 1)
        if q.dtype != self.storage.dtype:
            q = q.to(self.storage.dtype)
        # The queries that share a key are taken as so many positions of one head: no grouped attention is needed.
        return q.reshape(q.shape[0], self.n_kv_head, -1, self.d_head), kv

    def attend(self, slot: int, mask: Tensor | None) -> Attend:
        """Attention that writes one token per row and looks at the filled slots only.

        Args:
            slot: the token's.
            mask: (B, 1, 1, slot + 1) to add to the scores, or None.
        """
        # The views of all layers at once: made one by one they would take as long as attention.
        places = self.storage.select(3, slot).unbind(0)  # each (B, 2K, D)
        keys, values = (tensor.narrow(3, 0, slot + 1).unbind(0) for tensor in (self.keys, self.values))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, kv = self._split(qkv)
            places[layer].copy_(kv)
            y = F.scaled_dot_product_attention(q, keys[layer], values[layer], attn_mask=mask)
            return y.reshape(q.shape[0], -1)

        return attend

    def attend_static(self, slot: Tensor, mask: Tensor) -> Attend:
        """As :meth:`attend`, over all slots and with nothing that depends on the host.

        Args:
            slot: (1,) the token's.
            mask: (B or 1, 1, 1, S), true where a slot is seen.
        """

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, kv = self._split(qkv)
            self.storage[layer].index_copy_(2, slot, kv.to(self.storage.dtype).unsqueeze(2))
            y = F.scaled_dot_product_attention(q, self.keys[layer], self.values[layer], attn_mask=mask)
            return y.reshape(q.shape[0], -1)

        return attend

    def attend_prompt(self, T: int, mask: Tensor | None) -> Attend:
        """Causal attention of whole prompts, which are written into the first slots.

        Args:
            T: tokens per row.
            mask: (B, 1, T, T), true where a query sees a key, or None: the whole past.
        """

        def attend(layer: int, qkv: Tensor) -> Tensor:  # (B T, n, D)
            q, kv = qkv.unflatten(0, (-1, T)).transpose(1, 2).split((self.n_head, 2 * self.n_kv_head), 1)
            self.storage[layer][:, :, :T].copy_(kv)
            k, v = self.keys[layer][:, :, :T], self.values[layer][:, :, :T]
            y = F.scaled_dot_product_attention(
                q.to(self.storage.dtype),
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.n_head != self.n_kv_head,
            )
            return y.transpose(1, 2).flatten(2).flatten(0, 1)

        return attend
