"""LeNet-5 on the digits that come with scikit-learn: the whole way in seconds, with no download.

    python experiments/lenet5_digits.py            (the same as `jaxcnn train`)

Data      1,438 + 359 images of 8x8 pixels scaled to 28x28, a fixed stratified split
Recipe    Adam 3e-3 with a cosine to 0, batch 64, 40 epochs (899 steps), random crop after padding by 2
Expected  at least 98 % test accuracy in under a minute on 2 cores
Measured  99.50 % +- 0.12 % (mean and standard deviation, 5 seeds: --seeds 5), 6 to 8 s a seed on 2 CPU cores
"""

from jaxcnn.cli import run_experiment
from jaxcnn.config import LENET5_DIGITS as experiment

if __name__ == "__main__":
    run_experiment(experiment)
