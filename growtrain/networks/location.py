"""Where a network's head is: one module, the tail of an `nn.Sequential`, or several modules that follow each other."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growtrain.networks.attachments import holds, refuse_hooks
from growtrain.networks.heads import seeded
from growtrain.networks.injectable import kept_buffers
from growtrain.networks.injected import InjectedHead

Observations = Any  # a batch as a network takes it, a tensor or a dictionary of them; a list or a tuple is one for each of its inputs
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))  # where PyTorch keeps what is registered
_LOOKED_AT = 10_000  # objects of an attribute: one that holds a replay has no head behind them


@dataclass(frozen=True)
class Head:
    """A head and its place in a network.

    Attributes:
        network: the network that holds it, out of its wrapper of `torch.compile`.
        module: what computes it: the module, or its layers as an `nn.Sequential`.
        path: where the injected head is put.
        parts: paths of what it is made of, in the order in which they are computed.
        is_tail: whether they are the last layers of one `nn.Sequential`, which becomes shorter; else the others become identities.
    """

    network: nn.Module
    module: nn.Module
    path: str
    parts: tuple[str, ...]
    is_tail: bool = False

    @property
    def live(self) -> nn.Module:
        """The part that trains."""
        return self.module.live if isinstance(self.module, InjectedHead) else self.module

    @property
    def is_last(self) -> bool:
        """Whether its output is the network's by construction: it is the end of a plain `nn.Sequential`, of nested ones too."""
        holder = self.network
        for name in self.parts[-1].split("."):
            if not is_plain_sequential(holder) or name != list(holder._modules)[-1]:
                return False
            holder = uncompiled(holder.get_submodule(name))
        return True

    @property
    def names(self) -> dict[int, str]:
        """Full names by the id of parameter and module."""
        return {id(each): name for name, each in (*self.network.named_modules(), *self.network.named_parameters())}

    def check_untied(self) -> None:
        """Raises `ValueError` if the rest of the network has a parameter of the head, too."""
        parts = [self.module, *map(self.network.get_submodule, self.parts)]
        inside = {id(each) for part in parts for each in part.modules()}
        parameters, places = {id(p) for p in self.module.parameters()}, self._places()

        def refuse(name: str, remedy: str) -> None:
            raise ValueError(
                f"head {self.path!r} shares its parameters with {name!r}: freezing it would freeze that too; {remedy}"
            )

        one_name = "it is the same module under another name: keep that by which forward() reaches it"
        for path, module in self.network.named_modules():
            prefix = f"{path}." if path else ""
            for name, p in module._parameters.items() if id(module) not in inside else ():
                if id(p) in parameters:
                    refuse(prefix + name, "untie them first")
            for name, child in module._modules.items() if id(module) not in inside else ():
                if child is None or id(child) not in inside or parameters.isdisjoint(map(id, child.parameters())):
                    continue
                if not any(holder is module and name == place for holder, place in places):
                    refuse(prefix + name, one_name)
        # Who reaches the others by another name would be given an identity.
        if len(self.parts) > 1 and not self.is_tail:
            for name, module in self.network.named_modules(remove_duplicate=False):
                is_part = any(module is part for part in parts) and any(True for _ in module.parameters())
                if is_part and name not in self.parts:
                    refuse(name, one_name)

    def _places(self) -> list[tuple[nn.Module, str]]:
        """Where its parts are held, each a module and a name in it; of a head that is one module, every name that it has."""
        places = [part.rpartition(".")[::2] for part in self.parts]
        own = [(self.network.get_submodule(holder), name) for holder, name in places]
        if self.is_tail or len(own) > 1:
            return own
        ((first, its_name),) = own
        named = [(each, name) for each in self.network.modules() for name in each._modules]
        return [(each, name) for each, name in named if each._modules[name] is first._modules[its_name]]

    def put(self, head: InjectedHead) -> None:
        """Puts a head in the place of this one, under all of its names."""
        path = self.path.rpartition(".")
        place = self.network.get_submodule(path[0]), path[2]
        for holder, name in self._places():
            if (holder, name) == place or len(self.parts) == 1:
                holder._modules[name] = head
            elif self.is_tail:
                del holder._modules[name]
            else:
                holder._modules[name] = nn.Identity()

    def features(self, observations: Observations) -> Tensor | None:
        """What the head is given for observations (B, ...), as the network takes them; None of a module that is not given one tensor.

        Raises:
            ValueError: its modules do not follow each other, each on what the one before gives and on nothing else.
        """
        calls: list[tuple[str, tuple[Any, ...], Any]] = []

        def record(name: str) -> Any:
            return lambda _, inputs, named, output: calls.append((name, (*inputs, *named.values()), output))

        holder = self.parts[0].rpartition(".")[0]
        with contextlib.ExitStack() as stack, kept_buffers(self.network), torch.no_grad():
            stack.enter_context(seeded(self.network, torch.Generator().manual_seed(0)))
            for part in (*self.parts, *([holder] if self.is_tail else [])):
                handle = self.network.get_submodule(part).register_forward_hook(record(part), with_kwargs=True)
                stack.callback(handle.remove)
            self.network(*as_inputs(copies_of_tensors(observations)))
            if self.is_tail and (inputs := [inputs for name, inputs, _ in calls if name == holder]):
                return self._tail_features(holder, inputs)
        order = [name for name, _, _ in calls]
        if order != list(self.parts):
            raise ValueError(f"head={self.parts}: they are computed in the order {order}, not each once in this order")
        for (name, _, output), (following, given, _) in itertools.pairwise(calls):
            if len(given) != 1 or not isinstance(output, Tensor) or not torch.equal(output, given[0]):
                raise ValueError(
                    f"{following!r} is not given what {name!r} gives: something else is computed between them, "
                    "which the injected head would leave out; make it a module and name it in head=, too"
                )
        first = calls[0][1]
        return first[0] if len(first) == 1 and isinstance(first[0], Tensor) else None

    def _tail_features(self, holder: str, calls: Sequence[tuple[Any, ...]]) -> Tensor:
        """What the layers before a tail make of what their `nn.Sequential` was given."""
        if len(calls) != 1 or len(calls[0]) != 1:
            raise ValueError(
                f"{holder or 'the network'!r} is not computed once, of one tensor: its tail cannot be injected"
            )
        features: Tensor = calls[0][0]
        for name, layer in self.network.get_submodule(holder)._modules.items():
            if name == self.parts[0].rpartition(".")[2]:
                break
            assert layer is not None
            features = layer(features)
        return features

    def check_reached_by_name(self) -> None:
        """Raises `ValueError` if another module has the head's modules in a plain attribute, which would go on with the old ones.

        That is in containers, and in what functions are bound to or enclose, too.
        """
        parts = [self.module, *map(self.network.get_submodule, self.parts)]
        leaving = {id(each) for part in parts for each in part.modules() if [*each.parameters(), *each.buffers()]}
        for path, module in self.network.named_modules():
            if id(module) in leaving:
                continue
            for name, value in vars(module).items():
                if name not in _OWN_ATTRIBUTES and holds(value, leaving, names=frozenset(), at_most=_LOOKED_AT):
                    where = f"{path}.{name}" if path else name
                    raise ValueError(
                        f"the attribute {where!r} holds a module of the head, which leaves: reach it by its name in forward(), hold it "
                        f"in an nn.ModuleList, too, or name it as a tail if it is an nn.Sequential: head='{self.path}.0:'"
                    )


def find_head(network: nn.Module, where: str | Sequence[str]) -> Head:
    """The head of a network.

    Args:
        network: any module.
        where: the path of a module; `path.START:`, a Sequential from that layer on (a position or a name); or paths of modules that
            follow each other.

    Raises:
        ValueError: there is none; the message says what there is.
    """
    if isinstance(network, nn.parallel.DistributedDataParallel):
        raise ValueError("the network is DistributedDataParallel: inject into network.module, then wrap that again")
    network = uncompiled(network)
    if not isinstance(where, str):
        paths = tuple(where) if isinstance(where, Sequence) else (where,)
        if not all(isinstance(each, str) for each in paths):
            raise ValueError(f"head={where!r}: name a module by its path, as 'head', or several that follow each other")
        if len(paths) != 1:
            return _several(network, paths)
        (where,) = paths
    where = where.removeprefix("_orig_mod.")
    if where.endswith(":"):
        return _tail(network, *where[:-1].rpartition(".")[::2])
    if not where:
        raise ValueError("the head cannot be the whole network: wrap it, nn.Sequential(network), and name head='0'")
    return Head(network, uncompiled(_submodule(network, where)), where, (where,))


def as_inputs(observations: Observations) -> tuple[Any, ...]:
    """What a network is called with."""
    return tuple(observations) if isinstance(observations, list | tuple) else (observations,)


def copies_of_tensors(observations: Observations) -> Observations:
    """The same with copies of its tensors, for a network that works on its input in place."""
    if isinstance(observations, list | tuple):
        copies = [copies_of_tensors(each) for each in observations]
        return type(observations)(*copies) if hasattr(observations, "_fields") else copies
    if isinstance(observations, dict):
        return {name: copies_of_tensors(each) for name, each in observations.items()}
    return observations.clone() if hasattr(observations, "clone") else observations


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, where this is what it gave."""
    while isinstance(original := module._modules.get("_orig_mod"), nn.Module):
        module = original
    return module


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        module = network.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"the network has no module {path!r}: name its head with head=..., its children are {names}"
        ) from error
    holder, _, name = path.rpartition(".")
    if path and network.get_submodule(holder)._modules.get(name) is not module:
        own = next((own for own, each in network.named_modules() if each is module), "its own path")
        raise ValueError(f"{path!r} is an attribute that gives a module which is elsewhere: name {own!r}")
    return module


def _tail(network: nn.Module, path: str, start: str) -> Head:
    layers = _submodule(network, path)
    # One whose own `forward` was compiled reaches its layers as it did.
    if not isinstance(layers, nn.Sequential) or type(layers).forward is not nn.Sequential.forward:
        raise ValueError(f"{path or 'the network'!r} is no plain nn.Sequential, of which {start}: could be the tail")
    names = list(layers._modules)
    last = uncompiled(layers[-1]) if len(layers) else None
    inside = len(last.live) if isinstance(last, InjectedHead) and isinstance(last.live, nn.Sequential) else 1
    length = len(names) - 1 + inside  # as before it was injected
    try:
        place = names.index(start) if start in names else int(start)
    except ValueError:
        raise ValueError(
            f"{path or 'the network'!r} has no layer {start!r}: its layers are {', '.join(names)}"
        ) from None
    place = place + length if place < 0 else place
    if isinstance(last, InjectedHead) and place != len(names) - 1:
        raise ValueError(
            f"{path or 'the network'!r} was injected from layer {names[-1]} on: name head='{path}.{names[-1]}:'"
        )
    if not 0 <= place < len(names):
        raise ValueError(f"{path or 'the network'!r} has {length} layers: there is no layer {start}")
    parts = tuple(f"{path}.{name}" if path else name for name in names[place:])
    if isinstance(last, InjectedHead):
        return Head(network, last, parts[0], parts, is_tail=True)
    tail = nn.Sequential(OrderedDict((name, layers._modules[name]) for name in names[place:]))
    tail.training = layers.training
    return Head(network, tail, parts[0], parts, is_tail=True)


def _several(network: nn.Module, paths: tuple[str, ...]) -> Head:
    if not paths:
        raise ValueError("head names no module")
    if tails := [path for path in paths if path.endswith(":")]:
        raise ValueError(f"head={paths}: a tail, {tails[0]!r}, is a head of its own: inject heads one after the other")
    modules = {path: uncompiled(_submodule(network, path)) for path in paths}
    last = modules[paths[-1]]
    if isinstance(last, InjectedHead):
        if not all(isinstance(module, nn.Identity) for module in list(modules.values())[:-1]):
            raise ValueError(
                f"{paths[-1]!r} was injected with other modules: name the same again, or head={paths[-1]!r}"
            )
        return Head(network, last, paths[-1], paths)
    refuse_hooks({path: module for path, module in modules.items() if is_plain_sequential(module)})
    layers = [layer for module in modules.values() for layer in _layers(module)]
    return Head(network, nn.Sequential(*layers), paths[-1], paths)


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module computes its modules one after the other, and nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and computes_as_its_class(module)
        and type(module).forward is nn.Sequential.forward
    )


def computes_as_its_class(module: nn.Module) -> bool:
    """Whether no other `forward` is set on this one module, as `module.forward = torch.compile(module.forward)` sets one."""
    return "forward" not in vars(module)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if is_plain_sequential(module):
        for layer in filter(None, module._modules.values()):  # `children()` names a layer that is there twice but once
            yield from _layers(layer)
    else:
        yield module
