"""check_bijection: proves that a bijection keeps the contract of `base`."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from waveflow.bijections.base import Bijection, Condition
from waveflow.context import Context, context_of
from waveflow.errors import ConfigError, ContractError

# A Jacobian of more values than this takes minutes.
_MOST_VALUES = 1024
# Of the largest entry of a Jacobian: smaller ones are rounding, larger ones a dependence.
_NEGLIGIBLE = 1e-10


class BijectionReport(NamedTuple):
    """Measurements of `check_bijection`, all in float64.

    Attributes:
        round_trip: largest |inverse(forward(x)) - x|, over valid positions.
        log_det_error: largest difference between a log-determinant and that of the Jacobian.
        context, inverse_context: positions on each side that the results really depend on.
    """

    round_trip: float
    log_det_error: float
    context: Context
    inverse_context: Context


def check_bijection(
    bijection: Bijection, x: Tensor, cond: Condition | None = None, tolerance: float = 1e-6
) -> BijectionReport:
    """Checks a bijection on a small signal against autograd, in float64.

    It checks that `inverse` undoes `forward`; that both log-determinants are (B,), opposite, and
    equal to those of the Jacobian; that no item and no padding reaches another item; that
    nothing outside the declared context does; and that `inverse_after` goes on as `inverse` would.
    A bijection that declares no context is checked for all the rest; training refuses it.

    Args:
        bijection: it is copied, and stays as it is.
        x: (B, C, L), up to 1,024 values in an item; random values, not zeros.
        cond: at the resolution that the bijection needs, or None.
        tolerance: of the round trip (relative to the largest value of x) and of log-determinants
            (in nats).

    Raises:
        ContractError: the first promise that does not hold, with the numbers.
        ValueError: x is too large.

    Example:
        >>> check_bijection(Squeeze(2), torch.randn(3, 1, 8)).round_trip
        0.0
    """
    n_values = x[0].numel()
    if n_values > _MOST_VALUES:
        raise ValueError(f"an item of {n_values} values is too large: give {_MOST_VALUES} at most")
    twin = copy.deepcopy(bijection).double()
    x = x.detach().double()
    if cond is not None:
        mask = None if cond.mask is None else cond.mask.double()
        cond = Condition(cond.features.detach().double(), mask)
    twin(x, cond)  # starts layers that start from their first batch
    with torch.no_grad():
        z, log_det = twin(x, cond)
        back, inverse_log_det = twin.inverse(z, cond)
    name = type(bijection).__name__
    for direction, value in (("forward", log_det), ("inverse", inverse_log_det)):
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            words = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ContractError(f"{name}.{direction}: log_det is {words}, not ({len(x)},)")
    if z[0].numel() != n_values or back.shape != x.shape:
        shapes = " to ".join(str(tuple(t.shape)) for t in (x, z, back))
        raise ContractError(f"{name} is no bijection of these shapes: {shapes}")
    error, seen, inverse_seen = 0.0, Context(), Context()
    for item in range(len(x)):
        forward = _Dependence(name, lambda v, c: twin(v, c)[0], x, z, cond, item)
        inverse = _Dependence(name, lambda v, c: twin.inverse(v, c)[0], z, x, cond, item)
        expected = forward.log_abs_det()
        for direction, value, truth in (
            ("forward", log_det[item].item(), expected),
            ("inverse", inverse_log_det[item].item(), -expected),
        ):
            error = max(error, abs(value - truth))
            if not abs(value - truth) <= tolerance:
                raise ContractError(
                    f"{name}.{direction}: log_det is {value:.6g}, the Jacobian says {truth:.6g}"
                )
        seen = _wider(seen, forward.context(bijection.block, x.shape[2]))
        inverse_seen = _wider(inverse_seen, inverse.context(bijection.block, x.shape[2]))
    trip = (back - x)[_valid(x, cond)].abs().max().item()
    if not trip <= tolerance * max(1.0, x.abs().max().item()):
        raise ContractError(f"{name}: inverse(forward(x)) differs from x by {trip:.3g}")
    _check_padding(name, twin.forward, x, cond, z, log_det)
    _check_padding(name, twin.inverse, z, cond, back, inverse_log_det)
    for direction, found in (("context", seen), ("inverse_context", inverse_seen)):
        _check_declared(bijection, direction, found)
    _check_stream(name, twin, x, z, cond)
    return BijectionReport(trip, error, seen, inverse_seen)


class _Dependence:
    """The Jacobians of an item's valid results.

    Raises:
        ContractError: the result depends on another item, or on padding.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor, Condition | None], Tensor],
        values: Tensor,
        result: Tensor,
        cond: Condition | None,
        item: int,
    ) -> None:
        self.n_valid = _n_valid(result, cond, item)
        self.length = result.shape[2]
        inputs = {"x": (values, lambda v: function(v, cond))}
        if cond is not None and cond.features.shape[1]:
            mask = cond.mask
            inputs["the condition"] = (
                cond.features,
                lambda features: function(values, Condition(features, mask)),
            )
        self.jacobians = []
        for what, (given, of_given) in inputs.items():
            whole = torch.autograd.functional.jacobian(
                lambda v, of=of_given: of(v)[item, :, : self.n_valid],
                given,
                vectorize=True,
            ).clone()  # parts of it may share memory
            own = whole[:, :, item].clone()
            whole[:, :, item] = 0
            if whole.any():
                raise ContractError(f"{name}: an item depends on {what} of another item")
            n_own = _n_valid(given, cond, item)
            if own[..., n_own:].any():
                raise ContractError(f"{name}: valid positions depend on {what} in the padding")
            self.jacobians.append(own)

    def log_abs_det(self) -> float:
        """log|det| of the Jacobian by the values, over valid positions."""
        own = self.jacobians[0]
        n_own = own.shape[3] * self.n_valid // self.length
        matrix = own[..., :n_own].reshape(own.shape[0] * self.n_valid, -1)
        return torch.linalg.slogdet(matrix)[1].item()

    def context(self, block: int, x_length: int) -> Context:
        """Positions of x on each side, counted from the edges of whole blocks."""
        found = Context()
        for jacobian in self.jacobians:
            size = jacobian.abs().amax((0, 2))  # (positions of the result, of the input)
            if not size.numel() or not size.any():
                continue
            out_step = Fraction(x_length, self.length)
            in_step = Fraction(x_length, jacobian.shape[3])
            for position, row in enumerate(size > _NEGLIGIBLE * size.max()):
                reached = row.nonzero()[:, 0].tolist()
                if reached:
                    first = math.floor(position * out_step / block) * block
                    last = math.ceil((position + 1) * out_step / block) * block
                    left = math.ceil(first - reached[0] * in_step)
                    right = math.ceil((reached[-1] + 1) * in_step - last)
                    found = _wider(found, Context(max(left, 0), max(right, 0)))
        return found


@torch.no_grad()
def _check_padding(
    name: str,
    function: Callable[[Tensor, Condition], tuple[Tensor, Tensor]],
    given: Tensor,
    cond: Condition | None,
    result: Tensor,
    log_det: Tensor,
) -> None:
    """Raises ContractError if NaN in the padding changes a valid value or a log-determinant."""
    if cond is None or cond.mask is None:
        return
    features = cond.features.masked_fill(cond.mask == 0, math.nan)
    spoilt = given.masked_fill(~_valid(given, cond), math.nan)
    other, other_log_det = function(spoilt, Condition(features, cond.mask))
    valid = _valid(result, cond)
    if not torch.allclose(other[valid], result[valid]):
        raise ContractError(f"{name}: NaN in the padding changes a valid position")
    if not torch.allclose(other_log_det, log_det):
        raise ContractError(f"{name}: NaN in the padding changes a log-determinant")


def _check_declared(bijection: Bijection, attribute: str, found: Context) -> None:
    try:
        declared = context_of(bijection) if attribute == "context" else bijection.inverse_context
    except ConfigError as error:
        with suppress(ConfigError):
            if getattr(bijection, "context", None) is not None:
                raise ContractError(str(error)) from error
        return  # it declares none: training, windows and streams refuse it by name
    if found.left > declared[0] or found.right > declared[1]:
        raise ContractError(
            f"{type(bijection).__name__}: {attribute} is declared as {tuple(declared)}, but the "
            f"result depends on {tuple(found)} positions"
        )


@torch.no_grad()
def _check_stream(
    name: str, bijection: Bijection, x: Tensor, z: Tensor, cond: Condition | None
) -> None:
    """Raises ContractError if `inverse_after` makes something else than `inverse`."""
    try:
        left, _ = bijection.stream_context
    except ConfigError:
        return
    if left == bijection.inverse_context.left:
        return
    for n_past in range(1, x.shape[2]):
        first = max(0, n_past - int(left))
        window = cond
        if cond is not None:
            mask = None if cond.mask is None else cond.mask[:, :, first:]
            window = Condition(cond.features[:, :, first:], mask)
        made = bijection.inverse_after(x[:, :, first:n_past], z[:, :, first:], window)
        valid = _valid(x, cond)[:, :, first:]
        if made.shape != valid.shape or not torch.allclose(made[valid], x[:, :, first:][valid]):
            raise ContractError(f"{name}: inverse_after {n_past} positions is not the inverse")


def _wider(first: Context, second: Context) -> Context:
    return Context(max(first.left, second.left), max(first.right, second.right))


def _n_valid(signal: Tensor, cond: Condition | None, item: int) -> int:
    """Valid positions of an item, at the resolution of a signal."""
    if cond is None or cond.mask is None:
        return signal.shape[2]
    n_valid = int((cond.mask[item] != 0).sum())
    return n_valid * signal.shape[2] // cond.mask.shape[2]


def _valid(x: Tensor, cond: Condition | None) -> Tensor:
    """True at the valid positions of x."""
    valid = torch.zeros_like(x, dtype=torch.bool)
    for item in range(len(x)):
        valid[item, :, : _n_valid(x, cond, item)] = True
    return valid
