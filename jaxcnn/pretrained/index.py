"""Public ImageNet weights that our networks can take: where they are, their licence, and what they scored.

Keys are NAME.TAG: our name of the network and the tag under which the source published the weights. Three sources:

- timm's copies on the Hugging Face Hub, in safetensors: torchvision's weights (`tv_in1k`, `tv2_in1k`) and timm's own.
  Accuracies are timm's, measured at 224 pixels with the preprocessing given here (its results-imagenet.csv), top-5
  where it is known; the notes have torchvision's own.
- Keras Applications, in HDF5, with the MD5 that Keras's source pins and the accuracies of keras.io. Keras publishes the
  arithmetic on pixels; size, crop and interpolation here are the usual ones, and accuracies may differ by some tenths
  of a point.
- torchvision itself, for AlexNet, SqueezeNet and GoogLeNet, which it publishes as pickles and timm does not have. They
  are never unpickled here: after `jaxcnn weights fetch` their user converts them where PyTorch is installed, by the
  command that is shown then, and they are used under the same name. Accuracies are torchvision's.

SHA-256 and the full revision of the Hub stand here where two independent projects pin the same. Elsewhere the address
is that of the branch `main`, or torchvision's, which has the digest's first digits: the digest is recorded at the
first download and must match afterwards.

Not here, although published: networks we do not have (MobileNet v2); Keras's ResNet v2, which our networks cannot be:
it halves the image in the last block of a stage, where the shortcut is a max-pooling, and a part of its convolutions
has biases.

The caveat of timm's README holds for all: the weights were trained on ImageNet, whose images were released for
non-commercial research; whether weights inherit that is not settled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxcnn.errors import unknown
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels

IMAGENET_CAVEAT = (
    "Trained on ImageNet, whose images were released for non-commercial research purposes. Whether weights inherit "
    "that restriction is not settled: for commercial use seek legal advice."
)


@dataclass(frozen=True)
class Entry:
    """Published weights for `model`. `top1` and `top5` are percent of the ImageNet validation set, by `preprocessing`.

    `overrides` are those of `jaxcnn.models.create` that the file's layout does not settle. `sha256`, `md5` and `size`
    (bytes) are None where they are not known before the first download.
    """

    model: str
    tag: str
    url: str
    sha256: str | None
    size: int | None
    licence: str
    source: str
    layout: str
    preprocessing: Pixels
    top1: float
    top5: float | None
    note: str = ""
    md5: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"


@dataclass(frozen=True)
class _Pin:
    """A revision of a repository on the Hub, and its model.safetensors."""

    revision: str
    sha256: str
    size: int | None = None


_PINS = {
    "resnet18.tv_in1k": _Pin(
        "bbd144b3e5565108aad885f145491d11bc6ce807",
        "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
        46_807_446,
    ),
    "resnet50.tv_in1k": _Pin(
        "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
        "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        102_469_840,
    ),
    "resnet50.a1_in1k": _Pin(
        "767268603ca0cb0bfe326fa87277f19c419566ef",
        "773525d5821de224f8f30c33377b7a795d7863e08522698200d3217d3f2a41bb",
        102_469_840,
    ),
    "vgg16.tv_in1k": _Pin(
        "b8d8aa2dd860af9233c8c67385a8097fd6c35d3f",
        "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8",
    ),
    "densenet121.tv_in1k": _Pin(
        "f0d0f2698a02cb133b09d48396db6e1e46fe9f3b",
        "c894c6d9caa317a8ca1942986dee7a16a86c77734a4d691d2abe05389cfef358",
    ),
}

_REVISIONS = {
    "vgg19.tv_in1k": "128d470",
    "vgg19_bn.tv_in1k": "5df00d8",
    "densenet161.tv_in1k": "359c7ec",
    "densenet169.tv_in1k": "8c033a1",
    "densenet201.tv_in1k": "d941e79",
}
"""Starts of known revisions, which an address cannot have."""


def _timm(
    name: str, top1: float, top5: float | None, *, preprocessing: Pixels, repository: str | None = None, **fields: Any
) -> Entry:
    model, _, tag = name.partition(".")
    repository = f"timm/{repository or name}"
    pin = _PINS.get(name)
    notes = [fields.pop("note", "")]
    if name in _REVISIONS:
        notes.append(f"revision {_REVISIONS[name]}... is known to hold the weights")
    return Entry(
        model=model,
        tag=tag,
        url=f"https://huggingface.co/{repository}/resolve/{pin.revision if pin else 'main'}/model.safetensors",
        sha256=pin.sha256 if pin else None,
        size=pin.size if pin else None,
        source=f"{repository} on the Hugging Face Hub; accuracy: timm, results-imagenet.csv",
        preprocessing=preprocessing,
        top1=top1,
        top5=top5,
        note="; ".join(filter(None, notes)),
        **fields,
    )


_BILINEAR = PREPROCESSINGS["imagenet"]
_BICUBIC = PREPROCESSINGS["imagenet_bicubic"]
_RSB = replace(_BICUBIC, crop=0.95)
_MOBILENET = replace(PREPROCESSINGS["inception"], interpolation="bicubic")
_BSD, _APACHE = "BSD-3-Clause", "Apache-2.0"


def _torchvision(published: str) -> str:
    return f"torchvision publishes {published}"


def _vgg(name: str, top1: float, top5: float, published: str) -> Entry:
    note = _torchvision(published)
    return _timm(name, top1, top5, preprocessing=_BILINEAR, licence=_BSD, layout="timm", note=note)


def _resnet(name: str, top1: float, top5: float | None, published: str, preprocessing: Pixels = _BILINEAR) -> Entry:
    note = _torchvision(published)
    return _timm(name, top1, top5, preprocessing=preprocessing, licence=_BSD, layout="torchvision", note=note)


def _densenet(name: str, top1: float, top5: float, published: str) -> Entry:
    note = _torchvision(f"{published} (bilinear)")
    return _timm(name, top1, top5, preprocessing=_BICUBIC, licence=_APACHE, layout="torchvision", note=note)


_HUB = (
    _vgg("vgg11.tv_in1k", 69.050, 88.630, "69.020 / 88.628"),
    _vgg("vgg11_bn.tv_in1k", 70.374, 89.802, "70.370 / 89.810"),
    _vgg("vgg13.tv_in1k", 69.950, 89.262, "69.928 / 89.246"),
    _vgg("vgg13_bn.tv_in1k", 71.560, 90.372, "71.586 / 90.374"),
    _vgg("vgg16.tv_in1k", 71.594, 90.398, "71.592 / 90.382"),
    _vgg("vgg16_bn.tv_in1k", 73.354, 91.490, "73.360 / 91.516"),
    _vgg("vgg19.tv_in1k", 72.400, 90.878, "72.376 / 90.876"),
    _vgg("vgg19_bn.tv_in1k", 74.230, 91.848, "74.218 / 91.842"),
    _resnet("resnet18.tv_in1k", 69.752, 89.082, "69.758 / 89.078"),
    _resnet("resnet34.tv_in1k", 73.298, 91.422, "73.314 / 91.420"),
    _resnet("resnet50.tv_in1k", 76.156, 92.866, "76.130 / 92.862"),
    _resnet("resnet101.tv_in1k", 77.404, 93.552, "77.374 / 93.546"),
    _resnet("resnet152.tv_in1k", 78.330, 94.046, "78.312 / 94.046"),
    _resnet("resnet50.tv2_in1k", 80.846, 95.430, "80.858 / 95.434", replace(_BILINEAR, crop=0.965)),
    _timm(
        "resnet50.a1_in1k",
        80.382,
        94.618,
        preprocessing=_RSB,
        licence=_APACHE,
        layout="torchvision",
        note="81.240 at 288 pixels",
    ),
    _timm(
        "resnet50.gn_a1h_in1k",
        80.074,
        None,
        repository="resnet50_gn.a1h_in1k",
        preprocessing=replace(_BICUBIC, crop=0.94),
        licence=_APACHE,
        layout="torchvision",
        overrides={"norm": "group"},
        note="group normalisation; 81.216 at 288 pixels",
    ),
    _timm(
        "resnetv2_50.a1h_in1k",
        80.410,
        None,
        preprocessing=_RSB,
        licence=_APACHE,
        layout="timm",
        note="81.406 at 288 pixels",
    ),
    _timm(
        "resnetv2_101.a1h_in1k",
        82.042,
        None,
        preprocessing=_RSB,
        licence=_APACHE,
        layout="timm",
        note="83.002 at 288 pixels",
    ),
    _densenet("densenet121.tv_in1k", 74.750, 92.158, "74.434 / 91.972"),
    _densenet("densenet161.tv_in1k", 77.384, 93.656, "77.138 / 93.560"),
    _densenet("densenet169.tv_in1k", 75.922, 92.976, "75.600 / 92.806"),
    _densenet("densenet201.tv_in1k", 77.284, 93.480, "76.896 / 93.370"),
    _timm(
        "mobilenet_v1.ra4_e3600_r224_in1k",
        75.388,
        92.310,
        repository="mobilenetv1_100.ra4_e3600_r224_in1k",
        preprocessing=_MOBILENET,
        licence=_APACHE,
        layout="timm",
        note="76.088 at 256 pixels; the paper's own training reaches 70.6",
    ),
    _timm(
        "mobilenet_v1.x125_ra4_e3600_r224_in1k",
        76.920,
        None,
        repository="mobilenetv1_125.ra4_e3600_r224_in1k",
        preprocessing=replace(_MOBILENET, crop=0.9),
        licence=_APACHE,
        layout="timm",
        overrides={"width": 1.25},
        note="width 1.25; 77.612 at 256 pixels",
    ),
)


def _keras(
    model: str,
    top1: float,
    top5: float,
    *,
    md5: str | None,
    folder: str,
    licence: str,
    note: str = "",
    file: str = "",
    preprocessing: str = "caffe",
) -> Entry:
    base = "https://storage.googleapis.com/tensorflow/keras-applications"
    return Entry(
        model=model,
        tag="keras",
        url=f"{base}/{folder}/{file or f'{model}_weights_tf_dim_ordering_tf_kernels.h5'}",
        sha256=None,
        size=None,
        licence=licence,
        source="Keras Applications; accuracy: keras.io",
        layout="keras",
        preprocessing=PREPROCESSINGS[preprocessing],
        top1=top1,
        top5=top5,
        note=note,
        md5=md5,
    )


_OXFORD = {"licence": "CC BY 4.0", "note": "the paper's weights, ported from Oxford's release"}
_HE = {"folder": "resnet", "licence": "MIT", "note": "the paper's weights, ported from K. He's release"}
_HUANG = {"folder": "densenet", "licence": _BSD, "preprocessing": "imagenet"}
_KERAS = (
    _keras("vgg16", 71.3, 90.1, folder="vgg16", md5="64373286793e3c8b2b4e3219cbf3544b", **_OXFORD),
    _keras("vgg19", 71.3, 90.0, folder="vgg19", md5="cbe5617147190e668d6c5d5026f83318", **_OXFORD),
    _keras("resnet50", 74.9, 92.1, md5="2cb95161c43110f7111970584f804107", **_HE),
    _keras("resnet101", 76.4, 92.8, md5="f1aeb4b969a6efcfb50fad2f0c20cfc5", **_HE),
    _keras("resnet152", 76.6, 93.1, md5="100835be76be38e30d865e96f2aaae62", **_HE),
    _keras("densenet121", 75.0, 92.3, md5="9d60b8095a5708f2dcce2bca79d332c7", **_HUANG),
    _keras("densenet169", 76.2, 93.2, md5="d699b8f76981ab1b30698df4c175e90b", **_HUANG),
    _keras("densenet201", 77.3, 93.6, md5="1ceb130c1ea1b78c3bf6114dbdfd8807", **_HUANG),
    _keras(
        "mobilenet_v1",
        70.4,
        89.5,
        md5=None,
        folder="mobilenet",
        file="mobilenet_1_0_224_tf.h5",
        licence=_APACHE,
        preprocessing="inception",
        note="the authors' weights, ported from TensorFlow; Keras's files of other widths load with the override width",
    ),
)


def _torchvision_own(
    model: str,
    top1: float,
    top5: float,
    file: str,
    *,
    sha256: str | None = None,
    size: int | None = None,
    **fields: Any,
) -> Entry:
    return Entry(
        model=model,
        tag="tv_in1k",
        url=f"https://download.pytorch.org/models/{file}.pth",
        sha256=sha256,
        size=size,
        licence=_BSD,
        source="torchvision, which publishes a pickle; accuracy: torchvision",
        layout="torchvision",
        top1=top1,
        top5=top5,
        **fields,
    )


_TORCHVISION = (
    _torchvision_own(
        "alexnet",
        56.522,
        79.066,
        "alexnet-owt-7be5be79",
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        size=244_408_911,
        preprocessing=_BILINEAR,
    ),
    _torchvision_own("squeezenet1_0", 58.092, 80.420, "squeezenet1_0-b66bff10", preprocessing=_BILINEAR),
    _torchvision_own(
        "squeezenet1_1",
        58.178,
        80.624,
        "squeezenet1_1-b8a52dc0",
        sha256="b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        size=4_958_839,
        preprocessing=_BILINEAR,
    ),
    _torchvision_own(
        "inception_v1",
        69.778,
        89.530,
        "googlenet-1378be20",
        preprocessing=PREPROCESSINGS["inception"],
        note="Google's weights, ported from TensorFlow, with its values in -1..1 (torchvision's transform_input). The "
        "auxiliary heads in the file are not trained: they are read with the override aux=True, and dropped without",
    ),
)

INDEX: dict[str, Entry] = {entry.name: entry for entry in (*_HUB, *_KERAS, *_TORCHVISION)}


def find(name: str) -> Entry:
    """The entry NAME.TAG of `INDEX`; `InputError` with the nearest ones where there is none."""
    if name not in INDEX:
        raise unknown("weights", name, INDEX)
    return INDEX[name]


def describe(entry: Entry) -> str:
    """What a user should know before using the weights: one line a fact, the ImageNet caveat last."""
    known = entry.sha256 or "not known: recorded at the first download, and must match afterwards"
    top5 = "not known" if entry.top5 is None else f"{entry.top5:g} %"
    facts = {
        "weights": entry.name,
        "address": entry.url,
        "SHA-256": known,
        "MD5": entry.md5,
        "bytes": None if entry.size is None else f"{entry.size:,}",
        "source": entry.source,
        "licence": entry.licence,
        "layout": entry.layout,
        "overrides": ", ".join(f"{key}={value}" for key, value in entry.overrides.items()),
        "preprocessing": _pixels(entry.preprocessing),
        "accuracy": f"top-1 {entry.top1:g} %, top-5 {top5}",
        "note": entry.note,
        "caveat": IMAGENET_CAVEAT,
    }
    return "\n".join(f"{label:13}  {fact}" for label, fact in facts.items() if fact)


def _pixels(pixels: Pixels) -> str:
    height, width = pixels.size
    return f"{height} x {width}, crop {pixels.crop:.4g}, {pixels.interpolation}, {pixels.arithmetic}"
