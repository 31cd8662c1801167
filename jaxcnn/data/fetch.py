"""The original files of the data sets, pinned by size and SHA-256."""

from dataclasses import dataclass
from pathlib import Path

from jaxcnn.download import Progress, Remote, download
from jaxcnn.errors import unknown


@dataclass(frozen=True)
class Original:
    """The files of a data set as its authors publish them."""

    files: tuple[Remote, ...]
    licence: str
    citation: str


def _mnist_files(base: str, pins: dict[str, tuple[int, str]]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{base}/{name}-ubyte.gz", size, sha256) for name, (size, sha256) in pins.items())


FILES: dict[str, Original] = {
    "mnist": Original(
        files=_mnist_files(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            {
                "train-images-idx3": (
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "train-labels-idx1": (
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "t10k-images-idx3": (
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "t10k-labels-idx1": (
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            },
        ),
        licence="CC BY-SA 3.0",
        citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document "
        "recognition. Proceedings of the IEEE 86(11), 1998.",
    ),
    "fashion_mnist": Original(
        files=_mnist_files(
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
            {
                "train-images-idx3": (
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "train-labels-idx1": (
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "t10k-images-idx3": (
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "t10k-labels-idx1": (
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            },
        ),
        licence="MIT",
        citation="H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking "
        "machine learning algorithms. arXiv:1708.07747, 2017.",
    ),
    "cifar10": Original(
        files=(
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        licence="none stated by its authors",
        citation="A. Krizhevsky. Learning multiple layers of features from tiny images. Technical report, "
        "University of Toronto, 2009.",
    ),
    "cifar100": Original(
        files=(
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                168_513_733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        licence="none stated by its authors",
        citation="A. Krizhevsky. Learning multiple layers of features from tiny images. Technical report, "
        "University of Toronto, 2009.",
    ),
}


def fetch(name: str, data_dir: Path | str, *, progress: Progress | None = None) -> list[Path]:
    """Download the originals of `name`, one of `FILES`, to `data_dir/name`; return their paths.

    A file that is there with the pinned digest is not fetched again. Bytes arrive in `FILE.partial`,
    which takes its final name only when size and digest are right; an interrupted download goes on
    from there at the next call.

    Raises:
      InputError: unknown name; a file of another digest already there (it is left alone); no
        connection, or one that broke off (the partial file stays); a download of the wrong size or
        digest, or a redirect away from https (nothing stays).
    """
    if name not in FILES:
        raise unknown("data set to fetch", name, FILES)
    folder = Path(data_dir) / name
    return [download(remote, folder / remote.name, progress=progress) for remote in FILES[name].files]
