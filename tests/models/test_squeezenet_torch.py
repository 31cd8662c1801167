"""SqueezeNet against a PyTorch module written from the paper and torchvision's account, at a sixteenth of its width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn.models import create

torch = pytest.importorskip("torch")
nn = torch.nn


class Fire(nn.Module):
    def __init__(self, channels, squeeze):
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, 4 * squeeze, 1)
        self.expand3x3 = nn.Conv2d(squeeze, 4 * squeeze, 3, padding=1)

    def forward(self, x):
        x = self.squeeze1x1(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(nn.Module):
    """Version 1.0 has a 7x7 conv1 of 6 maps, 1.1 a 3x3 one of 4; fire2 squeezes to 1."""

    def __init__(self, version, classes):
        super().__init__()
        width, kernel, self.pools = {"1.0": (6, 7, (1, 4, 8)), "1.1": (4, 3, (1, 3, 5))}[version]
        self.conv1 = nn.Conv2d(3, width, kernel, stride=2)
        for i, squeeze in enumerate((1, 1, 2, 2, 3, 3, 4, 4), 2):
            setattr(self, f"fire{i}", Fire(width, squeeze))
            width = 8 * squeeze
        self.conv10 = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        x = self.conv1(x).relu()
        for i in range(1, 10):
            x = getattr(self, f"fire{i}")(x) if i > 1 else x
            if i in self.pools:
                x = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
        return self.conv10(x).relu().mean((2, 3))


def flax_params(module):
    params = {}
    for name, value in module.state_dict().items():
        *path, leaf = name.split(".")
        at = params
        for part in path:
            at = at.setdefault(part, {})
        value = value.numpy()
        at["kernel" if leaf == "weight" else "bias"] = value.transpose(2, 3, 1, 0) if leaf == "weight" else value
    return params


@pytest.mark.parametrize(("version", "size"), [("1.0", (53, 80)), ("1.1", (65, 63)), ("1.1", (38, 40))])
def test_logits(version, size):
    torch.manual_seed(0)
    theirs = SqueezeNet(version, 5)
    ours = create(f"squeezenet{version.replace('.', '_')}", width=theirs.conv1.out_channels, num_classes=5)
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    logits = jax.jit(lambda p, x: ours.apply({"params": p}, x, train=False))(flax_params(theirs), jnp.asarray(x))
    assert expected.max() > 0
    np.testing.assert_allclose(logits, expected, atol=1e-5)
