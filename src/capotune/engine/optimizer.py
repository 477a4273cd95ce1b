"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from capotune.settings import TrainingSettings

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW:
    """AdamW of fp32 weights on one device, for which all weights of a learning rate are one tensor. A LoRA delta
    is many small tensors: one by one, clipping and updating 75 of them takes three times as long.

    Inside ``with`` the weights lie one after the other in the memory of those tensors, afterwards each in its own
    again. A weight without a gradient counts as one whose gradient is zero.
    """

    def __init__(self, weights: dict[str, nn.Parameter], rates: dict[str, float], decay: float) -> None:
        """``rates``: the peak learning rate of each weight."""
        groups: dict[float, dict[str, nn.Parameter]] = {}
        for key, weight in weights.items():
            groups.setdefault(rates[key], {})[key] = weight
        self._members = list(groups.values())
        flats = [nn.Parameter(_joined(members.values())) for members in self._members]
        self._adamw: Any = torch.optim.AdamW(
            [{"params": [flat], "lr": rate, "peak": rate} for rate, flat in zip(groups, flats, strict=True)],
            weight_decay=decay,
            fused=True,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """PyTorch's, one for each learning rate, in the order of the weights."""
        groups: list[dict[str, Any]] = self._adamw.param_groups
        return groups

    def __enter__(self) -> FlatAdamW:
        for flat, members in self._groups():
            with torch.no_grad():
                flat.copy_(_joined(members.values()))
            for weight, part in zip(members.values(), _parted(flat.detach(), members), strict=True):
                weight.data = part
        return self

    def __exit__(self, *_error: object) -> None:
        for members in self._members:
            for weight in members.values():
                weight.data = weight.data.clone()

    def step(self, max_norm: float, loss: torch.Tensor) -> torch.Tensor:
        """Clip the gradients at ``max_norm``, all together as ``nn.utils.clip_grad_norm_`` does, update the weights and
        forget the gradients.

        Where the ``loss`` or the gradients' norm is not finite, weights and moments stay as they are, to the bit.
        Returns whether they were updated, a boolean scalar on the device: a GPU is not waited for.
        """
        for flat, members in self._groups():
            flat.grad = _joined(torch.zeros_like(one) if one.grad is None else one.grad for one in members.values())
            for weight in members.values():
                weight.grad = None
        grads = [group["params"][0].grad for group in self.param_groups]
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()
        for grad in grads:
            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        is_finite: torch.Tensor = loss.isfinite() & norm.isfinite()
        self._adamw.found_inf = (~is_finite).float()  # as GradScaler tells a fused optimizer to leave a step out
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return is_finite

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """A copy of AdamW's state by weight, shaped like it; empty before the first step."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for flat, members in self._groups():
            state = self._adamw.state[flat]
            parts = {name: _parted(state[name], members) for name in _MOMENTS if state}
            for at, key in enumerate(members):
                found[key] = {name: part[at].clone() for name, part in parts.items()}
                found[key] |= {"step": state["step"].clone()} if state else {}
        return found

    def set_moments(self, moments: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from what ``moments`` gave, on whichever device it is now."""
        for flat, members in self._groups():
            if first := moments.get(next(iter(members))):
                joined = {name: _joined(moments[key][name] for key in members).to(flat.device) for name in _MOMENTS}
                self._adamw.state[flat] = {**joined, "step": first["step"].to(flat.device, copy=True)}

    def _groups(self) -> Iterator[tuple[nn.Parameter, dict[str, nn.Parameter]]]:
        for group, members in zip(self.param_groups, self._members, strict=True):
            yield group["params"][0], members


def _joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """(elements of all,), a new tensor."""
    return torch.cat([one.detach().flatten() for one in tensors])


def _parted(flat: torch.Tensor, like: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """Views of ``flat``, one after the other, shaped like the weights."""
    parts = torch.split(flat, [weight.numel() for weight in like.values()])
    return [part.view(weight.shape) for part, weight in zip(parts, like.values(), strict=True)]


def learning_rate_factor(step: int, total: int, settings: TrainingSettings) -> float:
    """Part of the peak learning rate at ``step`` (from 0) of ``total``: a linear rise, then the chosen fall."""
    rise = settings.warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    done = (step - rise) / max(1.0, total - rise)
    if settings.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0


def set_learning_rate(optimizer: FlatAdamW, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
