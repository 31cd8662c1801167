"""Sets prepared by tensorflow-datasets, read without TensorFlow."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcnn.data.sources import load
from jaxcnn.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")


def png(value: int, width: int) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, width, 3), value, np.uint8)).save(stream, "PNG")
    stream.seek(0)
    return stream


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Six pictures to train on and three held out, the last of them wider where the config says so."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (tensorflow-datasets' own way)
        tfds.core.BuilderConfig(name="even"),
        tfds.core.BuilderConfig(name="uneven"),
        tfds.core.BuilderConfig(name="untested"),
    ]

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["left", "right"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def _split_generators(self, dl_manager):
        held = {"even": "validation", "uneven": "test", "untested": "other"}[self.builder_config.name]
        return {"train": self._generate_examples(6), held: self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            wide = self.builder_config.name == "uneven" and i == 2
            yield i, {"image": png(10 * i, 5 if wide else 4), "label": i % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    for name in ("even", "uneven", "untested"):
        builder = TinyPictures(config=name, data_dir=str(root / "tfds"), file_format="array_record")
        builder.download_and_prepare()
    return root


def test_a_prepared_set_is_read_whole(prepared):
    data = load("tfds:tiny_pictures/even", data_dir=prepared)
    assert data.name == "tfds:tiny_pictures/even"
    assert data.classes == ("left", "right")
    assert data.train.images.shape == (6, 4, 4, 3)
    assert data.train.images.dtype == np.uint8
    for split, count in ((data.train, 6), (data.test, 3)):
        values = split.images[:, 0, 0, 0] // 10
        assert sorted(values) == list(range(count))
        np.testing.assert_array_equal(split.labels, values % 2)
    assert data.digests == load("tfds:tiny_pictures/even:1.0.0", data_dir=prepared).digests


def test_images_of_several_sizes_need_one_size(prepared):
    with pytest.raises(InputError, match=r"--data\.image-size"):
        load("tfds:tiny_pictures/uneven", data_dir=prepared)
    data = load("tfds:tiny_pictures/uneven", data_dir=prepared, image_size=(3, 3))
    assert data.test.images.shape == (3, 3, 3, 3)


def test_a_set_without_a_test_split_is_refused(prepared):
    with pytest.raises(InputError, match=r"untested.*expected a prepared set with splits train and test"):
        load("tfds:tiny_pictures/untested", data_dir=prepared)


def test_a_set_that_is_not_prepared_is_not_generated(tmp_path):
    for name in ("mnist", "no_such_set"):
        with pytest.raises(InputError, match=rf"cannot read tfds:{name} in .*tfds build {name}"):
            load(f"tfds:{name}", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["huggingface:mnist", "../mnist", "mnist/", "mnist;x"])
def test_only_plain_names_are_looked_up(tmp_path, name):
    with pytest.raises(InputError, match="expected tfds:SET"):
        load(f"tfds:{name}", data_dir=tmp_path)


def test_mocked_sets_work(tmp_path):
    with tfds.testing.mock_data(num_examples=7):
        data = load("tfds:mnist", data_dir=tmp_path)
    assert data.train.images.shape == (7, 28, 28, 1)
    assert data.classes == tuple("0123456789")


def test_tensorflow_is_never_imported(prepared):
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from jaxcnn.data.sources import load\n"
        "assert 'tensorflow_datasets' not in sys.modules and 'sklearn' not in sys.modules\n"
        f"print(len(load('tfds:tiny_pictures/even', data_dir={str(prepared)!r}).train))\n"
        "assert not any(name.split('.')[0] == 'tensorflow' for name in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("6\n", 0), run.stderr
