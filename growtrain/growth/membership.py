"""What optimizers hold, across an injection: the old head's parameters leave, the live head's take their places, by name.

Any object with `param_groups` and `state` as `torch.optim.Optimizer` has them, and the optimizers inside it. One that keeps parameters, or
copies of their values, elsewhere cannot be mended from outside and is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from growtrain.networks.attachments import holds, reachable

_ANEW = "inject without it (optimizer=[], if it is the only one) and build it anew from the parameters that then require a gradient"


class Membership:
    """The optimizers that train a head.

    Args:
        optimizer: one or several; none, an empty sequence, for those that are built anew.

    Raises:
        ValueError: what is given is no optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.is_empty = False
        given = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
        if isinstance(given, Mapping) or not isinstance(given, Iterable):
            raise ValueError(f"optimizer is {type(optimizer).__name__}: pass an optimizer, or several in a list")
        self.optimizers: list[Any] = []
        waiting = list(given)
        self.is_empty = not waiting
        for each in waiting:
            if not (hasattr(each, "param_groups") and hasattr(each, "state")):
                raise ValueError(f"optimizer holds {type(each).__name__}: pass an optimizer, or several in a list")
            if not any(each is known for known in self.optimizers):
                self.optimizers.append(each)
                waiting += [
                    value
                    for value in _elements(vars(each))
                    if hasattr(value, "param_groups") and hasattr(value, "state")
                ]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups, each once."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return list({id(group): group for group in groups}.values())

    def check(self, trained: Mapping[str, nn.Parameter], leaving: Iterable[nn.Parameter]) -> None:
        """Raises `ValueError` if no optimizer holds a parameter that the head trains, or if one cannot be mended.

        Args:
            trained: the parameters that the head trains, by full name.
            leaving: those that will be gone.
        """
        held = {id(p) for group in self.groups for p in group["params"]}
        for name, parameter in trained.items():
            if not self.is_empty and id(parameter) not in held:
                raise ValueError(f"the optimizer does not hold {name}: pass the optimizer that trains this head")
        leaving = list(leaving)
        ids = {id(p) for p in leaving}
        for optimizer in self.optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            if not ids & {id(p) for p in own}:
                continue
            sizes = {sum(p.numel() for p in params) for params in (own, *(g["params"] for g in optimizer.param_groups))}
            sizes -= {p.numel() for p in own}
            shapes = {p.shape for p in leaving if p.numel() > 1}
            kind = type(optimizer).__name__
            mended = [each for each in self.optimizers if each is not optimizer]
            elsewhere = {
                name: value for name, value in vars(optimizer).items() if name not in ("param_groups", "state")
            }
            for group in optimizer.param_groups:
                elsewhere |= {f"param_groups[...][{k!r}]": value for k, value in group.items() if k != "params"}
            elsewhere |= {f"state[{k!r}]": value for k, value in optimizer.state.items() if not isinstance(k, Tensor)}
            for name, value in elsewhere.items():
                aside = [optimizer, *mended, *optimizer.param_groups]
                copies = (
                    each for each in reachable(value, seen={id(each) for each in aside}) if isinstance(each, Tensor)
                )
                if holds(value, ids, aside) or any(each.shape in shapes or each.numel() in sizes for each in copies):
                    raise ValueError(f"{kind} keeps parameters or their values in {name!r}, too: {_ANEW}")
            for parameter, slots in optimizer.state.items():
                tensors = (each for each in reachable(slots, seen={id(parameter)}) if isinstance(each, Tensor))
                if any(id(each) in ids - {id(parameter)} or each.numel() in sizes for each in tensors):
                    raise ValueError(f"{kind} keeps one state for several parameters: {_ANEW}")

    def mend(
        self,
        successors: Mapping[int, nn.Parameter],
        leaving: set[int],
        before: Mapping[int, str],
        after: Sequence[Mapping[int, str]],
    ) -> None:
        """Puts each successor in the place of the parameter it succeeds, or beside it where that stays; in the networks' order, with names.

        Args:
            successors: by the id of the parameter that they succeed.
            leaving: ids of those that are gone.
            before: full names by id, as they were.
            after: for each network, full names by id in the order of its `named_parameters()`.
        """
        predecessors = {id(new): old for old, new in successors.items()}
        ranks = {key: (block, place) for block, names in enumerate(after) for place, key in enumerate(names)}
        full_names = {key: name for names in reversed(after) for key, name in names.items()}
        for group in self.groups:
            given = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
            params = []
            for p in group["params"]:
                params += [successors[id(p)]] if id(p) in successors else []
                params += [p] if id(p) not in leaving else []
            group["params"] = _in_order(params, ranks)
            if "param_names" in group:
                group["param_names"] = [
                    _renamed(given[old], before.get(old), full_names.get(id(p)))
                    for p in group["params"]
                    for old in [predecessors.get(id(p), id(p))]
                ]
        for optimizer in self.optimizers:
            for p in [p for p in optimizer.state if id(p) in leaving]:
                del optimizer.state[p]


def _elements(attributes: Mapping[str, Any]) -> Iterable[Any]:
    for value in attributes.values():
        yield from value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)


def _in_order(params: list[Any], ranks: Mapping[int, tuple[int, int]]) -> list[Any]:
    """A network's parameters together, in its order, where its first one was; what is in no network stays between them."""
    blocks: dict[Any, list[Any]] = {}
    for p in params:
        blocks.setdefault(ranks[id(p)][0] if id(p) in ranks else f"alone {id(p)}", []).append(p)
    return [p for block in blocks.values() for p in sorted(block, key=lambda p: ranks.get(id(p), (0, 0)))]


def _renamed(given: str, before: str | None, after: str | None) -> str:
    """The name under which an optimizer knows a parameter, moved along with its name in the network; a prefix more or less stays."""
    if before is None or after is None:
        return given
    if given.endswith(before):
        return given.removesuffix(before) + after
    return after.removeprefix(before.removesuffix(given)) if before.endswith(given) else after
