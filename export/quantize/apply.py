"""What a recipe makes of a program: weights stored as it says, activations in integers around the layers it names."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError, unknown
from handheld.export.quantize import ops
from handheld.export.quantize.calibration import Range, ranges
from handheld.export.quantize.kernels import computable, round_biases
from handheld.export.quantize.weights import StoredTensor, store
from handheld.export.recipe import Activations, Recipe, Rule, Weights
from handheld.export.rewrites import graph
from handheld.export.rewrites.layers import CONVOLUTIONS, LINEAR, TRANSPOSED
from handheld.export.rewrites.tabulate import is_table

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from handheld.export.program import Program

LAYERS: Mapping[str, tuple[int, str, int]] = {
    **dict.fromkeys(CONVOLUTIONS, (1, "conv", 0)),
    **dict.fromkeys(TRANSPOSED, (1, "conv", 1)),
    LINEAR: (1, "linear", 0),
    "embedding.default": (0, "embedding", 0),
}
"""Operator -> which argument is its weight, what recipes call it, and the weight's axis of output channels."""

JOINED = ("add.Tensor", "mul.Tensor", "sub.Tensor", "cat.default", "mean.dim", "adaptive_avg_pool2d.default")
"""Operators that stay in integers if all that they take is in integers. `cat` has one scale for all that it joins."""

SHARED = (
    *("max_pool2d.default", "avg_pool2d.default", "relu.default", "hardtanh.default", "clamp.default", "slice.Tensor"),
    *("pad.default", "constant_pad_nd.default"),  # with zeros: anything else is not in the integers' range by itself
    *graph.VIEWS,
    *graph.PERMUTES,
)
"""Operators that give out the scale that they take."""

CONSTANT = "constant"
"""What recipes call a constant that is added before a softmax: a step's half there is a small part of a weight. Not one
that is added elsewhere: places' embeddings have outliers, and cost all-MiniLM-L6-v2's `w8` 4 dB."""

AS_CONSTANT = Weights(scheme="integer", bits=8, per="tensor")
"""How it is stored, if at all: its axes are no channels to a kernel."""

LARGEST_ADDED = 1e4
"""Beyond it a constant is a mask, whose steps would swallow whatever else is in it."""

FUSED = ("relu.default", "hardtanh.default", "clamp.default", "relu6.default")
"""Operators that kernels do at the end of a layer: between the two nothing is rounded."""


CALIBRATE_HINT = "Type: --calibrate FOLDER (pictures), FILE.npz, FILE.py:FUNCTION, or drawn:N for seeded noise."


@dataclass(frozen=True)
class Layer:
    """One weight that a recipe can store: `module` is its path in the model, `operator` what recipes call it."""

    module: str
    operator: str
    weight: str
    """The attribute of the program's module that holds it."""
    shape: tuple[int, ...]
    channel_axis: int
    users: "tuple[Node, ...]"

    @property
    def elements(self) -> int:
        """Of the weight."""
        return math.prod(self.shape)


def prepared(program: "Program", *, neural_engine: bool = False) -> "Program":
    """The program as it is quantized: with the rewrites that every format gets, batch norms folded among them.

    `neural_engine`: in the form of `rewrites.NEURAL_ENGINE`, which does not see through weights that are stored.
    """
    from handheld.export import rewrites

    return rewrites.apply(program, "quantized", neural_engine=neural_engine)[0]


def layers(module: "GraphModule") -> list[Layer]:
    """The weights of a prepared program's module, in the order in which they are used; a shared one counts once.

    The numbers of a fixed schedule that `tabulate` stored are no weights.
    """
    found: dict[str, list[tuple[Node, str, int]]] = {}
    for node in module.graph.nodes:
        place, operator, axis = LAYERS.get(graph.operator(node), (None, "", 0))
        if place is None or graph.constant(node.args[place]) is None:
            continue
        weight = node.args[place]
        if is_table(str(weight.target)):
            continue
        if operator == "conv" and graph.arguments(node)["groups"] > 1 and graph.shape(weight)[1 - axis] == 1:
            operator = "depthwise"
        found.setdefault(str(weight.target), []).append((node, operator, axis))
    return [
        Layer(
            module=target.rpartition(".")[0].removeprefix("module.") or target,
            operator=uses[0][1],
            weight=target,
            shape=tuple(graph.shape(_argument(uses[0][0], target))),
            channel_axis=uses[0][2],
            users=tuple(node for node, _, _ in uses),
        )
        for target, uses in found.items()
    ]


def constants(module: "GraphModule") -> list[Layer]:
    """The constants of a prepared program's module that are added to what a softmax takes and nothing else: attention
    biases, in the order in which they are used."""
    found = []
    for node in module.graph.find_nodes(op="get_attr"):
        tensor, users = graph.constant(node), tuple(node.users)
        if tensor is None or is_table(str(node.target)) or not tensor.is_floating_point():
            continue
        added = all(graph.operator(user) == "add.Tensor" and _before_softmax(user) for user in users)
        if users and added and tensor.abs().max() <= LARGEST_ADDED:  # no number is not
            name = str(node.target)
            found.append(Layer(name.removeprefix("module."), CONSTANT, name, tuple(tensor.shape), 0, users))
    return found


def _before_softmax(node: "Node") -> bool:
    """Whether softmaxes take it, moved about or with something added, and nothing else does."""
    return bool(node.users) and all(
        graph.operator(user) == "softmax.int"
        or (graph.operator(user) in ("add.Tensor", *graph.VIEWS) and _before_softmax(user))
        for user in node.users
    )


def _argument(node: "Node", target: str) -> "Node":
    return next(given for given in node.all_input_nodes if str(given.target) == target)


def assignment(found: Iterable[Layer], recipe: Recipe) -> dict[str, Rule]:
    """Weight -> the rule that it gets. Weights below `recipe.smallest` get none, unless their activations are in
    integers too; constants get none but that stores integers of 8 bits.

    Raises `HandheldError` for a rule whose modules match no layer of the model at all.
    """
    found = list(found)
    names = [layer.module for layer in found]
    for rule in recipe.rules:
        if found and not any(rule.matches(layer.module, layer.operator) for layer in found):
            raise unknown(f"modules of a rule of {recipe.name}, like no layer of this model:", rule.modules[0], names)
    chosen = {layer: recipe.rule(layer.module, layer.operator) for layer in found}
    return {
        layer.weight: rule
        for layer, rule in chosen.items()
        if rule and (_stores_constants(rule) if layer.operator == CONSTANT else rule.activations or rule.weights)
        if layer.elements >= recipe.smallest or (rule.activations and layer.operator != CONSTANT)
    }


def _stores_constants(rule: Rule) -> bool:
    how = rule.weights
    return how is not None and (how.scheme, how.bits, how.sparsity) == ("integer", 8, None)


Store = Callable[[Layer, "Tensor", Weights], StoredTensor]
"""How a weight is stored as a recipe says: `weights.store`, or what also looks at the layer's inputs."""


def plain_store(layer: Layer, weight: "Tensor", how: Weights) -> StoredTensor:
    """Rounded to nearest, layer by layer."""
    return store(weight, how, layer.channel_axis, layer.module)


def quantize(
    program: "Program",
    recipe: Recipe,
    batches: "Sequence[Sequence[Tensor]]" = (),
    *,
    store: Store = plain_store,
) -> "Program":
    """The quantized form of a prepared program. `batches`: inputs to calibrate with, if the recipe has activations.

    Raises `HandheldError` for a rule that matches nothing, and for missing or unusable calibration data.
    """
    import torch

    module, found, rules, quantized = plan(program, recipe, batches)
    with torch.no_grad():
        seen = ranges(module, {node: group.how for node, group in quantized.items()}, batches) if quantized else {}
        for layer in found:
            rule = rules.get(layer.weight)
            if rule and layer.operator == CONSTANT:
                _store_weight(module, layer, plain_store(layer, tensor_of(layer), AS_CONSTANT))
            elif rule and rule.weights:
                stored = store(layer, tensor_of(layer), rule.weights)
                if rule.activations and rule.activations.bits == 8:
                    stored = computable(stored, layer.channel_axis, _uses(layer, quantized, seen))
                _store_weight(module, layer, stored)
        _quantize_values(quantized, seen)
        round_biases(module)
    module.graph.eliminate_dead_code()
    graph.drop_unused_constants(module)
    module.recompile()
    return program.retraced(module)


def plan(
    program: "Program", recipe: Recipe, batches: "Sequence[Sequence[Tensor]]"
) -> "tuple[GraphModule, list[Layer], dict[str, Rule], dict[Node, _Group]]":
    """The module of a prepared program, its layers and constants, the rule of each, and values that become integers.

    Raises `HandheldError` for a rule that matches nothing, and for calibration data that is missing.
    """
    module = program.module()
    found = layers(module)
    every = [*found, *constants(module)]
    rules = assignment(every, recipe)
    quantized = _quantized_values(module, found, rules)
    if quantized and not batches:
        raise HandheldError(
            f"recipe {recipe.name} needs calibration data: inputs to find the ranges of activations with.",
            hint=CALIBRATE_HINT,
        )
    return module, every, rules, quantized


def tensor_of(layer: Layer) -> "Tensor":
    """Its weight in floats."""
    found = graph.constant(_argument(layer.users[0], layer.weight))
    assert found is not None
    return found


def _uses(
    layer: Layer, groups: "Mapping[Node, _Group]", seen: "Mapping[Node, Range]"
) -> "list[tuple[float, float | None, Tensor | None]]":
    """Of each operator that the weight is of: the scales of its input and its output, and its bias."""

    def scale(node: "Node") -> float | None:
        if _is_fused(node):
            node = next(iter(node.users))
        return parameters_of(groups[node], seen)[0] if node in groups else None

    sources = [(user, groups.get(user.args[0])) for user in layer.users if graph.is_node(user.args[0])]
    return [
        (parameters_of(source, seen)[0], scale(user), graph.constant(graph.arguments(user).get("bias")))
        for user, source in sources
        if source
    ]


def _store_weight(module: "GraphModule", layer: Layer, stored: StoredTensor) -> None:
    """Put the operators that make the weight in its place, before its first use."""
    import torch

    first = layer.users[0]

    def constant(tensor: "Tensor", kind: str) -> "Node":
        return graph.add_constant(first, tensor, f"{layer.weight}_{kind}")

    def call(operator: Any, like: "torch.dtype", *arguments: Any) -> "Node":
        with module.graph.inserting_before(first):
            node = module.graph.call_function(operator, arguments)
        node.meta["val"] = torch.empty(layer.shape, dtype=like, device="meta")
        return node

    dequantize, lookup, masked = ops.WEIGHTS
    made = constant(stored.values, "values" if stored.table is None else "indices")
    if stored.table is not None:
        made = call(lookup, stored.table.dtype, made, constant(stored.table, "table"), stored.bits)
    if stored.scale is not None:
        bits = stored.bits if stored.table is None else 8
        made = call(dequantize, torch.float32, made, constant(stored.scale, "scale"), bits)
    if stored.mask is not None:
        made = call(masked, torch.float32, made, constant(stored.mask, "mask"))
    for user in layer.users:
        user.replace_input_with(_argument(user, layer.weight), made)


@dataclass
class _Group:
    """Values that have one scale."""

    how: Activations
    members: "list[Node]"


def _quantized_values(module: "GraphModule", found: Sequence[Layer], rules: Mapping[str, Rule]) -> "dict[Node, _Group]":
    """The nodes whose values become integers, and with which others they share a scale."""
    wanted = {
        user: rule.activations
        for layer in found
        if (rule := rules.get(layer.weight)) and rule.activations and layer.operator != "embedding"
        for user in layer.users
    }
    kernels = set(wanted)
    groups: dict[Node, _Group] = {}

    def add(node: "Node", how: Activations) -> None:
        if node not in groups:
            groups[node] = _Group(how, [node])

    def join(nodes: "Sequence[Node]") -> None:
        first = groups[nodes[0]]
        for node in nodes[1:]:
            for member in groups[node].members if groups[node] is not first else ():
                groups[member] = first
                first.members.append(member)

    for node in module.graph.nodes:
        given = [before for before in node.all_input_nodes if graph.constant(before) is None]
        if how := wanted.get(node):
            source = given[0]
            if source not in groups:
                add(source, how)
                while _moves(source) and (before := source.all_input_nodes[0]) not in groups:
                    add(before, how)
                    join([source, before])
                    source = before
            if not _is_fused(node):
                add(node, how)
        elif graph.operator(node) in FUSED and given and given[0] in wanted and _is_fused(given[0]):
            add(node, wanted[given[0]])
        elif graph.operator(node) in SHARED and given and given[0] in groups and graph.pads_with_zeros(node):
            add(node, groups[given[0]].how)
            join([given[0], node])
        elif graph.operator(node) in JOINED and len(given) == _tensors(node) and all(v in groups for v in given):
            if _is_fused(node):
                wanted[node] = groups[given[0]].how
            else:
                add(node, groups[given[0]].how)
                if graph.operator(node) == "cat.default":
                    join([*given, node])
    _leave_out_idle(module, groups, kernels)
    return groups


def _leave_out_idle(module: "GraphModule", groups: "dict[Node, _Group]", kernels: "Collection[Node]") -> None:
    """Do not round what no integer operator takes, unless a layer's kernel makes it: the sums between a transformer's
    layers, which only norms take, cost all-MiniLM-L6-v2 4 dB."""

    def computes(node: "Node") -> bool:
        """Whether it is an operator on integers."""
        last = next(iter(node.users)) if _is_fused(node) else node
        given = [before for before in node.all_input_nodes if graph.constant(before) is None]
        joins = graph.operator(node) in (*JOINED, *SHARED) and last in groups and all(v in groups for v in given)
        return node in kernels or joins

    for node in reversed(module.graph.nodes):
        made = node.all_input_nodes[0] if graph.operator(node) in FUSED else node
        if node in groups and made not in kernels and not any(computes(user) for user in node.users):
            groups.pop(node).members.remove(node)


def _tensors(node: "Node") -> int:
    """How many tensors an operator takes: a number in a tensor's place counts, for it is no quantized value."""
    if graph.operator(node) in ("add.Tensor", "mul.Tensor", "sub.Tensor"):
        return len(set(node.args[:2]))
    return len(node.all_input_nodes)


def _moves(node: "Node") -> bool:
    """Whether the node only moves values about, and can as well move integers."""
    return graph.operator(node) in SHARED and graph.operator(node) not in FUSED and graph.pads_with_zeros(node)


def rounded(layer: "Node") -> "tuple[Node, ...]":
    """The values around an operator with weights that are rounded, if any are: what it takes, and what it gives with
    the activation that its kernel ends with."""
    made = next(iter(layer.users)) if _is_fused(layer) else layer
    return (layer.args[0], made) if graph.is_node(layer.args[0]) else (made,)


def _is_fused(node: "Node") -> bool:
    """Whether the one user of `node` is an activation that kernels do at its end."""
    user = graph.only_user(node)
    return user is not None and graph.operator(user) in FUSED


def _quantize_values(groups: "Mapping[Node, _Group]", seen: "Mapping[Node, Range]") -> None:
    for node, group in groups.items():
        _insert_pairs(node, parameters_of(group, seen))


def parameters_of(group: _Group, seen: "Mapping[Node, Range]") -> tuple[float, int, int, int]:
    """As `parameters`, of all that has one scale."""
    low = min(seen[member].low for member in group.members)
    high = max(seen[member].high for member in group.members)
    return parameters(Range(low, high), group.how.bits)


def parameters(seen: Range, bits: int) -> tuple[float, int, int, int]:
    """Scale, zero point, lowest and highest integer for values of a range, in which 0 is made to lie.

    A range of nothing but 0 has the scale 1.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if bits == 16:
        return max(-low, high) / 32767 or 1.0, 0, -32767, 32767
    scale = (high - low) / 255 or 1.0
    return scale, max(-128, min(127, round(-128 - low / scale))), -128, 127


def _insert_pairs(node: "Node", how: tuple[float, int, int, int]) -> None:
    """Quantize after `node`, and dequantize before each of its users."""
    import torch

    quantize, dequantize = ops.ACTIVATIONS
    arguments = (*how, torch.int8 if how[3] == 127 else torch.int16)
    users = list(node.users)
    with node.graph.inserting_after(node):
        stored = node.graph.call_function(quantize, (node, *arguments))
    stored.meta["val"] = torch.empty(graph.shape(node), dtype=arguments[-1], device="meta")
    for user in users:
        with node.graph.inserting_before(user):
            real = node.graph.call_function(dequantize, (stored, *arguments))
        real.meta["val"] = torch.empty(graph.shape(node), dtype=torch.float32, device="meta")
        user.replace_input_with(node, real)
