"""How much a network may be while it is built from a config that a stranger may have written."""

from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from waveflow.errors import ConfigError, WaveflowError
from waveflow.limits import MODEL_TENSORS, PARAMETERS

# Functions that take memory by a size alone.
_TAKES_MEMORY = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.eye,
    torch.arange,
    torch.linspace,
}
# Of those calls for each tensor; both models have one.
_CALLS = 4
# Constants and first values take memory beside the parameters: 1 % of it in both models.
_SHARE, _FREE = 8, 2**20


class Budget(TorchFunctionMode):
    """Stops the building of a network, on this thread, that becomes larger than it may.

    A config is a few numbers, and they can ask for any size. Sizes are compared before memory is
    taken; building on torch's meta device would tell the same and takes as long as building.

    Args:
        n_tensors, n_numbers: what the network's weights have.
        reason: why it may not be larger.
        error: class of the error.

    Example:
        >>> with Budget(2, 12, "its weights have 12 numbers", ConfigError):
        ...     layer = torch.nn.Linear(3, 3)
    """

    def __init__(
        self, n_tensors: int, n_numbers: int, reason: str, error: type[WaveflowError]
    ) -> None:
        super().__init__()
        self._n_calls = _CALLS * (n_tensors + 10)
        self._n_numbers = n_numbers + n_numbers // _SHARE + _FREE
        self._refusal = error(reason)

    @classmethod
    def of_table(cls) -> Self:
        """The budget of a config that comes without weights, such as a recipe."""
        reason = (
            f"the config asks for a model of more than {PARAMETERS.value:,} parameters or "
            f"{MODEL_TENSORS.value:,} tensors: set {PARAMETERS.name} or {MODEL_TENSORS.name} in "
            "the environment to raise the limits"
        )
        return cls(MODEL_TENSORS.value, PARAMETERS.value, reason, ConfigError)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Nothing else may fail here: no_grad, for one, restores the old state by such a call.
        if func in _TAKES_MEMORY:
            self._n_calls -= 1
            try:
                self._n_numbers -= func(*args, **(kwargs | {"device": "meta"})).numel()
            except (RuntimeError, TypeError, OverflowError) as error:  # beyond 64 bits
                raise self._refusal from error
            if self._n_calls < 0 or self._n_numbers < 0:
                raise self._refusal
        return func(*args, **kwargs)
