"""What came before networks: a linear classifier, k-NN, bags of visual words and Fisher vectors (row M1).

`BASELINES[name]().fit(images, labels)` gives a `Fitted`, whose scores the networks' own evaluation judges. Local
descriptors are scikit-image's DAISY (Tola et al. 2010), 17 histograms of 8 gradient directions around a point, where
the papers have SIFT's 16 of 8, on a dense grid at 3 scales. The same data and seed give the same result.
The defaults that no paper gives did best on held-out training images of the digits, MNIST and Fashion-MNIST.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from jaxcnn import parallel
from jaxcnn.data.loader import eval_batches
from jaxcnn.errors import InputError
from jaxcnn.train import evaluate, make_eval_step
from jaxcnn.types import Array

Encoder = Callable[[np.ndarray], np.ndarray]
"""Images (b, h, w, c) -> vectors (b, d)."""

SMALLEST = 8
"""Pixels of the shorter side from which on DAISY's three scales differ."""
EACH = 20
"""Descriptors taken of one image for a codebook, at least: an image costs the same for one as for all."""


class _Scores(nn.Module):
    """The network whose outputs are its inputs, for an evaluation step of scores that are there already."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return x


@dataclass(frozen=True)
class Fitted:
    """A trained baseline for images of one `shape` (h, w, c): a scikit-learn `classifier` of encoded images.

    `log_probabilities`: whether scores are log p(class | image), in nats; else only their order means something.
    """

    encode: Encoder
    classifier: Any
    shape: tuple[int, ...]
    num_classes: int
    log_probabilities: bool

    def scores(self, images: np.ndarray) -> np.ndarray:
        """(b, h, w, c) uint8 -> float32 (b, k); a class that was not in the training split has -inf.

        Raises:
            InputError: images of another shape or type than in training.
        """
        _check_images(images)
        if images.shape[1:] != self.shape:
            raise InputError(f"images {images.shape[1:]}: trained on {self.shape}, which they must have too")
        found = self._of(self.encode(images))
        if found.ndim == 1:  # of two classes, the margin of the second
            found = np.stack([-found, found], 1)
        scores = np.full((len(images), self.num_classes), -np.inf, np.float32)
        scores[:, self.classifier.classes_] = found
        return scores

    def evaluate(self, images: np.ndarray, labels: np.ndarray, *, batch_size: int = 1000) -> dict[str, float]:
        """`accuracy`, `top5`, `correct` and `count` of images (b, h, w, c) and labels (b,), as for networks.

        Also `loss`, the cross-entropy in nats, where scores are log-probabilities; infinite if a class is there that
        was not in the training split.

        Raises:
            InputError: images of another shape or type than in training; labels that do not fit.
        """
        _check_labels(images, labels)
        if labels.max() >= self.num_classes:
            raise InputError(f"label {labels.max()}: expected 0..{self.num_classes - 1}; give fit num_classes")
        batches = eval_batches(self.scores(images), labels, batch_size=batch_size, mesh=parallel.make_mesh())
        result = evaluate(make_eval_step(_Scores()), {}, batches())
        return result if self.log_probabilities else {name: n for name, n in result.items() if name != "loss"}

    def _of(self, vectors: np.ndarray) -> np.ndarray:
        if self.log_probabilities:
            return self.classifier.predict_log_proba(vectors)
        votes = hasattr(self.classifier, "predict_proba")
        return self.classifier.predict_proba(vectors) if votes else self.classifier.decision_function(vectors)


class Baseline(ABC):
    """What the four have in common: images become vectors, and a scikit-learn classifier learns those."""

    log_probabilities = False

    def fit(self, images: np.ndarray, labels: np.ndarray, *, num_classes: int | None = None) -> Fitted:
        """Learns from images (b, h, w, c) uint8 and labels (b,) in 0..k-1; `num_classes` k, or the largest label + 1.

        Raises:
            InputError: not such images or labels; fewer than 2 classes; sizes that so few images do not allow.
        """
        _check_images(images)
        _check_labels(images, labels)
        k = int(labels.max()) + 1 if num_classes is None else num_classes
        if labels.max() >= k:
            raise InputError(f"num_classes {k}: the labels go up to {labels.max()}, so at least {labels.max() + 1}")
        if len(np.unique(labels)) < 2:
            raise InputError(f"the training split has only class {labels[0]}: a classifier needs 2 or more")
        encode = self._encoder(images)
        classifier = self._classifier(len(images)).fit(encode(images), labels)
        return Fitted(encode, classifier, images.shape[1:], k, self.log_probabilities)

    @abstractmethod
    def _encoder(self, images: np.ndarray) -> Encoder: ...

    @abstractmethod
    def _classifier(self, examples: int) -> Any: ...


@dataclass(frozen=True)
class Linear(Baseline):
    """Multinomial logistic regression on the pixels in 0..1, by L-BFGS: the convex optimum, without chance.

    The objective is the sum of the examples' cross-entropies plus ||W||^2 / (2 `inverse_decay`).
    """

    inverse_decay: float = 0.1
    log_probabilities = True

    def _encoder(self, images: np.ndarray) -> Encoder:
        return _pixels

    def _classifier(self, examples: int) -> Any:
        from sklearn.linear_model import LogisticRegression

        _positive(inverse_decay=self.inverse_decay)
        return LogisticRegression(C=self.inverse_decay, max_iter=2000)


@dataclass(frozen=True)
class NearestNeighbours(Baseline):
    """The shares of the classes among the `neighbours` training images of least Euclidean distance in pixels."""

    neighbours: int = 3

    def _encoder(self, images: np.ndarray) -> Encoder:
        return _pixels

    def _classifier(self, examples: int) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        if not 1 <= self.neighbours <= examples:
            raise InputError(f"neighbours {self.neighbours}: expected from 1 to the {examples} training images")
        return KNeighborsClassifier(self.neighbours, algorithm="brute")


@dataclass(frozen=True, kw_only=True)
class LocalBaseline(Baseline):
    """Vectors of an image's local descriptors, and a linear SVM trained by SGD.

    `sampled` descriptors of training images make the codebook; `radii` and `step` are those of `descriptors`; `decay`
    is the SVM's weight of ||w||^2 / 2.
    """

    sampled: int = 20_000
    radii: tuple[int, ...] | None = None
    step: int = 2
    decay: float = 1e-4
    seed: int = 0

    def _encoder(self, images: np.ndarray) -> Encoder:
        from threadpoolctl import threadpool_limits

        _positive(sampled=self.sampled)
        sample = _sample(images, self._describe, self.sampled, self.seed)
        with threadpool_limits(1):  # several threads add up in the order in which they end
            return partial(_each, encode=self._codebook(sample))

    def _classifier(self, examples: int) -> Any:
        from sklearn.linear_model import SGDClassifier

        _positive(decay=self.decay)
        return SGDClassifier(loss="hinge", alpha=self.decay, average=True, random_state=self.seed)

    def _describe(self, image: np.ndarray) -> np.ndarray:
        return descriptors(image, radii=self.radii, step=self.step)

    @abstractmethod
    def _codebook(self, sample: np.ndarray) -> Encoder:
        """From descriptors (n, d), what makes a vector of one image."""


@dataclass(frozen=True, kw_only=True)
class BagOfWords(LocalBaseline):
    """Histograms of visual words, which are the centres of k-means (Csurka et al. 2004).

    The defaults fit images of 8 to 64 pixels; on photographs there were 1,000 `words` from a million SIFT descriptors.
    Shares of words enter as share^`power`, which evens them out; 1 is the original's plain histogram.
    """

    words: int = 200
    power: float = 0.5

    def _codebook(self, sample: np.ndarray) -> Encoder:
        from sklearn.cluster import KMeans

        _positive(words=self.words, power=self.power)
        _enough(self.words, "words", sample)
        centres = KMeans(self.words, random_state=self.seed).fit(sample)

        def encode(image: np.ndarray) -> np.ndarray:
            return histogram(np.asarray(centres.predict(self._describe(image))), self.words) ** self.power

        return encode


@dataclass(frozen=True, kw_only=True)
class FisherVectors(LocalBaseline):
    """`fisher` vectors under a mixture of Gaussians (Perronnin et al. 2010).

    The defaults fit images of 8 to 64 pixels; the paper has 256 `modes` and 64 `components` of a million SIFT
    descriptors. They are reduced by PCA, and whitened, since the Gaussians' covariances are diagonal.
    """

    modes: int = 16
    components: int = 32

    def _codebook(self, sample: np.ndarray) -> Encoder:
        from sklearn.decomposition import PCA

        _positive(modes=self.modes, components=self.components)
        _enough(self.modes, "modes", sample)
        rank = int(np.linalg.matrix_rank(sample - sample.mean(0)))
        reduced = PCA(min(self.components, rank), whiten=True, svd_solver="full").fit(sample)
        settings = {"covariance_type": "diag", "random_state": self.seed, "tol": 1e-2}
        mixture = _skimage().learn_gmm(reduced.transform(sample), n_modes=self.modes, gm_args=settings)
        return lambda image: fisher(reduced.transform(self._describe(image)), mixture)


BASELINES: dict[str, type[Baseline]] = {
    "linear": Linear,
    "knn": NearestNeighbours,
    "bag_of_words": BagOfWords,
    "fisher": FisherVectors,
}


def descriptors(image: np.ndarray, *, radii: tuple[int, ...] | None = None, step: int = 2) -> np.ndarray:
    """DAISY's of an image (h, w, c) uint8, on a grid of every `step`-th pixel at each scale: (n, 136), of length 1.

    A descriptor of radius r looks at a patch of 2 r + 1 pixels and its blurred surroundings; colours become
    luminance. `radii` None are 1/8, 1/4 and 3/8 of the shorter side, rounded down: 1, 2, 3 of 8 pixels, 3, 7, 10 of
    28, 4, 8, 12 of 32. Brightness and contrast do not matter; without any contrast all numbers are the same.

    Raises:
        InputError: channels that are neither 1 nor 3; a patch that does not fit; scikit-image is missing.
    """
    daisy = _skimage().daisy
    height, width, channels = image.shape
    if channels not in (1, 3):
        raise InputError(f"{channels} channels: local descriptors need grey (1) or RGB (3) images")
    side = min(height, width)
    if radii is None and side < SMALLEST:
        raise InputError(f"images {height} x {width}: three scales need at least {SMALLEST} pixels; give radii")
    radii = radii or (side // 8, side // 4, 3 * side // 8)
    if step < 1 or min(radii) < 1 or 2 * max(radii) >= side:
        raise InputError(
            f"radii {radii}, step {step}: expected at least 1, and patches of 2 r + 1 inside {side} pixels"
        )
    grey = image[..., 0] / 255 if channels == 1 else image @ np.array([0.2125, 0.7154, 0.0721]) / 255
    scales = (
        daisy(grey, step=step, radius=radius, rings=2, histograms=8, orientations=8, normalization="off")
        for radius in radii
    )
    found = np.concatenate([scale.reshape(-1, scale.shape[-1]) for scale in scales]) + 1e-10
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def histogram(words: np.ndarray, n: int) -> np.ndarray:
    """The share of each of `n` words among those of an image (m,): (n,), of sum 1."""
    return np.bincount(words, minlength=n) / len(words)


def fisher(vectors: np.ndarray, mixture: Any, *, power: float = 0.5) -> np.ndarray:
    """The Fisher vector of descriptors (m, d) under a `GaussianMixture` of k diagonal Gaussians: (2 k d,), of length 1.

    First the gradients of the mean log-likelihood by the means, then by the standard deviations, each divided by the
    root of its Fisher information (equations 6 and 7 of Perronnin et al. 2010), then sign(z) |z|^power and length 1.
    As in the paper, the mixture weights' gradient, which scikit-image gives too, is left out; scikit-image's
    sign of the second half, the opposite of the paper's, stays.
    """
    vector = _skimage().fisher_vector(vectors, mixture)[len(mixture.weights_) :]
    vector = np.sign(vector) * np.abs(vector) ** power
    return vector / max(np.linalg.norm(vector), np.finfo(np.float64).tiny)


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _each(images: np.ndarray, *, encode: Encoder) -> np.ndarray:
    return np.stack([encode(image) for image in images]).astype(np.float32)


def _sample(images: np.ndarray, describe: Encoder, size: int, seed: int) -> np.ndarray:
    """Up to `size` descriptors of images drawn at random, as evenly as `EACH` allows."""
    rng = np.random.default_rng(seed)
    each, left = max(EACH, -(-size // len(images))), size
    drawn = []
    for index in rng.permutation(len(images)):
        found = describe(images[index])
        drawn.append(rng.permutation(found)[: min(each, left)])
        left -= len(drawn[-1])
        if not left:
            break
    return np.concatenate(drawn)


def _enough(wanted: int, what: str, sample: np.ndarray) -> None:
    different = len(np.unique(sample, axis=0))
    if different < max(wanted, 2):
        raise InputError(
            f"{wanted} {what} from {different} different descriptors: give more or varied images, or fewer"
        )


def _skimage() -> Any:
    try:
        from skimage import feature
    except ImportError as error:
        raise InputError('local descriptors need scikit-image: pip install "jaxcnn[baselines]"') from error
    return feature


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name} {value}: expected more than 0")


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or 0 in images.shape or images.dtype != np.uint8:
        raise InputError(f"images {images.shape} {images.dtype}: expected (b, h, w, c), none of them 0, as uint8")


def _check_labels(images: np.ndarray, labels: np.ndarray) -> None:
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(f"labels {labels.shape} {labels.dtype}: expected ({len(images)},) integers from 0")
