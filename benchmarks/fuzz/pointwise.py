"""Operators that work on each element: activations, arithmetic, comparisons, choices, casts."""

from handheld.benchmarks.fuzz.draw import Draw, Drawn, Operator


def _one(d: Draw) -> Drawn:
    return [d.value()], {}


def _two(d: Draw) -> Drawn:
    left = d.value()
    operands = [left, d.broadcast(left)]
    return (operands if d.chance() else operands[::-1]), {}


def _scaled(d: Draw) -> Drawn:
    return _two(d)[0], {"alpha": d.choice((2, 0.5, -1.5))}


def _scalar(d: Draw) -> Drawn:
    return [d.value()], {"scalar": d.choice((2, 0.5, -1.5, d.number()))}


def _slope(d: Draw) -> Drawn:
    return [d.value()], {"slope": d.number(0.05, 0.4)}


def _bounds(d: Draw) -> Drawn:
    return [d.value()], {"low": d.choice((None, -d.number(0.2, 1.5))), "high": d.number(0.2, 1.5)}


def _exponent(d: Draw) -> Drawn:
    return [d.value()], {"exponent": d.choice((2, 3, 2.0))}


def _positive_exponent(d: Draw) -> Drawn:
    return [d.value()], {"exponent": d.choice((0.5, -1, -0.5, 1.5))}


def _softplus(d: Draw) -> Drawn:
    return [d.value()], {"beta": d.choice((1, 2, 0.5)), "threshold": d.choice((20, 3))}


def _threshold(d: Draw) -> Drawn:
    return [d.value()], {"scalar": d.choice((0, 0.25, -0.5))}


def _choice(d: Draw) -> Drawn:
    condition = d.value("bool")
    left = d.broadcast(condition)
    return [condition, left, d.broadcast(left)], {}


def _masked(d: Draw) -> Drawn:
    x = d.value()
    return [x, d.broadcast(x, "bool")], {"scalar": d.choice((0, -2.5))}


def _bools(d: Draw) -> Drawn:
    left = d.value("bool")
    return [left, d.broadcast(left, "bool")], {}


def _bool(d: Draw) -> Drawn:
    return [d.value("bool")], {}


def _ints(d: Draw) -> Drawn:
    left = d.value("int")
    return [left, d.broadcast(left, "int")], {}


def _int(d: Draw) -> Drawn:
    return [d.value("int")], {"scalar": d.choice((1, 2, 3))}


def _interpolated(d: Draw) -> Drawn:
    return _two(d)[0], {"weight": d.number(0.1, 0.9)}


FUNCTIONS = {
    **{f: f"F.{f}({{0}})" for f in ("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "mish", "selu")},
    **{f: f"torch.{f}({{0}})" for f in ("sigmoid", "tanh", "erf", "abs", "sin", "cos", "neg", "square", "atan")},
    "gelu_tanh": "F.gelu({0}, approximate='tanh')",
    "logsigmoid": "F.logsigmoid({0})",
    "softsign": "F.softsign({0})",
    "hardtanh": "F.hardtanh({0})",
    "exp": "torch.exp({0}.clamp(max=2))",
    "expm1": "torch.expm1({0}.clamp(max=2))",
    "log": "torch.log({0}.abs() + 0.5)",
    "log1p": "torch.log1p({0}.abs())",
    "log2": "torch.log2({0}.abs() + 0.5)",
    "sqrt": "torch.sqrt({0}.abs() + 0.1)",
    "rsqrt": "torch.rsqrt({0}.abs() + 0.5)",
    "reciprocal": "torch.reciprocal({0}.abs() + 0.5)",
    "sign": "torch.sign({0})",
    "floor": "torch.floor({0})",
    "ceil": "torch.ceil({0})",
    "round": "torch.round({0})",
    "to_int": "({0} * 3).to(torch.int32)",
    "to_long": "({0} * 3).to(torch.int64)",
}
"""Functions of one float tensor, kept away from where they are not defined or too steep."""

TABLE = {
    **{name: Operator(call, _one) for name, call in FUNCTIONS.items()},
    "leaky_relu": Operator("F.leaky_relu({0}, {slope})", _slope),
    "elu": Operator("F.elu({0}, {slope})", _slope),
    "celu": Operator("F.celu({0}, {slope} + 0.5)", _slope),
    "hardshrink": Operator("F.hardshrink({0}, {slope})", _slope),
    "softshrink": Operator("F.softshrink({0}, {slope})", _slope),
    "softplus": Operator("F.softplus({0}, {beta}, {threshold})", _softplus),
    "clamp": Operator("torch.clamp({0}, {low}, {high})", _bounds),
    "clamp_min": Operator("torch.clamp({0}, min={scalar})", _scalar),
    "threshold": Operator("F.threshold({0}, {scalar}, 0.75)", _threshold),
    "pow": Operator("torch.pow({0}, {exponent})", _exponent),
    "pow_positive": Operator("torch.pow({0}.abs() + 0.5, {exponent})", _positive_exponent),
    "pow_of_scalar": Operator("torch.pow(2, {0}.clamp(max=2))", _one),
    "pow_of_tensors": Operator("torch.pow({0}.abs() + 0.5, {1}.clamp(-2, 2))", _two),
    "add": Operator("{0} + {1}", _two),
    "add_alpha": Operator("torch.add({0}, {1}, alpha={alpha})", _scaled),
    "sub": Operator("{0} - {1}", _two),
    "sub_alpha": Operator("torch.sub({0}, {1}, alpha={alpha})", _scaled),
    "mul": Operator("{0} * {1}", _two),
    "div": Operator("{0} / ({1}.abs() + 0.5)", _two),
    "div_floor": Operator("torch.div({0}, {1}.abs() + 0.5, rounding_mode='floor')", _two),
    "atan2": Operator("torch.atan2({0}, {1}.abs() + 0.5)", _two),
    "maximum": Operator("torch.maximum({0}, {1})", _two),
    "minimum": Operator("torch.minimum({0}, {1})", _two),
    "lerp": Operator("torch.lerp({0}, {1}, {weight})", _interpolated),
    "addcmul": Operator("torch.addcmul({0}, {0}, {1}, value={weight})", _interpolated),
    "add_scalar": Operator("{0} + {scalar}", _scalar),
    "mul_scalar": Operator("{0} * {scalar}", _scalar),
    "scalar_minus": Operator("{scalar} - {0}", _scalar),
    "div_scalar": Operator("{0} / {scalar}", _scalar),
    "scalar_over": Operator("{scalar} / ({0}.abs() + 0.5)", _scalar),
    "remainder_scalar": Operator("torch.remainder({0}, {scalar})", _scalar),
    "greater": Operator("{0} > {1}", _two),
    "less_equal": Operator("{0} <= {1}", _two),
    "greater_scalar": Operator("{0} > {scalar}", _threshold),
    "less_scalar": Operator("{0} < {scalar}", _threshold),
    "to_bool": Operator("torch.floor({0}).bool()", _one),
    "where": Operator("torch.where({0}, {1}, {2})", _choice),
    "masked_fill": Operator("{0}.masked_fill({1}, {scalar})", _masked),
    "mask": Operator("{0} * {1}", lambda d: (_masked(d)[0], {})),
    "and": Operator("{0} & {1}", _bools),
    "or": Operator("{0} | {1}", _bools),
    "xor": Operator("torch.logical_xor({0}, {1})", _bools),
    "not": Operator("~{0}", _bool),
    "bool_to_float": Operator("{0}.float()", _bool),
    "bool_to_int": Operator("{0}.to(torch.int64)", _bool),
    "int_to_float": Operator("{0}.float() / {scalar}", _int),
    "int_add": Operator("{0} + {1}", _ints),
    "int_mul": Operator("{0} * {scalar} - 1", _int),
    "int_floor_div": Operator("{0} // {scalar}", _int),
    "int_remainder": Operator("{0} % {scalar}", _int),
    "int_clamp": Operator("{0}.clamp(-{scalar}, {scalar})", _int),
    "int_abs": Operator("{0}.abs()", lambda d: ([d.value("int")], {})),
    "int_equal": Operator("{0} == {scalar}", _int),
    "int_less": Operator("{0} < {1}", _ints),
}
