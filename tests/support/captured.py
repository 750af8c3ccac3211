"""The captured training step of cotolora/integrations/README.md, with the way of capturing as an argument."""

import torch
from torch import nn

from cotolora import CoTo, adapter_parameters, inject, set_backend

WIDTH, STEPS = 32, 12


def model_of(device, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(4))).to(device)
    for name, layer in inject(model, "all-linear", rank=4).items():
        nn.init.normal_(layer.lora_b, std=0.1 + 0.01 * int(name))
    return model


def batches(model):
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, WIDTH, generator=generator).to(weight) for _ in range(STEPS)]


def train_captured(model, capture):
    """Trains with device gates; `capture(f)` returns the result of f and a function that recomputes it in place."""
    parameters = list(adapter_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    coto = CoTo(model, STEPS, gates="device", seed=3)
    coto.attach(optimizer)
    every = batches(model)
    x = every[0].clone()

    def gradients():
        return torch.autograd.grad(model(x).float().square().mean(), parameters)

    grads, replay = capture(gradients)
    masks = []
    for batch in every:
        x.copy_(batch)
        replay()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        masks.append(tuple(coto.mask.tolist()))
        coto.step()
    return [p.detach().clone() for p in parameters], masks


def train_eagerly(model):
    """The same training in an eager loop with host gates."""
    parameters = list(adapter_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    coto = CoTo(model, STEPS, seed=3)
    coto.attach(optimizer)
    for batch in batches(model):
        model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        coto.step()
    return [p.detach().clone() for p in parameters]


def without_a_graph(compute):
    """Replaces a capture if there is no GPU. Calls f once as a warm-up, which fills the caches."""
    compute()
    results = compute()

    def again():
        for result, new in zip(results, compute(), strict=True):
            result.copy_(new)

    return results, again


def by_a_graph(compute, backend="auto:captured"):
    """Captures a CUDA graph with `backend`, after the warm-up that torch requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), set_backend(backend):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    return results, graph.replay
