"""Process INDEX of two: says whether its part of each global batch is what one process alone would have there."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from jaxcnn import parallel
from jaxcnn.data.disk import EvalRows, Shard, TrainRows, open_folder
from jaxcnn.data.stream import StreamFeed, eval_batches


def check(batch, whole) -> None:
    for name, array in batch.items():
        assert array.shape == whole[name].shape
        assert len(array.addressable_shards) == 2
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])


def main(index: int, address: str, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    bind = {"coordinator_bind_address": address} if index == 0 else {}
    jax.distributed.initialize(address, num_processes=2, process_id=index, **bind)
    data, mesh = open_folder(folder, image_size=(16, 12)), parallel.make_mesh()
    images = dataclasses.replace(data.train.images, area=(0.2, 1.0), workers=0)
    feed = StreamFeed(images, data.train.labels, batch_size=16, seed=5, mesh=mesh)
    for step in range(3):
        check(feed(step), TrainRows(images, data.train.labels, 16, 5, Shard())(step))
    feed.close()
    count = 0
    for i, batch in enumerate(eval_batches(data.test.images, data.test.labels, size=8, mesh=mesh)()):
        check(batch, EvalRows(data.test.images, data.test.labels, 8, Shard())(i))
        count += 1
    print(f"process {index}: {count} evaluation batches")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
