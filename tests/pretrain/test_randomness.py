"""Draws belong to clips: statistics, and independence of batch composition and order."""

from __future__ import annotations

import torch

from pretrain.frame_mask import draw_frame_mask
from pretrain.randomness import Purpose, Randomness


def _clips(*samples: int, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(samples), torch.full((len(samples),), epoch)


def test_draws_do_not_depend_on_the_batch() -> None:
    random = Randomness(7)
    together = random.uniform(Purpose.FLIP, *_clips(3, 11, 5), (2, 5, 3))
    for row, sample in enumerate((3, 11, 5)):
        alone = random.uniform(Purpose.FLIP, *_clips(sample), (2, 5, 3))
        assert torch.equal(together[row], alone[0])
    # a longer clip begins with the same draws
    longer = random.uniform(Purpose.FLIP, *_clips(3), (4, 5, 3))
    assert torch.equal(longer[0, :2], together[0])


def test_every_part_of_the_key_matters() -> None:
    base = Randomness(7).uniform(Purpose.FLIP, *_clips(3), (64,))
    others = [
        Randomness(8).uniform(Purpose.FLIP, *_clips(3), (64,)),
        Randomness(7, stage=1).uniform(Purpose.FLIP, *_clips(3), (64,)),
        Randomness(7).uniform(Purpose.FLIP_RATIO, *_clips(3), (64,)),
        Randomness(7).uniform(Purpose.FLIP, *_clips(4), (64,)),
        Randomness(7).uniform(Purpose.FLIP, *_clips(3, epoch=1), (64,)),
    ]
    for other in others:
        assert (base == other).float().mean() < 0.05


def test_the_first_draws_never_change() -> None:
    """Runs that resume with a later version must see the same draws; Philox's raw bits are fixed by its definition."""
    draws = Randomness(0).uniform(Purpose.FLIP, *_clips(0), (3,))[0]
    assert draws.tolist() == [0.6249396800994873, 0.8144335746765137, 0.993850827217102]


def test_draws_are_uniform() -> None:
    draws = Randomness(1).uniform(Purpose.CONDITION, torch.arange(500), torch.zeros(500, dtype=torch.int64), (41,))
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (counts - 0.1).abs().max() < 0.01
    first = draws[:, 0]  # one draw a clip, as for the condition: neighbours in the counter are independent
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.12


def test_frame_mask_statistics_and_determinism() -> None:
    random, samples = Randomness(5), torch.arange(2000)
    epoch = torch.zeros_like(samples)
    mask = draw_frame_mask(random, samples, epoch, 4, 0.3)
    assert mask.shape == (2000, 4, 4) and mask.dtype == torch.bool
    assert (mask.float().mean(0) - 0.7).abs().max() < 0.04  # each pair on its own
    again = draw_frame_mask(random, samples[[1500, 2]], epoch[:2], 4, 0.3)
    assert torch.equal(again, mask[[1500, 2]])
    assert draw_frame_mask(random, samples, epoch, 4, 0.0).all()
    pairs = mask[:, 1:, 0].float()
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 0.08
