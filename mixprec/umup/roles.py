"""Which role each parameter of a model plays, kept by the parameter's name.

Multipliers, initial values and learning rates follow from a parameter's role and fans. Nothing of
that can live on tensors: `fully_shard`, `to_empty` and `load_state_dict(assign=True)` put new
tensors in their place, and a rule that finds no mark there silently uses another learning rate. So
modules say it (`umup_roles`, `umup_depth`), patterns may say it for modules that do not, and a
`Spec` writes it down under names that wrappers do not change: plain data, good for a checkpoint.

Shapes are global ones. A DTensor's are, so a spec taken before sharding equals one taken after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import Tensor, nn

__all__ = ["ROLES", "Entry", "Role", "Spec", "spec"]

Role = Literal["embedding", "input", "hidden", "output", "tied", "norm", "bias"]
ROLES: frozenset[Role] = frozenset(get_args(Role))


@dataclass(frozen=True)
class Entry:
    """What the rules need to know of one parameter.

    A weight is `[fan_out, fan_in, *kernel]`, an embedding `[vocab, width]` with fans the other way
    round: it maps one of `vocab` to `width` numbers.
    """

    role: Role
    shape: tuple[int, ...]
    depth: int = 1
    """Layers of the residual stack that it is in; 1 outside."""
    plain: bool = False
    """Whether its module has no multipliers, so that they have to be inside the weight."""
    names: tuple[str, ...] = ()
    """All names of a tied parameter, its own first."""
    in_readout: bool = False
    """Whether it is the readout's bias, whose gradient comes straight from the loss."""

    @property
    def fan_in(self) -> int:
        if self.role in ("embedding", "tied"):
            return self.shape[0]
        return _numel(self.shape[1:]) if len(self.shape) > 1 else _numel(self.shape)

    @property
    def fan_out(self) -> int:
        if self.role in ("embedding", "tied"):
            return _numel(self.shape[1:])
        return self.shape[0] if self.shape else 1


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class Spec(Mapping[str, Entry]):
    """Entries by parameter name, each parameter once. See `spec`, which makes one.

    >>> from torch import nn
    >>> from mixprec import umup
    >>> spec = umup.spec(nn.Sequential(umup.layers.Linear(4, 8), umup.layers.LinearReadout(8, 2)))
    >>> spec["0.weight"].role, spec["1.weight"].fan_in
    ('hidden', 8)
    >>> umup.Spec.from_dict(spec.to_dict()) == spec
    True
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Spec({self._entries!r})"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The spec as plain data, for JSON or a checkpoint."""
        return {
            name: {**asdict(e), "shape": list(e.shape), "names": list(e.names)}
            for name, e in self.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Spec:
        """The spec that `to_dict` wrote."""
        entries: dict[str, Entry] = {}
        for name, fields in data.items():
            tuples: dict[str, Any] = {key: tuple(fields[key]) for key in ("shape", "names")}
            entries[name] = Entry(**{**fields, **tuples})
            _check_role(entries[name].role, name)
        return cls(entries)

    def parameters(self, model: nn.Module) -> list[tuple[str, Tensor, Entry]]:
        """Every parameter of `model` that is trained, with its name and entry.

        Raises:
            ValueError: if the model's parameters and the spec's are not the same, or a shape or a
                tie differs.
        """
        named = _by_name(model)
        missing = [name for name in named if name not in self._entries]
        extra = [name for name in self._entries if name not in named]
        # Frozen ones may be left out of a spec.
        missing = [name for name in missing if named[name][0].requires_grad]
        if missing or extra:
            raise ValueError(
                f"this spec is not of this model: it lacks {_list(missing)}, and the model lacks "
                f"{_list(extra)}. Take it from the same model, umup.spec(model), before or after "
                f"sharding."
            )
        found: list[tuple[str, Tensor, Entry]] = []
        for name, (param, names) in named.items():
            if name not in self._entries:
                continue
            entry = self._entries[name]
            if tuple(param.shape) != entry.shape:
                raise ValueError(
                    f"{name} is {list(param.shape)}, but the spec says {list(entry.shape)}; fans "
                    f"of a shard would give wrong learning rates. Take the spec before tensors are "
                    f"cut up, or keep them as DTensors, which know their global shape."
                )
            if set(names) != set(entry.names or (name,)):
                raise ValueError(
                    f"{name} is one tensor with {_list(names[1:])}, but the spec ties it to "
                    f"{_list(entry.names[1:])}; tie the same weights before taking the spec"
                )
            if param.requires_grad:
                found.append((name, param, entry))
        return found


def spec(
    model: nn.Module,
    roles: Mapping[str, Role] | None = None,
    *,
    stacks: Sequence[str] = (),
) -> Spec:
    """The role, shape and depth of every parameter of `model` that is trained.

    Args:
        model: unit-scaled, or any other with `roles`. It may be on the meta device, sharded,
            compiled or wrapped; names are those of the bare model.
        roles: role by pattern of parameter names, such as `{"*.wte.weight": "embedding"}`; the
            first pattern that fits decides, over what a module says. `*` matches dots as well.
        stacks: names of `nn.ModuleList`s of residual layers in a model without
            `umup.layers.DepthModuleList`; their lengths are the depths.

    Raises:
        ValueError: for a parameter without a role, an unknown role, a pattern or stack that nothing
            matches, a readout inside a residual stack, a stack inside another, tied weights whose
            roles clash, and a fan of zero.

    >>> from torch import nn
    >>> from mixprec import umup
    >>> model = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50))
    >>> found = umup.spec(model, {"0.weight": "embedding", "2.weight": "output"})
    >>> [(name, entry.role) for name, entry in found.items()]
    [('0.weight', 'embedding'), ('1.weight', 'norm'), ('1.bias', 'bias'), ('2.weight', 'output'), ('2.bias', 'bias')]
    """  # noqa: E501
    roles = dict(roles or {})
    for pattern, role in roles.items():
        _check_role(role, f"pattern {pattern!r}")
    found: dict[int, Entry] = {}
    matched: set[str] = set()
    places = list(_walk(model))
    depths = _depths(model, places, stacks)
    known = {
        name: _role_of(name, module, local, param, roles, matched)
        for name, module, local, param in places
        if param.requires_grad
    }
    readouts = {
        name.removesuffix(local)
        for name, _, local, _ in places
        if known.get(name, ("",))[0] == "output"
    }
    for name, _, local, param in places:
        if name not in known:
            continue
        role, plain = known[name]
        depth = depths.get(name, 1)
        if role == "output" and name in depths:
            raise ValueError(
                f"{name} is a readout inside a residual stack: it is no cut edge there, and its "
                f"gradient would be off against the skip path's. Use umup.layers.Linear inside, or "
                f"move it out of the stack."
            )
        last = role == "bias" and name.removesuffix(local) in readouts
        entry = Entry(role, tuple(param.shape), depth, plain, (name,), last)
        first = found.get(id(param))
        found[id(param)] = entry if first is None else _tied(first, entry)
    unused = [pattern for pattern in roles if pattern not in matched]
    if unused:
        raise ValueError(
            f"no parameter matches {_list(unused)}; patterns are matched against whole names such "
            f"as {_list([name for name, *_ in places][:2])}"
        )
    entries = {entry.names[0]: entry for entry in found.values()}
    for name, entry in entries.items():
        if entry.fan_in == 0 or entry.fan_out == 0:
            raise ValueError(
                f"{name} is {list(entry.shape)}: a fan of zero gives no learning rate. Leave this "
                f"parameter out of the model."
            )
    return Spec(entries)


# ------------------------------------------------------------------ names


_WRAPPERS = {
    "_orig_mod": None,
    "_checkpoint_wrapped_module": None,
    "_fsdp_wrapped_module": None,
    # A name that models use too, so only in these classes:
    "module": {"DistributedDataParallel", "DataParallel", "AveragedModel"},
}


def _is_wrapped(parent: nn.Module, name: str) -> bool:
    if name not in _WRAPPERS:
        return False
    classes = _WRAPPERS[name]
    return classes is None or type(parent).__name__ in classes


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every use of a parameter: its clean name, its module, and its name there."""
    for local, param in module._parameters.items():
        if param is not None:
            yield prefix + local, module, local, param
    for name, child in module._modules.items():
        if child is not None:
            inside = prefix if _is_wrapped(module, name) else f"{prefix}{name}."
            yield from _walk(child, inside)


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield prefix.removesuffix("."), module
    for name, child in module._modules.items():
        if child is not None:
            inside = prefix if _is_wrapped(module, name) else f"{prefix}{name}."
            yield from _modules(child, inside)


def _by_name(model: nn.Module) -> dict[str, tuple[Tensor, list[str]]]:
    """Each parameter once, under its first name, with all of its names."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, _, _, param in _walk(model):
        found.setdefault(id(param), (param, []))[1].append(name)
    return {names[0]: (param, names) for param, names in found.values()}


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


# ------------------------------------------------------------------ roles


_PLAIN_ROLES: dict[type[nn.Module], Mapping[str, Role]] = {
    nn.LayerNorm: {"weight": "norm", "bias": "bias"},
    nn.RMSNorm: {"weight": "norm"},
    nn.GroupNorm: {"weight": "norm", "bias": "bias"},
}


def _role_of(
    name: str,
    module: nn.Module,
    local: str,
    param: Tensor,
    roles: Mapping[str, Role],
    matched: set[str],
) -> tuple[Role, bool]:
    """The role, and whether the module has no multipliers."""
    carried: Mapping[str, Role] | None = getattr(module, "umup_roles", None)
    plain = carried is None
    fitting = [pattern for pattern in roles if fnmatchcase(name, pattern)]
    matched.update(fitting)
    if fitting:
        role = roles[fitting[0]]
        _check_multipliers(name, module, (carried or {}).get(local, role), role)
        return role, plain
    if carried is not None and local in carried:
        role = _check_role(carried[local], name)
        of_class: Mapping[str, Role] = getattr(type(module), "umup_roles", carried)
        _check_multipliers(name, module, of_class.get(local, role), role)
        return role, plain
    for kind, known in _PLAIN_ROLES.items():
        if isinstance(module, kind) and local in known:
            return known[local], plain
    if roles and local == "bias" and param.ndim == 1:
        return "bias", plain
    raise ValueError(
        f"{name} has no role: {type(module).__name__} says none for its {local!r}, "
        f"{list(param.shape)}. Use a layer of umup.layers, set umup_roles on your module, or give "
        f"roles={{{name!r}: role}} with one of {', '.join(sorted(ROLES))}."
    )


def _check_multipliers(name: str, module: nn.Module, own: Role, role: Role) -> None:
    """Refuse a role whose multipliers are not those that a unit-scaled module applies."""
    if own != role and not any({own, role} <= alike for alike in _ALIKE):
        kind = type(module).__name__
        raise ValueError(
            f"{name} is made {role!r}, but its {kind} multiplies as {own!r} in its own forward, "
            f"which a name does not change: the table and the learning rate would be those of "
            f"another layer. Use a layer of that role: umup.layers.LinearReadout is 'output', over "
            f"the channels of a convolution too, umup.layers.Embedding is 'embedding'."
        )


_ALIKE = ({"hidden", "input"}, {"embedding", "tied"}, {"output", "tied"})
"""Roles whose modules multiply alike; a tied weight is in two modules, each with its own way."""


def _check_role(role: Any, where: str) -> Role:
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; roles are {', '.join(sorted(ROLES))}")
    return role


def _tied(first: Entry, second: Entry) -> Entry:
    names = (*first.names, *second.names)
    pair = {first.role, second.role}
    if len(pair) == 1 and first.depth == second.depth:
        return replace(first, names=names)
    if pair <= {"embedding", "output", "tied"}:
        return replace(first, role="tied", plain=first.plain and second.plain, names=names)
    raise ValueError(
        f"{first.names[0]} ({first.role}, depth {first.depth}) and {second.names[0]} "
        f"({second.role}, depth {second.depth}) are one tensor, and no learning rate is right for "
        f"both. Untie them, or give the one that counts to both: roles={{{second.names[0]!r}: "
        f"{first.role!r}}}."
    )


def _depths(
    model: nn.Module,
    places: Sequence[tuple[str, nn.Module, str, Tensor]],
    stacks: Sequence[str],
) -> dict[str, int]:
    """Depth by parameter name, for what is inside a stack."""
    found: dict[str, int] = {}
    modules = dict(_modules(model))
    unknown = [name for name in stacks if name not in modules]
    if unknown:
        raise ValueError(f"there is no module {_list(unknown)} to take as a residual stack")
    depths = {name: getattr(module, "umup_depth", None) for name, module in modules.items()}
    for name in stacks:
        layers: Any = modules[name]
        depths[name] = len(layers)
    containers = {name: depth for name, depth in depths.items() if depth is not None}
    for name, depth in containers.items():
        outer = next((o for o in containers if o != name and _inside(name, o)), None)
        if outer is not None:
            raise ValueError(
                f"the residual stack {name or 'model'!r} is inside the stack {outer or 'model'!r}; "
                f"a branch has one depth. Put all layers into one umup.layers.DepthModuleList and "
                f"use nn.ModuleList for the other."
            )
        for place, *_ in places:
            if _inside(place, name):
                found[place] = max(int(depth), 1)
    return found


def _inside(name: str, container: str) -> bool:
    return not container or name.startswith(f"{container}.")
