"""Class names of the classic sets in the order of their labels, as their authors publish them."""

from importlib import resources

# fmt: off
DIGIT_CLASSES = (
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9",
)
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup",
    "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
    "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
    "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
    "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew",
    "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
    "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout",
    "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)
# fmt: on


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC 2012 in the order of their WordNet ids, named as in torchvision (BSD-3-Clause)."""
    return tuple((resources.files("jaxcnn.data") / "imagenet_classes.txt").read_text().splitlines())


def class_names(model: str, count: int | None) -> tuple[str, ...] | None:
    """What the logits of a published network of so many classes stand for, None where that is not known."""
    cifar = {10: CIFAR10_CLASSES, 100: CIFAR100_CLASSES} if model.startswith("cifar_") else {}
    return imagenet_classes() if count == 1000 else cifar.get(count or 0)
