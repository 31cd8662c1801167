"""What is done with a network's maps on the host: prediction by overlapping tiles, and the Rand error of its cells."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jaxcnn.data.segmentation import components, tiles
from jaxcnn.errors import InputError
from jaxcnn.types import ArrayLike


def predict_tiles(
    apply: Callable[[np.ndarray], ArrayLike], image: np.ndarray, *, tile: int, context: int
) -> NDArray[np.float32]:
    """The map (h, w, k) of an image (h, w, c) of any size, put together from tiles (Ronneberger et al. 2015, figure 2).

    `apply` takes (b, tile + 2 context, tile + 2 context, c), a row of tiles with the image around them, mirrored
    beyond its border, and returns (b, h', w', k), of which the middle tile x tile is used. No seam remains, and the
    result is that of the whole mirrored image at once, where `context` covers what a U-Net without padding takes away
    (half of 12 2^depth - 8, or more), and `tile` is a multiple of 2^depth, so that its pooling windows lie the same.
    With zero padding the same holds once `context` is a multiple of 2^depth that reaches as far.

    Raises InputError for an image of another rank, or maps smaller than the tile or not centred on it.
    """
    if image.ndim != 3:
        raise InputError(f"image {image.shape}: expected one image (h, w, c)")
    h, w = image.shape[:2]
    pieces = tiles(image[None], tile=tile, context=context)
    rows, columns = -(-h // tile), -(-w // tile)
    maps = []
    for row in pieces.reshape(rows, columns, *pieces.shape[1:]):
        output = np.asarray(apply(row), np.float32)
        margins = [size - tile for size in output.shape[1:3]]
        if any(m < 0 or m % 2 for m in margins):
            raise InputError(
                f"maps of {output.shape[1:3]} from tiles of {tile} with a context of {context}: they must be of the "
                "tile's size or larger by an even number of pixels; change the context"
            )
        top, left = (m // 2 for m in margins)
        maps.append(output[:, top : top + tile, left : left + tile])
    whole = np.stack(maps).swapaxes(1, 2)  # rows, tile, columns, tile, k
    return whole.reshape(rows * tile, columns * tile, -1)[:h, :w]


def rand_error(predicted: np.ndarray, truth: np.ndarray) -> float:
    """1 - the foreground-restricted Rand F-score of two divisions into cells, from 0 (equal) to 1.

    That of the ISBI 2012 challenge (Arganda-Carreras et al. 2015, section 2.4), at one threshold, without thinning.
    `predicted` and `truth` (h, w): true or above 0 on cells, whose 4-connected components are the segments. Pixels that
    are membrane in truth are left out; a pixel predicted membrane is a segment of its own. Over the ordered pairs
    (i, j) of the n pixels that remain, i = j among them: with S the pairs in one segment of the prediction, T in one of
    truth, the error is 1 - 2 |S and T| / (|S| + |T|), precision |S and T| / |S| and recall |S and T| / |T|.

    Raises InputError unless both are (h, w) of one shape with a cell in truth.
    """
    if predicted.shape != truth.shape or truth.ndim != 2 or not (truth > 0).any():
        raise InputError(
            f"prediction {predicted.shape} and truth {truth.shape}: expected (h, w) twice, and a cell in truth"
        )
    true, found = (components(x)[truth > 0].astype(np.int64) for x in (truth, predicted))
    alone = np.count_nonzero(found == 0)  # each is one pair, with itself, in S, T and both
    inside = found > 0

    def pairs(segments: np.ndarray) -> int:
        return int((np.unique(segments, return_counts=True)[1] ** 2).sum())

    both = alone + pairs(true[inside] * (found.max() + 1) + found[inside])
    return 1 - 2 * both / (alone + pairs(found[inside]) + pairs(true))
