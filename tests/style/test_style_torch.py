"""The whole objective beside an independent PyTorch implementation: the first 20 steps of Adam, term by term."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import h5py  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from jaxcnn.style import optimizers  # noqa: E402
from jaxcnn.style.losses import moments  # noqa: E402
from jaxcnn.style.network import load  # noqa: E402
from jaxcnn.style.objective import Objective as OurObjective  # noqa: E402
from jaxcnn.style.objective import Targets  # noqa: E402
from jaxcnn.style.settings import Settings  # noqa: E402
from jaxcnn.style.transfer import Style, stylize  # noqa: E402

nn = torch.nn
CONVS = (2, 2, 4, 4, 4)
CONTENT, STYLE = "relu4_2", ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
STEPS = 20
BETA, GAMMA = 1e3, 0.01
"""alpha is 1."""


class Vgg19(nn.Module):
    """From table 1, column E, of the paper: it ends at relu5_1. `oxford`: trained on BGR in 0..255 less the mean."""

    def __init__(self, width, *, pooling="max", oxford=False):
        super().__init__()
        generator, channels = torch.Generator().manual_seed(width), 3
        self.convolutions = nn.ModuleDict()
        for stage, count in enumerate(CONVS, 1):
            for j in range(1, count + 1 if stage < 5 else 2):
                features = width * min(2 ** (stage - 1), 8)
                layer = self.convolutions[f"{stage}_{j}"] = nn.Conv2d(channels, features, 3, padding=1)
                with torch.no_grad():
                    layer.weight.normal_(0, (2 / (9 * channels)) ** 0.5, generator=generator)
                    layer.bias.normal_(0, 0.1, generator=generator)
                channels = features
        self.pool = (nn.MaxPool2d if pooling == "max" else nn.AvgPool2d)(2)
        self.oxford = oxford
        self.requires_grad_(False)

    def preprocessed(self, x):
        """RGB in 0..1, (1, 3, h, w)."""
        if self.oxford:
            return 255 * x.flip(1) - x.new_tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
        mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
        return (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)

    def forward(self, x):
        x, found, stage = self.preprocessed(x), {}, "1"
        for name, layer in self.convolutions.items():
            if name[0] != stage:
                x, stage = self.pool(x), name[0]
            x = found[f"relu{name}"] = layer(x).relu()
        return found

    def write(self, directory):
        """As torchvision names it in safetensors, or Keras in HDF5."""
        if self.oxford:
            with h5py.File(directory / "vgg19.h5", "w") as file:
                for name, layer in self.convolutions.items():
                    keras = f"block{name[0]}_conv{name[2]}"
                    file[f"{keras}/{keras}/kernel:0"] = layer.weight.numpy().transpose(2, 3, 1, 0)
                    file[f"{keras}/{keras}/bias:0"] = layer.bias.numpy()
            return directory / "vgg19.h5"
        index, stage, state = 0, "1", {}
        for name, layer in self.convolutions.items():
            index += name[0] != stage
            stage = name[0]
            state |= {f"features.{index}.weight": layer.weight, f"features.{index}.bias": layer.bias}
            index += 2
        save_file(state, directory / "vgg19.safetensors")
        return directory / "vgg19.safetensors"


def gram(features):
    """(n, n) of features (1, n, h, w), over the number of locations."""
    flat = features.flatten(2)[0]
    return flat @ flat.T / flat.shape[1]


def total_variation(x):
    down, across = x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]
    return (down**2).sum() + (across**2).sum()


def tensor(picture, dtype=torch.float32):
    return torch.tensor(picture.transpose(2, 0, 1)[None], dtype=dtype) / 255


class Objective:
    """Row S: alpha / 2 sum (F - P)^2 + beta / 4 sum_l w_l / N_l^2 sum (G_l - A_l)^2, and TV, blended over styles."""

    def __init__(self, network, content, styles):
        dtype = next(network.parameters()).dtype
        self.network, self.content = network, network(tensor(content, dtype))[CONTENT]
        shares = sum(share for share, _ in styles)
        found = [(share / shares, network(tensor(style, dtype))) for share, style in styles]
        self.styles = [(share, {name: gram(found[name]) for name in STYLE}) for share, found in found]

    def __call__(self, x):
        found = self.network(x)
        terms = {f"content/{CONTENT}": 0.5 * ((found[CONTENT] - self.content) ** 2).sum()}
        for name in STYLE:
            g, n = gram(found[name]), found[name].shape[1]
            distance = sum(share * ((g - grams[name]) ** 2).sum() for share, grams in self.styles)
            terms[f"style/{name}"] = BETA / 4 / len(STYLE) / n**2 * distance
        return terms | {"tv": GAMMA * total_variation(x)}


def adam(objective, x, rate):
    """The terms before the first update, and after each."""
    x = x.clone().requires_grad_(True)
    optimizer, lines = torch.optim.Adam([x], lr=rate), []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        terms = objective(x)
        total = sum(terms.values())
        total.backward()
        lines.append({name: float(value.detach()) for name, value in terms.items()} | {"total": float(total.detach())})
        optimizer.step()
    return lines


def picture(seed, size):
    """Waves and noise, never black or white: of equal neighbours, pooling may take either."""
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(0, 9, n) for n in size)
    waves = np.sin(y[:, None, None] * rng.uniform(0.5, 2, 3) + x[None, :, None] * rng.uniform(0.5, 2, 3))
    return np.uint8(127 + 80 * waves + rng.uniform(-40, 40, (*size, 3)))


def images(size, init):
    """Content, styles with their weights, and where to start."""
    content, styles = picture(0, size), [(1.0, picture(1, size[::-1])), (3.0, picture(2, size))]
    noise = np.random.default_rng(3).integers(256, size=(*size, 3), dtype=np.uint8)
    return content, styles, content if init == "content" else noise


def near(ours, theirs, close):
    """Every term by the total, at each step."""
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in other.items():
            assert abs(one[name] - value) <= close * other["total"], (step, name)


def compare(directory, *, width, size, init, pooling, oxford, rate):
    """Through the public functions, in float32."""
    content, styles, start = images(size, init)
    theirs = Vgg19(width, pooling=pooling, oxford=oxford)
    settings = Settings(
        size=max(size), steps=STEPS, optimizer="adam", learning_rate=rate, style_weight=BETA, tv_weight=GAMMA
    )
    found = stylize(
        content,
        [Style(picture, weight) for weight, picture in styles],
        network=load(theirs.write(directory), pooling=pooling),
        settings=settings,
        start=None if init == "content" else start,
    )
    assert [line["step"] for line in found.losses] == list(range(STEPS + 1))
    expected = adam(Objective(theirs, content, styles), tensor(start), rate)
    assert expected[-1]["total"] < expected[0]["total"]
    near(found.losses, expected, 1e-4)


@pytest.mark.parametrize(
    ("init", "pooling", "oxford", "rate"),
    [("content", "max", False, 0.005), ("noise", "avg", True, 0.02)],
    ids=["content, max, torchvision", "noise, avg, oxford"],
)
def test_the_first_20_steps_of_adam_are_those_of_pytorch(init, pooling, oxford, rate, tmp_path):
    compare(tmp_path, width=8, size=(48, 40), init=init, pooling=pooling, oxford=oxford, rate=rate)


@pytest.mark.slow
@pytest.mark.parametrize("oxford", [False, True], ids=["torchvision", "oxford"])
@pytest.mark.parametrize(("init", "pooling"), [("content", "max"), ("noise", "max"), ("noise", "avg")])
def test_the_first_20_steps_of_adam_at_full_width_are_those_of_pytorch(init, pooling, oxford, tmp_path):
    """By small steps: Adam's, whatever the size of the gradient, magnify rounding, PyTorch's as ours; see below."""
    compare(tmp_path, width=64, size=(64, 56), init=init, pooling=pooling, oxford=oxford, rate=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "pooling", "oxford"), [("content", "max", False), ("content", "avg", True), ("noise", "max", True)]
)
def test_in_float64_rounding_is_not_magnified_by_large_steps_either(init, pooling, oxford, tmp_path, float64):
    content, styles, start = images((64, 56), init)
    theirs = Vgg19(64, pooling=pooling, oxford=oxford)
    network = load(theirs.write(tmp_path), pooling=pooling)
    expected = adam(Objective(theirs.double(), content, styles), tensor(start, torch.float64), 0.02)

    network = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network)
    objective = OurObjective(((CONTENT, 1.0),), tuple((name, BETA / len(STYLE)) for name in STYLE), tv=GAMMA)
    features = jax.jit(lambda x: network.features(x, objective.layers))
    held = [features(array(each)) for _, each in styles]
    style = {
        name: jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), *(moments(each[name]) for each in held))
        for name in STYLE
    }
    targets = Targets({CONTENT: features(array(content))[CONTENT]}, style, jnp.array([[0.25, 0.75]]), None)
    optimizer = optimizers.make("adam", learning_rate=0.02)
    evaluate = jax.jit(lambda x: objective.value_and_grad(network, targets, x))
    state, found = optimizer.init(array(start)), []
    for _ in range(STEPS + 1):
        terms, grad = evaluate(state.point)
        state, _ = optimizer.tell(state, terms["total"], grad)
        found.append({name: float(value[0]) for name, value in terms.items()})
    near(found, expected, 1e-6)


def array(picture):
    return jnp.asarray(picture[None] / 255)


def test_adam_is_pytorch_s():
    """On the same gradients, over 20 steps."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 5, 6, 3)).astype(np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    optimizer, ours = torch.optim.Adam([theirs], lr=0.02), optimizers.make("adam", learning_rate=0.02)
    state = ours.init(jnp.asarray(x))
    for step in range(20):
        grad = (rng.normal(size=x.shape) * 10.0 ** (step % 7 - 3)).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        state, _ = ours.tell(state, jnp.ones(2), jnp.asarray(grad))
        np.testing.assert_allclose(state.point, theirs.detach().numpy(), rtol=1e-6, atol=2e-6)
