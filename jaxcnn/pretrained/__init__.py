"""Weights from elsewhere: read, converted and checked to the last tensor, without the framework that wrote them."""

from jaxcnn.pretrained.convert import Pretrained, load
from jaxcnn.pretrained.read import read

__all__ = ["Pretrained", "load", "read"]
