"""The spine: state, step, loop, randomness, log and run directory."""

from jaxcnn.train.loop import FitResult, TrainingFailed, evaluate, fit
from jaxcnn.train.state import TrainState, create_state
from jaxcnn.train.step import make_eval_step, make_train_step
from jaxcnn.tree import state_sha256

__all__ = [
    "FitResult",
    "TrainState",
    "TrainingFailed",
    "create_state",
    "evaluate",
    "fit",
    "make_eval_step",
    "make_train_step",
    "state_sha256",
]
