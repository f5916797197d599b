"""The same work by PyTorch: fused Adam and `clip_grad_norm_`, on the CPU's cores or on CUDA."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax_contenders import CLIP, MULTIPLIER, NOISE, RATE
from workers import Contender

if TYPE_CHECKING:  # PyTorch need not be installed
    import torch

__all__ = ["torch_call", "torch_histogram", "torch_noise", "torch_step"]


def torch_step(shapes: Sequence[tuple[int, ...]], noise: str | None) -> Contender:
    """The full step; `noise` is "normal", "truncated" or None."""
    torch, device, note = _torch()
    generator = np.random.default_rng(0)
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for param, shape in zip(params, shapes, strict=True):
        param.grad = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(device)
    update = _update(torch, params, noise)

    def step() -> None:
        update()
        _synchronize(torch, device)

    return Contender(step, note=note)


def torch_call(calls: int) -> Contender:
    """Steps of a small network, one after the other."""
    torch, device, note = _torch()
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)
    update = _update(torch, list(network.parameters()), "normal")
    batch = torch.ones(8, 4, device=device)

    def step() -> None:
        for _ in range(calls):
            network.zero_grad()
            network(batch).square().mean().backward()
            update()
        _synchronize(torch, device)

    return Contender(step, repeats=calls, note=note)


def torch_histogram(shape: tuple[int, ...], buckets: int) -> Contender:
    """Evenly spaced buckets, the only ones that PyTorch has on every device."""
    torch, device, note = _torch()
    values = torch.randn(shape, device=device)

    def step() -> None:
        torch.histc(values, bins=buckets)
        _synchronize(torch, device)

    return Contender(step, note=note)


def torch_noise(shapes: Sequence[tuple[int, ...]], noise: str) -> Contender:
    """Noise added in place, in seconds a number."""
    torch, device, note = _torch()
    gradients = [torch.zeros(shape, device=device) for shape in shapes]

    def step() -> None:
        _add_noise(torch, gradients, noise)
        _synchronize(torch, device)

    return Contender(step, repeats=sum(gradient.numel() for gradient in gradients), note=note)


def _torch() -> tuple[Any, str, str]:
    """PyTorch with every core at work, its device and a word on both."""
    import torch

    if torch.cuda.is_available():
        return torch, "cuda", f"on {torch.cuda.get_device_name()}"
    torch.set_num_threads(os.cpu_count() or 1)
    return torch, "cpu", f"on {torch.get_num_threads()} threads"


def _update(torch: Any, params: "list[torch.nn.Parameter]", noise: str | None) -> Callable[[], None]:
    """Noise, multipliers on a third, clip and Adam, of parameters that have gradients."""
    optimizer = torch.optim.Adam(params, lr=RATE, fused=True)

    def update() -> None:
        gradients = [param.grad for param in params]
        if noise is not None:
            _add_noise(torch, gradients, noise)
        torch._foreach_mul_(gradients[::3], MULTIPLIER)
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    return update


def _add_noise(torch: Any, gradients: "Sequence[torch.Tensor | None]", noise: str) -> None:
    for gradient in gradients:
        if noise == "truncated":
            draw = torch.nn.init.trunc_normal_(torch.empty_like(gradient), a=-2.0, b=2.0)
        else:
            draw = torch.randn_like(gradient)
        gradient.add_(draw, alpha=NOISE)  # type: ignore[union-attr]


def _synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
