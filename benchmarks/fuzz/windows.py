"""Operators that look at more than one element: pooling, resizing, padding, reductions, attention, products."""

from handheld.benchmarks.fuzz.draw import Draw, Drawn, Operator


def _pool(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    kernel: int | tuple[int, ...] = d.choice((2, 3, 3, 5)) if d.chance(0.8) else (2, 3)
    smallest = kernel if isinstance(kernel, int) else min(kernel)
    return [x], {
        "kernel": kernel,
        "stride": d.choice((1, 2, 2, 3)),
        "padding": d.choice((0, smallest // 2)),
        "ceil_mode": d.chance(0.4),
    }


def _max_pool(d: Draw) -> Drawn:
    operands, attributes = _pool(d)
    return operands, {**attributes, "dilation": d.choice((1, 1, 1, 2))}


def _avg_pool(d: Draw) -> Drawn:
    operands, attributes = _pool(d)
    divisor = d.choice((None, None, None, 5))
    return operands, {**attributes, "count_include_pad": d.chance(), "divisor": divisor}


def _pool1d(d: Draw) -> Drawn:
    return [d.value(ranks=[3])], {"kernel": d.choice((2, 3)), "stride": d.choice((1, 2)), "ceil_mode": d.chance(0.4)}


def _adaptive(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    height, width = d.shape(x)[2:]
    sizes: list[int | tuple[int, ...]] = [1, (d.divisor(height), d.divisor(width)), 2, 3, (1, width), (height, 1)]
    return [x], {"size": d.choice(sizes)}


def _size(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    sides = d.shape(x)[2:]
    return [x], {"size": tuple(d.choice((side * 2, side + 3, max(side // 2, 1), max(side - 1, 1))) for side in sides)}


def _size_aligned(d: Draw) -> Drawn:
    operands, attributes = _size(d)
    return operands, {**attributes, "align_corners": d.chance()}


def _scale(d: Draw) -> Drawn:
    scales: list[float | tuple[float, ...]] = [2, 2.0, 0.5, 1.5, 3, 1.3, (2.0, 1.5)]
    return [d.value(ranks=[4])], {"scale": d.choice(scales)}


def _scale_aligned(d: Draw) -> Drawn:
    operands, attributes = _scale(d)
    return operands, {**attributes, "align_corners": d.chance()}


def _sides(d: Draw, most: int, ranks: tuple[int, ...] = (3, 4)) -> Drawn:
    x = d.value(ranks=ranks)
    shape = d.shape(x)
    amounts = []
    for size in reversed(shape[2:]):
        amounts += [d.random.randint(0, min(most, size - 1)), d.random.randint(0, min(most, size - 1))]
    return [x], {"amounts": tuple(amounts)}


def _constant_pad(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    amounts = tuple(d.random.randint(0, 2) for _ in range(2 * d.random.randint(1, len(d.shape(x)))))
    return [x], {"amounts": amounts, "value": d.choice((0, 0.5, -1.0))}


def _crop(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4], fits=lambda shape: shape[-1] > 2)
    return [x], {"amounts": (-1, d.choice((-1, 0, 2)))}


def _reduce(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"axes": d.axes(x), "keepdim": d.chance()}


def _reduce_one(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"axis": d.axis(x), "keepdim": d.chance()}


def _variance(d: Draw) -> Drawn:
    operands, attributes = _reduce(d)
    return operands, {**attributes, "correction": d.choice((0, 1))}


def _norm(d: Draw) -> Drawn:
    operands, attributes = _reduce_one(d)
    return operands, {**attributes, "p": d.choice((1, 2))}


def _along(d: Draw) -> Drawn:
    x = d.value(ranks=[1, 2, 3, 4])
    return [x], {"axis": d.axis(x)}


def _best(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    axis = d.axis(x)
    return [x], {"axis": axis, "k": d.random.randint(1, d.shape(x)[axis])}


def _bool_reduce(d: Draw) -> Drawn:
    x = d.value("bool", ranks=[2, 3, 4])
    return [x], {"axis": d.axis(x), "keepdim": d.chance()}


def _int_reduce(d: Draw) -> Drawn:
    x = d.value("int", ranks=[2, 3, 4])
    return [x], {"axis": d.axis(x), "keepdim": d.chance()}


def _heads(d: Draw) -> Drawn:
    x = d.value(ranks=[3])
    return [x], {"heads": d.divisor(d.shape(x)[-1])}


def _qkv(d: Draw) -> list[int]:
    q = d.value(ranks=[3, 4])
    k = d.value(fits=lambda shape: shape == d.shape(q))
    return [q, k, d.value(fits=lambda shape: shape == d.shape(q))]


def _attention(d: Draw) -> Drawn:
    return _qkv(d), {"causal": d.chance(0.3), "scale": d.choice((None, 0.3))}


def _written_out(d: Draw) -> Drawn:
    return _qkv(d), {"scale": d.number(0.2, 0.8)}


def _masked_attention(d: Draw) -> Drawn:
    q, k, v = _qkv(d)
    tokens = d.shape(q)[-2]
    mask = d.value(d.choice(("float", "bool")), ranks=[2, 3, 4], fits=lambda s: s[-2:] == (tokens, tokens))
    return [q, k, v, mask], {}


def _matmul(d: Draw) -> Drawn:
    a = d.value(ranks=[2, 3, 4])
    left = d.shape(a)
    return [a, d.value(ranks=[2, 3, 4], fits=lambda s: s[-2] == left[-1] and _batches(left, s))], {}


def _matmul_transposed(d: Draw) -> Drawn:
    a = d.value(ranks=[2, 3, 4])
    left = d.shape(a)
    return [a, d.value(ranks=[2, 3, 4], fits=lambda s: s[-1] == left[-1] and _batches(left, s))], {}


def _batches(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(a[-3::-1], b[-3::-1], strict=False))


EQUATIONS = {
    2: ("ij,kj->ik", "ij,ij->i", "ij,ij->ji", "ij,ik->jk"),
    3: ("bij,bkj->bik", "bij,bij->bj", "bij,bik->bjk", "bij,bij->ib", "bij,bkj->kbi"),
    4: ("bhij,bhkj->bhik", "bchw,bchw->bhw", "bhij,bhik->bjhk", "bchw,bdhw->bcd", "bchw,bchw->bwc"),
}


def _einsum(d: Draw) -> Drawn:
    a = d.value(ranks=[2, 3, 4])
    return [a, d.value(fits=lambda shape: shape == d.shape(a))], {"equation": d.choice(EQUATIONS[len(d.shape(a))])}


def _reducers() -> dict[str, Operator]:
    calls = {f: f"{{0}}.{f}({{axes}}, keepdim={{keepdim}})" for f in ("mean", "sum", "amax", "amin")}
    calls["logsumexp"] = "torch.logsumexp({0}, {axes}, keepdim={keepdim})"
    one = {
        "argmax": "{0}.argmax({axis}, keepdim={keepdim})",
        "argmin": "{0}.argmin({axis}, keepdim={keepdim})",
        "max": "{0}.max({axis}, keepdim={keepdim})[0]",
        "min": "{0}.min({axis}, keepdim={keepdim}).values",
        "mean_typed": "{0}.mean({axis}, keepdim={keepdim}, dtype=torch.float32)",
    }
    return {
        **{name: Operator(call, _reduce) for name, call in calls.items()},
        **{name: Operator(call, _reduce_one) for name, call in one.items()},
    }


INTERPOLATE = "F.interpolate({0}, "

TABLE = {
    "max_pool2d": Operator(
        "F.max_pool2d({0}, {kernel}, {stride}, {padding}, dilation={dilation}, ceil_mode={ceil_mode})", _max_pool
    ),
    "avg_pool2d": Operator(
        "F.avg_pool2d({0}, {kernel}, {stride}, {padding}, ceil_mode={ceil_mode}, "
        "count_include_pad={count_include_pad}, divisor_override={divisor})",
        _avg_pool,
    ),
    "max_pool1d": Operator("F.max_pool1d({0}, {kernel}, {stride}, ceil_mode={ceil_mode})", _pool1d),
    "avg_pool1d": Operator("F.avg_pool1d({0}, {kernel}, {stride}, ceil_mode={ceil_mode})", _pool1d),
    "adaptive_avg_pool2d": Operator("F.adaptive_avg_pool2d({0}, {size})", _adaptive),
    "adaptive_max_pool2d": Operator("F.adaptive_max_pool2d({0}, {size})", _adaptive),
    "nearest_size": Operator(INTERPOLATE + "size={size}, mode='nearest')", _size),
    "nearest_exact_size": Operator(INTERPOLATE + "size={size}, mode='nearest-exact')", _size),
    "nearest_scale": Operator(INTERPOLATE + "scale_factor={scale}, mode='nearest')", _scale),
    "bilinear_size": Operator(
        INTERPOLATE + "size={size}, mode='bilinear', align_corners={align_corners})", _size_aligned
    ),
    "bilinear_scale": Operator(
        INTERPOLATE + "scale_factor={scale}, mode='bilinear', align_corners={align_corners})", _scale_aligned
    ),
    "bilinear_antialias": Operator(INTERPOLATE + "size={size}, mode='bilinear', antialias=True)", _size),
    "bicubic_size": Operator(
        INTERPOLATE + "size={size}, mode='bicubic', align_corners={align_corners})", _size_aligned
    ),
    "bicubic_scale": Operator(
        INTERPOLATE + "scale_factor={scale}, mode='bicubic', align_corners={align_corners})", _scale_aligned
    ),
    "pad_constant": Operator("F.pad({0}, {amounts}, value={value})", _constant_pad),
    "pad_reflect": Operator("F.pad({0}, {amounts}, mode='reflect')", lambda d: _sides(d, 2)),
    "pad_replicate": Operator("F.pad({0}, {amounts}, mode='replicate')", lambda d: _sides(d, 3)),
    "pad_circular": Operator("F.pad({0}, {amounts}, mode='circular')", lambda d: _sides(d, 2)),
    "crop": Operator("F.pad({0}, {amounts})", _crop),
    **_reducers(),
    "mean_all": Operator("{0}.mean()", lambda d: ([d.value(ranks=[2, 3, 4])], {})),
    "var": Operator("{0}.var({axes}, correction={correction}, keepdim={keepdim})", _variance),
    "std": Operator("{0}.std({axes}, correction={correction}, keepdim={keepdim})", _variance),
    "norm": Operator("torch.linalg.vector_norm({0}, {p}, {axis}, keepdim={keepdim})", _norm),
    "normalize": Operator("F.normalize({0}, dim={axis})", _along),
    "softmax": Operator("{0}.softmax({axis})", _along),
    "log_softmax": Operator("{0}.log_softmax({axis})", _along),
    "softmin": Operator("F.softmin({0}, {axis})", _along),
    "cumsum": Operator("{0}.cumsum({axis})", _along),
    "glu": Operator("F.glu(torch.cat([{0}, {0} * 0.5], {axis}), {axis})", _along),
    "sort": Operator("{0}.sort({axis}).values", _along),
    "topk": Operator("{0}.topk({k}, {axis}).values", _best),
    "any": Operator("{0}.any({axis}, keepdim={keepdim})", _bool_reduce),
    "all": Operator("{0}.all({axis}, keepdim={keepdim})", _bool_reduce),
    "count": Operator("{0}.sum({axis}, keepdim={keepdim})", _bool_reduce),
    "int_sum": Operator("{0}.sum({axis}, keepdim={keepdim})", _int_reduce),
    "int_amax": Operator("{0}.amax({axis}, keepdim={keepdim})", _int_reduce),
    "int_cumsum": Operator("{0}.cumsum({axis})", lambda d: _axis_of(d, "int")),
    "heads": Operator("{0}.unflatten(-1, ({heads}, -1)).transpose(1, 2)", _heads),
    "attention": Operator(
        "F.scaled_dot_product_attention({0}, {1}, {2}, is_causal={causal}, scale={scale})", _attention
    ),
    "attention_masked": Operator("F.scaled_dot_product_attention({0}, {1}, {2}, attn_mask={3})", _masked_attention),
    "attention_written_out": Operator("({0} @ {1}.transpose(-2, -1) * {scale}).softmax(-1) @ {2}", _written_out),
    "matmul": Operator("{0} @ {1} / 2", _matmul),
    "matmul_transposed": Operator("{0} @ {1}.transpose(-2, -1) / 2", _matmul_transposed),
    "einsum": Operator("torch.einsum({equation}, {0}, {1}) / 2", _einsum),
}


def _axis_of(d: Draw, kind: str) -> Drawn:
    x = d.value(kind, ranks=[1, 2, 3, 4])
    return [x], {"axis": d.axis(x)}
