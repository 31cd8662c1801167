"""Ten steps of training are the ten steps that an independent PyTorch implementation takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn import models, optim, parallel
from jaxcnn.train import create_state, make_train_step
from jaxcnn.tree import flatten

torch = pytest.importorskip("torch")
F = torch.nn.functional

STEPS, BATCH, RATE, DECAY = 10, 16, 0.05, 5e-3


class TorchLeNet5(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = torch.nn.Conv2d(1, 6, 5, padding=2)
        self.c3 = torch.nn.Conv2d(6, 16, 5)
        self.c5 = torch.nn.Linear(400, 120)
        self.f6 = torch.nn.Linear(120, 84)
        self.output = torch.nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c3(x)), 2).flatten(1)
        return self.output(F.relu(self.f6(F.relu(self.c5(x)))))


class TorchBlock(torch.nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        below = self.new // 2
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, below, self.new - below))
        return F.relu(y + x)


class TorchCifarResNet(torch.nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        channels = width
        for i in range(3):
            stage = torch.nn.Sequential()
            for j in range((depth - 2) // 6):
                stage.add_module(f"block{j + 1}", TorchBlock(channels, width * 2**i, 2 if i and not j else 1))
                channels = width * 2**i
            self.add_module(f"stage{i + 1}", stage)
        self.fc = torch.nn.Linear(channels, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


class Case(NamedTuple):
    module: Any
    reference: Any
    shape: tuple[int, int, int]


CASES = {
    "lenet5": lambda: Case(models.create("lenet5"), TorchLeNet5(), (28, 28, 1)),
    "resnet8": lambda: Case(models.create("cifar_resnet20", depth=8, width=4), TorchCifarResNet(8, 4), (8, 8, 3)),
}


def torch_parameter(path, value):
    """Our parameter under PyTorch's name and in its layout."""
    name = path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
    if value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)
    elif path == "c5/kernel":  # reads 5x5x16 maps: h w c here, c h w there
        value = value.reshape(5, 5, 16, 120).transpose(3, 2, 0, 1).reshape(120, 400)
    elif value.ndim == 2:
        value = value.T
    return name, torch.tensor(np.ascontiguousarray(value))


def batches(shape):
    rng = np.random.default_rng(1)
    return [
        {"image": rng.normal(0.2, 1, (BATCH, *shape)), "label": rng.integers(0, 10, BATCH).astype(np.int32)}
        for _ in range(STEPS)
    ]


def variables_of(case):
    """Random float64 values throughout: biases of 0 and scales of 1 would hide where they are applied."""
    image = jax.ShapeDtypeStruct((1, *case.shape), jnp.float64)
    shapes = jax.eval_shape(lambda x: case.module.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(2)

    def value(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        return rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.1, leaf.shape)

    statistics = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key == "var")), shapes.get("batch_stats", {})
    )
    params = jax.tree_util.tree_map_with_path(value, shapes["params"])
    return {"params": params} | ({"batch_stats": statistics} if statistics else {})


def our_run(case, mask, variables):
    """Loss of every step, and the state at the end."""
    optimizer = optim.make_optimizer(
        "sgd",
        schedule=optim.make_schedule("cosine", learning_rate=RATE, steps=STEPS),
        weight_decay=DECAY,
        decay_mask=mask,
        momentum=0.9,
    )
    mesh = parallel.make_mesh(jax.devices()[:1])
    sample = jax.ShapeDtypeStruct((1, *case.shape), jnp.float64)
    state = create_state(case.module, optimizer=optimizer, sample=sample, mesh=mesh, variables=variables)
    step = make_train_step(case.module, optimizer=optimizer, mesh=mesh)
    losses = []
    for batch in batches(case.shape):
        state, totals = step(state, batch, np.uint32(0))
        losses.append(float(totals["loss"].sum) / BATCH)
    return losses, jax.device_get(state)


def torch_run(case, mask, params):
    """Loss of every step, and how many values per channel each BatchNorm has seen in one step."""
    net = case.reference.double()
    named = dict(torch_parameter(path, value) for path, value in flatten(params).items())
    parameters = dict(net.named_parameters())
    assert parameters.keys() == named.keys()
    net.load_state_dict({**net.state_dict(), **named})
    plain = [p for name, p in parameters.items() if mask == "kernel$" and p.ndim == 1]
    decayed = [p for p in parameters.values() if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
    seen = {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.numel() // y.shape[1]}))
    losses = []
    for i, batch in enumerate(batches(case.shape)):
        for group in sgd.param_groups:
            group["lr"] = RATE * (1 + np.cos(np.pi * i / STEPS)) / 2
        images = torch.tensor(batch["image"].transpose(0, 3, 1, 2).copy())
        loss = F.cross_entropy(net(images), torch.tensor(batch["label"]).long())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, seen


@pytest.mark.parametrize(("name", "mask"), [("lenet5", "."), ("resnet8", "kernel$")])
def test_ten_steps_of_sgd_follow_torch_in_float64(name, mask, float64):
    case = CASES[name]()
    variables = variables_of(case)
    ours, state = our_run(case, mask, variables)
    theirs, seen = torch_run(case, mask, variables["params"])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)
    final = case.reference.state_dict()
    for path, value in flatten(state.params).items():
        assert value.dtype == np.float64, path
        torch_name, value = torch_parameter(path, value)
        np.testing.assert_allclose(value, final[torch_name], rtol=0, atol=1e-8, err_msg=path)

    statistics = flatten(state.collections.get("batch_stats", {}))
    assert len(statistics) == 2 * len(seen)
    for path, value in statistics.items():
        layer, kind = path.replace("/", ".").rsplit(".", 1)
        expected = final[f"{layer}.running_{kind}"].numpy()
        if kind == "var":  # 0.9^t of the initial 1, and batch variances that PyTorch divides by n - 1 rather than n
            initial, n = 0.9**STEPS, seen[layer]
            expected = initial + (expected - initial) * (n - 1) / n
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-8, err_msg=path)
