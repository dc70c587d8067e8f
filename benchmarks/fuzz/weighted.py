"""Operators with weights: convolutions, linear layers, norms, embeddings, constants."""

from handheld.benchmarks.fuzz.draw import Draw, Drawn, Operator

CHANNELS = (1, 3, 4, 6, 8, 12, 16)


def _conv(ranks: tuple[int, ...]) -> "Operator":
    spatial = ranks[0] - 2

    def draw(d: Draw) -> Drawn:
        x = d.value(ranks=ranks)
        channels, out = d.shape(x)[1], d.choice(CHANNELS)
        groups = d.choice([1, 1, *(g for g in range(2, channels + 1) if channels % g == 0 and out % g == 0)])
        kernel = tuple(d.choice((1, 3, 3, 5, 2)) for _ in range(spatial)) if d.chance(0.2) else _same(d, spatial)
        return [x], {
            "channels": channels,
            "out": out,
            "kernel": kernel,
            "stride": d.choice((1, 1, 2)),
            "padding": d.choice([0, *(k // 2 for k in kernel)]),
            "dilation": d.choice((1, 1, 1, 2)),
            "groups": groups,
            "bias": d.chance(0.7),
        }

    return Operator(
        "{part}({0})",
        draw,
        f"seeded(nn.Conv{spatial}d({{channels}}, {{out}}, {{kernel}}, stride={{stride}}, padding={{padding}}, "
        "dilation={dilation}, groups={groups}, bias={bias}), {seed})",
    )


def _same(d: Draw, spatial: int) -> tuple[int, ...]:
    return (d.choice((1, 3, 3, 5)),) * spatial


def _depthwise(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    kernel = d.choice((3, 5))
    stride, padding = d.choice((1, 1, 2)), d.choice((0, kernel // 2))
    return [x], {"channels": d.shape(x)[1], "kernel": kernel, "stride": stride, "padding": padding}


def _conv_transpose(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    channels, stride = d.shape(x)[1], d.choice((1, 2, 2, 3))
    groups, out = d.choice([1, 1, d.divisor(channels)]), d.choice((4, 6, 8, 12))
    return [x], {
        "channels": channels,
        "out": out * groups,
        "kernel": d.choice((1, 2, 3, 4)),
        "stride": stride,
        "padding": d.choice((0, 1)),
        "output_padding": d.choice((0, 0, stride - 1)),
        "groups": groups,
        "bias": d.chance(0.7),
        "dilation": d.choice((1, 1, 1, 2)),
    }


def _linear(d: Draw) -> Drawn:
    x = d.value(ranks=[1, 2, 3, 4])
    return [x], {"features": d.shape(x)[-1], "out": d.choice(CHANNELS), "bias": d.chance(0.7)}


def _batch_norm(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    return [x], {"channels": d.shape(x)[1], "eps": d.choice((1e-5, 1e-3)), "affine": d.chance(0.8)}


def _layer_norm(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    shape = d.shape(x)[-d.choice((1, 1, 2)) :]
    return [x], {"shape": shape, "eps": d.choice((1e-5, 1e-6)), "affine": d.chance(0.8)}


def _group_norm(d: Draw) -> Drawn:
    x = d.value(ranks=[3, 4])
    channels = d.shape(x)[1]
    return [x], {"channels": channels, "groups": d.divisor(channels), "affine": d.chance(0.8)}


def _instance_norm(d: Draw) -> Drawn:
    x = d.value(ranks=[4])
    return [x], {"channels": d.shape(x)[1], "affine": d.chance()}


def _rms_norm(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"shape": d.shape(x)[-1:]}


def _prelu(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"channels": d.choice((1, d.shape(x)[1]))}


def _embedding(d: Draw) -> Drawn:
    return [d.value("int", ranks=[1, 2, 3])], {"rows": d.choice((5, 10)), "width": d.choice((4, 8, 12))}


def _constant(d: Draw) -> Drawn:
    """A constant that can be broadcast with a value: some of its last axes, some of them 1."""
    like = d.shape(d.value())
    kept = like[-d.random.randint(1, len(like)) :]
    return [], {"shape": tuple(1 if d.chance(0.3) else size for size in kept)}


def _projection(d: Draw) -> Drawn:
    x = d.value(ranks=[2, 3, 4])
    return [x], {"shape": (d.shape(x)[-1], d.choice(CHANNELS))}


def _batched_projection(d: Draw) -> Drawn:
    x = d.value(ranks=[3])
    return [x], {"shape": (d.shape(x)[0], d.shape(x)[-1], d.choice(CHANNELS))}


TABLE = {
    "conv1d": _conv((3,)),
    "conv2d": _conv((4,)),
    "depthwise": Operator(
        "{part}({0})",
        _depthwise,
        "seeded(nn.Conv2d({channels}, {channels}, {kernel}, stride={stride}, padding={padding}, groups={channels}), "
        "{seed})",
    ),
    "conv_transpose2d": Operator(
        "{part}({0})",
        _conv_transpose,
        "seeded(nn.ConvTranspose2d({channels}, {out}, {kernel}, stride={stride}, padding={padding}, "
        "output_padding={output_padding}, groups={groups}, bias={bias}, dilation={dilation}), {seed})",
    ),
    "linear": Operator("{part}({0})", _linear, "seeded(nn.Linear({features}, {out}, bias={bias}), {seed})"),
    "batch_norm": Operator(
        "{part}({0})", _batch_norm, "seeded(nn.BatchNorm2d({channels}, eps={eps}, affine={affine}), {seed})"
    ),
    "layer_norm": Operator(
        "{part}({0})", _layer_norm, "seeded(nn.LayerNorm({shape}, eps={eps}, elementwise_affine={affine}), {seed})"
    ),
    "group_norm": Operator(
        "{part}({0})", _group_norm, "seeded(nn.GroupNorm({groups}, {channels}, affine={affine}), {seed})"
    ),
    "instance_norm": Operator(
        "{part}({0})", _instance_norm, "seeded(nn.InstanceNorm2d({channels}, affine={affine}), {seed})"
    ),
    "rms_norm": Operator("{part}({0})", _rms_norm, "seeded(nn.RMSNorm({shape}), {seed})"),
    "prelu": Operator("{part}({0})", _prelu, "seeded(nn.PReLU({channels}), {seed})"),
    "embedding": Operator("{part}({0} % {rows})", _embedding, "seeded(nn.Embedding({rows}, {width}), {seed})"),
    "constant": Operator("{part}", _constant, "nn.Buffer(normal({shape}, {seed}))"),
    "projection": Operator("{0} @ {part}", _projection, "nn.Buffer(normal({shape}, {seed}) / 3)"),
    "bmm": Operator("torch.bmm({0}, {part})", _batched_projection, "nn.Buffer(normal({shape}, {seed}) / 3)"),
}
