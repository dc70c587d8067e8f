"""Operators that move elements: concatenation, slicing, indexing, permutation, reshaping."""

from math import prod

from handheld.benchmarks.fuzz.draw import Draw, Drawn, NoFitError, Operator


def _any(d: Draw, ranks: tuple[int, ...] = (2, 3, 4)) -> int:
    return d.value(d.choice(("float", "float", "float", "int", "bool")), ranks=ranks)


def _cat(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    shape, axis = d.shape(x), d.axis(x)
    place = axis % len(shape)

    def fits(other: tuple[int, ...]) -> bool:
        return len(other) == len(shape) and all(
            a == b for i, (a, b) in enumerate(zip(shape, other, strict=True)) if i != place
        )

    others = [d.value(ranks=[len(shape)], fits=fits) for _ in range(d.choice((1, 1, 2)))]
    return [x, *others], {"axis": axis}


def _stack(d: Draw) -> Drawn:
    x = d.value(ranks=[1, 2, 3])
    return [x, d.value(fits=lambda shape: shape == d.shape(x))], {"axis": d.axis(x)}


def _part_of(d: Draw) -> tuple[int, int, int]:
    """A value, an axis of it longer than 1, and how long."""
    x = _any(d)
    axis = d.axis(x)
    length = d.shape(x)[axis]
    if length < 2:
        raise NoFitError
    return x, axis, length


def _split(d: Draw) -> Drawn:
    x, axis, length = _part_of(d)
    size = d.random.randint(1, length - 1)
    return [x], {"sizes": (size, length - size), "axis": axis, "index": d.choice((0, 1))}


def _chunk(d: Draw) -> Drawn:
    x, axis, length = _part_of(d)
    count = d.random.randint(2, min(length, 3))
    return [x], {"count": count, "axis": axis}


def _narrow(d: Draw) -> Drawn:
    x, axis, length = _part_of(d)
    start = d.random.randint(0, length - 1)
    return [x], {"axis": axis, "start": start, "length": d.random.randint(1, length - start)}


def _select(d: Draw) -> Drawn:
    x, axis, length = _part_of(d)
    return [x], {"axis": axis, "index": d.random.randrange(-length, length)}


def _steps(d: Draw) -> Drawn:
    x = _any(d)
    return [x], {"start": d.choice((0, 1, -3)), "step": d.choice((1, 2, 3))}


def _rows(d: Draw) -> Drawn:
    x, axis, length = _part_of(d)
    index = tuple(d.random.randrange(length) for _ in range(d.random.randint(1, length + 2)))
    return [x], {"axis": axis, "index": index}


def _listed(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    length = d.shape(x)[1]
    return [x], {"index": tuple(d.random.randrange(length) for _ in range(d.random.randint(1, length + 1)))}


def _gathered(d: Draw) -> Drawn:
    """Indices of the value's own shape, shorter along the axis, computed from another value."""
    index = d.value("int", ranks=[2, 3, 4])
    wanted = d.shape(index)
    axis = d.axis(index)
    place = axis % len(wanted)
    x = d.value(
        ranks=[len(wanted)],
        fits=lambda s: all(a >= b for i, (a, b) in enumerate(zip(s, wanted, strict=True)) if i != place),
    )
    return [x, index], {"axis": axis, "length": d.shape(x)[axis]}


def _at_best(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"axis": d.axis(x)}


def _flip(d: Draw) -> Drawn:
    x = _any(d)
    return [x], {"axes": d.axes(x)}


def _roll(d: Draw) -> Drawn:
    x = _any(d)
    return [x], {"shift": d.choice((1, 2, -1, -3)), "axis": d.axis(x)}


def _roll_two(d: Draw) -> Drawn:
    return [d.value(ranks=[4])], {"shifts": (d.choice((1, -2)), d.choice((2, -1)))}


def _permute(d: Draw) -> Drawn:
    x = _any(d)
    return [x], {"order": d.order(len(d.shape(x)))}


def _transpose(d: Draw) -> Drawn:
    x = _any(d)
    return [x], {"a": d.axis(x), "b": d.axis(x)}


def _reshape(d: Draw) -> Drawn:
    x = _any(d, (1, 2, 3, 4, 5))
    left, sizes = prod(d.shape(x)), []
    for _ in range(d.random.randint(1, 3)):
        sizes.append(d.divisor(left))
        left //= sizes[-1]
    sizes.append(left)
    d.random.shuffle(sizes)
    if d.chance(0.3) and 0 not in sizes:
        sizes[d.random.randrange(len(sizes))] = -1
    return [x], {"shape": tuple(sizes)}


def _merge(d: Draw) -> Drawn:
    x = _any(d, (2, 3, 4, 5))
    start = d.random.randrange(len(d.shape(x)) - 1)
    return [x], {"start": start, "end": d.random.randint(start + 1, len(d.shape(x)) - 1)}


def _unsqueeze(d: Draw) -> Drawn:
    x = _any(d, (1, 2, 3))
    return [x], {"axis": d.axis(x)}


def _squeeze(d: Draw) -> Drawn:
    x = d.value(fits=lambda shape: 1 in shape)
    return [x], {"axis": d.choice([axis for axis, size in enumerate(d.shape(x)) if size == 1])}


def _expand(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4], fits=lambda shape: 1 in shape)
    return [x], {"shape": tuple(d.choice((-1, 3)) if size == 1 else -1 for size in d.shape(x))}


def _repeat(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3])
    return [x], {"counts": tuple(d.choice((1, 1, 2)) for _ in d.shape(x))}


def _interleave(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"count": 2, "axis": d.axis(x)}


def _shuffle(d: Draw) -> Drawn:
    return [d.value(ranks=[4], fits=lambda s: s[1] % 4 == 0)], {"factor": 2}


def _unshuffle(d: Draw) -> Drawn:
    factor = d.choice((2, 3))
    return [d.value(ranks=[4], fits=lambda s: not s[2] % factor and not s[3] % factor)], {"factor": factor}


def _channel_shuffle(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    return [x], {"groups": d.divisor(d.shape(x)[1])}


def _unfold(d: Draw) -> Drawn:
    kernel = d.choice((2, 3))
    x = d.value(ranks=[4], fits=lambda s: min(s[2:]) >= kernel)
    return [x], {"kernel": kernel, "stride": d.choice((1, 2)), "padding": d.choice((0, 1))}


def _square(d: Draw) -> Drawn:
    return [d.value(ranks=[2, 3])], {"diagonal": d.choice((0, 1, -1))}


TABLE = {
    "cat": Operator("torch.cat([{all}], dim={axis})", _cat),
    "stack": Operator("torch.stack([{all}], dim={axis})", _stack),
    "split": Operator("{0}.split({sizes}, dim={axis})[{index}]", _split),
    "chunk_swapped": Operator("torch.cat({0}.chunk({count}, dim={axis})[::-1], dim={axis})", _chunk),
    "unbind": Operator("torch.stack({0}.unbind({axis})[::-1], dim=0)", _at_best),
    "narrow": Operator("{0}.narrow({axis}, {start}, {length})", _narrow),
    "select": Operator("{0}.select({axis}, {index})", _select),
    "slice_last": Operator("{0}[..., {start}::{step}]", _steps),
    "slice_second": Operator("{0}[:, {start}::{step}]", _steps),
    "index_select": Operator("{0}.index_select({axis}, torch.tensor({index}))", _rows),
    "index": Operator("{0}[:, list({index})]", _listed),
    "gather": Operator("{0}.gather({axis}, {1} % {length})", _gathered),
    "gather_best": Operator("{0}.gather({axis}, {0}.argmax({axis}, keepdim=True))", _at_best),
    "flip": Operator("{0}.flip({axes})", _flip),
    "roll": Operator("{0}.roll({shift}, {axis})", _roll),
    "roll_two": Operator("{0}.roll({shifts}, (2, 3))", _roll_two),
    "permute": Operator("{0}.permute({order})", _permute),
    "transpose": Operator("{0}.transpose({a}, {b})", _transpose),
    "reshape": Operator("{0}.reshape({shape})", _reshape),
    "flatten": Operator("{0}.flatten({start}, {end})", _merge),
    "unsqueeze": Operator("{0}.unsqueeze({axis})", _unsqueeze),
    "squeeze": Operator("{0}.squeeze({axis})", _squeeze),
    "expand": Operator("{0}.expand({shape})", _expand),
    "repeat": Operator("{0}.repeat({counts})", _repeat),
    "repeat_interleave": Operator("{0}.repeat_interleave({count}, dim={axis})", _interleave),
    "pixel_shuffle": Operator("F.pixel_shuffle({0}, {factor})", _shuffle),
    "pixel_unshuffle": Operator("F.pixel_unshuffle({0}, {factor})", _unshuffle),
    "channel_shuffle": Operator("F.channel_shuffle({0}, {groups})", _channel_shuffle),
    "unfold": Operator("F.unfold({0}, {kernel}, stride={stride}, padding={padding})", _unfold),
    "tril": Operator("{0}.tril({diagonal})", _square),
    "triu": Operator("{0}.triu({diagonal})", _square),
    "contiguous": Operator("{0}.contiguous()", lambda d: ([d.value()], {})),
}
