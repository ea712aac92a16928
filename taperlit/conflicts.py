"""What every norm feeds, who else uses the numbers that are to absorb it, and what stands in the way."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from taperlit.consumers import Watch
from taperlit.errors import TaperlitError
from taperlit.float64 import storage_of
from taperlit.products import Elements, Feeds, Product, Read


def resolve(watch: Watch, scaled: Iterable[str] = ()) -> dict[str, Feeds]:
    """What every norm feeds, by what a watch saw; a matrix that other inputs use too is found here.

    Args:
        watch: after its runs.
        scaled: names of norms that stay as explicit scales: their products are other inputs' too.

    Raises:
        TaperlitError: a norm did not run.
    """
    feeds = {name: Feeds(others=list(dict.fromkeys(watch.others[name]))) for name in watch.norms}
    for name in watch.norms:
        if name not in watch.ran:
            raise TaperlitError(
                f"{name} did not run in the forward pass, so what it feeds is unknown; it cannot be folded."
            )
    products = [p for p in watch.products if not any(part.norm in scaled for part in p.parts)]
    reads = watch.reads + [Read(p.module, p.weight) for p in watch.products if p not in products]
    for product in products:
        for part in product.parts:
            feeds[part.norm].products.append(product)
    for storage in {p.weight.storage for p in products} | {
        p.bias.elements.storage for p in products if p.bias is not None
    }:
        _find_conflicts(watch, storage, products, [read for read in reads if read.elements.storage == storage], feeds)
    return feeds


def _find_conflicts(
    watch: Watch, storage: int, products: list[Product], reads: list[Read], feeds: dict[str, Feeds]
) -> None:
    """Find elements of one storage that two things use that would need them changed differently."""
    roles = list(roles_in(watch, storage, products))
    if len(roles) + len(reads) < 2:
        return  # it is in nobody's way
    users = torch.zeros(watch.size_of(storage), dtype=torch.int32)  # per element: 0 nobody, 1 a read, else a role
    for read in reads:
        _mark(users, read.elements, 1)
    clashes: set[int] = set()
    for number, (product, elements, _) in enumerate(roles, start=2):
        if elements is product.weight and not product.whole:
            index = elements.index()[torch.stack([part.where for part in product.parts]).any(0)]
            elements = Elements(storage, tuple(index.shape), (), 0, index)
        for other in _mark(users, elements, number):
            clashes |= {number, other}
    names = [name for name, _ in watch.parameters[storage]]
    for number, (product, _, twins) in enumerate(roles, start=2):
        if number not in clashes:
            continue
        holders = {twin.module for twin in twins}
        rivals = {read.module for read in reads}
        rivals |= {twin.module for n, (_, _, ts) in enumerate(roles, start=2) if n != number for twin in ts}
        own = [name for name in names if name.rpartition(".")[0] in holders]
        separable = (
            len({id(p) for _, p in watch.parameters[storage]}) == 1
            and holders <= {name.rpartition(".")[0] for name in own}
            and not holders & rivals
        )
        for part in product.parts:
            feeds[part.norm].shared.update(dict.fromkeys(own if separable else names[:1], separable))


def _same_bias(a: Product, b: Product) -> bool:
    if a.bias is None or b.bias is None or not a.same_weight(b):
        return False
    return a.bias.elements.same(b.bias.elements) and torch.equal(a.bias.columns, b.bias.columns)


def _mark(users: Tensor, elements: Elements, number: int) -> list[int]:
    """Write a number over elements, and return the numbers, none of them higher, that were there."""
    view = elements.view(users)
    before = users[elements.index()] if view is None else view.clone()
    if view is None:
        users[elements.index()] = number
    else:
        view.fill_(number)
    low, high = (int(value) for value in before.aminmax())
    if low == high:  # nearly always, and faster than to look at each
        return [low] if low else []
    found = torch.zeros(number + 1, dtype=torch.bool)
    found[before.flatten()] = True
    return [other for other in found.nonzero().flatten().tolist() if other]


def roles_in(
    watch: Watch, storage: int, products: Iterable[Product]
) -> Iterator[tuple[Product, Elements, list[Product]]]:
    """What products want of the elements of one storage, as weights or as biases, each once.

    Yields:
        A product, its weight or its bias, and all products that want the very same of the very same elements.
    """
    roles: list[tuple[Product, Elements, list[Product]]] = []
    for product in products:
        wanted: list[tuple[Elements, Callable[[Product, Product], bool]]] = [(product.weight, Product.same_weight)]
        if product.bias is not None and watch.has_bias(product):
            wanted.append((product.bias.elements, _same_bias))
        for elements, alike in wanted:
            if elements.storage != storage:
                continue
            is_weight = elements is product.weight
            twins = next((ts for p, es, ts in roles if (es is p.weight) == is_weight and alike(p, product)), None)
            if twins is not None:
                twins.append(product)
            else:
                roles.append((product, elements, [product]))
    yield from roles


def check_foldable(watch: Watch, name: str, feed: Feeds) -> None:
    """Refuse a norm that something other than linear maps of its own reads.

    Raises:
        TaperlitError: names the norm and what reads it.
    """
    reasons = list(feed.others)
    reasons += [f"{weight}, which other inputs use too" for weight in feed.shared]
    if reasons:
        raise TaperlitError(
            f"{name} feeds something that is not a linear map of its own ({', '.join(dict.fromkeys(reasons))}), so it "
            "cannot be folded; leave it untapered"
            + (", or fold with tied='scale'." if feed.shared and not feed.others else ".")
        )
    if not feed.products:
        raise TaperlitError(f"{name} ran, but nothing that the run used reads its output; leave it untapered.")
    for product in feed.products:
        if product.bias is None and watch.has_bias(product):
            weight = watch.name_of(product.weight, product.module)
            raise TaperlitError(
                f"{name} adds a bias, and the product with {weight} reads none that could take it; give that linear "
                "map a bias, or leave the norm untapered."
            )


def check_touched(watch: Watch, feeds: dict[str, Feeds], patterns: list[str]) -> None:
    """Refuse parameters that no run used: a norm may feed them.

    Raises:
        TaperlitError: names the first of them.
    """
    elements = [read.elements for read in watch.reads]
    elements += [
        e for p in watch.products for e in (p.weight, None if p.bias is None else p.bias.elements) if e is not None
    ]
    touched: dict[int, list[Elements]] = {}
    for element in elements:
        touched.setdefault(element.storage, []).append(element)
    own = {storage_of(p) for norm in watch.norms.values() for p in norm.parameters() if p.numel()}
    absorbing = {product.weight.storage for feed in feeds.values() for product in feed.products}
    missing = []
    for storage, parameters in watch.parameters.items():
        name = parameters[0][0]
        if storage in own or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if storage not in touched:
            missing.append(name)
        elif storage in absorbing:
            used = torch.zeros(watch.size_of(storage), dtype=torch.bool)
            for element in touched[storage]:
                view = element.view(used)
                if view is None:
                    used[element.index()] = True
                else:
                    view.fill_(True)
            if not bool(used.all()):
                missing.append(f"part of {name}")
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise TaperlitError(
            f"The run used {shown} nowhere, so which norms feed them is unknown; pass more runs that use them, or name "
            "them in untouched= if no norm does."
        )
