"""What a training loop has attached to a head - hooks, attributes, shared memory - and how a fresh head gets it.

A hook is a function that PyTorch calls with a gradient, a parameter or a module: it serves the fresh one as well, unless it holds on to the
old one by itself. Where that is so, or where a hook takes part in what the head computes, the injection is refused and the hook named.
Hooks on nodes of the autograd graph (`AccumulateGrad`) cannot be seen from Python: register them again.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growtrain.networks.injectable import kept_buffers

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
# The others qualify them.
_FUNCTIONS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def reachable(thing: Any, names: frozenset[str] | None = None, seen: set[Any] | None = None) -> Iterator[Any]:
    """The thing and all that it holds on to: through containers, weak references, closures, defaults, bound objects, optimizers' groups.

    Args:
        thing: anything. Modules are not looked into: what they hold changes with them.
        names: the attributes that are looked into, those that a function names; None: all of them.
        seen: what has been met.
    """
    seen = set() if seen is None else seen
    pending = deque[tuple[Iterable[Any], frozenset[str] | None]]([((thing,), names)])
    while pending:  # what is near comes first
        parts, names = pending.popleft()
        for each in parts:
            if isinstance(each, str | bytes | int | float | type | types.ModuleType):
                yield each  # which holds on to nothing
                continue
            key = (id(each.__self__), id(each.__func__)) if isinstance(each, types.MethodType) else (id(each), names)
            if key in seen or id(each) in seen:
                continue
            seen.add(key)
            yield each
            if not isinstance(each, Tensor | nn.Module):
                pending.append(_held(each, names))


def _held(thing: Any, names: frozenset[str] | None) -> tuple[Iterable[Any], frozenset[str] | None]:
    """What a thing holds on to itself, and the attributes that are looked into from there."""
    if isinstance(thing, Mapping):
        return itertools.chain(thing.keys(), thing.values()), names
    if isinstance(thing, list | tuple | set | frozenset | deque | weakref.WeakSet):
        return thing, names
    if isinstance(thing, weakref.ref):
        return [thing()], names
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()], names
    if isinstance(thing, torch.optim.Optimizer) and names is not None:
        return [group["params"] for group in thing.param_groups], names
    if isinstance(thing, types.MethodType):
        function = thing.__func__
        names = _names(function.__code__) if isinstance(function, types.FunctionType) else names
        return [thing.__self__, function], names
    if isinstance(thing, types.FunctionType):
        if (thing.__module__ or "").split(".")[0] == "torch" and thing.__closure__ is None:
            return (), names
        names = _names(thing.__code__)
        closure = [cell.cell_contents for cell in thing.__closure__ or () if not _is_empty(cell)]
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return [*closure, *defaults, *(thing.__globals__[name] for name in names if name in thing.__globals__)], names
    if isinstance(thing, torch.autograd.graph.Node):
        return [getattr(thing, "variable", None)], names
    call = inspect.getattr_static(type(thing), "__call__", None)
    if names is not None and isinstance(call, types.FunctionType):
        names |= _names(call.__code__)
    own = {**{name: getattr(thing, name, None) for name in _slots(thing)}, **getattr(thing, "__dict__", {})}
    parts = [value for name, value in own.items() if names is None or name in names]
    methods = (inspect.getattr_static(thing, name, None) for name in names or ())
    return [*parts, *(types.MethodType(each, thing) for each in methods if isinstance(each, types.FunctionType))], names


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _names(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes that a function's code uses, those of functions within it included."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _slots(thing: Any) -> list[str]:
    found = [getattr(kind, "__slots__", ()) for kind in type(thing).__mro__]
    return [name for each in found for name in ([each] if isinstance(each, str) else each) if not name.startswith("__")]


def holds(
    thing: Any,
    ids: set[int],
    aside: Iterable[Any] = (),
    names: frozenset[str] | None = None,
    *,
    at_most: int | None = None,
) -> bool:
    """Whether a thing holds on to any object of these ids, other than through what is `aside`; `names` as in `reachable`.

    It looks at so many objects `at_most`.
    """
    objects = itertools.islice(reachable(thing, names, {id(each) for each in aside}), at_most)
    return any(id(each) in ids for each in objects)


class Attachments:
    """What is attached to the live part of a head.

    Args:
        root: the module in whose place the injected head will be; its hooks see the whole head.
        live: the part of it that trains, whose successor is to get what it has.
        names: full names by the id of parameter and module, for messages.
        beside: older parts that train beside the live one.
        mended: optimizers that will hold the successor's parameters: a hook that uses one goes on doing so.

    Raises:
        ValueError: something cannot serve the fresh head; the message names it.
    """

    def __init__(
        self,
        root: nn.Module,
        live: nn.Module,
        names: Mapping[int, str],
        *,
        beside: Sequence[nn.Module] = (),
        mended: Sequence[Any] = (),
    ) -> None:
        self.root, self.live, self.names = root, live, names
        self.inner = [module for part in (live, *beside) for module in part.modules() if module is not root]
        old = {id(each) for each in (*root.modules(), *root.parameters())} - ({id(root)} - {id(live)})
        for thing, kind, hook in self._all_hooks():
            name = f"{names.get(id(thing), type(thing).__name__)!r}"
            _refuse_computing(hook, name)
            if not _is_own(hook, root) and holds(hook, old, mended):
                raise ValueError(
                    f"the {kind} hook {getattr(hook, '__qualname__', type(hook).__name__)} on {name} holds on to parts "
                    "of the old head, which leave: remove it, inject, and register it again; "
                    "or write it so that it uses only its arguments"
                )
        known = {id(each) for each in (root, *self.inner)}
        for module in root.modules():
            if id(module) not in known and _foreign(module, root):
                raise ValueError(
                    f"a hook is registered on {names.get(id(module))!r}, which is frozen and is built anew: remove it"
                )
        for parameter in live.parameters():
            for name, value in _attributes(parameter).items():
                if holds(value, old, mended) or any(isinstance(each, Tensor) for each in reachable(value)):
                    raise ValueError(
                        f"the attribute {name!r} of parameter {names.get(id(parameter))!r} belongs to its old values: "
                        "delete it, inject, and set it again"
                    )

    def _all_hooks(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """Every hook with what it is on, and its kind."""
        for parameter in self.live.parameters():
            for kind, name in (("_backward_hooks", "gradient"), ("_post_accumulate_grad_hooks", "post-accumulate")):
                for hook in (getattr(parameter, kind) or {}).values():
                    yield parameter, name, hook
        for module in (self.root, *self.inner):
            for kind in _FUNCTIONS:
                for hook in getattr(module, kind).values():
                    yield module, kind.strip("_").removesuffix("_hooks").replace("_", " "), hook

    def check_observing(self, features: Tensor | None) -> None:
        """Raises `ValueError` if hooks on modules inside the head take part in what it computes, forward or backward.

        They run once more, on the features (B, F).
        """
        hooked = [module for module in self.inner if _foreign(module, self.root)]
        if not hooked or features is None:
            return
        results = []
        for context in (contextlib.nullcontext, self.aside):
            with context(), kept_buffers(self.root), torch.enable_grad():
                x = features.detach().clone().requires_grad_()
                output = self.root(x)
                results.append((output, *torch.autograd.grad(output.sum(), x)))
        if not all(map(torch.equal, *results)):
            raise ValueError(
                f"a hook on {self.names.get(id(hooked[0]))!r} changes what the head computes, and its frozen copies would "
                "not: put that into the module's forward, or use torch.nn.utils.parametrize"
            )

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """`hooks_aside`, of the head."""
        return hooks_aside(self.root, (self.root, *self.inner))

    def hand_over(self, grown: nn.Module) -> None:
        """Gives a fresh head what the old one has; handles go on removing hooks, unless the old head trains on."""
        live = grown.get_submodule("live")
        stays = any(module is self.live for module in grown.modules())
        own = {id(module): live.get_submodule(path) for path, module in self.live.named_modules()}
        for path, old in self.live.named_parameters():
            new = live.get_parameter(path)
            for kind in _PARAMETER_HOOKS:
                if hooks := getattr(old, kind):
                    setattr(new, kind, self._for(hooks, own, share=not stays))
            for name, value in _attributes(old).items():
                setattr(new, name, value)
        for module in self.live.modules():
            if module is not self.root:
                self._move_hooks(module, own[id(module)], own, share=not stays)
        self._move_hooks(self.root, grown, own, share=True)
        if stays and self.root is self.live and _foreign(self.root, self.root):
            for kind in _HOOKS:  # it is one part of the head now, and they see the whole
                setattr(self.root, kind, OrderedDict())

    def _move_hooks(self, old: nn.Module, new: nn.Module, own: dict[int, nn.Module], *, share: bool) -> None:
        if _foreign(old, self.root):
            for kind in _HOOKS:
                setattr(new, kind, self._for(getattr(old, kind), own, share=share))
            new._is_full_backward_hook = old._is_full_backward_hook

    def _for(self, hooks: Mapping[int, Any], own: dict[int, nn.Module], *, share: bool) -> Mapping[int, Any]:
        """The hooks as the fresh head is to have them: the same dictionary, which handles know, or a copy."""
        if share and not any(_is_own(hook, self.root) for hook in hooks.values()):
            return hooks
        return OrderedDict(
            (key, types.MethodType(hook.__func__, own[id(hook.__self__)]) if _is_own(hook, self.root) else hook)
            for key, hook in hooks.items()
        )


@contextlib.contextmanager
def hooks_aside(root: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile no hook on these modules runs or is copied, but for those that are methods of the root's own modules."""
    kept = []
    for module in modules:
        if foreign := _foreign(module, root):
            for kind in _HOOKS:
                hooks = getattr(module, kind)
                kept.append((module, kind, hooks))
                setattr(module, kind, OrderedDict((key, each) for key, each in hooks.items() if key not in foreign))
    try:
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; what a forward pass has left in an attribute, which PyTorch does not copy with its graph, is there without it."""
    left = dict[int, Any]()
    for each in module.modules():
        for value in vars(each).values():
            for tensor in reachable(value, frozenset()):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    left[id(tensor)] = tensor.detach()
    return copy.deepcopy(module, left)


def copy_without_hooks(network: nn.Module) -> nn.Module:
    """A copy of a network without the hooks that others registered on its modules, and so without what these hold on to.

    Raises:
        ValueError: a hook computes a weight.
    """
    for name, module in network.named_modules():
        for hook in module._forward_pre_hooks.values():
            _refuse_computing(hook, repr(name or type(module).__name__))
    with hooks_aside(network, network.modules()):
        return copied(network)


def first_hooked(network: nn.Module) -> str | None:
    """The name of the first module with a hook that a forward pass runs."""
    hooked = (each for each in network.named_modules() if each[1]._forward_pre_hooks or each[1]._forward_hooks)
    return next((name or type(module).__name__ for name, module in hooked), None)


def _foreign(module: nn.Module, root: nn.Module) -> set[int]:
    """The keys of a module's hooks that are no methods of the root's modules."""
    return {key for kind in _FUNCTIONS for key, hook in getattr(module, kind).items() if not _is_own(hook, root)}


def _is_own(hook: Any, root: nn.Module) -> bool:
    """Whether a hook is a method of one of the root's own modules, which its copy has, too."""
    return isinstance(hook, types.MethodType) and any(hook.__self__ is each for each in root.modules())


def _refuse_computing(hook: Any, name: str) -> None:
    """Raises `ValueError` if a hook computes a weight of what has this name."""
    if type(hook).__module__.startswith("torch.nn.utils."):
        raise ValueError(
            f"{name} is computed by {type(hook).__name__}, a hook of torch.nn.utils: "
            "use torch.nn.utils.parametrizations, or remove it before the injection"
        )


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _FUNCTIONS)


def refuse_hooks(modules: Mapping[str, nn.Module]) -> None:
    """Raises `ValueError` if a hook is on one of these modules, by name, which dissolve."""
    for name, module in modules.items():
        if _is_hooked(module):
            raise ValueError(f"a hook is registered on {name!r}, which becomes part of the head: remove it first")


def _attributes(parameter: nn.Parameter) -> dict[str, Any]:
    """What was set on a parameter; the compiler's marks are its own."""
    return {name: value for name, value in vars(parameter).items() if not name.startswith("_dynamo")}
