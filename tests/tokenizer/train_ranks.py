"""Started under torchrun by test_train.py: trains the test's recipe on this process's share of each batch."""

import os
import sys
from dataclasses import replace

import torch

from tests.tokenizer.test_train import SLOW, Source, clips, held_out
from tokenizer.train import train

if __name__ == "__main__":
    out, strategy, stop_at = sys.argv[1:]
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def share(step, spec):
        if stop_at and step == int(stop_at):
            os.kill(os.getpid(), 9)
        part = spec.batch_size // size
        return clips(step, spec)[rank * part : (rank + 1) * part]

    train(replace(SLOW, strategy=strategy), Source(share), out, validation=held_out)
