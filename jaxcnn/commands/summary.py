"""`jaxcnn summary`: a network layer by layer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from jaxcnn.commands.network import Network
from jaxcnn.commands.output import show


@dataclass(frozen=True)
class Summary:
    """Explains a network layer by layer, without running it: output, parameters, MACs, FLOPs, activation memory,
    receptive field and stride, for one image in evaluation. FLOPs are 2 per MAC and 1 per element for the rest; taps on
    padding count, which XLA's own count leaves out."""

    network: tyro.conf.OmitArgPrefixes[Network]
    json: bool = False


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Summary, args=list(args), prog="jaxcnn summary")
    from jaxcnn.analysis import summary, table

    net, size = flags.network.created()
    found = summary(net, input=size)
    if flags.json:
        print(json.dumps(found.to_json()))
        return 0
    show(table(found))
    return 0
