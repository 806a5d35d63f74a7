"""MADE: a masked network whose parameters of a channel see only earlier channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from waveflow.context import Context
from waveflow.decoding import Steps
from waveflow.padding import zero_padding


class MADE(nn.Module):
    """A masked autoencoder over the C channels of a position (Germain et al. 2015).

    Input channel c has degree c, from 1 to C, and a hidden unit has a degree from 1 to C - 1. A
    unit sees units of the same degree or less, and the parameters of channel c see units of
    degrees less than c (equations 8 and 9). Features are seen by all units. Each position is
    mapped by itself.

    Args:
        channels: C.
        cond_channels: M, channels of the features; 0 for none.
        hidden_channels: units of each of the two hidden layers.
        n_params: parameters for each channel.
    """

    context = Context()
    mask_in: Tensor
    mask_hidden: Tensor
    mask_out: Tensor

    def __init__(
        self, channels: int, cond_channels: int, hidden_channels: int, n_params: int
    ) -> None:
        super().__init__()
        self.n_params = n_params
        inputs = torch.arange(1, channels + 1)
        # In ascending order: `steps` computes the units of a degree at once.
        hidden = torch.arange(hidden_channels) * max(channels - 1, 1) // hidden_channels + 1
        outputs = inputs.repeat(n_params)
        masks = {
            "mask_in": hidden[:, None] >= inputs,
            "mask_hidden": hidden[:, None] >= hidden,
            "mask_out": outputs[:, None] > hidden,
        }
        for name, mask in masks.items():
            self.register_buffer(name, mask.float(), persistent=False)
        self.enter = nn.Linear(channels, hidden_channels)
        self.middle = nn.Linear(hidden_channels, hidden_channels)
        self.leave = nn.Linear(hidden_channels, n_params * channels)
        n_added = 2 * hidden_channels + n_params * channels
        self.condition = nn.Linear(cond_channels, n_added) if cond_channels else None
        # A new flow is the identity.
        for layer in (self.leave, self.condition):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        # Where the units of each degree begin: degree d has [edges[d - 1], edges[d]). Units
        # from edges[d - 1] on see channel d and the units of degree d.
        self._edges = [int((hidden < degree).sum()) for degree in range(1, channels + 1)]

    def forward(
        self, x: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, C, L), features (B, M, L) and mask (B, 1, L) to (B, n_params C, L)."""
        first, second, last = self._conditions(x, features, mask)
        h = self._masked(self.enter, self.mask_in, x.transpose(1, 2), first).relu()
        h = self._masked(self.middle, self.mask_hidden, h, second).relu()
        return self._masked(self.leave, self.mask_out, h, last).transpose(1, 2)

    def steps(self, like: Tensor, features: Tensor | None, mask: Tensor | None) -> Steps:
        """Channel by channel: a unit that is known adds its part to all units that see it."""
        first, second, last = self._conditions(like, features, mask)
        # Sums of the units that are not known yet, (B, L, units); of the parameters by channel.
        h1, h2 = first + self.enter.bias, second + self.middle.bias
        params = (last + self.leave.bias).unflatten(2, (self.n_params, -1))
        into_params = self.leave.weight.unflatten(0, (self.n_params, -1))
        done = 0

        def params_of_next(element: Tensor | None) -> Tensor:
            nonlocal h1, h2, params, done
            if element is not None:
                start, stop = self._edges[done : done + 2]
                n_units = stop - start
                h1 = h1 + F.linear(element.transpose(1, 2), self.enter.weight[start:, done, None])
                known, h1 = h1[..., :n_units].relu(), h1[..., n_units:]
                h2 = h2 + F.linear(known, self.middle.weight[start:, start:stop])
                known, h2 = h2[..., :n_units].relu(), h2[..., n_units:]
                done += 1
                weight = into_params[:, done:, start:stop]
                params = params[..., 1:] + F.linear(known, weight.flatten(0, 1)).unflatten(
                    2, weight.shape[:2]
                )
            return params[..., 0].transpose(1, 2)

        return params_of_next

    def _conditions(
        self, x: Tensor, features: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the condition adds to each of the three layers, (B, L, units)."""
        sizes = [layer.out_features for layer in (self.enter, self.middle, self.leave)]
        if self.condition is None or features is None:
            return tuple(x.new_zeros(()).expand(x.shape[0], x.shape[2], n) for n in sizes)
        return self.condition(zero_padding(features, mask).transpose(1, 2)).split(sizes, 2)

    def _masked(self, layer: nn.Linear, mask: Tensor, x: Tensor, added: Tensor) -> Tensor:
        return F.linear(x, layer.weight * mask, layer.bias) + added
