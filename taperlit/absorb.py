"""The folding algebra: the weights and biases that absorb norms, in float64 and as they are stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from taperlit.conflicts import roles_in
from taperlit.consumers import Watch
from taperlit.errors import TaperlitError
from taperlit.float64 import flat, storage_of
from taperlit.norm import Affine, TaperNorm
from taperlit.products import Bias, Elements, Feeds, Part, Product
from taperlit.structure import Scale, explicit_scale, replace


class Absorbed:
    """The weights that absorb the norms, old and new, in float64.

    Args:
        watch: after its runs.
        feeds: what every norm feeds.
        keep: copy the old weights, so that :meth:`stored` can put them back.
    """

    def __init__(self, watch: Watch, feeds: dict[str, Feeds], keep: bool = True) -> None:
        self.watch, self.keep = watch, keep
        self.maps = {name: norm.linear_map() for name, norm in watch.norms.items()}
        self.products = list({id(p): p for feed in feeds.values() for p in feed.products}.values())
        changed = {p.weight.storage for p in self.products}
        changed |= {p.bias.elements.storage for p in self.products if p.bias is not None and watch.has_bias(p)}
        self.old = {s: self._flat(s).clone() if keep else self._flat(s) for s in changed}
        # Before any weight is stored: they are of the old ones.
        self.biases = {p: self._bias(p) for p in self.products if p.bias is not None and watch.has_bias(p)}
        self.contents: dict[int, Callable[[], Tensor]] = {s: partial(self.new, s) for s in changed}

    def _flat(self, storage: int) -> Tensor:
        return flat(self.watch.parameters[storage][0][1])

    def new(self, storage: int) -> Tensor:
        """What a parameter's storage is to hold: flat float64."""
        old = self.old[storage]
        new = old.to(torch.float64, copy=True)
        for product, elements, _ in roles_in(self.watch, storage, self.products):
            if elements is product.weight:
                self._scale(product, old, new)
            else:
                index, columns = elements.index().to(old.device), cast(Bias, product.bias).columns.to(old.device)
                self._put(new, index, old[index].double() + self.biases[product].flatten()[columns], product)
        return new

    def _scale(self, product: Product, old: Tensor, new: Tensor) -> None:
        if product.whole and (target := product.weight.view(new)) is not None:
            part = product.parts[0]
            target.mul_(self._gain(part, new.device)[part.features.to(new.device)][:, :, None])  # (batch, K, O)
            if self.watch.norms[part.norm].centred:
                target.sub_(target.mean(1, keepdim=True))
            return
        for part in product.parts:
            gain = self._gain(part, old.device)
            for index, features in self._matrices(product.weight, part, old.device):
                weight = old[index].double() * gain[features][:, None]
                if self.watch.norms[part.norm].centred:
                    weight = weight - weight.mean(0, keepdim=True)
                self._put(new, index, weight, product)

    def _gain(self, part: Part, device: torch.device) -> Tensor:
        return self.maps[part.norm][0].to(device)  # a norm may lie elsewhere than what absorbs it

    @staticmethod
    def _matrices(weight: Elements, part: Part, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: the indices (K, O) at a part's positions, and their features (K,)."""
        for index, where, features in zip(weight.index(), part.where, part.features, strict=True):
            yield index[where].to(device), features[where].to(device)

    def _bias(self, product: Product) -> Tensor:
        """``beta~ W``: (batch, O) float64."""
        old = self.old[product.weight.storage]
        if product.whole and (weight := product.weight.view(old)) is not None:
            part = product.parts[0]
            bias = cast(Tensor, self.maps[part.norm][1]).to(old.device)
            return torch.einsum("bk,bko->bo", bias[part.features.to(old.device)], weight.double())
        rows = []
        for part in product.parts:
            if (own := self.maps[part.norm][1]) is None:
                continue
            bias = own.to(old.device)
            matrices = self._matrices(product.weight, part, old.device)
            rows.append(torch.stack([bias[features] @ old[index].double() for index, features in matrices]))
        return torch.stack(rows).sum(0)

    def _put(self, new: Tensor, index: Tensor, values: Tensor, product: Product) -> None:
        new[index] = values
        read = new[index]
        if not torch.equal(read, values) and not torch.allclose(read, values, rtol=1e-12, atol=0.0):  # used twice
            name = self.watch.name_of(product.weight, product.module)
            raise TaperlitError(
                f"{product.parts[0].norm} feeds {name}, which uses one number for several features, so it cannot be "
                "folded; leave it untapered."
            )

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Write the new values into the parameters; if anything is raised inside, the old ones again, if they are kept.

        Without them :meth:`new` has nothing to start from any more.

        Raises:
            TaperlitError: a parameter's dtype has no numbers so small.
        """
        try:
            for storage in self.old:
                self._store(storage)
            yield
        except BaseException:
            for storage, old in self.old.items():
                if self.keep:
                    self._flat(storage).copy_(old)
            raise

    def _store(self, storage: int) -> None:
        name, parameter = self.watch.parameters[storage][0]
        new, stored = self.new(storage), self._flat(storage)
        stored.copy_(new)
        size = float(new.norm())
        lost = float(new.sub_(stored).norm())
        if lost > torch.finfo(parameter.dtype).eps * size:  # five times what rounding takes: float16 ends at 6e-8
            raise TaperlitError(
                f"{name} is too small for {str(parameter.dtype).removeprefix('torch.')} once folded, which would take "
                f"{lost / size:.1%} of it; fold the model in float32."
            )

    def keep_scale(self, model: nn.Module, name: str, norm: TaperNorm) -> Scale:
        """Put an explicit affine map in a norm's place."""
        gain, bias = self.maps[name]
        scale = Scale(shape=list(norm.kind.shape), centred=norm.centred, bias=bias is not None)
        module: Affine = explicit_scale(model, name, scale)
        for parameter, value in ((module.weight, gain), (module.bias, bias)):
            if parameter is not None and value is not None:
                parameter.copy_(value.view(parameter.shape))
                self.contents[storage_of(parameter)] = value.clone
        replace(model, name, module)
        return scale
